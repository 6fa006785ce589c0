"""How `predict`, `export`, `watch` and `serve` are to work, as it is asked on the command line."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stages.detection.detector import Per
    from stages.detection.runtime import RuntimeName


@dataclass(frozen=True)
class Deciding:
    """What decides of new images, and what is promised.

    Attributes:
        score_name: which score; None: the detector's own choice.
        per: whose ID images are promised how many false alarms: all, or those of each class or expert.
        fdr: share of ID among the images that are flagged together, at most; None: images are not judged together.
    """

    score_name: str | None = None
    per: "Per" = "all"
    fdr: float | None = None


@dataclass(frozen=True)
class Exporting:
    """What is exported, as it is asked for on the command line.

    Attributes:
        output: the file.
        score_name: which score decides; None: the detector's own choice.
        variant: whose experts; ``none`` for the backbone's own features; None: the first.
        with_backbone: whether the network's weights go into the file.
        onnx: whether the network goes into the file as ONNX as well.
    """

    output: Path
    score_name: str | None = None
    variant: str | None = None
    with_backbone: bool = True
    onnx: bool = False


@dataclass(frozen=True)
class Watching:
    """How a stream is to be watched, as it is asked on the command line.

    Attributes:
        alpha: probability of a false alarm ever.
        seed: of the places that are drawn, see `DriftMonitor`.
        state: file to go on from, and to leave the state in; None: nothing is kept.
        prometheus: file to leave the last values in, as text for Prometheus; None: none is written.
        strict: whether the stream is compared with itself alone, see `stages.detection.drift.DriftMonitor`.
        runtime: what runs the network.
    """

    alpha: float = 0.01
    seed: int = 0
    state: Path | None = None
    prometheus: Path | None = None
    strict: bool = False
    runtime: "RuntimeName" = "torch"


@dataclass(frozen=True)
class Serving:
    """Where a detector is to answer, and within which limits, as it is asked on the command line.

    Attributes:
        host: address; this machine alone by default.
        port: 0: any that is free.
        device: where the network runs: ``cpu``, ``cuda``, or ``auto``, a GPU where there is one.
        batch: images that go through the network together, at most; no more than are worth it, see `Runtime.batch`.
        patience: seconds that images wait for the next to be decoded, at most; one that is alone does not wait.
        max_bytes: of a request.
        max_pixels: of an image, before it is decoded.
        timeout: seconds until a request is refused, its way through the network included.
        runtime: what runs the network.
        silent: seconds beyond the timeout that the process which computes may be silent before it is taken as hung.
        slower: times as long as the first one another may take until it answers.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    device: str = "auto"
    batch: int = 64
    patience: float = 0.15
    max_bytes: int = 20 << 20
    max_pixels: int = 50_000_000
    timeout: float = 30
    runtime: "RuntimeName" = "torch"
    silent: float = 5
    slower: float = 3
