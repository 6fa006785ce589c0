"""The command line: one verb a stage, and what an error becomes for who reads it.

    0    done
    1    a stage failed (StageError, CacheError, a full disk); what is finished is kept
    2    bad usage or bad input: nothing was begun
    130  interrupted; the same command goes on

Every error is one line on standard error; ``--debug`` adds the traceback. Heavy libraries are imported when a verb
needs them, so that ``--help`` and a mistake in the experiment file answer at once.
"""

import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pipeline.config import ConfigError, RunConfig, RunOptions, features_config, folder_name, load_config
from pipeline.processes import SaidElsewhereError, is_first, started, together
from stages.config import SCORE_NAMES, nearest, unknown_part
from stages.errors import InputError, PeerLostError, StageError

if TYPE_CHECKING:
    from cache import FeatureCache, FeatureSpec
    from pipeline.predictions import Format
    from pipeline.study import Study

Command = TypeVar("Command", bound=Callable[..., Any])


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: the arguments after ``python -m pipeline``; those of this process by default.

    Returns:
        Exit status.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with verbs.make_context("python -m pipeline", arguments.copy(), obj=arguments) as context:
            verbs.invoke(context)
    except click.exceptions.Exit as done:
        return done.exit_code
    except SaidElsewhereError as failed:
        return failed.status
    except KeyboardInterrupt:
        if is_first():
            click.echo("interrupted; what is finished is kept: the same command goes on where it was", err=True)
        return 130
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        status, message = explain(error)
        # Who lost another has nothing to say, and of several that misread the same command line one says so.
        if not isinstance(error, PeerLostError) and (is_first() or not isinstance(error, click.UsageError)):
            click.echo(f"error: {' '.join(message.split())}", err=True)
        return status
    return 0


def explain(error: Exception) -> tuple[int, str]:
    """Exit status and message of an error."""
    if isinstance(error, click.UsageError):
        return 2, error.format_message()
    if isinstance(error, StageError):
        return (2 if isinstance(error, InputError) else 1), str(error)
    if isinstance(error, OSError):
        return 1, f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
    from cache.errors import CacheError, CacheMismatchError, CacheNotFoundError

    if isinstance(error, CacheError):
        return (2 if isinstance(error, CacheMismatchError | CacheNotFoundError) else 1), str(error)
    return 1, f"unexpected {type(error).__name__}: {error}; this is a defect of the program, --debug says where"


_TOGETHER = ("train", "finetune")  # verbs that several processes may run together


@click.group(no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"]})
@click.pass_context
def verbs(context: click.Context) -> None:
    """Cache features of a vision backbone, train a Mixture of Feature Experts on them, score OOD detection."""
    verb = context.invoked_subcommand
    if started() > 1 and verb not in _TOGETHER:
        raise click.UsageError(f"torchrun is for {' and '.join(_TOGETHER)}; {verb} runs in one process")


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


override_options = _options(
    click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key; repeatable."),
    click.option("--debug", is_flag=True, help="Print the traceback of an error."),
)
experiment_options = _options(click.argument("experiment", metavar="EXPERIMENT.toml"), override_options)
dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Say what would run, what is fresh and the bytes it would write."
)
workers_options = _options(
    click.option("--scheduler", metavar="ADDRESS", help="Hand the work to the Dask cluster of this scheduler."),
    click.option("--workers", type=click.IntRange(min=1), metavar="N", help="Work in N local processes."),
)
failures_option = click.option(
    "--max-failures",
    type=click.FloatRange(0, 1),
    default=RunOptions.max_failures,
    show_default=True,
    help="Largest share of a set's images that may be unusable.",
)
rehash_option = click.option(
    "--rehash", is_flag=True, help="Tell changed images by the bytes of all, not by size and time."
)
backbone_option = click.option(
    "--backbone",
    type=click.Choice(["pretrained", "finetuned", "all"]),
    default="all",
    show_default=True,
    help="Which backbone's features; all: every one that exists.",
)


processes_option = click.option(
    "--processes",
    type=click.IntRange(min=1),
    metavar="N",
    help="Train in N processes together, on GPUs one each; torchrun does the same.",
)


def _config(verb: str, experiment: str, overrides: Sequence[str], backbone: str = "all") -> RunConfig:
    config = load_config(experiment, overrides)
    config.require_roles(verb)
    if config.finetune is None and (verb == "finetune" or backbone == "finetuned"):
        raise ConfigError(f"{experiment}: finetune: missing; add a section [finetune], such as `epochs = 10` under it")
    return config


@contextmanager
def _study(config: RunConfig, options: RunOptions) -> "Iterator[Study]":
    """A study whose line of progress ends before anything else is said, an error above all."""
    from pipeline.study import Study

    study = Study(config, options)
    try:
        yield study
    finally:
        study.progress.close()


def _run_options(scheduler: str | None, workers: int | None, **others: Any) -> RunOptions:
    if scheduler is not None and workers is not None:
        raise click.UsageError("--workers is for local processes; with --scheduler the cluster has its own: give one")
    return RunOptions(scheduler=scheduler, workers=workers or 1, **others)


def _run_verb(
    verb: str,
    experiment: str,
    overrides: Sequence[str],
    *,
    dry_run: bool,
    scheduler: str | None = None,
    workers: int | None = None,
    max_failures: float = RunOptions.max_failures,
    rehash: bool = False,
    processes: int | None = None,
    **arguments: Any,
) -> None:
    """What all verbs that run a stage have in common; ``arguments`` go to the method of the same name."""
    options = _run_options(scheduler, workers, max_failures=max_failures, rehash=rehash)
    command: Sequence[str] = click.get_current_context().obj
    with together(command, processes, lambda error: explain(error)[0]):
        config = _config(verb, experiment, overrides, **arguments)
        with _study(config, options) as study:
            lines = study.plan(verb, **arguments) if dry_run else getattr(study, verb)(**arguments)
            if is_first():
                show(lines)


@verbs.command()
@experiment_options
@dry_run_option
@workers_options
@failures_option
@rehash_option
@backbone_option
def extract(experiment: str, overrides: tuple[str, ...], debug: bool, **options: Any) -> None:
    """Stage one: images to sealed feature caches."""
    _run_verb("extract", experiment, overrides, **options)


def _set_name(_context: click.Context, _option: click.Parameter, value: str | None) -> str | None:
    try:
        return None if value is None else folder_name(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@verbs.command()
@click.argument("images", nargs=-1, required=True, metavar="IMAGES...")
@click.option("--backbone", required=True, metavar="NAME", help="Any timm model.")
@click.option("--weights", metavar="FILE", help='A .safetensors or .pth file, "embedded" or "hub" (the default).')
@click.option("--size", type=int, metavar="N", help="Side of the network's input in pixels; 224 by default.")
@click.option("--patches", metavar="OPTION", help='"full" (the default), "pool:G" or "none".')
@click.option("--dtype", type=click.Choice(["float16", "float32"]), help="As features are stored; float16 by default.")
@click.option("--out", default="cache", show_default=True, metavar="FOLDER", help="Of all caches.")
@click.option(
    "--name", callback=_set_name, metavar="SET", help="Of the set, part of its folder's name; by default its source's."
)
@workers_options
@failures_option
@rehash_option
@override_options
def cache(
    images: tuple[str, ...],
    backbone: str,
    weights: str | None,
    size: int | None,
    patches: str | None,
    dtype: str | None,
    out: str,
    name: str | None,
    scheduler: str | None,
    workers: int | None,
    max_failures: float,
    rehash: bool,
    overrides: tuple[str, ...],
    debug: bool,
) -> None:
    """A sealed cache of a folder, a tar or a list, without an experiment; a study finds it again by what it is."""
    options = _run_options(scheduler, workers, max_failures=max_failures, rehash=rehash)
    given: dict[str, dict[str, Any]] = {
        "backbone": {"name": backbone, "weights": weights, "image_size": size},
        "cache": {"root": out, "patches": patches, "dtype": dtype},
    }
    said = {table: {key: value for key, value in keys.items() if value is not None} for table, keys in given.items()}
    config = features_config(said, overrides)
    from pipeline.caches import cache_images
    from pipeline.progress import TqdmProgress

    progress = TqdmProgress()
    try:
        for line in cache_images(images, config, options, progress, name):
            progress.close()
            show(line)
    finally:
        progress.close()


@verbs.command()
@experiment_options
@dry_run_option
@processes_option
@backbone_option
def train(experiment: str, overrides: tuple[str, ...], debug: bool, **options: Any) -> None:
    """Stage two: probe and Mixture of Feature Experts, on cached features."""
    _run_verb("train", experiment, overrides, **options)


@verbs.command()
@experiment_options
@dry_run_option
@processes_option
def finetune(experiment: str, overrides: tuple[str, ...], debug: bool, **options: Any) -> None:
    """Stage two, the other half: the whole backbone end to end, on images."""
    _run_verb("finetune", experiment, overrides, **options)


@verbs.command()
@experiment_options
@dry_run_option
@backbone_option
def score(experiment: str, overrides: tuple[str, ...], debug: bool, **options: Any) -> None:
    """Stage three: OOD scores and the table, from caches alone."""
    _run_verb("score", experiment, overrides, **options)


@verbs.command()
@click.argument("experiments", nargs=-1, required=True, metavar="EXPERIMENT.toml...")
@override_options
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the page of several studies; by default `report` beside their work folders.",
)
@dry_run_option
def report(
    experiments: tuple[str, ...], overrides: tuple[str, ...], debug: bool, output: Path | None, **options: Any
) -> None:
    """Write report/index.html, or one page of several studies."""
    if len(experiments) > 1:
        _report_together(experiments, overrides, output, **options)
    elif output is not None:
        raise click.UsageError("--output is for several studies; the page of one stands in its work folder")
    else:
        _run_verb("report", experiments[0], overrides, **options)


def _report_together(
    experiments: Sequence[str], overrides: Sequence[str], output: Path | None, *, dry_run: bool
) -> None:
    configs = [_config("report", experiment, overrides) for experiment in experiments]
    from pipeline.report.several_studies import joint_folder, joint_report

    with ExitStack() as stack:
        studies = [stack.enter_context(_study(config, RunOptions())) for config in configs]
        folder = joint_folder(studies, output)
        show(f"report: would write {folder / 'index.html'}" if dry_run else joint_report(studies, folder))


@verbs.command()
@experiment_options
@dry_run_option
@workers_options
@failures_option
@rehash_option
def run(experiment: str, overrides: tuple[str, ...], debug: bool, **options: Any) -> None:
    """Every stage that is not fresh."""
    _run_verb("run", experiment, overrides, **options)


@verbs.command()
@click.argument("data", type=click.Path(path_type=Path), metavar="DATA")
@click.option("--work", type=click.Path(path_type=Path), default="runs/results", show_default=True, help="Where to.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of every study.")
@click.option(
    "--controls",
    metavar="NAME,…",
    callback=lambda _context, _option, names: None if names is None else names.split(","),
    help="Of the control variants, only these.",
)
@click.option("--finetune", is_flag=True, help="Fine-tune the backbones as well, and score what follows from them.")
@click.option("--unchecked", is_flag=True, help="Run on other images than the benchmark's as well.")
@click.option("--debug", is_flag=True, help="Print the traceback of an error.")
@dry_run_option
@workers_options
def results(
    data: Path,
    work: Path,
    overrides: tuple[str, ...],
    controls: list[str] | None,
    finetune: bool,
    unchecked: bool,
    debug: bool,
    dry_run: bool,
    scheduler: str | None,
    workers: int | None,
) -> None:
    """The benchmark's results, from the folder DATA that holds its images."""
    from pipeline.benchmark.run import run_results

    options = _run_options(scheduler, workers)
    lines = run_results(
        data, work, overrides, options, controls=controls, finetune=finetune, unchecked=unchecked, dry_run=dry_run
    )
    show(lines)


def _known_score(_context: click.Context, _option: click.Parameter, value: str | None) -> str | None:
    if value is not None and (unknown := unknown_part(value)) is not None:
        raise click.BadParameter(f"{unknown!r} is not a known score{nearest(unknown, SCORE_NAMES)}")
    return value


@verbs.command()
@experiment_options
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option(
    "--backbone",
    type=click.Choice(["pretrained", "finetuned"]),
    default="pretrained",
    show_default=True,
    help="Whose detector decides; finetuned: that of the first seed.",
)
@click.option("--score", "score_name", callback=_known_score, help="Which score decides, or sum of two: knn+energy.")
@click.option(
    "--format", "form", type=click.Choice(["csv", "json"]), default="csv", show_default=True, help="Of what is printed."
)
def predict(
    experiment: str,
    overrides: tuple[str, ...],
    debug: bool,
    paths: tuple[str, ...],
    backbone: str,
    score_name: str | None,
    form: "Format",
) -> None:
    """Score new images: score, threshold, decision, class, expert, the nearest training images."""
    with _study(_config("predict", experiment, overrides, backbone), RunOptions()) as study:
        show(study.predict(paths, score_name, form, backbone))


@verbs.command()
@experiment_options
@click.option("--repair", is_flag=True, help="Extract damaged shards again.")
def verify(experiment: str, overrides: tuple[str, ...], debug: bool, repair: bool) -> None:
    """Check every byte of the caches of EXPERIMENT.toml, or of one CACHE folder."""
    if (cache := _cache_folder(experiment, overrides)) is None:
        with _study(_config("verify", experiment, overrides), RunOptions()) as study:
            show(study.verify(repair))
        return
    if repair:
        raise click.UsageError("--repair extracts anew and needs the images: give the experiment file, not the cache")
    damages = cache.verify()
    show(f"{damage.file}: {damage.what}" for damage in damages)
    show(f"{name}: not part of the cache, ignored" for name in cache.strays())
    if damages:
        raise StageError(
            f"{experiment}: {len(damages)} damaged files; verify --repair with the experiment file makes them again"
        )
    show([f"{experiment}: whole, {cache.n_rows} rows in {len(cache.manifest.shards)} shards"])


@verbs.command()
@experiment_options
def info(experiment: str, overrides: tuple[str, ...], debug: bool) -> None:
    """Show the caches and models of EXPERIMENT.toml, or one CACHE folder, at a glance."""
    if (cache := _cache_folder(experiment, overrides)) is None:
        with _study(_config("info", experiment, overrides), RunOptions()) as study:
            show(study.info())
    else:
        show(cache_lines(cache))


def _cache_folder(path: str, overrides: Sequence[str]) -> "FeatureCache | None":
    """The sealed cache at the path, or ``None`` where the path is no folder, so an experiment file."""
    if not Path(path).is_dir():
        return None
    if overrides:
        raise click.UsageError(f"--set changes an experiment file; {path} is a folder")
    from cache import FeatureCache

    return FeatureCache.open(Path(path))


def _network_line(spec: "FeatureSpec") -> str:
    network = f"{spec.backbone} at {spec.image_size} px, weights {spec.weights_sha[:8]}" if spec.backbone else ""
    return ", ".join(filter(None, (f"given, {spec.origin}" if spec.origin else "", network)))


def cache_lines(cache: "FeatureCache") -> list[str]:
    """What is in a cache, a line each."""
    manifest, spec = cache.manifest, cache.spec
    n_bytes = sum(shard.nbytes for shard in manifest.shards)
    datasets = ", ".join(f"{name} [n, {', '.join(map(str, shape))}]" for name, (shape, _) in spec.datasets().items())
    return [
        f"cache      {cache.path}",
        f"set        {manifest.dataset}: {manifest.n_rows} rows + {manifest.n_failures} failures "
        f"= {manifest.n_inputs} inputs, {len(manifest.class_names)} classes",
        f"features   {_network_line(spec)}",
        f"datasets   {datasets} as {spec.dtype}",
        f"shards     {len(manifest.shards)}, {n_bytes / 2**20:.1f} MiB",
        *_left_out_lines(manifest.left_out),
        f"identity   fingerprint {cache.fingerprint[:8]}, with its inputs {cache.identity[:8]}",
        *([] if spec.origin else [f"origin     {cache.fingerprint}"]),
    ]


def _left_out_lines(left_out: Mapping[str, int]) -> list[str]:
    if not left_out:
        return []
    from stages.inputs.images import describe_left_out  # and all that reads images

    return [describe_left_out(left_out)]


def show(result: Any) -> None:
    """Print what a verb returned: nothing, text, lines or tables of rich."""
    if result is None:
        return
    if not isinstance(result, str) and isinstance(result, Iterable):
        for part in result:
            show(part)
        return
    if isinstance(result, str):
        click.echo(result)
        return
    from rich.console import Console

    # A pipe or a file has no width: as wide as the table needs, where rich would cut it to 80 columns.
    Console(width=None if sys.stdout.isatty() else 1000).print(result)
