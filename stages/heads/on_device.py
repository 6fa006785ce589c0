"""A linear head's sums on a GPU: the same formulas as `stages.heads.sums`, equal to rounding.

Rows are sent there once and stay, standardised, as far as half of the memory that is free holds them; those beyond are
sent in every step, the next ones while it computes. Products are in the rows' precision and sums over chunks of rows in
float64, in a fixed order: the same GPU gives the same bits.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, singledispatch

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.heads.affine import LinearHead, Standardisation
from stages.heads.summing import HERE, RowsIn
from stages.heads.sums import BlockSum, FloatType, GivenRows, HeadLossSum, ProductSum, Sums, one_blas_thread
from stages.id_data.lazy import Rows2D
from stages.networks.batch import free_bytes
from stages.networks.repeatable import repeatable
from stages.networks.transfer import array_for, sent_ahead

_CHUNK_VALUES = 1 << 25  # of logits or features that are computed with at once
_BYTES_OF_A_VALUE = 64  # of memory that is to be free for each: some copies in float64, and rows that stay in one half
_WORTH = 1 << 28  # N · D · K from which on a step takes a GPU less time than starting its kernels does


class OnDevice:
    """The GPU of this process; of few rows this process itself, which has summed before a GPU has begun.

    Args:
        device: as torch names it.
        worth: N · D · K from which on it is used.
        kept_bytes: of rows that stay there; by default half of the memory that is free.
    """

    def __init__(self, device: str, worth: int = _WORTH, kept_bytes: int | None = None) -> None:
        self._device, self._worth, self._kept_bytes = torch.device(device), worth, kept_bytes

    @contextmanager
    def rows(self, given: GivenRows, n_classes: int) -> Iterator[RowsIn]:
        """As `stages.heads.summing.Summing`."""
        n_rows, dim = given.features.shape
        if n_rows * dim * n_classes < self._worth:
            with HERE.rows(given, n_classes) as here:
                yield here
            return
        chunk = _chunk_rows(self._device, max(dim, n_classes))
        with repeatable(self._device), one_blas_thread():  # the solver's own steps are summed here
            yield lambda dtype: _DeviceRows(given, self._device, dtype, chunk, self._kept_bytes)

    def log_likelihood(self, head: LinearHead, features: Rows2D, labels: NDArray[np.int32]) -> NDArray[np.float64]:
        """As `stages.heads.summing.Summing`."""
        if len(labels) * head.weight.size < self._worth:
            return HERE.log_likelihood(head, features, labels)
        weight, bias = (
            torch.from_numpy(np.asarray(own, np.float32)).to(self._device) for own in (head.weight, head.bias)
        )
        chunk = _chunk_rows(self._device, max(head.weight.shape))
        likelihood = torch.empty(len(labels), dtype=torch.float64, device=self._device)
        with repeatable(self._device):
            for at, sent in _sent(features, labels, range(0, len(labels), chunk), chunk, self._device):
                rows = _standardised(sent["features"], head.standardise, torch.float32)
                logits = torch.addmm(bias, rows, weight.T)
                own = logits.gather(1, sent["labels"])[:, 0].double()
                largest = logits.amax(1, keepdim=True)
                total = (logits - largest).exp_().sum(1, dtype=torch.float64).log_()
                likelihood[at] = own - largest[:, 0].double() - total
        found: NDArray[np.float64] = likelihood.cpu().numpy()
        return found


class _DeviceRows:
    """As `stages.heads.sums.SummedRows`."""

    def __init__(
        self, given: GivenRows, device: torch.device, dtype: FloatType, chunk: int, kept_bytes: int | None
    ) -> None:
        self.shape, self.dtype = given.features.shape, dtype
        self._given, self._device, self._chunk = given, device, chunk
        self._torch_dtype = torch.float64 if dtype is np.float64 else torch.float32
        n_rows, dim = self.shape
        fit = (free_bytes(device) // 2 if kept_bytes is None else kept_bytes) // (dim * np.dtype(dtype).itemsize)
        self._starts = range(0, n_rows, chunk)
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._kept.extend(self._read(range(0, n_rows if fit >= n_rows else fit // chunk * chunk, chunk)))

    @property
    def whole(self) -> bool:
        """Whether all are there."""
        return len(self._kept) == len(self._starts)

    def turn(self, basis: NDArray[np.float64]) -> None:
        """Rows that are all there, and stay as coordinates along directions ``[D, r]``."""
        along = torch.from_numpy(basis).to(self._device, self._torch_dtype)
        for number, (rows, labels) in enumerate(self._kept):
            self._kept[number] = rows @ along, labels
        self.shape = self.shape[0], basis.shape[1]

    def all(self) -> NDArray[np.float64]:
        """All of them."""
        found: NDArray[np.float64] = torch.cat([rows.double() for rows, _ in self._chunks()]).cpu().numpy()
        return found

    def sums(self, of: BlockSum) -> Sums:
        """Over all rows."""
        compute = _on_device(of, self._device)
        totals = [torch.from_numpy(zeros).to(self._device) for zeros in of.zeros()]
        for rows, labels in self._chunks():
            for total, own in zip(totals, compute(rows, labels), strict=True):
                total += own
        return [total.cpu().numpy() for total in totals]

    def _chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from self._kept
        yield from self._read(self._starts[len(self._kept) :])

    def _read(self, starts: range) -> Iterator[tuple[Tensor, Tensor]]:
        for _, sent in _sent(self._given.features, self._given.labels, starts, self._chunk, self._device):
            yield _standardised(sent["features"], self._given.standardise, self._torch_dtype), sent["labels"]


def _chunk_rows(device: torch.device, width: int) -> int:
    """Rows that are computed with at once: beside those that stay, a few copies of them fit into what is free."""
    most = _CHUNK_VALUES if device.type != "cuda" else min(_CHUNK_VALUES, free_bytes(device) // _BYTES_OF_A_VALUE)
    return max(1, most // width)


def _sent(
    features: Rows2D, labels: NDArray[np.integer], starts: range, chunk: int, device: torch.device
) -> Iterator[tuple[slice, Mapping[str, Tensor]]]:
    """Chunks of rows as they are and of labels ``[n, 1]``, with where they stand."""
    new = array_for(device)
    places = [slice(start, min(start + chunk, len(labels))) for start in starts]

    def read(at: slice) -> Mapping[str, Tensor]:
        rows = np.asarray(features[at])
        held = new(rows.shape, rows.dtype)
        held[:] = rows
        return {"features": torch.from_numpy(held), "labels": torch.from_numpy(labels[at, None].astype(np.int64))}

    yield from zip(places, sent_ahead((partial(read, at) for at in places), device), strict=True)


def _standardised(rows: Tensor, by: Standardisation | None, dtype: torch.dtype) -> Tensor:
    """As `stages.heads.affine.Standardisation` does it."""
    rows = rows.to(dtype)
    if by is None:
        return rows
    mean, scale = (torch.from_numpy(np.asarray(own)).to(rows) for own in by)
    return rows.sub_(mean).div_(scale)


_Compute = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


@singledispatch
def _on_device(of: BlockSum, _device: torch.device) -> _Compute:
    """What `of` computes, of rows ``[n, D]`` and labels ``[n, 1]`` on a device."""
    raise NotImplementedError(f"{type(of).__name__} has no sum on a device")


@_on_device.register
def _(of: ProductSum, _device: torch.device) -> _Compute:
    return lambda rows, _labels: (rows.T @ rows,)


@_on_device.register
def _(of: HeadLossSum, device: torch.device) -> _Compute:
    weight, bias = (torch.from_numpy(own).to(device) for own in (of.weight, of.bias))
    return partial(_loss, weight, bias)


def _loss(weight: Tensor, bias: Tensor, rows: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    logits = torch.addmm(bias, rows, weight)
    if len(bias) == 1:  # the difference of two logits, one on either side of 0
        logits = logits * torch.tensor([-0.5, 0.5], dtype=logits.dtype, device=logits.device)
    logits -= logits.amax(1, keepdim=True)
    own = logits.gather(1, labels).sum(dtype=torch.float64)
    probability = logits.exp_()
    total = probability.sum(1, keepdim=True)
    loss = total.log().sum(dtype=torch.float64) - own
    probability /= total
    curvature = (len(labels) - probability.square().sum(dtype=torch.float64)) / probability.shape[1]
    probability.scatter_add_(1, labels, torch.full_like(total, -1).expand_as(labels))
    by_logit = probability[:, -len(bias) :]
    return torch.stack([loss, curvature]), by_logit.T @ rows, by_logit.sum(0, dtype=torch.float64)
