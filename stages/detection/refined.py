"""Choices of features as detectors see them: the backbone's own (`FrozenFeatures`) or a mixture's (`RefinedFeatures`).

A `BackboneSource` is all that is on disk of one backbone. No image is opened and no backbone runs; the mixture's
refined features are computed once per set and kept, so that another k or score costs a search and some arithmetic.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray

from cache import CacheMismatchError, FeatureCache
from stages.context import Context
from stages.detection.detectors import Head, Run, SetRows, Subject, SubjectKey
from stages.errors import InputError
from stages.files.documents import read_document
from stages.heads.affine import LinearHead
from stages.heads.choose import FittedHeads, load_heads
from stages.id_data.lazy import Floats, LazyArray, RowNumbers, Rows2D
from stages.id_data.rows import IdData, Labels, lazy_rows, read_tokens
from stages.id_data.split import Rows
from stages.mixture.model import MixtureOfFeatureExperts
from stages.mixture.refine import (
    LEFT_OUT,
    REFINE_BATCH,
    Refined,
    Routes,
    load_refined,
    part_bank,
    refine,
    refine_to,
    refined_identity,
    refined_path,
)
from stages.mixture.storage import load_mixture, load_trained_heads, run_folder
from stages.networks.ends import BackboneEnd
from stages.progress import Progress

if TYPE_CHECKING:
    from stages.networks.backbone import Backbone

_FINETUNE_HEAD = "finetune"
_GIVEN_HEAD = "given"  # logits that came with features


@dataclass(frozen=True)
class TestSet:
    """A set to score: its cache, and ``id``, ``near`` or ``far``."""

    name: str
    group: str
    cache: FeatureCache


@dataclass(frozen=True)
class MixtureFolder:
    """A trained mixture on disk."""

    variant: str
    seed: int
    path: Path


@dataclass(frozen=True)
class BackboneSource:
    """All that stage three needs of one backbone.

    Attributes:
        name: ``pretrained`` or ``finetuned``.
        seed: of the fine-tune; None for the pre-trained backbone.
        data: ID features and split.
        probe: the linear probe.
        finetuned_head: weight ``[C, D]`` and bias ``[C]`` that were trained with the backbone, if it was.
        mixtures: trained on its cache.
        tests: the ID test set and the OOD sets, as this backbone sees them.
        architecture: gives the untrained network, whose end stored experts are loaded into.
        network: gives the network that the caches were made with, whose end makes patch tokens; None where there is
            none to be had.
        models: digests of all that was trained on its cache, by their bytes.
    """

    name: str
    seed: int | None
    data: IdData
    probe: FittedHeads
    finetuned_head: tuple[NDArray[np.float32], NDArray[np.float32]] | None
    mixtures: tuple[MixtureFolder, ...]
    tests: tuple[TestSet, ...]
    architecture: "Callable[[], Backbone]"
    network: "Callable[[], Backbone] | None" = None
    models: Mapping[str, str | None] = field(default_factory=dict)


class PatchTokens:
    """Patch tokens after the final norm, ``[n, P, D]``: made from cached tap tokens when they are read as an array.

    Rows of it are taken without reading anything; ``numpy.asarray(tokens[:16])`` reads 16 images.

    Args:
        end: gives the untrained end of the backbone that filled the cache.
        cache: of a set, with patches.
        rows: row numbers of the cache; all by default.
    """

    def __init__(self, end: Callable[[], BackboneEnd], cache: FeatureCache, rows: Rows | None = None) -> None:
        self._end = end
        self._cache = cache
        self._rows = np.arange(cache.n_rows) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: NDArray[np.integer] | NDArray[np.bool_] | slice) -> "PatchTokens":
        return PatchTokens(self._end, self._cache, self._rows[rows])

    @torch.inference_mode()
    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[np.float32]:
        end = self._end()
        blocks = [self._rows[start : start + REFINE_BATCH] for start in range(0, max(1, len(self)), REFINE_BATCH)]
        try:
            tokens = [end.patch_tokens(read_tokens(self._cache, block)).numpy() for block in blocks]
        except (RuntimeError, ValueError, AssertionError) as error:  # as the architecture's own code has it
            spec = self._cache.spec
            if spec.patches == "full":
                raise
            raise cannot_read_patches(spec.backbone, spec.patches) from error
        return np.concatenate(tokens).astype(dtype or np.float32, copy=False)


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
            Run(
                self._bank(train, fold.train, _of_fold(index)),
                self._rows(held[fold.select], data.held_out_labels[fold.select], _of_fold(index)),
                self._rows(held[fold.calibrate], data.held_out_labels[fold.calibrate], _of_fold(index)),
            )
            for index, fold in enumerate(data.split.folds)
        )
        key, heads = SubjectKey(self.source.name, "cls", "", self.source.seed), (*self._heads, *train.given)
        if not data.split.cross_fitted:  # the only fold's model is the final one: its bank need not be in memory twice
            return Subject(key, heads, runs, runs[0].bank, runs[0].select)
        # Rows that are held out from models are of id-train here.
        select, labels = data.split.select, data.train_labels
        parts = tuple(
            Run(
                self._bank(train, data.split.without(part), _of_part(index)),
                self._rows(train[select], labels[select], _of_part(index)),
                self._rows(train[part.rows], labels[part.rows], _of_part(index)),
            )
            for index, part in enumerate(data.split.parts)
        )
        bank, rows = (
            self._bank(train, data.split.final_train, _final),
            self._rows(train[select], labels[select], _final),
        )
        return Subject(key, heads, runs, bank, rows, parts=parts)

    def rows(self, cache: FeatureCache, labels: Labels) -> SetRows:
        """A set's rows for the final model."""
        return self._rows(self._cached(cache), labels, _final)

    def _rows(self, cached: "_CachedRows", labels: Labels, pick: "_Pick") -> SetRows:
        heads = {name: pick(fitted) for name, fitted in self._heads.items()}
        logits = {name: cached.features.then(head.logits, len(head.bias)) for name, head in heads.items()}
        return SetRows(cached.features, labels, logits | cached.given, patches=cached.patches)

    def _bank(self, train: "_CachedRows", rows: Rows, pick: "_Pick") -> SetRows:
        heads: dict[str, Head] = {name: pick(fitted).on_raw_features() for name, fitted in self._heads.items()}
        own, labels = train[rows], self.source.data.train_labels[rows]
        return SetRows(own.features, labels, own.given, patches=own.patches, heads=heads)

    def _cached(self, cache: FeatureCache) -> "_CachedRows":
        has_patches = "patches" in cache.spec.datasets() and self.source.network is not None
        return _CachedRows.of(cache, PatchTokens(lambda: self._end, cache) if has_patches else None)

    @cached_property
    def _end(self) -> BackboneEnd:
        assert self.source.network is not None
        return self.source.network().end()


@dataclass(frozen=True, eq=False)
class _CachedRows:
    """``cls`` of some rows, the logits that came with it, if any did, by the name of their head; patches."""

    features: LazyArray
    given: dict[str, LazyArray]
    patches: PatchTokens | None

    @classmethod
    def of(cls, cache: FeatureCache, patches: PatchTokens | None) -> "_CachedRows":
        n_logits = cache.spec.n_logits
        given = {_GIVEN_HEAD: lazy_rows(cache, "logits", n_logits)} if n_logits else {}
        return cls(lazy_rows(cache, "cls", cache.spec.cls_dim), given, patches)

    def __getitem__(self, rows: Rows) -> "_CachedRows":
        given = {name: logits[rows] for name, logits in self.given.items()}
        return _CachedRows(self.features[rows], given, None if self.patches is None else self.patches[rows])


class RefinedFeatures:
    """A trained mixture's refined class embedding, in the routed expert's subspace."""

    def __init__(self, source: BackboneSource, folder: MixtureFolder, progress: Progress) -> None:
        self.source = source
        self.folder = folder
        self._progress = progress
        about = read_document(folder.path / "mofe.json")
        if about is None:
            raise InputError(f"{folder.path} holds no trained mixture: run make train")
        if about["data"] != source.data.identity:
            raise CacheMismatchError(
                f"{folder.path}: the mixture was trained on other features or another split: run make train"
            )
        self._files, self._bank, self._left_out = about["files"], about["bank"], about["left_out"]
        heads = load_heads(folder.path, "heads", about["heads"])
        if heads is None:
            raise InputError(f"{folder.path} holds no whole heads.safetensors: run make train")
        self._refit = heads.pop("refit")
        self._group_heads = [heads[f"refit-group-{expert}"] for expert in range(len(heads))]
        self.group = np.asarray([about["groups"][name] for name in source.data.class_names])
        self.about = {"kind": about["settings"]["expert"], "parameters": about["parameters"]}
        self._mixtures: dict[str, MixtureOfFeatureExperts] = {}

    @property
    def n_experts(self) -> int:
        """E."""
        return len(self._group_heads)

    def subject(self, top2: bool = False) -> Subject:
        """Banks (training rows through their own expert) and held-out rows (routed) of every fold.

        Args:
            top2: whether the calibrate rows are wanted through the router's second choice as well.
        """
        data = self.source.data
        runs = []
        for index, (name, fold) in enumerate(data.runs()):
            bank = self.bank(name)
            held = bank if data.held_out is data.train else self.refined(name, "id-val", data.held_out)
            runs.append(
                Run(
                    self._bank_rows(name, bank, fold.train, _of_fold(index)),
                    self._rows(held, data.held_out_labels, _of_fold(index), fold.select),
                    self._rows(held, data.held_out_labels, _of_fold(index), fold.calibrate),
                    self._second_of(name, held, fold.calibrate, _of_fold(index)) if top2 else None,
                )
            )
        key = SubjectKey(self.source.name, "mofe", self.folder.variant, self.folder.seed)
        final, select = self.bank("final"), runs[0].select
        if data.split.cross_fitted:
            select = self._rows(final, data.held_out_labels, _final, data.split.select)
        has_others, heads = runs[0].calibrate.others is not None, ("trained", "refit", "refit-group")
        rows, parts = self._bank_rows("final", final, data.split.final_train, _final), tuple(self._parts(top2))
        return Subject(key, heads, tuple(runs), rows, select, self.n_experts, has_others, parts)

    def _parts(self, top2: bool) -> Iterator[Run]:
        """Runs that calibrate under cross-fitting: through a fold's experts, with banks of all rows but the part's."""
        data = self.source.data
        split, labels = data.split, data.train_labels
        if not split.parts:
            return
        stored = [(name, self.bank(name), self._stored(name, LEFT_OUT, self._left_out)) for name, _ in data.runs()]
        for index, part in enumerate(split.parts):
            name, routed, left_out = stored[part.fold]
            bank, pick = part_bank(split, part, routed, left_out), _of_part(index)
            yield Run(
                self._bank_of(name, bank.rows, bank.features, bank.expert, pick),
                self._rows(routed, labels, pick, split.select),
                self._rows(routed, labels, pick, part.rows),
                self._second_of(name, routed, split.folds[part.fold].calibrate, pick, part.rows) if top2 else None,
            )

    def rows(self, name: str, cache: FeatureCache, labels: Labels, oracle: bool = False) -> SetRows:
        """A set's rows for the final model, routed by the router, or by the true label where `oracle` is asked."""
        expert = self.group[labels].astype(np.int64) if oracle else None
        # Folders of their own: a set may be called id-train, as the bank's file is.
        refined = self.refined("final", f"oracle/{name}" if oracle else f"sets/{name}", cache, expert)
        return self._rows(refined, labels, _final)

    def passing_rows(self, cache: FeatureCache, labels: Labels) -> SetRows:
        """The same of a cache that is thrown away, as of new images: nothing is kept."""
        return self._rows(refine(self.mixture(), cache, context=Context(device="auto")), labels, _final)

    def second(self, name: str, cache: FeatureCache, labels: Labels) -> SetRows:
        """The same rows through the router's second choice, for top-2 routing."""
        routed = self.refined("final", f"sets/{name}", cache)
        return self._second_rows(self.refined("final", f"top2/{name}", cache, routed.runner_up), labels, _final)

    def _second_of(self, run: str, held: Refined, calibrate: Rows, pick: "_Pick", some: Rows | None = None) -> SetRows:
        """A fold's calibrate rows, or some of them, through the router's second choice."""
        data = self.source.data
        refined = self.refined(run, "top2-calibrate", data.held_out, held.runner_up[calibrate], calibrate)
        own = np.arange(len(calibrate)) if some is None else np.searchsorted(calibrate, some)
        return self._second_rows(refined, data.held_out_labels[calibrate], pick, own)

    def _second_rows(self, refined: Refined, labels: Labels, pick: "_Pick", rows: Rows | None = None) -> SetRows:
        gate = refined.gate[np.arange(len(refined.expert)), refined.expert]
        return replace(self._rows(refined, labels, pick, rows), confidence=gate if rows is None else gate[rows])

    def bank(self, run: str) -> Refined:
        """Refined id-train rows of one run, as training left them; features and logits stay in the file."""
        return self._stored(run, "id-train", self._bank)

    def _stored(self, run: str, name: str, digests: Mapping[str, str]) -> Refined:
        path = refined_path(self.folder.path, run, name)
        refined = load_refined(path, {"files": {path.name: digests[run]}})
        if refined is None:
            raise InputError(f"{path} is missing or damaged: delete {self.folder.path / 'mofe.json'}, run make train")
        return refined

    def refined(
        self,
        run: str,
        name: str,
        cache: FeatureCache,
        expert: NDArray[np.int64] | None = None,
        rows: Rows | None = None,
    ) -> Refined:
        """Refined rows of a set, computed where they are not kept yet; features and logits stay in the file."""
        path = refined_path(self.folder.path, run, name)
        routes = Routes(expert, rows)
        identity = refined_identity(self._weights(run), cache, routes)
        stored = load_refined(path, identity)
        if stored is None:
            stored = refine_to(path, identity, self.mixture(run), cache, routes, Context(self._progress, "auto"))
        return stored

    def mixture(self, run: str = "final") -> MixtureOfFeatureExperts:
        """The trained network of one run, loaded once."""
        if run not in self._mixtures:
            spec = self.source.data.train.spec
            # The network is built only where experts are made of its end.
            self._mixtures[run] = load_mixture(
                run_folder(self.folder.path, run), lambda: self.source.architecture().end(), spec.cls_dim, spec.tap_dim
            )
        return self._mixtures[run]

    def _weights(self, run: str) -> str:
        """SHA-256 of the weights of one run."""
        path = run_folder(self.folder.path, run) / "mofe.safetensors"
        return str(self._files[path.relative_to(self.folder.path).as_posix()])

    def _bank_rows(self, run: str, refined: Refined, rows: Rows, pick: "_Pick") -> SetRows:
        return self._bank_of(run, rows, LazyArray.of(refined.features, rows), refined.expert[rows], pick)

    def _bank_of(self, run: str, rows: Rows, features: Rows2D, expert: NDArray[np.int64], pick: "_Pick") -> SetRows:
        """Rows of id-train, by their numbers, to fit on with the heads of a run."""
        heads: dict[str, Head] = {
            "trained": load_trained_heads(run_folder(self.folder.path, run)),
            "refit": pick(self._refit).on_raw_features(),
            "refit-group": tuple(pick(heads).on_raw_features() for heads in self._group_heads),
        }
        return SetRows(features, self.source.data.train_labels[rows], {}, expert, heads=heads)

    def _rows(self, refined: Refined, labels: Labels, pick: "_Pick", rows: Rows | None = None) -> SetRows:
        """Rows, all by default, of a set with these labels."""
        refit = pick(self._refit)
        group_heads = [pick(heads) for heads in self._group_heads]

        def group_logits(features: Floats, numbers: RowNumbers) -> Floats:
            logits = np.full((len(features), len(refit.bias)), -np.inf, dtype=np.float32)
            routed = refined.expert[numbers]
            for expert, head in enumerate(group_heads):
                own = np.flatnonzero(routed == expert)
                logits[own] = head.logits(features[own])
            return logits

        features = LazyArray.of(refined.features, rows)
        logits = {
            "trained": LazyArray.of(refined.logits, rows),
            "refit": features.then(refit.logits, len(refit.bias)),
            "refit-group": features.then_by_row(group_logits, len(refit.bias)),
        }
        some = slice(None) if rows is None else rows
        others = refined.others[some] if refined.others.shape[1] else None
        other = refined.other[some] if self.n_experts > 1 else None
        return SetRows(features, labels[some], logits, refined.expert[some], refined.confidence[some], others, other)


_Pick = Callable[[FittedHeads], LinearHead]  # the head of one model among those that were fitted


def _final(heads: FittedHeads) -> LinearHead:
    return heads.final


def _of_fold(fold: int) -> _Pick:
    return lambda heads: heads.folds[fold]


def _of_part(part: int) -> _Pick:
    return lambda heads: heads.parts[part]
