"""Verb: the fitted detector of a study as one sealed file, which proves itself before it is there."""

import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stages.detection.bundle import Bundle, write_bundle
from stages.detection.deciding import DecidingDetector
from stages.detection.detector import Detector
from stages.detection.golden import TOLERANCE, check_golden, golden_rows, tolerance_of
from stages.detection.onnx_runtime import OnnxRuntime
from stages.detection.parts import DetectorParts
from stages.detection.proof import Proof, prove_runtime
from stages.detection.runtime import Runtime
from stages.errors import InputError, StageError
from stages.files.regular import check_file_to_write

_SEALED = "sealed"  # in place of where weights come from, where they are in the file
_MOST_PIXELS = 1 << 18  # of a golden image: larger ones are made smaller by a whole factor, and are what is scored


@dataclass(frozen=True, eq=False)
class GoldenSamples:
    """Rows to be golden, some more than are needed.

    Attributes:
        named: set and id of each.
        images: each decoded; None where the detector takes features.
        features: arrays ``[n, …]`` as a cache has them; None where it takes images.
    """

    named: Sequence[tuple[str, str]]
    images: Sequence[Image.Image] | None
    features: Mapping[str, NDArray[Any]] | None


class Exported(NamedTuple):
    """A detector that was written.

    Attributes:
        detector: loaded from the file.
        proof: that its graph scores as torch does; None where it has none.
    """

    detector: Detector
    proof: Proof | None


def export_detector(
    path: Path,
    deciding: DecidingDetector,
    samples: GoldenSamples,
    about: Mapping[str, Any],
    with_backbone: bool = True,
    proof: Iterable[tuple[str, bytes]] | None = None,
) -> Exported:
    """Write the detector of a study as one file; nothing is left where it does not score as the study's does.

    Args:
        path: of the file.
        deciding: the detector.
        samples: rows whose scores it is to prove itself by.
        about: where it came from, for `info`: JSON.
        with_backbone: whether the network's weights go into the file; without, they are loaded from where the study has
            them, and compared.
        proof: name and file of images of the study. Where they are given the network goes into the file as ONNX, too,
            once it scores all of these as torch does.

    Returns:
        The detector, loaded from the file, and what was shown of its graph.

    Raises:
        InputError: no rows to be golden; a network that cannot be written as ONNX.
        OSError: `path` is no place for a file.
        StageError: what was written does not score as the study's own detector, or by ONNX otherwise than by torch.
    """
    if not samples.named:
        raise InputError("no image of the study can be used to prove an exported detector by")
    check_file_to_write(path)
    images = None if samples.images is None else tuple(_pixels(image) for image in samples.images)
    features = None if samples.features is None else {name: np.asarray(each) for name, each in samples.features.items()}
    golden = golden_rows(deciding.detector(), samples.named, images, features)
    graph = None if proof is None else deciding.graph()
    weights = deciding.weights() if with_backbone else None
    parts = deciding.parts if weights is None else _sealed(deciding.parts)
    # Not under its name before it has proved itself.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        write_bundle(temporary, Bundle(dict(about), parts, golden, weights, graph))
        with _scoring_as_the_study(path, temporary):
            found = Detector.load(temporary, device=deciding.device)
            if tolerance_of(found) > TOLERANCE:  # what other devices are allowed, this one is not
                check_golden(found, golden)
            by_onnx = None if proof is None else Detector.load(temporary, runtime="onnx").runtime
        shown = None if by_onnx is None or proof is None else _prove(found, by_onnx, proof)
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()
    return Exported(found, shown)


@contextmanager
def _scoring_as_the_study(path: Path, temporary: Path) -> Iterator[None]:
    """Around loading what was written."""
    try:
        yield
    except InputError as error:
        said = str(error).removeprefix(f"{temporary}: ")
        raise StageError(f"{path}: not written, for what was written does not score as the study: {said}") from error


def _prove(by_torch: Detector, by_onnx: Runtime, proof: Iterable[tuple[str, bytes]]) -> Proof:
    assert isinstance(by_onnx, OnnxRuntime)
    return prove_runtime(by_torch, by_onnx, proof)


def _sealed(parts: DetectorParts) -> DetectorParts:
    """The same, whose network's weights are in the file: it names no place on this machine."""
    if parts.network is None:
        return parts
    return replace(parts, network=replace(parts.network, config=parts.network.config | {"weights": _SEALED}))


def _pixels(image: Image.Image) -> NDArray[np.uint8]:
    """``[h, w, 3]`` of an image, a large one made smaller."""
    factor = int(np.ceil(np.sqrt(image.width * image.height / _MOST_PIXELS)))
    return np.asarray(image.reduce(factor) if factor > 1 else image)


def spread(n: int, wanted: int) -> NDArray[np.intp]:
    """Numbers of up to so many of n rows, evenly spread over them.

    >>> spread(10, 4).tolist(), spread(2, 4).tolist()
    ([0, 3, 6, 9], [0, 1])
    """
    return np.unique(np.linspace(0, n - 1, min(wanted, n)).round().astype(np.intp)) if n else np.zeros(0, np.intp)


def even_shares(sizes: Sequence[int], wanted: int) -> list[int]:
    """How many of sets of these sizes, so many in all or all there are, as evenly as their sizes let it be.

    >>> even_shares([2, 100, 50], 30), even_shares([2, 3], 30)
    ([2, 14, 14], [2, 3])
    """
    shares, left = [0] * len(sizes), wanted
    smallest_first = sorted(range(len(sizes)), key=lambda index: (sizes[index], index))
    for rank, index in enumerate(smallest_first):
        shares[index] = min(sizes[index], -(-left // (len(sizes) - rank)))
        left -= shares[index]
    return shares
