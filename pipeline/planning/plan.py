"""Verb `plan`: images, bytes, hours and memory of a study, before anything of it runs."""

from dataclasses import asdict, dataclass
from typing import Any

from cache import CacheError
from pipeline.backbones import StudyBackbone
from pipeline.checks import check_before_extraction
from pipeline.planning.asked import Planning
from pipeline.planning.calibrate import Calibrator
from pipeline.planning.forecast import Forecast, StageCost, ToDo
from pipeline.planning.kept import KeptOption, kept_options
from pipeline.planning.size import StudySize, study_size
from pipeline.stages_of_study.report import Report
from pipeline.stages_of_study.score import Score
from pipeline.workspace import Workspace
from stages.errors import InputError
from stages.extraction.changes import compare_versions
from stages.heads.choose import load_heads
from stages.machine import usable_cores
from stages.training.identity import probe_identity

_WORKERS = 4  # n, where nobody says how many


@dataclass(frozen=True)
class Plan:
    """What a study would cost on machines like this one.

    Attributes:
        name: of the study.
        size: what its sets hold.
        kept: bytes of an image by what is kept, the option that is asked for first.
        n_backbones: whose features are cached.
        costs: of each stage that there is.
        workers: for how many each is said.
        cores: of this machine.
    """

    name: str
    size: StudySize
    kept: list[KeptOption]
    n_backbones: int
    costs: list[StageCost]
    workers: tuple[int, ...]
    cores: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; hours as seconds."""
        return {
            "name": self.name,
            "images": dict(self.size.rows),
            "classes": self.size.n_classes,
            "counted": self.size.counted,
            "backbones": self.n_backbones,
            "kept": [asdict(kept) | {"bytes": kept.row_bytes * self.size.total} for kept in self.kept],
            "cores": self.cores,
            "workers": list(self.workers),
            "stages": [
                {
                    "stage": cost.name,
                    "seconds": {str(n): round(cost.with_workers(n), 2) for n in self.workers},
                    "memory": cost.memory,
                    "about": cost.about,
                }
                for cost in self.costs
            ],
            "seconds": {str(n): round(self.seconds(n), 2) for n in self.workers},
        }

    def seconds(self, n: int) -> float:
        """Of all stages with n workers."""
        return sum(cost.with_workers(n) for cost in self.costs)


def plan_study(workspace: Workspace, asked: Planning) -> Plan:
    """Calibrate this machine and say what the study would cost; nothing is written but to a temporary folder.

    Raises:
        InputError: a set is not there, or a stage is bound to refuse something.
    """
    config = workspace.config
    size = study_size(workspace, asked)
    if size.counted:
        check_before_extraction(workspace, lambda: workspace.pretrained.architecture)
    calibrator = Calibrator(workspace, size, asked.seconds)
    todo = _to_do(workspace, size)
    verbs = {"train"} if any(todo.mixtures.values()) or todo.probes or todo.score else set()
    verbs |= {"finetune"} if todo.finetunes else set()
    if todo.score and config.sets_of("id-test") and config.sets_of("near-ood", "far-ood"):
        verbs |= {"score", "report"}
    measured = calibrator.measure(verbs, any(sum(own.values()) for own in todo.images.values()))
    forecast = Forecast(config, size, calibrator.spec, measured)
    costs = []
    for backbone in workspace.backbones:
        if backbone.seed is not None:
            costs.append(forecast.finetune(backbone.seed, backbone.name in todo.finetunes))
        costs.append(forecast.extract(backbone.name, todo.images[backbone.name]))
        mixtures = todo.mixtures[backbone.name]
        costs.append(forecast.train(backbone.name, mixtures, backbone.name in todo.probes))
    costs += [forecast.score(todo), forecast.report(todo)]
    network = None if config.has_features else calibrator.network
    workers = tuple(sorted({1, 2, asked.workers or _WORKERS}))
    kept = kept_options(calibrator.spec, network)
    return Plan(config.name, size, kept, len(workspace.backbones), costs, workers, usable_cores())


def _to_do(workspace: Workspace, size: StudySize) -> ToDo:
    """What is not fresh; of a study whose images are only stated, everything."""
    backbones, subjects = workspace.backbones, sum(1 + len(workspace.mixtures(own)) for own in workspace.backbones)
    tuned = {own.name: own.seed for own in workspace.finetuned if own.seed is not None}
    if not size.counted:
        images = {own.name: dict(size.rows) for own in backbones}
        mixtures = {own.name: workspace.mixtures(own) for own in backbones}
        return ToDo(images, mixtures, set(images), tuned, True, True, subjects)
    images = {own.name: _to_extract(workspace, own, size) for own in backbones}
    mixtures = {own.name: workspace.to_train(own) for own in backbones}
    probes = {own.name for own in backbones if not _has_probe(workspace, own)}
    made = {own.name for own in workspace.finetuned if workspace.is_finetuned(own)}
    tuned = {name: seed for name, seed in tuned.items() if name not in made}
    score = bool(tuned or probes or any(mixtures.values()) or any(sum(own.values()) for own in images.values()))
    score = score or not _is_fresh(Score(workspace, fits=False))
    return ToDo(images, mixtures, probes, tuned, score, score or not _is_fresh(Report(workspace)), subjects)


def _to_extract(workspace: Workspace, backbone: StudyBackbone, size: StudySize) -> dict[str, int]:
    """Images of each set of which a backbone has no features."""
    spec = workspace.known_spec(backbone) if workspace.is_finetuned(backbone) else None
    if spec is None:
        return dict(size.rows)
    found = {}
    for entry in workspace.config.sets:
        table = workspace.sets.table(entry)
        changes = compare_versions(entry.name, table, spec, workspace.config.cache.root)
        found[entry.name] = len(table) if changes is None else changes.to_extract
    return found


def _has_probe(workspace: Workspace, backbone: StudyBackbone) -> bool:
    if not workspace.is_finetuned(backbone):
        return False
    try:
        identity = probe_identity(backbone.id_data())
    except (InputError, CacheError):  # not extracted yet
        return False
    return load_heads(backbone.probe_folder, "probe", identity) is not None


def _is_fresh(stage: Score | Report) -> bool:
    try:
        return stage.is_fresh()
    except (InputError, CacheError):  # what it reads is not there yet
        return False
