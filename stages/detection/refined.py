"""A trained mixture's features as a subject: they are computed once a set and kept.

So that another k or score costs a search and some arithmetic.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cache import CacheMismatchError, FeatureCache
from stages.context import Context
from stages.detection.frozen import FrozenFeatures
from stages.detection.sources import BackboneSource, MixtureFolder
from stages.detection.subject import FoldRows, Head, SetRows, Subject, SubjectKey, logits_by_head
from stages.errors import InputError
from stages.files.documents import read_document
from stages.heads.choose import WhichHead, final_head, fold_head, load_heads, part_head
from stages.id_data.lazy import LazyArray, Rows2D
from stages.id_data.rows import Labels
from stages.id_data.split import Rows
from stages.mixture.refined import LEFT_OUT, Refined, Routes, load_refined, part_bank, refined_identity, refined_path
from stages.mixture.storage import load_mixture, load_trained_heads, run_folder

if TYPE_CHECKING:  # torch, for those alone whose features are not there yet
    from stages.mixture.model import MixtureOfFeatureExperts


class RefinedFeatures:
    """A trained mixture's refined class embedding, in the routed expert's subspace.

    Its rows know what the backbone's own features say of them.
    """

    def __init__(self, source: BackboneSource, folder: MixtureFolder, context: Context = Context()) -> None:
        self.source = source
        self.folder = folder
        self.frozen = FrozenFeatures(source)
        self._context = context
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
                FoldRows(
                    self._bank_rows(name, bank, fold.train, fold_head(index)),
                    self._rows(held, data.held_out_labels, fold_head(index), fold.select),
                    self._rows(held, data.held_out_labels, fold_head(index), fold.calibrate),
                    self._second_of(name, held, fold.calibrate, fold_head(index)) if top2 else None,
                )
            )
        key = SubjectKey(self.source.name, "mofe", self.folder.variant, self.folder.seed)
        final, select = self.bank("final"), runs[0].select
        if data.split.cross_fitted:
            select = self._rows(final, data.held_out_labels, final_head, data.split.select)
        has_others, heads = runs[0].calibrate.others is not None, ("trained", "refit", "refit-group")
        rows, parts = self._bank_rows("final", final, data.split.final_train, final_head), tuple(self._parts(top2))
        strengths = {"refit": self._refit.strength}
        found = Subject(key, heads, tuple(runs), rows, select, self.n_experts, has_others, parts, strengths)
        return found.beside(self.frozen.subject())

    def _parts(self, top2: bool) -> Iterator[FoldRows]:
        """Runs that calibrate under cross-fitting: through a fold's experts, with banks of all rows but the part's."""
        data = self.source.data
        split, labels = data.split, data.train_labels
        if not split.parts:
            return
        stored = [(name, self.bank(name), self._stored(name, LEFT_OUT, self._left_out)) for name, _ in data.runs()]
        for index, part in enumerate(split.parts):
            name, routed, left_out = stored[part.fold]
            bank, pick = part_bank(split, part, routed, left_out), part_head(index)
            yield FoldRows(
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
        return replace(self._rows(refined, labels, final_head), frozen=self.frozen.rows(cache, labels))

    def passing_rows(self, cache: FeatureCache, labels: Labels) -> SetRows:
        """The same of a cache that is thrown away, as of new images: nothing is kept."""
        from stages.mixture.refine import refine

        return self._rows(refine(self.mixture(), cache, context=Context(device="auto")), labels, final_head)

    def second(self, name: str, cache: FeatureCache, labels: Labels) -> SetRows:
        """The same rows through the router's second choice, for top-2 routing."""
        routed = self.refined("final", f"sets/{name}", cache)
        rows = self._second_rows(self.refined("final", f"top2/{name}", cache, routed.runner_up), labels, final_head)
        return replace(rows, frozen=self.frozen.rows(cache, labels))

    def _second_of(
        self, run: str, held: Refined, calibrate: Rows, pick: WhichHead, some: Rows | None = None
    ) -> SetRows:
        """A fold's calibrate rows, or some of them, through the router's second choice."""
        data = self.source.data
        refined = self.refined(run, "top2-calibrate", data.held_out, held.runner_up[calibrate], calibrate)
        own = np.arange(len(calibrate)) if some is None else np.searchsorted(calibrate, some)
        return self._second_rows(refined, data.held_out_labels[calibrate], pick, own)

    def _second_rows(self, refined: Refined, labels: Labels, pick: WhichHead, rows: Rows | None = None) -> SetRows:
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
            from stages.mixture.refine import refine_to

            stored = refine_to(path, identity, self.mixture(run), cache, routes, self._context)
        return stored

    def mixture(self, run: str = "final") -> "MixtureOfFeatureExperts":
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

    def _bank_rows(self, run: str, refined: Refined, rows: Rows, pick: WhichHead) -> SetRows:
        return self._bank_of(run, rows, LazyArray.of(refined.features, rows), refined.expert[rows], pick)

    def _bank_of(self, run: str, rows: Rows, features: Rows2D, expert: NDArray[np.int64], pick: WhichHead) -> SetRows:
        """Rows of id-train, by their numbers, to fit on with the heads of a run."""
        heads: dict[str, Head] = {
            "trained": load_trained_heads(run_folder(self.folder.path, run)),
            "refit": pick(self._refit).on_raw_features(),
            "refit-group": tuple(pick(heads).on_raw_features() for heads in self._group_heads),
        }
        return SetRows(features, self.source.data.train_labels[rows], {}, expert, heads=heads)

    def _rows(self, refined: Refined, labels: Labels, pick: WhichHead, rows: Rows | None = None) -> SetRows:
        """Rows, all by default, of a set with these labels."""
        features = LazyArray.of(refined.features, rows)
        logits = {
            "trained": LazyArray.of(refined.logits, rows),
            **logits_by_head(features, self.row_heads(pick), refined.expert),
        }
        some = slice(None) if rows is None else rows
        others = refined.others[some] if refined.others.shape[1] else None
        other = refined.other[some] if self.n_experts > 1 else None
        return SetRows(features, labels[some], logits, refined.expert[some], refined.confidence[some], others, other)

    def row_heads(self, pick: WhichHead = final_head) -> dict[str, Head]:
        """Linear heads that rows are classified by, beside the experts' own; those of the final model by default."""
        return {"refit": pick(self._refit), "refit-group": tuple(pick(heads) for heads in self._group_heads)}
