"""Coordinates in which neighbours are searched: the features' own, whitened, or their principal components."""

import re
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import ArrayLike
from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from stages.id_data.lazy import Floats, LazyArray, ReadOnce, Rows2D
from stages.scorers.inputs import ROWS_AT_ONCE, ScoreInputs
from stages.scorers.neighbours.bank import HELD_BYTES
from stages.scorers.shared.components import explaining
from stages.scorers.shared.moments import Matrix, float64_rows, moments_of, whitened
from stages.scorers.shared.shrinkage import shrunk_scatter, varies

RAW = "raw"
NO_SPACE = "neighbours are those of raw features, for no two ID training rows differ"


def _share(name: str) -> float | None:
    """The share of ``"pca:0.95"``; None where that is not what it is."""
    found = re.fullmatch(r"pca:(0?\.\d+|1(?:\.0*)?)", name)
    return float(found[1]) if found and float(found[1]) > 0 else None


def _known(name: str) -> str:
    if name not in (RAW, "whitened") and _share(name) is None:
        allowed = "Input should be 'raw', 'whitened', or 'pca:' with a share of the variance, such as 'pca:0.95'"
        raise PydanticCustomError("space", allowed)
    return name


SpaceName = Annotated[str, AfterValidator(_known)]


@dataclass(frozen=True, eq=False)
class Space:
    """Coordinates of normalised features: (z / ‖z‖ − origin) · axes.

    Attributes:
        origin: [D] mean of the normalised ID training features.
        axes: [D, d].
        shrinkage: intensity with which the covariance was shrunk before it whitened; None where it is the rows' own.
        remark: what to say of the fit; empty for nothing.
    """

    origin: Matrix
    axes: Matrix
    shrinkage: float | None = None
    remark: str = ""

    @classmethod
    def of(cls, name: SpaceName, train: ScoreInputs, who: str) -> "Space | None":
        """Fitted on ID training rows, in one pass over them, or two where a covariance has to be shrunk; no labels.

        Args:
            name: ``"whitened"``: the covariance becomes the identity, shrunk first where rows are scarce
                (`stages.scorers.shared.shrinkage`). ``"pca:0.95"``: the first principal components that explain such a
                share of the variance of these rows.
            train: ID training rows of one model.
            who: the score that needs it, for messages.

        Returns:
            None for ``"raw"``.
        """
        if name == RAW:
            return None
        moments = moments_of(train, who, normalise=True, by_class=False)
        if not varies(moments.within, moments):
            return cls(np.zeros(moments.dim), np.eye(moments.dim), remark=NO_SPACE)
        if (share := _share(name)) is None:
            shrunk = shrunk_scatter(train, who, moments)
            return cls(
                moments.mean, shrunk.scatter.whitening() * np.sqrt(len(moments)), shrunk.intensity, shrunk.remark
            )
        variances, components = moments.within.spectrum()
        return cls(moments.mean, np.ascontiguousarray(components[:, : explaining(variances, share)]))

    @property
    def facts(self) -> dict[str, Any]:
        """How many coordinates, where they are fewer than features; intensity of the shrinkage."""
        dim, used = self.axes.shape
        shrunk = {} if self.shrinkage is None else {"shrinkage_intensity": self.shrinkage}
        return ({"dim_used": used} if used < dim else {}) | shrunk

    def apply(self, features: ArrayLike) -> Floats:
        """Features [n, D] in these coordinates, [n, d] float32; computed in float64.

        Raises:
            InputError: another D, NaN or inf.
        """
        rows = float64_rows(features, True, len(self.origin))
        rows -= self.origin
        return np.ascontiguousarray(whitened(rows, self.axes), dtype=np.float32)


def queries_in(space: Space | None, features: np.ndarray) -> np.ndarray:
    """Rows to search for, [n, D], as the bank of that space has them."""
    return features if space is None else space.apply(features)


def bank_in(space: Space | None, features: Rows2D | ReadOnce) -> Rows2D | ReadOnce:
    """Rows to search in, [n, D], in a space: computed here, or, of more than are held, when they are read."""
    if space is None:
        return features
    n, dim = len(features), space.axes.shape[1]
    rows = LazyArray(lambda numbers: space.apply(np.asarray(features[numbers])), n, dim)
    if 4 * rows.size > HELD_BYTES:
        return rows
    return np.concatenate([np.asarray(rows[start : start + ROWS_AT_ONCE]) for start in range(0, n, ROWS_AT_ONCE)])
