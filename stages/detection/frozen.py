"""The backbone's own features as a subject: its class embedding, and its patch tokens where patches are cached.

No image is opened and no backbone runs; its last block does where patch tokens are read.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cache import FeatureCache
from stages.detection.sources import BackboneSource
from stages.detection.subject import FoldRows, Head, SetRows, Subject, SubjectKey, logits_by_head
from stages.errors import InputError
from stages.heads.affine import LinearHead
from stages.heads.choose import FittedHeads, WhichHead, final_head, fold_head, part_head
from stages.id_data.lazy import LazyArray
from stages.id_data.rows import Labels, lazy_rows
from stages.id_data.split import Rows
from stages.id_data.taps import TapRows

if TYPE_CHECKING:  # torch, for those alone who read patch tokens
    from stages.networks.ends import BackboneEnd

_FINETUNE_HEAD = "finetune"
_GIVEN_HEAD = "given"  # logits that came with features


class PatchTokens:
    """Patch tokens after the final norm, ``[n, P, D]``: made from cached tap tokens when they are read as an array.

    Rows of it are taken without reading anything; ``numpy.asarray(tokens[:16])`` reads 16 images.

    Args:
        end: gives the untrained end of the backbone that filled the cache.
        cache: of a set, with patches.
        rows: row numbers of the cache; all by default.
    """

    def __init__(self, end: "Callable[[], BackboneEnd]", cache: FeatureCache, rows: Rows | None = None) -> None:
        self._end = end
        self._cache = cache
        self._rows = np.arange(cache.n_rows) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: NDArray[np.integer] | NDArray[np.bool_] | slice) -> "PatchTokens":
        return PatchTokens(self._end, self._cache, self._rows[rows])

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[np.float32]:
        import torch

        with torch.inference_mode():
            return self._read().astype(dtype or np.float32, copy=False)

    def _read(self) -> NDArray[np.floating]:
        from stages.id_data.tokens import read_tokens
        from stages.mixture.refine import REFINE_BATCH

        end = self._end()
        blocks = [self._rows[start : start + REFINE_BATCH] for start in range(0, max(1, len(self)), REFINE_BATCH)]
        try:
            tokens = [end.patch_tokens(read_tokens(self._cache, block)).numpy() for block in blocks]
        except (RuntimeError, ValueError, AssertionError) as error:  # as the architecture's own code has it
            spec = self._cache.spec
            if spec.patches == "full":
                raise
            raise cannot_read_patches(spec.backbone, spec.patches) from error
        return np.concatenate(tokens)


def cannot_read_patches(backbone: str, patches: str) -> InputError:
    """What to say of patch tokens whose network does not run on those that are cached."""
    return InputError(
        f"score.scores: patch tokens behind the end of {backbone} are asked for, which cannot run on patches = "
        f'"{patches}": extract with patches = "full", or leave the scores of patches out'
    )


class FrozenFeatures:
    """The backbone's own class embedding, and its patch tokens where patches are cached."""

    def __init__(self, source: BackboneSource) -> None:
        self.source = source
        heads = {"probe": source.probe}
        if source.finetuned_head is not None:
            head = LinearHead(*source.finetuned_head)
            heads[_FINETUNE_HEAD] = FittedHeads((head,) * len(source.data.split.folds), head, 0.0, {})
        self._heads = heads

    def subject(self) -> Subject:
        """Banks and held-out rows of every fold."""
        data = self.source.data
        train = self._cached(data.train)
        held = train if data.held_out is data.train else self._cached(data.held_out)
        runs = tuple(
            FoldRows(
                self._bank(train, fold.train, fold_head(index)),
                self._rows(held[fold.select], data.held_out_labels[fold.select], fold_head(index)),
                self._rows(held[fold.calibrate], data.held_out_labels[fold.calibrate], fold_head(index)),
            )
            for index, fold in enumerate(data.split.folds)
        )
        key, heads = SubjectKey(self.source.name, "cls", "", self.source.seed), (*self._heads, *train.given)
        if not data.split.cross_fitted:  # the only fold's model is the final one: its bank need not be in memory twice
            return Subject(
                key, heads, runs, runs[0].bank, runs[0].select, strengths=self._strengths, pseudo=self._pseudo()
            )
        # Rows that are held out from models are of id-train here.
        select, labels = data.split.select, data.train_labels
        parts = tuple(
            FoldRows(
                self._bank(train, data.split.without(part), part_head(index)),
                self._rows(train[select], labels[select], part_head(index)),
                self._rows(train[part.rows], labels[part.rows], part_head(index)),
            )
            for index, part in enumerate(data.split.parts)
        )
        bank, rows = (
            self._bank(train, data.split.final_train, final_head),
            self._rows(train[select], labels[select], final_head),
        )
        return Subject(key, heads, runs, bank, rows, parts=parts, strengths=self._strengths, pseudo=self._pseudo())

    def _pseudo(self) -> dict[str, SetRows]:
        """Images that play OOD, by kind: the folder of their ids."""
        cache = self.source.pseudo
        if cache is None or cache.spec.n_logits:
            return {}
        cached, kinds = self._cached(cache), np.array([name.partition("/")[0] for name in cache.ids.tolist()])
        labels = np.full(cache.n_rows, -1, np.int32)
        rows = {kind: np.flatnonzero(kinds == kind).astype(np.int64) for kind in np.unique(kinds).tolist()}
        return {kind: self._rows(cached[some], labels[some], final_head) for kind, some in rows.items()}

    @property
    def _strengths(self) -> dict[str, float]:
        """Of the heads that were fitted on ID rows alone, and not with the backbone."""
        return {name: fitted.strength for name, fitted in self._heads.items() if fitted.strength}

    def rows(self, cache: FeatureCache, labels: Labels) -> SetRows:
        """A set's rows for the final model."""
        return self._rows(self._cached(cache), labels, final_head)

    def _rows(self, cached: "_CachedRows", labels: Labels, pick: WhichHead) -> SetRows:
        logits = logits_by_head(cached.features, self.row_heads(pick))
        return SetRows(cached.features, labels, logits | cached.given, patches=cached.patches, taps=cached.taps)

    def row_heads(self, pick: WhichHead = final_head) -> dict[str, Head]:
        """Linear heads that rows are classified by, those of the final model by default."""
        return {name: pick(fitted) for name, fitted in self._heads.items()}

    def _bank(self, train: "_CachedRows", rows: Rows, pick: WhichHead) -> SetRows:
        heads: dict[str, Head] = {name: pick(fitted).on_raw_features() for name, fitted in self._heads.items()}
        own, labels = train[rows], self.source.data.train_labels[rows]
        return SetRows(own.features, labels, own.given, patches=own.patches, taps=own.taps, heads=heads)

    def _cached(self, cache: FeatureCache) -> "_CachedRows":
        has_patches = "patches" in cache.spec.datasets() and self.source.network is not None
        return _CachedRows.of(cache, PatchTokens(lambda: self._end, cache) if has_patches else None)

    @cached_property
    def _end(self) -> "BackboneEnd":
        assert self.source.network is not None
        return self.source.network().end()


@dataclass(frozen=True, eq=False)
class _CachedRows:
    """``cls`` of some rows, the logits that came with it, if any did, by the name of their head; patches; taps."""

    features: LazyArray
    given: dict[str, LazyArray]
    patches: PatchTokens | None
    taps: TapRows | None

    @classmethod
    def of(cls, cache: FeatureCache, patches: PatchTokens | None) -> "_CachedRows":
        n_logits = cache.spec.n_logits
        given = {_GIVEN_HEAD: lazy_rows(cache, "logits", n_logits)} if n_logits else {}
        return cls(lazy_rows(cache, "cls", cache.spec.cls_dim), given, patches, TapRows.cached(cache))

    def __getitem__(self, rows: Rows) -> "_CachedRows":
        given = {name: logits[rows] for name, logits in self.given.items()}
        patches = None if self.patches is None else self.patches[rows]
        return _CachedRows(self.features[rows], given, patches, None if self.taps is None else self.taps[rows])
