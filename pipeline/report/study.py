"""What a scored study left under ``work``, read for the page; all of it may be damaged, and is then named.

Beside its own files a report looks at what they were made from, as far as it is still there: `Evidence`.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache import FeatureCache
from pipeline.report.figures import Floats, Series
from pipeline.report.wording import BASELINE, SECOND_BASELINE, Line, Method, score_name
from stages.errors import InputError
from stages.files.documents import digest_of, read_document
from stages.inputs.images import SampleTable
from stages.results.scored_study import check_scores, samples_path
from stages.results.table import GROUPS, read_summary

DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError)
_SAMPLE_COLUMNS = ["set", "id", "label", "prediction", "expert"]


def _no_images(name: str) -> SampleTable:
    raise InputError("nobody says where its images are")


@dataclass(frozen=True)
class Evidence:
    """What a study was made from.

    Attributes:
        id_train: name of its set.
        caches: pre-trained features of the sets that still have them, by name.
        images: lists the images of a set; an `InputError` says why there are none.
    """

    id_train: str = ""
    caches: Mapping[str, FeatureCache] = field(default_factory=dict)
    images: Callable[[str], SampleTable] = _no_images


@dataclass(frozen=True, eq=False)
class Samples:
    """Every test image by one model: a row of ``samples/*.parquet``.

    Attributes:
        set: ``[n]`` name of its set.
        id: ``[n]``.
        label: ``[n]`` class name, empty for OOD images.
        prediction: ``[n]`` class name, empty where the head is ``none``.
        expert: ``[n]`` that the row went to; None without experts.
    """

    set: NDArray[np.str_]
    id: NDArray[np.str_]
    label: NDArray[np.str_]
    prediction: NDArray[np.str_]
    expert: NDArray[np.int64] | None

    def __getitem__(self, rows: NDArray[Any]) -> "Samples":
        expert = None if self.expert is None else self.expert[rows]
        return Samples(self.set[rows], self.id[rows], self.label[rows], self.prediction[rows], expert)

    def __len__(self) -> int:
        return len(self.id)


@dataclass(frozen=True)
class TrainingLog:
    """What ``metrics.jsonl`` of one variant (all its seeds) or of the fine-tune says."""

    title: str
    runs: list[list[Line]]  # a line an epoch, for every seed and fold
    best_epoch: int | None
    mixture: tuple[str, str] | None = None  # backbone and variant
    seed: int = 0  # the first
    classes: tuple[str, ...] = ()
    final: list[Line] = field(default_factory=list)  # of the first seed's final model
    kept_epoch: int | None = None  # whose weights it has

    def series(self, colour: str, name: str, dashed: bool = False) -> Series:
        """One of its values over the epochs of every run."""
        return Series(colour, [[line.get(name) for line in run] for run in self.runs], dashed)


class ScoredStudy:
    """What lies under ``work``.

    Attributes:
        lines: of each method the lines of the summary, by (OOD set or ``"average"``, group); the baseline first.
        rows: of ``table.json``.
        oods: (name, group) of each OOD set, near ones first.
        ood_groups: those that have averages.
        contents: what the scores are made of, and the digests of their files.
        recommended: what `predict` takes where nothing is asked, if it was scored.

    Args:
        work: its folder.
        evidence: what it was made from.

    Raises:
        InputError: something that ``score`` writes is missing or damaged.
    """

    def __init__(self, work: Path, evidence: Evidence | None = None) -> None:
        self.folder = work
        self.evidence = evidence or Evidence()
        scores = work / "scores"
        self.contents = check_scores(scores)
        self.rows: list[Line] = _read(scores / "table.json", _load_list)
        summary: list[Line] = _read(scores / "summary.csv", lambda path: read_summary(path.parent))
        self.id: Line = _read(scores / "id.json", _load_object)
        self.thresholds: list[Line] = _read(scores / "thresholds.json", _load_list)
        self.record: Line = _read(work / "record.json", _load_document)
        if not summary or not self.rows:
            raise InputError(f"{scores} holds no result: run make score")
        lines: dict[Method, dict[tuple[str, str], Line]] = {}
        for line in summary:
            lines.setdefault(Method.of(line), {})[line["ood"], line["group"]] = line
        self.lines = dict(sorted(lines.items(), key=lambda item: item[0] != BASELINE))
        sets = dict.fromkeys((line["ood"], line["group"]) for line in summary if line["ood"] != "average")
        self.oods = sorted(sets, key=lambda ood: GROUPS.index(ood[1]))
        self.ood_groups = [group for group in GROUPS if any(("average", group) in cells for cells in lines.values())]
        self.n_id: int = self.rows[0]["n_id"]
        self.n_ood: dict[str, int] = {row["ood"]: row["n_ood"] for row in self.rows}
        self.n_seeds: int = max(line["n_seeds"] for line in summary)
        self.experts = {(r["backbone"], r["variant"]): r["experts"] for r in self.id["router"]}
        self.recommended = self._recommended()
        self.logs = list(self._logs())
        self.id_test = self._id_test()
        self.name: str = self.record.get("name", work.name)

    def average(self, method: Method) -> Line | None:
        """The averages over all OOD sets; None for a diagnostic that has none."""
        return self.lines.get(method, {}).get(("average", "all"))

    def seed(self, method: Method) -> int | None:
        """The first seed that a method was run with; None where nothing is random."""
        seeds = (row["seed"] for row in self.rows if Method.of(row) == method)
        return min((seed for seed in seeds if seed is not None), default=None)

    def row(self, method: Method, ood: str, group: str) -> Line | None:
        """The row of ``table.json``, with its intervals, of a method that ran with one seed."""
        rows = [row for row in self.rows if Method.of(row) == method and (row["ood"], row["group"]) == (ood, group)]
        return rows[0] if len(rows) == 1 else None

    def features(self, backbone: str, features: str, variant: str) -> str:
        """Name of a choice of features."""
        if features == "cls":
            return {"pretrained": "Frozen backbone", "finetuned": "Fine-tuned backbone"}[backbone]
        experts = self.experts.get((backbone, variant))
        parts = [
            "MoFE",
            variant,
            f"{experts} expert{'s' if experts != 1 else ''}" if experts else "",
            f"{backbone} backbone" if len({method.backbone for method in self.lines}) > 1 else "",
        ]
        return " · ".join(filter(None, parts))

    def samples_path(self, method: Method) -> Path:
        """Where the first seed's model put its scores."""
        return samples_path(
            self.folder / "scores",
            method.backbone,
            method.features,
            method.head,
            method.variant,
            self.seed(method),
            method.routing,
        )

    def scores(self, method: Method) -> dict[str, Floats]:
        """Scores of each set's images by the first seed's model; the ID test set's under ``"id"``."""
        import pyarrow.parquet as pq

        path, column = self.samples_path(method), score_name(method)
        table = _read(path, lambda path: pq.read_table(path, columns=["set", column]).select(["set", column]))
        return self._by_set(path, np.asarray(table["set"].to_pylist()), table[column].to_numpy())

    def samples(self, method: Method) -> dict[str, tuple[Samples, Floats]]:
        """Images of each set with their scores by the first seed's model; the ID test set's under ``"id"``."""
        import pyarrow.parquet as pq

        path, column = self.samples_path(method), score_name(method)
        wanted = [*_SAMPLE_COLUMNS, column]
        table = _read(path, lambda path: pq.read_table(path, columns=wanted).select(wanted))
        text = {name: np.asarray(table[name].to_pylist(), dtype=str) for name in _SAMPLE_COLUMNS[:-1]}
        expert = None if table["expert"].null_count else np.asarray(table["expert"].to_pylist(), dtype=np.int64)
        samples = Samples(**text, expert=expert)
        rows = self._by_set(path, samples.set, np.arange(len(samples)))
        scores = table[column].to_numpy()
        return {name: (samples[own], scores[own]) for name, own in rows.items()}

    def _by_set(self, path: Path, sets: NDArray[np.str_], values: NDArray[Any]) -> dict[str, NDArray[Any]]:
        oods = [ood for ood, _ in self.oods]
        found = {"id": values[~np.isin(sets, oods)]} | {ood: values[sets == ood] for ood in oods}
        if empty := [name for name, own in found.items() if not len(own)]:
            raise InputError(f"{path} holds no image of {empty[0]}: run make score")
        return found

    def threshold(self, method: Method, admit: float) -> Line | None:
        """The first seed's threshold that admits a share of ID; None where it has none."""
        asked = (method, self.seed(method), admit)
        lines = (line for line in self.thresholds if line["threshold"] is not None)
        return next((line for line in lines if (Method.of(line), line["seed"], line["admit"]) == asked), None)

    def mixture_folder(self, backbone: str, variant: str, seed: int | None) -> Path:
        """Where a mixture stands."""
        return self.folder / "model" / backbone / variant / f"seed-{seed}"

    def groups(self, backbone: str, variant: str, seed: int | None) -> dict[str, int]:
        """Expert of each class; empty where the mixture is gone."""
        about = read_document(self.mixture_folder(backbone, variant, seed) / "mofe.json") or {}
        return dict(about.get("groups", {}))

    def _id_test(self) -> str:
        """Name of the ID test set."""
        sets = (self.record.get("config") or {}).get("sets", ())
        return next((str(entry["name"]) for entry in sets if entry["role"] == "id-test"), "ID test")

    def _recommended(self) -> Method | None:
        mixture = Method(BASELINE.backbone, "mofe", "refit", "", "predicted", "knn+energy", "False")
        found = [method for method in self.lines if method._replace(variant="") == mixture]
        return next((method for method in [*found, SECOND_BASELINE] if method in self.lines), None)

    def training_files(self) -> list[Path]:
        """Every ``metrics.jsonl`` that is as the training left it, by what was trained and by seed."""
        mixtures = self.folder.glob("model/*/*/seed-*/metrics.jsonl")
        paths = [*mixtures, *self.folder.glob("finetune/seed-*/metrics.jsonl")]

        def order(path: Path) -> tuple[bool, bool, str, bool, str, int]:
            *_, model, backbone, variant, seed, _ = path.parts
            number = int(seed.removeprefix("seed-"))
            return model != "model", backbone != "pretrained", backbone, variant != "default", variant, number

        return sorted(filter(_is_as_left, paths), key=order)

    def _logs(self) -> Iterator[TrainingLog]:
        for folder, members in groupby(self.training_files(), key=lambda path: path.parent.parent):
            files = list(members)
            runs = [run for path in files for run in _read(path, _load_runs)]
            about = read_document(files[0].parent / "mofe.json") or {}
            is_mixture = folder.parent.parent.name == "model"
            yield TrainingLog(
                title=f"MoFE · {folder.name} · {folder.parent.name} backbone" if is_mixture else "Fine-tune",
                runs=runs,
                best_epoch=about.get("best_epoch") if len(runs) == 1 else None,
                mixture=(folder.parent.name, folder.name) if is_mixture else None,
                seed=int(files[0].parent.name.removeprefix("seed-")),
                classes=tuple(about.get("classes", ())),
                final=_read(files[0], _load_runs)[-1],
                kept_epoch=about.get("best_epoch"),
            )


def _is_as_left(metrics: Path) -> bool:
    """Whether the log of a training is whole, as far as a document says so: a fine-tune that goes on has none yet."""
    if not metrics.parent.name.removeprefix("seed-").isdigit():  # somebody's copy
        return False
    described = [path for name in ("finetune.json", "mofe.json") if (path := metrics.parent / name).exists()]
    if not described:
        return True
    about = read_document(described[0])
    return about is not None and about["files"].get(metrics.name) == digest_of(metrics)


def _read(path: Path, load: Callable[[Path], Any]) -> Any:
    try:
        return load(path)
    except FileNotFoundError:
        raise InputError(f"{path} is missing: run make score") from None
    except DAMAGE as error:
        raise InputError(f"{path} cannot be read ({error}): delete it and run make score") from error


def _load_list(path: Path) -> list[Line]:
    value = json.loads(path.read_text("utf-8"))
    if not isinstance(value, list):
        raise TypeError("a list expected")
    return value


def _load_object(path: Path) -> Line:
    value = json.loads(path.read_text("utf-8"))
    if not isinstance(value, dict):
        raise TypeError("an object expected")
    return value


def _load_document(path: Path) -> Line:
    document = read_document(path)
    if document is None:
        path.stat()  # it may be missing
        raise ValueError("its bytes are not those that were written")
    return document


def _load_runs(path: Path) -> list[list[Line]]:
    by_run: dict[str, list[Line]] = {}
    for text in path.read_text("utf-8").splitlines():
        line = json.loads(text)
        by_run.setdefault(line.get("run", ""), []).append(line)
    return list(by_run.values())
