"""What runs a detector's network: one small protocol between pixels and scores.

A detector needs of a network what a cache of features holds, and what experts make of it. Whoever gives that is a
runtime: torch (`stages.detection.torch_runtime`), or anything else that computes the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from stages.id_data.lazy import Floats
from stages.mixture.refined import Refined

RuntimeName = Literal["torch", "onnx"]


@dataclass(frozen=True, eq=False)
class NetworkRows:
    """What a network, and the experts behind it, make of n images.

    Attributes:
        stored: what a cache would hold of each, in its type: ``cls`` ``[n, D]``, and where they are known ``tap_cls``
            ``[n, D']``, ``logits`` ``[n, C]``, and where they are read ``taps``.
        refined: by the expert that each went to; None without experts.
        patches: ``[n, P, D]`` patch tokens after the final norm; None where nobody reads them.
    """

    stored: Mapping[str, NDArray[Any]]
    refined: Refined | None = None
    patches: Floats | None = None

    def __len__(self) -> int:
        return len(self.stored["cls"])

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """Rows of several batches, one at least, one after the other."""
        first = parts[0]
        if len(parts) == 1:
            return first
        stored = {name: np.concatenate([part.stored[name] for part in parts]) for name in first.stored}
        refined = None
        if first.refined is not None:
            columns = {name: [vars(part.refined)[name] for part in parts] for name in vars(first.refined)}
            refined = Refined(**{name: np.concatenate(arrays) for name, arrays in columns.items()})
        patches = None
        if first.patches is not None:
            patches = np.concatenate([part.patches for part in parts if part.patches is not None])
        return cls(stored, refined, patches)


class Runtime(Protocol):
    """Runs the network of a detector; may be used by several threads.

    Attributes:
        size: side of what `prepare` gives, in pixels; 0 where it takes no images.
        reads: arrays of a cache that it needs of rows whose features were made elsewhere.
        batch: images that are worth going through it together: more of them take more passes.
        whole: images of one pass of the network, which costs as much with fewer.
        side_by_side: callers whose passes it computes at once; others wait.
    """

    size: int
    reads: frozenset[str]
    side_by_side: int

    @property
    def batch(self) -> int:
        """Images of a pass, with experts of one for each of them; never fewer than 1."""

    @property
    def whole(self) -> int:
        """Images of a pass of the network itself, never fewer than 1."""

    def prepare(self, data: bytes) -> NDArray[np.uint8]:
        """Bytes of an image file to ``[3, size, size]``, resized and cropped; raises `ImageError`."""

    def run(self, pixels: NDArray[np.uint8]) -> NetworkRows:
        """What `prepare` gave of n images, ``[n, 3, size, size]``, n at least 1; the same in whatever company."""

    def run_in_float32(self, pixels: NDArray[np.uint8]) -> NetworkRows:
        """The same by a network that computes in float32, whatever its features were made in; beside no `run`."""

    def run_stored(self, arrays: Mapping[str, NDArray[Any]]) -> NetworkRows:
        """Rows as a cache stores them, n at least 1, through what stands behind it."""
