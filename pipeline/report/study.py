"""What a scored study left under ``work``, read for the page; all of it may be damaged, and is then named.

Beside its own files a report looks at what they were made from, as far as it is still there: `Evidence`.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Self

from cache import FeatureCache
from pipeline.report.figures import Series
from stages.errors import InputError
from stages.files.documents import digest_of, read_document
from stages.inputs.images import SampleTable
from stages.results.method import BASELINES, FROZEN_KNN, FROZEN_SUM, RECOMMENDED, Method
from stages.results.scored_study import DAMAGE, Line, ScoredStudy, read_file
from stages.results.table import GROUPS
from stages.scorers import AUTO


@contextmanager
def as_written(work: Path) -> Iterator[None]:
    """Turn what a file that another version wrote raises where it is shown into one line.

    Raises:
        InputError: something was raised.
    """
    from jinja2 import UndefinedError

    try:
        yield
    except (*DAMAGE, UndefinedError) as error:
        raise InputError(
            f"{work / 'scores'} or record.json is not as this version writes it ({error}): delete them, run make score"
        ) from error


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

    @property
    def first(self) -> int:
        """The epoch of the first line: 0, or −1 where the start was judged."""
        return int(self.runs[0][0]["epoch"])

    def series(self, colour: str, name: str, dashed: bool = False) -> Series:
        """One of its values over the epochs of every run."""
        return Series(colour, [[line.get(name) for line in run] for run in self.runs], dashed)


class ReportedStudy:
    """A scored study, with what lies beside its scores under ``work`` and what it was made from.

    Attributes:
        folder: ``work``.
        scored: what stage three left.
        name: of the study; the page may lengthen it to tell studies apart.
        record: of ``record.json``.
        evidence: what it was made from.
        oods: (name, group) of each OOD set, near ones first.
        recommended: what `predict` takes where nothing is asked, if it was scored.
        logs: of every training that is as it was left.
        id_test: name of the ID test set.

    Args:
        scored: as the attribute; its bytes are compared once, however often the record changes.
        evidence: as the attribute.

    Raises:
        InputError: something that ``score`` writes is missing or damaged.
    """

    def __init__(self, scored: ScoredStudy, evidence: Evidence | None = None) -> None:
        self.folder = scored.folder.parent
        self.evidence = evidence or Evidence()
        self.scored = scored
        with as_written(self.folder):
            self.record: Line = read_file(self.folder / "record.json", _load_document)
            self.oods = sorted(scored.oods, key=lambda ood: GROUPS.index(ood[1]))
            self.recommended = _recommended(scored)
            self.logs = list(self._logs())
            self.id_test = self._id_test()
            self.name: str = self.record.get("name", self.folder.name)

    @classmethod
    def of(cls, work: Path, evidence: Evidence | None = None) -> Self:
        """The study whose folder is `work`."""
        return cls(ScoredStudy(work / "scores"), evidence)

    @property
    def compared(self) -> list[Method]:
        """The frozen baselines and what `predict` takes, as far as they were scored."""
        asked = dict.fromkeys((*BASELINES.values(), self.recommended))
        return [method for method in asked if method is not None and method in self.scored.lines]

    def features(self, backbone: str, features: str, variant: str) -> str:
        """Name of a choice of features."""
        if features == "cls":
            return {"pretrained": "Frozen backbone", "finetuned": "Fine-tuned backbone"}[backbone]
        experts = self.experts.get((backbone, variant))
        parts = [
            "MoFE",
            variant,
            f"{experts} expert{'s' if experts != 1 else ''}" if experts else "",
            f"{backbone} backbone" if len({method.backbone for method in self.scored.lines}) > 1 else "",
        ]
        return " · ".join(filter(None, parts))

    @cached_property
    def experts(self) -> dict[tuple[str, str], int]:
        """E of each mixture by backbone and variant."""
        return {(router["backbone"], router["variant"]): router["experts"] for router in self.scored.id["router"]}

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
            runs = [run for path in files for run in read_file(path, _load_runs)]
            about = read_document(files[0].parent / "mofe.json") or {}
            is_mixture = folder.parent.parent.name == "model"
            yield TrainingLog(
                title=f"MoFE · {folder.name} · {folder.parent.name} backbone" if is_mixture else "Fine-tune",
                runs=runs,
                best_epoch=about.get("best_epoch") if len(runs) == 1 else None,
                mixture=(folder.parent.name, folder.name) if is_mixture else None,
                seed=int(files[0].parent.name.removeprefix("seed-")),
                classes=tuple(about.get("classes", ())),
                final=read_file(files[0], _load_runs)[-1],
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


def _recommended(scored: ScoredStudy) -> Method | None:
    """What `predict` takes: ``auto`` where it was asked for, of the first variant that has it or without a mixture."""
    if scored.rows[0].get("labels") == "none":  # ID images without classes
        return FROZEN_KNN
    scores = (AUTO, RECOMMENDED.score)
    asked = [replace(method, score=score) for score in scores for method in (RECOMMENDED, FROZEN_SUM)]
    found = (
        method
        for wanted in asked
        for method in scored.lines
        if method == wanted or (wanted.variant and replace(method, variant=wanted.variant) == wanted)
    )
    return next(found, None)


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
