"""The paper's Figure 5: ID and OOD features on a plane, before and after the experts.

Two ways to flatten them. PCA is fitted on id-train alone, so that OOD images have no say in the plane. t-SNE (van der
Maaten and Hinton, JMLR 2008) has no fit without the points that it shows; it is seeded. Rows are divided by their
length first, as kNN does, and a seeded few of each set are shown.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.report.figures import Points, scatter_panel
from pipeline.report.study import ReportedStudy
from stages.files.documents import read_document
from stages.id_data.lazy import Floats
from stages.mixture.refined import load_refined, refined_path
from stages.progress import Progress
from stages.scorers.shared.arrays import l2_normalise

_FITTED = 2000  # rows of id-train that PCA is fitted on
_SHOWN_ID, _SHOWN_OOD = 300, 600  # dots, of all OOD sets together
_PERPLEXITY = 30
_AXES = 2
_DOT = 3  # points


def feature_maps(study: ReportedStudy, progress: Progress) -> dict[str, Any]:
    """Panels of the plane before and after the experts of the recommended mixture, or why there are none."""
    id_train, oods = study.evidence.id_train, [ood for ood, _ in study.oods]
    if study.evidence.caches and next(iter(study.evidence.caches.values())).spec.cls_dim < _AXES:
        return {"panels": [], "why": "one value a row needs no plane"}
    missing = [name for name in (id_train, study.id_test, *oods) if name not in study.evidence.caches]
    if missing:
        return {"panels": [], "why": f"no cached features of {', '.join(filter(None, missing))}"}
    rows = _rows(study)
    panels, notes = [], []
    for title, features in _stages(study, rows):
        if features is None:
            notes.append(f"{title.lower()}, the refined features are not kept any more")
            continue
        shown = {name: own for name, own in features.items() if name != id_train}
        for way, flat in (("PCA fitted on ID", _pca(features[id_train], shown)), ("t-SNE", _tsne(shown))):
            dots = [Points(colour, flat[name], _DOT) for name, colour in _colours(study).items()]
            panels.append({"title": f"{title}, {way}", "svg": scatter_panel(f"{title}, {way}", dots)})
        progress.advance()
    return {
        "panels": panels,
        "why": "; ".join(notes),
        "n_id": len(rows[study.id_test]),
        "n_ood": sum(len(rows[ood]) for ood in oods),
    }


def _colours(study: ReportedStudy) -> dict[str, str]:
    """Colour of each set, in the order in which they are drawn."""
    return {ood: "ood" if group == "near" else "far" for ood, group in reversed(study.oods)} | {study.id_test: "id"}


def _rows(study: ReportedStudy) -> dict[str, NDArray[np.int64]]:
    """A seeded few rows of each set, ascending."""
    n_ood = max(1, _SHOWN_OOD // len(study.oods))
    wanted = {study.evidence.id_train: _FITTED, study.id_test: _SHOWN_ID} | {ood: n_ood for ood, _ in study.oods}
    rng = np.random.default_rng(0)
    return {name: np.sort(rng.permutation(study.evidence.caches[name].n_rows)[:most]) for name, most in wanted.items()}


def _stages(
    study: ReportedStudy, rows: Mapping[str, NDArray[np.int64]]
) -> Iterator[tuple[str, dict[str, Floats] | None]]:
    """Unit features of some rows of each set: the backbone's own, then those that the mixture refined."""
    caches = study.evidence.caches
    yield "Before the experts", {name: l2_normalise(caches[name].read("cls", own)) for name, own in rows.items()}
    method = study.recommended
    if method is None or method.features != "mofe":
        return
    folder = study.mixture_folder(method.backbone, method.variant, study.scored.first_seed(method))
    weights = (read_document(folder / "mofe.json") or {}).get("files", {}).get("mofe.safetensors")
    refined: dict[str, Floats] = {}
    for name, own in rows.items():
        path = refined_path(folder, "final", "id-train" if name == study.evidence.id_train else f"sets/{name}")
        found = load_refined(path, {"weights": weights, "features": caches[name].digest})
        if found is None:
            yield "After the experts", None
            return
        refined[name] = l2_normalise(found.features[own])
    yield "After the experts", refined


def _pca(fitted: Floats, shown: Mapping[str, Floats]) -> dict[str, NDArray[np.float64]]:
    from sklearn.decomposition import PCA

    pca = PCA(n_components=_AXES, svd_solver="full").fit(fitted)
    return {name: pca.transform(features) for name, features in shown.items()}


def _tsne(shown: Mapping[str, Floats]) -> dict[str, NDArray[np.float64]]:
    from sklearn.manifold import TSNE

    together = np.concatenate(list(shown.values()))
    perplexity = min(_PERPLEXITY, (len(together) - 1) / 3)
    flat = TSNE(_AXES, perplexity=perplexity, init="pca", random_state=0, max_iter=500).fit_transform(together)
    ends = np.cumsum([len(features) for features in shown.values()])[:-1]
    return dict(zip(shown, np.split(flat, ends), strict=True))
