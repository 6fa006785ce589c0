"""Who sums over a linear head's rows: `Here` is this process; a GPU or other processes may (`stages.heads.places`)."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from stages.heads.affine import LinearHead
from stages.heads.sums import (
    BLOCK,
    FloatType,
    GivenRows,
    StandardisedRows,
    SummedElsewhere,
    SummedRows,
    blocks,
    one_blas_thread,
)
from stages.id_data.lazy import Rows2D
from stages.machine import usable_cores

RowsIn = Callable[[FloatType], SummedRows]  # rows, in the precision that they are computed with in


class Summing(Protocol):
    """Who sums over rows to fit a head, and says how likely a head finds others."""

    def rows(self, given: GivenRows, n_classes: int, /) -> AbstractContextManager[RowsIn]:
        """Rows of K classes, for as long as one head is fitted."""
        ...

    def log_likelihood(self, head: LinearHead, features: Rows2D, labels: NDArray[np.int32], /) -> NDArray[np.float64]:
        """Log p(label) of each row ``[N, D]``, ``[N]``; higher is better."""
        ...


class Here:
    """The threads of this process, in blocks whose sums do not depend on how many they are."""

    @contextmanager
    def rows(self, given: GivenRows, n_classes: int) -> Iterator[RowsIn]:
        """As `Summing`."""
        with self._elsewhere(given) as elsewhere, one_blas_thread():
            cores = min(usable_cores(), -(-len(given.labels) // BLOCK))
            with nullcontext() if cores == 1 else ThreadPoolExecutor(cores) as pool:
                yield lambda dtype: StandardisedRows(given, pool, cores, dtype, elsewhere)

    def _elsewhere(self, _given: GivenRows) -> AbstractContextManager[SummedElsewhere | None]:
        """Who sums, to the same bits, over rows that memory does not keep."""
        return nullcontext()

    def log_likelihood(self, head: LinearHead, features: Rows2D, labels: NDArray[np.int32]) -> NDArray[np.float64]:
        """As `Summing`."""
        likelihood = np.empty(len(labels))
        with one_blas_thread():
            for block in blocks(len(labels)):
                logits = head.logits(np.asarray(features[block], dtype=np.float32)).astype(np.float64)
                own = labels[block, None].astype(np.int64)
                likelihood[block] = np.take_along_axis(log_softmax(logits, axis=1), own, axis=1)[:, 0]
        return likelihood


HERE: Summing = Here()
