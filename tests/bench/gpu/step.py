"""What a step of the check is, what it is given, and what it says. Importing it loads nothing heavy.

A step is a function of one `Bench`. It measures with the parts of the product, on ``bench.device`` and in
``bench.sizes``, and says each number as soon as it has it::

    def train_mixture(bench: Bench) -> None:
        bench.measure("loss, relative to the CPU's", abs(ours - cpu) / cpu, at_most=1e-3)
        bench.measure("training", rows / seconds, "rows/s")

A number with a limit is held to it; one without is for people to read. An exception fails the step, `NotRun` does not.
It becomes part of the check by one line in `tests.bench.gpu.steps`, and its sizes by a line in `Sizes`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

LITE0 = "tf_efficientnet_lite0"  # whose weights come with a package


class NotRun(Exception):
    """What a step needs is not there: why."""


@dataclass(frozen=True)
class Step:
    """A step, as it is listed.

    Attributes:
        name: short, of the table's first column.
        proves: what a pass says, in a line.
        run: ``module:function`` that takes a `Bench`, and what is `given`. Named and not imported: torch is loaded in
            the process that runs it, and a module that cannot be imported fails its own steps alone.
        given: arguments of the function, by name.
        limit_s: seconds after which it is stopped.
    """

    name: str
    proves: str
    run: str
    given: Mapping[str, Any] = field(default_factory=dict)
    limit_s: float = 30


@dataclass(frozen=True)
class Value:
    """A number that was measured.

    Attributes:
        what: it is of.
        value: in `unit`.
        unit: "" for a ratio.
        at_most, at_least: what it is held to, if anything.
    """

    what: str
    value: float
    unit: str = ""
    at_most: float | None = None
    at_least: float | None = None

    @property
    def holds(self) -> bool:
        """Whether it is within its limits, which no NaN is."""
        above = self.at_least is None or self.value >= self.at_least
        return above and (self.at_most is None or self.value <= self.at_most)


@dataclass(frozen=True)
class Sizes:
    """How much is computed: by default what fits into minutes on a GPU; see `TINY`.

    Attributes:
        image_size, large_image_size: pixels that networks see.
        networks: names of those that stand for EfficientNet-Lite0 where its own weights need not be seen ("conv"), and
            for DINOv2's ViT-S, B and L.
        compared: images whose features are compared with the CPU's; of a pass, too.
        decoded: images that are decoded on the device and compared, damaged files among them.
        jpegs: different files of 500 x 375 pixels.
        listed: most images of an extraction that is timed, of these files over and over.
        extraction_s: it has as many of them as this takes, by the pace of the first.
        seconds: at least, of each thing that is timed over and over.
        digits: classes of scikit-learn's digits that mixtures are trained on.
        mixture_s: of each mixture that is timed.
        experts, batches: of which experts one after another and at once are timed.
        trained_rows: of the mixture whose loss is compared with the CPU's, a third of them to judge by.
        tuned: images of the fine-tune whose loss is compared, a tenth of them to judge by.
        timed_tuned: images of an epoch of the one that is timed.
        tuned_batch: images of a step.
        bank, queries, dim: of the search.
        heads, large_heads: rows, values, classes of linear heads, and how far class means are apart.
        demo: settings that make the demo smaller, as ``--set`` takes them.
        laps: of the long run.
    """

    image_size: int = 224
    large_image_size: int = 518
    networks: Mapping[str, str] = field(
        default_factory=lambda: {"conv": LITE0} | {f: f"vit_{f}_patch14_dinov2" for f in ("small", "base", "large")}
    )
    compared: int = 4
    decoded: int = 192
    jpegs: int = 256
    listed: int = 8192
    extraction_s: float = 2.0
    seconds: float = 0.5
    digits: str = "0-3"
    experts: tuple[int, ...] = (4, 16)
    batches: tuple[int, ...] = (64, 256)
    trained_rows: int = 96
    mixture_s: float = 2.0
    tuned: int = 72
    timed_tuned: int = 640
    tuned_batch: int = 32
    bank: int = 100_000
    queries: int = 20_000
    dim: int = 768
    heads: tuple[int, int, int, float] = (20_000, 384, 200, 0.12)
    large_heads: tuple[int, int, int, float] = (1_281_167, 384, 1000, 0.12)  # ImageNet-1K by a ViT-S
    demo: tuple[str, ...] = ("backbone.batch=64", "score.bootstrap=100")  # of differences, which are not compared
    laps: int = 6


TINY = Sizes(
    image_size=32,
    large_image_size=48,
    networks={"conv": "test_efficientnet", "small": "test_vit", "base": "test_vit2", "large": "test_vit3"},
    compared=2,
    decoded=12,
    jpegs=4,
    listed=8,
    extraction_s=0.01,
    seconds=0.001,
    digits="0-1",
    experts=(3,),
    batches=(8,),
    trained_rows=24,
    mixture_s=0.02,
    tuned=12,
    timed_tuned=12,
    tuned_batch=8,
    bank=500,
    queries=100,
    dim=32,
    heads=(300, 8, 5, 0.5),
    large_heads=(600, 8, 5, 0.5),
    demo=(
        "backbone.image_size=32",
        "sets.digits-train.images=sklearn:digits[0-1]/train",
        "sets.digits-test.images=sklearn:digits[0-1]/test",
        "sets.digits-7-9.images=sklearn:digits[7-7]/test",
        "sets.photos.images=sklearn:digits[9-9]/test",
        "train.epochs=1",
        "train.expert=adapter",
        "score.bootstrap=100",
        'score.scores=["msp", "knn"]',
    ),
    laps=3,
)

SIZES: Mapping[Literal["full", "tiny"], Sizes] = {"full": Sizes(), "tiny": TINY}


@dataclass(frozen=True)
class Bench:
    """What a step is given.

    Attributes:
        device: ``"cuda"`` or ``"cpu"``.
        sizes: how much to compute.
        scratch: an empty folder of this step alone.
        shared: folder of the whole check. What stands in it another step may have made, or have been stopped while it
            made it: only what is complete once it has its name, or is a cache.
        say: told of each value.
    """

    device: str
    sizes: Sizes
    scratch: Path
    shared: Path
    say: Callable[[Value], None]

    def measure(
        self, what: str, value: float, unit: str = "", *, at_most: float | None = None, at_least: float | None = None
    ) -> None:
        """Say a number, and what it is held to."""
        self.say(Value(what, float(value), unit, at_most, at_least))
