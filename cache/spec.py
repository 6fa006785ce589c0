"""FeatureSpec: what a cached feature is. Equal specs give equal fingerprints; a different one is another cache."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from math import isqrt, prod
from typing import Any, Self

import numpy as np

from cache.files import check, check_fields
from cache.fingerprint import canonical_json, fingerprint

_KINDS: dict[str, type] = {
    "backbone": str,
    "weights_sha": str,
    "transform": dict,
    "image_size": int,
    "expert_blocks": int,
    "patches": str,
    "dtype": str,
    "cls_dim": int,
    "tap_dim": int,
    "n_registers": int,
    "grid": list,
    "compute": dict,
    "semantics": int,
    "origin": str,
    "n_logits": int,
    "taps": list,
    "tap_widths": list,
    "tap_tokens": int,
}
# Left out where they say nothing: older caches do not have them.
_UNSAID: dict[str, Any] = {"origin": "", "n_logits": 0, "taps": [], "tap_widths": [], "tap_tokens": 0}
_LARGEST = 1 << 24  # no dimension of a real feature comes near; keeps products of hostile ones far from overflow


@dataclass(frozen=True)
class FeatureSpec:
    """All that the value of a feature depends on, besides the image itself.

    Attributes:
        backbone: name of the network.
        weights_sha: digest of its tensors.
        transform: what happens to an image before the network sees it; any JSON object.
        image_size: side of the network's input, in pixels.
        expert_blocks: how many blocks (ViT) or stages (CNN) stand after the tap.
        patches: ``"full"``, ``"pool:G"`` (adaptive average to G x G) or ``"none"``.
        dtype: ``"float16"`` or ``"float32"``, as stored.
        cls_dim: D of ``cls``.
        tap_dim: D' of ``tap_cls``, ``registers`` and ``patches``.
        n_registers: R, register tokens per image.
        grid: (h, w) of the stored patches, row-major; (0, 0) where there are none.
        compute: precision, device kind, batch and the like, where they change bits; any JSON object.
        semantics: version of the extraction's meaning.
        origin: where features come from that were not extracted here, in their owner's words; empty for others. What
            is not known of such features is empty or 0: network, weights, image size, tap.
        n_logits: C of the ``logits`` that came with them; 0 where none did.
        taps: blocks (ViT) or stages (CNN) after which ``taps`` are read, counted from 1, ascending; empty where none.
        tap_widths: features of each; the dataset is as wide as the widest, zeros beyond.
        tap_tokens: 2, class token and mean patch, or 1, the mean alone; 0 where there are no taps.

    Raises:
        CacheInvalidError: for values that no feature can have.
    """

    backbone: str
    weights_sha: str
    transform: Mapping[str, Any]
    image_size: int
    expert_blocks: int
    patches: str
    dtype: str
    cls_dim: int
    tap_dim: int
    n_registers: int
    grid: tuple[int, int]
    compute: Mapping[str, Any]
    semantics: int
    origin: str = ""
    n_logits: int = 0
    taps: tuple[int, ...] = ()
    tap_widths: tuple[int, ...] = ()
    tap_tokens: int = 0

    def __post_init__(self) -> None:
        # One JSON round trip makes a private copy in which tuples are lists, so that equal means equal after reading.
        body = json.loads(canonical_json({field.name: getattr(self, field.name) for field in fields(self)}))
        check_fields(body, _KINDS, "spec")
        object.__setattr__(self, "transform", body["transform"])
        object.__setattr__(self, "compute", body["compute"])
        for name in ("grid", "taps", "tap_widths"):
            object.__setattr__(self, name, tuple(body[name]))
        known = bool(self.backbone and self.weights_sha) or bool(self.origin)
        check(known, "spec: backbone and weights_sha must not be empty")
        least = 0 if self.origin else 1
        for name, low in (("image_size", least), ("expert_blocks", least), ("cls_dim", 1), ("tap_dim", least)):
            check(low <= body[name] <= _LARGEST, f"spec: {name} is {body[name]}, must be {low} to {_LARGEST}")
        for name in ("n_registers", "semantics", "n_logits"):
            check(0 <= body[name] <= _LARGEST, f"spec: {name} is {body[name]}, must be 0 to {_LARGEST}")
        check(self.dtype in ("float16", "float32"), f'spec: dtype is {self.dtype!r}, must be "float16" or "float32"')
        pooled = re.fullmatch(r"pool:([1-9][0-9]{0,3})", self.patches)
        known = self.patches in ("full", "none") or pooled is not None
        check(known, f'spec: patches is {self.patches!r}, must be "full", "pool:G" or "none"')
        grid_ok = len(self.grid) == 2 and all(type(side) is int and 0 <= side <= _LARGEST for side in self.grid)
        check(grid_ok, f"spec: grid is {body['grid']}, must be two sides (h, w)")
        fits = self.grid == (int(pooled[1]),) * 2 if pooled else (prod(self.grid) > 0) == (self.patches == "full")
        check(fits and (self.patches != "none" or self.grid == (0, 0)), f"spec: grid {self.grid} with {self.patches!r}")
        tokens = self.n_registers or prod(self.grid)
        check(bool(self.tap_dim or not tokens), "spec: tap_dim is 0, but there are registers or patches")
        self._check_taps()

    def _check_taps(self) -> None:
        sizes = all(type(n) is int and 1 <= n <= _LARGEST for n in (*self.taps, *self.tap_widths))
        ascending = sizes and list(self.taps) == sorted(set(self.taps))
        check(ascending, f"spec: taps {list(self.taps)} must be ascending numbers from 1, tap_widths at least 1")
        fits = len(self.tap_widths) == len(self.taps) and self.tap_tokens in ((1, 2) if self.taps else (0,))
        check(fits, f"spec: {len(self.taps)} taps with {len(self.tap_widths)} tap_widths, {self.tap_tokens} tap_tokens")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all fields, in hex."""
        return fingerprint(self.to_dict())

    def datasets(self) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """Shape of a row and dtype of every feature that a shard stores, by name."""
        shapes: dict[str, tuple[int, ...]] = {"cls": (self.cls_dim,)}
        if self.tap_dim:
            shapes["tap_cls"] = (self.tap_dim,)
        if self.n_registers:
            shapes["registers"] = (self.n_registers, self.tap_dim)
        if self.patches != "none":
            shapes["patches"] = (prod(self.grid), self.tap_dim)
        if self.taps:
            shapes["taps"] = (len(self.taps), *((2,) if self.tap_tokens == 2 else ()), max(self.tap_widths))
        stored = {name: (shape, np.dtype(self.dtype).newbyteorder("<")) for name, shape in shapes.items()}
        if self.n_logits:  # float16 would move an energy by a thousandth
            stored["logits"] = ((self.n_logits,), np.dtype("<f4"))
        return stored

    @property
    def row_bytes(self) -> int:
        """Bytes of one image's features."""
        return sum(prod(shape) * dtype.itemsize for shape, dtype in self.datasets().values())

    def without_taps(self) -> "FeatureSpec":
        """The same features but for ``taps``: no other depends on them."""
        return replace(self, taps=(), tap_widths=(), tap_tokens=0)

    def first_difference(self, asked: "FeatureSpec") -> str | None:
        """The first field in which this cached spec differs from the one asked for, or None.

        For example ``"image_size: 224 in the cache, 518 asked"``.
        """
        return first_difference(self.to_dict(), asked.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields; those that say nothing are left out."""
        body = {field.name: getattr(self, field.name) for field in fields(self)}
        body |= {name: list(body[name]) for name in ("grid", "taps", "tap_widths")}
        return {name: value for name, value in body.items() if name not in _UNSAID or value != _UNSAID[name]}

    @classmethod
    def from_dict(cls, body: Any) -> Self:
        """Parse and check what ``to_dict`` gave.

        Raises:
            CacheInvalidError: for unknown, missing or impossible fields.
        """
        return cls(**check_fields(_UNSAID | body if isinstance(body, dict) else body, _KINDS, "spec"))


def first_difference(cached: Any, asked: Any, name: str = "") -> str | None:
    """Where two JSON values first differ, as ``"transform.mean: 0.5 in the cache, 0.4 asked"``; None if nowhere."""
    if isinstance(cached, Mapping) and isinstance(asked, Mapping):
        for key in dict.fromkeys((*cached, *asked)):
            inner = f"{name}.{key}" if name else str(key)
            if difference := first_difference(cached.get(key), asked.get(key), inner):
                return difference
        return None
    if canonical_json(cached) == canonical_json(asked):
        return None
    return f"{name}: {_short(cached)} in the cache, {_short(asked)} asked"


def _short(value: Any) -> str:
    text = "nothing" if value is None else canonical_json(value).decode()
    return text if len(text) <= 80 else f"{text[:77]}..."


def square_grid(count: int) -> tuple[int, int]:
    """``(h, w)`` of patch tokens of which only their number is known: a square, or one row.

    >>> square_grid(16), square_grid(6)
    ((4, 4), (1, 6))
    """
    side = isqrt(count)
    return (side, side) if side * side == count else (1, count)
