"""The command line: one verb a stage, and those beside them.

Every error is one line on standard error; ``--debug`` adds the traceback. Heavy libraries are imported when a verb
needs them, so that ``--help`` and a mistake in the experiment file answer at once.
"""

import json
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.benchmark.choice import Choice, MapChoice
from pipeline.config import RunConfig, RunOptions
from pipeline.deciding import Deciding, Exporting, Serving, Watching
from pipeline.detector_options import EXPORTING, RUNTIME, SERVING, WATCHING
from pipeline.interrupts import interrupts
from pipeline.options import (
    CHOICE,
    DEBUG,
    DECIDING,
    DECIDING_BACKBONE,
    DRY_RUN,
    EXPERIMENT,
    FORMAT,
    MAP_CHOICE,
    MAX_FAILURES,
    NETWORK,
    OF_STAGES,
    PAGE,
    PLANNING,
    REHASH,
    SCHEDULER,
    SELECTION,
    SET,
    SET_NAME,
    WORKERS,
    Asked,
    Experiment,
    Network,
    asked,
)
from pipeline.planning.asked import Planning
from pipeline.processes import SaidElsewhereError, is_first, started, together
from pipeline.reproduction.selection import Selection
from pipeline.stages_of_study import STAGES, Listed
from pipeline.terminal import INTERRUPTED, complain, explain, show
from stages.errors import PeerLostError

if TYPE_CHECKING:
    from cache import FeatureCache
    from pipeline.predictions import Format
    from pipeline.study import Study
    from stages.detection.runtime import RuntimeName


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: the arguments after ``python -m pipeline``; those of this process by default.

    Returns:
        Exit status; see `pipeline.terminal`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    with interrupts() as interrupted:
        try:
            with verbs.make_context("python -m pipeline", arguments.copy(), obj=arguments) as context:
                verbs.invoke(context)
        except click.exceptions.Exit as done:
            return done.exit_code
        except SaidElsewhereError as failed:
            return failed.status
        except (Exception, KeyboardInterrupt) as error:
            return _failed(KeyboardInterrupt() if interrupted.is_set() else error, arguments)
    return 0


def _failed(error: BaseException, arguments: Sequence[str]) -> int:
    """Say what went wrong, and the exit status."""
    if "--debug" in arguments:
        traceback.print_exception(error)
    status, message = explain(error)
    # Who lost another has nothing to say, and of several that misread the same command line one says so.
    if not isinstance(error, PeerLostError) and (
        is_first() or not isinstance(error, (click.UsageError, KeyboardInterrupt))
    ):
        complain(message if status == INTERRUPTED else f"error: {message}")
    return status


@click.group(no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"]})
@click.pass_context
def verbs(context: click.Context) -> None:
    """Cache features of a vision backbone, train a Mixture of Feature Experts on them, score OOD detection."""
    verb = context.invoked_subcommand
    together = [listed.verb for listed in STAGES if "processes" in listed.options]
    if started() > 1 and verb not in together:
        raise click.UsageError(f"torchrun is for {' and '.join(together)}; {verb} runs in one process")


@contextmanager
def _study(config: RunConfig, options: RunOptions) -> "Iterator[Study]":
    """A study whose line of progress ends before anything else is said, an error above all; so do its workers."""
    from pipeline.study import Study

    study = Study(config, options)
    try:
        yield study
    finally:
        study.workspace.close()


@contextmanager
def _asked_study(verb: str, experiment: Experiment, asked: Asked) -> "Iterator[Study]":
    """The study that a verb is to work on, together with the other processes that were asked for."""
    options, command = asked.run_options(), click.get_current_context().obj
    with (
        together(command, asked.processes, lambda error: explain(error)[0]),
        _study(experiment.config(verb, asked.backbone), options) as study,
    ):
        yield study


# ------------------------------------------------------------------------------------------------- stages of a study


def _add(listed: Listed) -> None:
    """The verb of a stage."""

    @verbs.command(listed.verb, help=listed.about)
    @EXPERIMENT
    @asked(DRY_RUN, *(option for name in listed.options for option in OF_STAGES[name]))
    def command(experiment: Experiment, asked: Asked) -> None:
        with _asked_study(listed.verb, experiment, asked) as study:
            work = study.plan if asked.dry_run else study.do
            lines = work(listed.verb, asked.backbone)
            if is_first():
                show(lines)


for _listed in STAGES:
    _add(_listed)


@verbs.command()
@EXPERIMENT
@asked(DRY_RUN, *OF_STAGES["cluster"], *OF_STAGES["images"])
def run(experiment: Experiment, asked: Asked) -> None:
    """Every stage that is not fresh."""
    with _asked_study("run", experiment, asked) as study:
        show(study.plan("run") if asked.dry_run else study.run())


@verbs.command()  # in place of that of the stage, which knows one study
@click.argument("experiments", nargs=-1, required=True, metavar="EXPERIMENT.toml...")
@SET
@DEBUG
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the page of several studies; by default `report` beside their work folders.",
)
@DRY_RUN
def report(experiments: tuple[str, ...], overrides: tuple[str, ...], output: Path | None, dry_run: bool) -> None:
    """Write report/index.html, or one page of several studies."""
    given = [Experiment(path, overrides) for path in experiments]
    if len(given) > 1:
        _report_together(given, output, dry_run)
    elif output is not None:
        raise click.UsageError("--output is for several studies; the page of one stands in its work folder")
    else:
        with _asked_study("report", given[0], Asked()) as study:
            show(study.plan("report") if dry_run else study.report())


def _report_together(experiments: Sequence[Experiment], output: Path | None, dry_run: bool) -> None:
    configs = [experiment.config("report") for experiment in experiments]
    from pipeline.report.several_studies import joint_folder, joint_report

    with ExitStack() as stack:
        studies = [stack.enter_context(_study(config, RunOptions())) for config in configs]
        folder = joint_folder(studies, output)
        show(f"report: would write {folder / 'index.html'}" if dry_run else joint_report(studies, folder))


# -------------------------------------------------------------------------------------------------------- other verbs


@verbs.command()
@click.argument("images", nargs=-1, required=True, metavar="IMAGES...")
@NETWORK
@SET_NAME
@asked(SCHEDULER, WORKERS, MAX_FAILURES, REHASH)
@SET
@DEBUG
def cache(
    images: tuple[str, ...], network: Network, name: str | None, asked: Asked, overrides: tuple[str, ...]
) -> None:
    """A sealed cache of a folder, a tar or a list, without an experiment; a study finds it again by what it is."""
    options, config = asked.run_options(), network.config(overrides)
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
@click.argument("data", type=click.Path(path_type=Path), metavar="DATA")
@click.option("--work", type=click.Path(path_type=Path), default="runs/results", show_default=True, help="Where to.")
@CHOICE
@PAGE
@DEBUG
@asked(DRY_RUN, SCHEDULER, WORKERS)
def results(data: Path, work: Path, choice: Choice, page: Path | None, asked: Asked) -> None:
    """The benchmark's results, from the folder DATA that holds its images."""
    from pipeline.benchmark.run import run_results

    show(run_results(data, work, choice, asked.run_options(), dry_run=asked.dry_run, page=page))


@verbs.command("map")
@click.argument("data", type=click.Path(path_type=Path), metavar="DATA")
@click.option("--work", type=click.Path(path_type=Path), default="runs/map", show_default=True, help="Where to.")
@MAP_CHOICE
@PAGE
@DEBUG
@asked(DRY_RUN, SCHEDULER, WORKERS)
def map_(data: Path, work: Path, choice: MapChoice, page: Path | None, asked: Asked) -> None:
    """Where mixtures gain on frozen features: by ID classes, training images and experts, from the folder DATA."""
    from pipeline.benchmark.map import run_map

    show(run_map(data, work, choice, asked.run_options(), dry_run=asked.dry_run, page=page))


@verbs.command()
@click.argument("path", type=click.Path(path_type=Path), metavar="STUDY.toml")
@click.argument("data", type=click.Path(path_type=Path), metavar="DATA")
@click.option("--work", type=click.Path(path_type=Path), default="runs/study", show_default=True, help="Where to.")
@SELECTION
@DEBUG
@asked(DRY_RUN, SCHEDULER, WORKERS)
def study(path: Path, data: Path, work: Path, selection: Selection, asked: Asked) -> None:
    """Several backbones on the images in the folder DATA, held to the published numbers that STUDY.toml names."""
    from pipeline.reproduction.run import run_reproduction

    show(run_reproduction(path, data, work, selection, asked.run_options(), dry_run=asked.dry_run))


@verbs.command()
@EXPERIMENT
@PLANNING
def plan(experiment: Experiment, planning: Planning) -> None:
    """What a study would cost, before anything runs: bytes, hours and memory, from a minute's calibration."""
    config = experiment.config("plan")
    from pipeline.planning.plan import plan_study

    with _study(config, RunOptions()) as study:
        plan = plan_study(study.workspace, planning)
        if planning.as_json:
            show(json.dumps(plan.to_dict(), indent=2))
            return
        from pipeline.planning.saying import plan_lines

        show(plan_lines(plan))


@verbs.command()
@EXPERIMENT
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@DECIDING_BACKBONE
@DECIDING
@FORMAT
@RUNTIME
def predict(
    experiment: Experiment,
    paths: tuple[str, ...],
    backbone: str,
    deciding: Deciding,
    form: "Format",
    runtime: "RuntimeName",
) -> None:
    """Score new images by a study or by an exported FILE.ood: score, p-value, decision, class, expert, neighbours."""
    if _is_exported(experiment):
        if backbone != "pretrained":
            raise click.UsageError(f"--backbone chooses among those of a study; {experiment.path} has one")
        from pipeline.predictions import predict_by_bundle
        from pipeline.progress import TqdmProgress

        progress = TqdmProgress()
        try:
            show(predict_by_bundle(experiment.path, paths, deciding, form, runtime, progress))
        finally:
            progress.close()
        return
    if runtime != "torch":
        raise click.UsageError("--runtime is of exported detectors; export the study with --onnx, and give that file")
    with _study(experiment.config("predict", backbone), RunOptions()) as study:
        show(study.predict(paths, deciding, form, backbone))


@verbs.command()
@EXPERIMENT
@EXPORTING
@DECIDING_BACKBONE
def export(experiment: Experiment, exporting: Exporting, backbone: str) -> None:
    """The fitted detector as one sealed file, which `stages.detection.Detector` loads anywhere."""
    with _study(experiment.config("export", backbone), RunOptions()) as study:
        show(study.export(exporting, backbone))


@verbs.command()
@click.argument("bundle", metavar="FILE.ood")
@click.argument("source", metavar="FOLDER|-")
@WATCHING
@DEBUG
def watch(bundle: str, source: str, watching: Watching) -> None:
    """Watch a stream: a line of JSON for each image of FOLDER, or for each score (number or JSON) of standard input."""
    from pipeline.watching import watch_lines

    for line in watch_lines(bundle, source, watching):
        show(line)


@verbs.command()
@click.argument("bundle", metavar="FILE.ood")
@SERVING
@DEBUG
def serve(bundle: str, serving: Serving) -> None:
    """Answer over HTTP: POST an image or features, get what the exported detector says of it as JSON."""
    from pipeline.serving.supervisor import serve_bundle

    serve_bundle(bundle, serving)


@verbs.command()
@EXPERIMENT
@click.option("--repair", is_flag=True, help="Extract damaged shards again.")
def verify(experiment: Experiment, repair: bool) -> None:
    """Check every byte of the caches of EXPERIMENT.toml, or of one CACHE folder."""
    if (cache := _cache_folder(experiment)) is None:
        with _study(experiment.config("verify"), RunOptions()) as study:
            show(study.verify(repair))
        return
    if repair:
        raise click.UsageError("--repair extracts anew and needs the images: give the experiment file, not the cache")
    from pipeline.one_cache import verify_cache

    show(verify_cache(cache, experiment.path))


@verbs.command()
@EXPERIMENT
def info(experiment: Experiment) -> None:
    """Show the caches and models of EXPERIMENT.toml, one CACHE folder, or one exported file, at a glance."""
    if _is_exported(experiment):
        from pipeline.one_bundle import bundle_lines

        show(bundle_lines(Path(experiment.path)))
        return
    if (cache := _cache_folder(experiment)) is None:
        with _study(experiment.config("info"), RunOptions()) as study:
            show(study.info())
        return
    from pipeline.one_cache import cache_lines

    show(cache_lines(cache))


def _is_exported(given: Experiment) -> bool:
    """Whether the path is given as an exported detector in place of an experiment file."""
    from stages.files.bundle_file import is_meant_as_bundle

    if not is_meant_as_bundle(given.path):
        return False
    if given.overrides:
        raise click.UsageError(f"--set changes an experiment file; {given.path} is an exported detector")
    return True


def _cache_folder(given: Experiment) -> "FeatureCache | None":
    """The sealed cache at the path or URL, or ``None`` where it is no folder, so an experiment file."""
    from cache import FeatureCache, is_remote

    if not is_remote(given.path) and not Path(given.path).is_dir():
        return None
    if given.overrides:
        raise click.UsageError(f"--set changes an experiment file; {given.path} is a folder")
    return FeatureCache.open(given.path)
