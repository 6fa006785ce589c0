"""From pixels to rows of a cache: forward passes that all have one shape."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import count
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from cache import FeatureSpec
from stages.errors import StageError
from stages.extraction.passes import threads_of_passes
from stages.networks.backbone import Backbone
from stages.networks.compiling import compiler_errors
from stages.networks.tokens import reduce_patches
from stages.networks.transfer import stream_of


class Encoder:
    """Runs a backbone on one number of images at a time, that of the spec; several threads may.

    On a GPU each thread has memory of its own that images go in by and features come back by, and a stream that copies
    both. All compute on one stream: so the GPU has the next batch at hand while it computes one, and needs the memory
    of one forward pass, however many threads there are. One thread of the process starts all passes of a GPU, since
    cuDNN chooses its kernels anew in every thread, which takes a convolutional network seconds::

        thread 1   stack ─ copy in ─┐            ┌─ copy back ─ store   stack ─ copy in ─┐
        thread 2                    │ stack ─ copy in ─┐        ┌─ copy back ─ store     │
        GPU                         └─ compute ──┴─────┴─ compute ──┴────────────────────┴─ compute

    Args:
        backbone: the network.
        spec: what is kept of its tokens, in which type, and how many images a pass has: who made the spec chose that.

    Attributes:
        backbone, spec: likewise.
        batch: images of a pass.
    """

    def __init__(self, backbone: Backbone, spec: FeatureSpec) -> None:
        self.backbone = backbone
        self.spec = spec
        self.batch: int = spec.compute["batch"]
        self._device = next(backbone.model.parameters()).device  # with its number: threads have a current one each
        self._computes = stream_of(self._device, "pass") if self._device.type == "cuda" else None
        if self._computes is not None:
            self._computes.wait_stream(torch.cuda.current_stream(self._device))  # which has brought the weights there
        self._own, self._lanes = threading.local(), count()

    def compile(self) -> None:
        """Let torch.compile do what the spec asks of it, alone: it must not happen beside passes of other threads.

        While torch traces in one thread, what is compiled already runs as it was written in all others, to other bits.

        Raises:
            StageError: it cannot be compiled.
        """
        if self.spec.compute["compiled"]:
            self.backbone.compile()
            side = self.backbone.config.image_size
            with compiler_errors():
                self.encode([torch.zeros(3, side, side, dtype=torch.uint8)])

    def encode(self, images: Sequence[Tensor]) -> dict[str, NDArray[Any]]:
        """One forward pass; a batch that is not full is padded with its last image.

        Args:
            images: one to `batch`, each ``[3, H, W]`` uint8, all on the CPU or all on the backbone's device.

        Returns:
            ``[n, …]`` for each of the spec's datasets, as it is stored; what does not fit the type is inf. On a GPU
            they hold until this thread asks for the next.

        Raises:
            StageError: the GPU's memory does not hold a pass.
        """
        padded = [*images, *[images[-1]] * (self.batch - len(images))]
        if self._computes is None:
            rows = self._rows(torch.stack(padded))
        else:
            try:
                rows = self._rows_of_gpu(padded)
            except torch.cuda.OutOfMemoryError as error:
                raise StageError(
                    f"a pass of {self.batch} images does not fit into the memory that the GPU has left: end what else "
                    "runs there, or set backbone.batch lower, which makes other caches"
                ) from error
        return {name: tensor[: len(images)].numpy() for name, tensor in rows.items()}

    def _rows(self, batch: Tensor) -> dict[str, Tensor]:
        """Features of a batch that is where the backbone is."""
        backbone, spec = self.backbone, self.spec
        batch = backbone.preprocessing.normalise(batch)
        if spec.taps:
            tokens, taps = backbone.encode_with_taps(batch, spec.taps)
            rows = {"taps": taps}
        else:
            tokens, rows = backbone.encode(batch), {}
        rows |= vars(reduce_patches(tokens, backbone.grid, spec.patches))
        # torch casts four times faster than numpy.
        return {name: rows[name].to(getattr(torch, spec.dtype)) for name in spec.datasets()}

    def _rows_of_gpu(self, images: list[Tensor]) -> dict[str, Tensor]:
        """Features in this thread's pinned memory, once they are there."""
        computes, lane = self._computes, self._lane()
        assert computes is not None  # or this is the CPU
        batch, arrived = lane.bring(images)

        def start() -> tuple[dict[str, Tensor], torch.cuda.Event]:
            with torch.cuda.stream(computes):
                computes.wait_event(arrived)
                return self._rows(batch), computes.record_event()

        rows, computed = _starter(self._device).submit(start).result()
        with torch.cuda.stream(lane.stream):
            lane.stream.wait_event(computed)
            for name, tensor in rows.items():
                lane.rows[name].copy_(tensor, non_blocking=True)
            lane.stored.record(lane.stream)
        lane.stored.synchronize()  # nothing that was copied from or to is freed or filled before
        return lane.rows

    def _lane(self) -> "_Lane":
        """This thread's memory and stream."""
        if not hasattr(self._own, "lane"):
            stream = stream_of(self._device, f"lane {next(self._lanes)}")
            self._own.lane = _Lane(self.batch, self.spec, stream)
        lane: _Lane = self._own.lane
        return lane


@cache
def _starter(device: torch.device) -> ThreadPoolExecutor:
    """The thread that starts a GPU's passes."""
    return threads_of_passes(1)


class _Lane:
    """What one thread's batches go to a GPU and their features come back by.

    Attributes:
        rows: ``[B, …]`` for each of a spec's datasets, in pinned memory.
        stream: that copies.
        stored: when it has copied last.
    """

    def __init__(self, n: int, spec: FeatureSpec, stream: torch.cuda.Stream) -> None:
        dtype = getattr(torch, spec.dtype)
        self.rows = {
            name: torch.empty((n, *row), dtype=dtype, pin_memory=True) for name, (row, _) in spec.datasets().items()
        }
        self.stream = stream
        self.stored = torch.cuda.Event(blocking=True)  # the core is left to those that decode
        self._n = n
        self._images: Tensor | None = None  # [B, 3, H, W] in pinned memory

    def bring(self, images: list[Tensor]) -> tuple[Tensor, torch.cuda.Event]:
        """The images as one batch on the GPU, and when it is there."""
        if images[0].is_cuda:  # they were decoded there, on this thread's current stream
            return torch.stack(images), torch.cuda.current_stream(images[0].device).record_event()
        if self._images is None:
            self._images = torch.empty((self._n, *images[0].shape), dtype=images[0].dtype, pin_memory=True)
        torch.stack(images, out=self._images)
        with torch.cuda.stream(self.stream):
            return self._images.to(self.stream.device, non_blocking=True), self.stream.record_event()
