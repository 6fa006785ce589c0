"""Rows of a cache's taps, the tokens after several blocks or stages, that are taken without being read."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cache import FeatureCache
from stages.errors import InputError
from stages.id_data.lazy import Floats, RowNumbers

TapToken = Literal["auto", "cls", "mean"]


class TapRows:
    """Tokens after L blocks or stages of n rows, read when some of the layers are asked for.

    Args:
        read: gives rows by their numbers, ``[m, L, 2, D]`` (class token, mean patch) or ``[m, L, D]`` (the mean), of
            any float type; may be called by several threads.
        n: rows that it has.
        layers: L numbers of the blocks or stages, as `cache.FeatureSpec.taps`.
        widths: L numbers of features; what is beyond them is no feature.
        tokens: 2 or 1.

    >>> taps = TapRows.of(np.arange(12.0).reshape(1, 2, 2, 3), layers=(3, 12))
    >>> taps[:1].read([12])[0].tolist(), taps.read([3, 12], token="mean")[1].tolist()
    ([[6.0, 7.0, 8.0]], [[9.0, 10.0, 11.0]])
    """

    def __init__(
        self,
        read: Callable[[RowNumbers], NDArray[np.floating]],
        n: int,
        layers: Sequence[int],
        widths: Sequence[int],
        tokens: int,
    ) -> None:
        self._read = read
        self._numbers = np.arange(n)
        self.layers = tuple(layers)
        self.widths = dict(zip(layers, widths, strict=True))
        self.tokens = tokens

    @classmethod
    def of(cls, values: NDArray[np.floating], layers: Sequence[int], widths: Sequence[int] | None = None) -> "TapRows":
        """Rows of an array in memory; all of its layers are as wide as it is where nothing else is said."""
        widths = (values.shape[-1],) * len(layers) if widths is None else widths
        return cls(lambda numbers: values[numbers], len(values), layers, widths, values.ndim - 2)

    @classmethod
    def cached(cls, cache: FeatureCache) -> "TapRows | None":
        """All rows of a cache; None where it has no taps."""
        spec = cache.spec
        if not spec.taps:
            return None
        return cls(
            lambda numbers: cache.read("taps", numbers), cache.n_rows, spec.taps, spec.tap_widths, spec.tap_tokens
        )

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, rows: Any) -> "TapRows":
        """Some rows, by number, by mask or by slice."""
        taken = TapRows(self._read, 0, self.layers, tuple(self.widths.values()), self.tokens)
        taken._numbers = self._numbers[rows]
        return taken

    def token(self, asked: TapToken) -> Literal["cls", "mean"]:
        """Which token that is: ``"auto"`` is the class token where there is one.

        Raises:
            InputError: these taps have no class token.
        """
        if asked == "cls" and self.tokens < 2:
            raise InputError('token: "cls" given, these taps have no class token: give "mean"')
        if asked == "auto":
            return "cls" if self.tokens == 2 else "mean"
        return asked

    def check_layers(self, asked: Sequence[int]) -> None:
        """Refuse layers that are not there.

        Raises:
            InputError: naming them, and those that are.
        """
        if absent := sorted({*asked} - {*self.layers}):
            known = ", ".join(map(str, self.layers))
            raise InputError(f"layers: {absent[0]} given, the cache has taps after {known}: give some of them")

    def read(self, layers: Sequence[int], token: TapToken = "auto") -> list[Floats]:
        """Tokens after some of the layers, ``[n, D]`` float32 each, of one reading; raises as `check_layers` does."""
        self.check_layers(layers)
        values, place = self._read(self._numbers), 0 if self.token(token) == "cls" else self.tokens - 1
        found = []
        for layer in layers:
            own = values[:, self.layers.index(layer)]
            own = own[:, place] if self.tokens == 2 else own
            found.append(np.asarray(own[:, : self.widths[layer]], dtype=np.float32))
        return found
