"""Options of the command line, and the objects that commands take in their place."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pipeline.benchmark.choice import Choice, MapChoice
from pipeline.config import (
    ConfigError,
    FeaturesConfig,
    RunConfig,
    RunOptions,
    features_config,
    folder_name,
    load_config,
)
from pipeline.config.explain import score_problem
from pipeline.deciding import Deciding
from pipeline.output_files import OutputFile
from pipeline.planning.asked import Planning
from pipeline.reproduction.selection import Selection

if TYPE_CHECKING:
    from stages.detection.detector import Per

Command = TypeVar("Command", bound=Callable[..., Any])
Option = Callable[[Command], Command]


@dataclass(frozen=True)
class Experiment:
    """An experiment file as it was given.

    Attributes:
        path: of the file.
        overrides: ``a.b=value`` of ``--set``.
    """

    path: str
    overrides: tuple[str, ...] = ()

    def config(self, verb: str, which: str = "all") -> RunConfig:
        """The study, where it has what a verb works on.

        Args:
            verb: as it was given.
            which: kind of the backbone that is asked for.

        Raises:
            ConfigError: the file cannot be used, or not by this verb.
        """
        from stages.files.bundle_file import is_meant_as_bundle

        if is_meant_as_bundle(self.path):
            raise ConfigError(f"{self.path}: given as an exported detector, and {verb} takes an experiment's TOML file")
        config = load_config(self.path, self.overrides)
        config.require_roles(verb)
        if config.finetune is None and (verb == "finetune" or which == "finetuned"):
            raise ConfigError(
                f"{self.path}: finetune: missing; add a section [finetune], such as `epochs = 10` under it"
            )
        return config


@dataclass(frozen=True)
class Asked:
    """How a verb is to work; of what it has no option for, as it stands here.

    Attributes:
        dry_run: say what would be done, and no more.
        scheduler: address of a Dask scheduler.
        workers: local processes.
        max_failures: largest share of a set's images that may be unusable.
        rehash: whether changed images are told by their bytes.
        processes: how many train together; None: as torchrun started them, or one.
        backbone: kind of the backbones to work on.
    """

    dry_run: bool = False
    scheduler: str | None = None
    workers: int | None = None
    max_failures: float = RunOptions.max_failures
    rehash: bool = False
    processes: int | None = None
    backbone: str = "all"

    def run_options(self) -> RunOptions:
        """Those of stage one."""
        if self.scheduler is not None and self.workers is not None:
            raise click.UsageError(
                "--workers is for local processes; with --scheduler the cluster has its own: give one"
            )
        return RunOptions(
            scheduler=self.scheduler,
            workers=self.workers or 1,
            max_failures=self.max_failures,
            rehash=self.rehash,
        )


@dataclass(frozen=True)
class Network:
    """What features are, where there is no experiment file; what is None is as the file's defaults have it."""

    backbone: str
    weights: str | None
    size: int | None
    patches: str | None
    dtype: str | None
    taps: Sequence[int] | str | None
    out: str

    def config(self, overrides: Sequence[str]) -> FeaturesConfig:
        """The same as an experiment file would say it."""
        given: dict[str, dict[str, Any]] = {
            "backbone": {"name": self.backbone, "weights": self.weights, "image_size": self.size},
            "cache": {"root": self.out, "patches": self.patches, "dtype": self.dtype, "taps": self.taps},
        }
        said = {
            table: {key: value for key, value in keys.items() if value is not None} for table, keys in given.items()
        }
        return features_config(said, overrides)


def gathered(name: str, kind: Callable[..., Any], *options: Option[Any]) -> Option[Any]:
    """Several options as one argument of a command.

    Args:
        name: of the command's parameter.
        kind: makes it of what was given, by the options' names.
        options: decorators, in the order of ``--help``.
    """

    def probe() -> None:
        """Holds the options, for their names."""

    own = [option.name for option in getattr(_with(probe, options), "__click_params__", []) if option.expose_value]

    def decorate(command: Any) -> Any:
        @functools.wraps(command)
        def call(**given: Any) -> Any:
            return command(**{name: kind(**{key: given.pop(key) for key in own})}, **given)

        return _with(call, options)

    return decorate


def _with(command: Any, options: Sequence[Option[Any]]) -> Any:
    for option in reversed(options):
        command = option(command)
    return command


class RealRange(click.FloatRange):
    """Numbers of a range; NaN, which compares with nothing, is outside of any."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number, or a refusal."""
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value} is not in the range {self._describe_range()}.", param, ctx)
        return number


SET = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key; repeatable.")
DEBUG = click.option("--debug", is_flag=True, expose_value=False, help="Print the traceback of an error.")
DRY_RUN = click.option(
    "--dry-run", is_flag=True, help="Say what would run, what is fresh and the bytes it would write."
)
EXPERIMENT = gathered("experiment", Experiment, click.argument("path", metavar="EXPERIMENT.toml"), SET, DEBUG)
SCHEDULER = click.option("--scheduler", metavar="ADDRESS", help="Hand the work to the Dask cluster of this scheduler.")
WORKERS = click.option("--workers", type=click.IntRange(min=1), metavar="N", help="Work in N local processes.")
MAX_FAILURES = click.option(
    "--max-failures",
    type=RealRange(0, 1),
    default=RunOptions.max_failures,
    show_default=True,
    help="Largest share of a set's images that may be unusable.",
)
REHASH = click.option("--rehash", is_flag=True, help="Tell changed images by the bytes of all, not by size and time.")
BACKBONE = click.option(
    "--backbone",
    type=click.Choice(["pretrained", "finetuned", "all"]),
    default="all",
    show_default=True,
    help="Which backbone's features; all: every one that exists.",
)
PROCESSES = click.option(
    "--processes",
    type=click.IntRange(min=1),
    metavar="N",
    help="Train in N processes together, on GPUs one each; torchrun does the same.",
)

# Of the verbs of stages, by the names that `pipeline.stages_of_study` gives them, in the order of ``--help``.
OF_STAGES: dict[str, tuple[Option[Any], ...]] = {
    "cluster": (SCHEDULER, WORKERS),
    "images": (MAX_FAILURES, REHASH),
    "processes": (PROCESSES,),
    "backbone": (BACKBONE,),
}


def asked(*options: Option[Any]) -> Option[Any]:
    """Options of a verb as its argument ``asked``."""
    return gathered("asked", Asked, *options)


def _set_name(_context: click.Context, _option: click.Parameter, value: str | None) -> str | None:
    try:
        return None if value is None else folder_name(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _numbers(value: str, otherwise: str = "") -> list[int]:
    try:
        return [int(number) for number in value.split(",")]
    except ValueError as error:
        raise click.BadParameter(f"{value!r} given, must be numbers with commas between them{otherwise}") from error


def _taps(_context: click.Context, _option: click.Parameter, value: str | None) -> Sequence[int] | str | None:
    return value if value is None or value == "all" else _numbers(value, ', or "all"')


NETWORK = gathered(
    "network",
    Network,
    click.option("--backbone", required=True, metavar="NAME", help="Any timm model."),
    click.option("--weights", metavar="FILE", help='A .safetensors or .pth file, "embedded" or "hub" (the default).'),
    click.option("--size", type=int, metavar="N", help="Side of the network's input in pixels; 224 by default."),
    click.option("--patches", metavar="OPTION", help='"full" (the default), "pool:G" or "none".'),
    click.option(
        "--dtype", type=click.Choice(["float16", "float32"]), help="As features are stored; float16 by default."
    ),
    click.option("--taps", callback=_taps, metavar="N,N,…|all", help="Tokens after these blocks or stages as well."),
    click.option("--out", default="cache", show_default=True, metavar="FOLDER", help="Of all caches."),
)
SET_NAME = click.option(
    "--name", callback=_set_name, metavar="SET", help="Of the set, part of its folder's name; by default its source's."
)


def _known_score(_context: click.Context, _option: click.Parameter, value: str | None) -> str | None:
    if value is not None and (problem := score_problem(value)) is not None:
        raise click.BadParameter(problem)
    return value


def _split_names(_context: click.Context, _option: click.Parameter, names: str | None) -> list[str] | None:
    return None if names is None else names.split(",")


def _split_numbers(_context: click.Context, _option: click.Parameter, value: str) -> list[int]:
    return _numbers(value)


DECIDING_BACKBONE = click.option(
    "--backbone",
    type=click.Choice(["pretrained", "finetuned"]),
    default="pretrained",
    show_default=True,
    help="Whose detector decides; finetuned: that of the first seed.",
)


DECIDING_SCORE = click.option(
    "--score", "score_name", callback=_known_score, help="Which score decides, or sum of two: knn+energy."
)


def _deciding(score_name: str | None, per: "Per", fdr: float | None) -> Deciding:
    if fdr is not None and per != "all":
        raise click.UsageError(
            f"--fdr is promised with p-values of all calibration rows, not with those per {per}: give one"
        )
    return Deciding(score_name, per, fdr)


DECIDING = gathered(
    "deciding",
    _deciding,
    DECIDING_SCORE,
    click.option(
        "--per",
        type=click.Choice(["all", "class", "expert"]),
        default="all",
        show_default=True,
        help="Whose false alarms are promised: of all ID images, or of those of each predicted class or expert.",
    ),
    click.option(
        "--fdr",
        type=RealRange(0, 1, min_open=True, max_open=True),
        metavar="SHARE",
        help="Judge the images together: at most this share of those flagged is ID, on average.",
    ),
)
FORMAT = click.option(
    "--format", "form", type=click.Choice(["csv", "json"]), default="csv", show_default=True, help="Of what is printed."
)


def _overrides(what: str) -> Option[Any]:
    return click.option(
        "--set", "overrides", multiple=True, metavar="KEY=VALUE", help=f"Override a key of every {what}."
    )


def _names(option: str, about: str) -> Option[Any]:
    return click.option(option, metavar="NAME,…", callback=_split_names, help=about)


def _counts(option: str, default: Sequence[int], about: str) -> Option[Any]:
    shown = ",".join(map(str, default))
    return click.option(option, metavar="N,…", default=shown, show_default=True, callback=_split_numbers, help=about)


_UNCHECKED = click.option("--unchecked", is_flag=True, help="Run on other images than the benchmark's as well.")
CHOICE = gathered(
    "choice",
    Choice,
    _overrides("study"),
    _names("--benchmarks", "Of the benchmarks, only these."),
    _names("--controls", "Of the control variants, only these."),
    click.option("--finetune", is_flag=True, help="Fine-tune the backbones as well, and score what follows from them."),
    _UNCHECKED,
)
MAP_CHOICE = gathered(
    "choice",
    MapChoice,
    _overrides("cell"),
    _counts("--classes", MapChoice.classes, "Numbers of ID classes."),
    _counts("--images", MapChoice.images, "Numbers of training images a class."),
    _UNCHECKED,
)
SELECTION = gathered(
    "selection",
    Selection,
    _overrides("run"),
    _names("--only", "Of the runs, only these."),
    click.option("--available", is_flag=True, help="Leave runs out whose images or weights are missing."),
)
PAGE = click.option(
    "--page",
    type=OutputFile(),
    metavar="FILE",
    help="Write the page there as well; the project's own stand in pipeline/benchmark.",
)
PLANNING = gathered(
    "planning",
    Planning,
    click.option("--workers", type=click.IntRange(min=1), metavar="N", help="Plan for N workers as well, not for 4."),
    click.option(
        "--seconds",
        type=RealRange(5, 600),
        default=Planning.seconds,
        show_default=True,
        help="That the calibration may take, about.",
    ),
    click.option("--images", type=click.IntRange(min=1), metavar="N", help="Of id-train, which need not be there."),
    click.option("--classes", type=click.IntRange(min=2), metavar="N", help="Of these images."),
    click.option(
        "--test-images", type=click.IntRange(min=1), metavar="N", help="Of each other set; 10,000 by default."
    ),
    click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON."),
)
