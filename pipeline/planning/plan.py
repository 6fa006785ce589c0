"""Verb `plan`: images, bytes, hours and memory of a study, before anything of it runs."""

from dataclasses import asdict, dataclass
from typing import Any

from cache import CacheError
from pipeline.backbones import StudyBackbone
from pipeline.checks import check_before_extraction
from pipeline.config import RunConfig
from pipeline.planning.asked import Planning
from pipeline.planning.calibrate import Calibrator
from pipeline.planning.forecast import Calibration, Forecast, StageCost, ToDo
from pipeline.planning.kept import KeptOption, kept_options
from pipeline.planning.size import StudySize, study_size
from pipeline.pseudo_ood import PseudoOOD
from pipeline.stages_of_study.report import Report
from pipeline.stages_of_study.score import Score
from pipeline.workspace import Workspace
from stages.detection.pseudo import FEWEST_CLASSES
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
        n_pseudo: images that are made of ID images and kept as well, at most.
        costs: of each stage that there is.
        workers: for how many each is said.
        cores: of this machine.
        calibrated: seconds that were spent to measure it.
        notes: what is less certain, a line each.
    """

    name: str
    size: StudySize
    kept: list[KeptOption]
    n_backbones: int
    n_pseudo: int
    costs: list[StageCost]
    workers: tuple[int, ...]
    cores: int
    calibrated: float
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; hours as seconds."""
        return {
            "name": self.name,
            "images": dict(self.size.rows),
            "classes": self.size.n_classes,
            "counted": self.size.counted,
            "backbones": self.n_backbones,
            "pseudo_ood": self.n_pseudo,
            "kept": [asdict(kept) | {"bytes": kept.row_bytes * self.n_images} for kept in self.kept],
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
            "calibrated": round(self.calibrated, 2),
            "notes": self.notes,
        }

    @property
    def n_images(self) -> int:
        """Whose features one backbone has in its caches."""
        return self.size.total + self.n_pseudo

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
    measured = calibrator.measure(_verbs(config, todo), any(sum(own.values()) for own in todo.images.values()))
    return Plan(
        name=config.name,
        size=size,
        kept=kept_options(calibrator.spec, None if config.has_features else calibrator.network),
        n_backbones=len(workspace.backbones),
        n_pseudo=_pseudo(PseudoOOD(workspace, workspace.pretrained), size),
        costs=_costs(workspace, todo, Forecast(config, size, calibrator.spec, measured)),
        workers=tuple(sorted({1, 2, asked.workers or _WORKERS})),
        cores=usable_cores(),
        calibrated=measured.seconds,
        notes=_notes(size, measured),
    )


def _verbs(config: RunConfig, todo: ToDo) -> set[str]:
    """Stages that pilots are to run."""
    verbs = {"train"} if any(todo.mixtures.values()) or todo.probes or todo.score else set()
    verbs |= {"finetune"} if todo.finetunes else set()
    if todo.score and config.sets_of("id-test") and config.sets_of("near-ood", "far-ood"):
        verbs |= {"score", "report"}
    return verbs


def _costs(workspace: Workspace, todo: ToDo, forecast: Forecast) -> list[StageCost]:
    """Of each stage, in the order of a run."""
    costs = []
    for backbone in workspace.backbones:
        if backbone.seed is not None:
            costs.append(forecast.finetune(backbone.seed, backbone.name in todo.finetunes))
        costs.append(forecast.extract(backbone.name, todo.images[backbone.name]))
        mixtures = todo.mixtures[backbone.name]
        costs.append(forecast.train(backbone.name, mixtures, backbone.name in todo.probes))
    return [*costs, forecast.score(todo), forecast.report(todo)]


def _notes(size: StudySize, measured: Calibration) -> list[str]:
    """What is less certain than the rest."""
    notes = []
    if not size.counted:
        notes.append("images that are not there were drawn, and the network has untrained weights")
    if measured.head:
        notes.append("train: heads of so many rows and classes were timed on few drawn ones: the least certain hours")
    scored = [timed for timed in measured.pilots if timed.score or timed.fold]
    if len(measured.pilots) > len(scored) == 1:
        notes.append(
            f"score: from one pilot of {scored[0].n_train:,} ID rows, all of it multiplied: the most that it takes"
        )
    notes += [f"finetune: from {timed.tuned:.0%} of an epoch" for timed in measured.pilots if timed.tuned < 1]
    return notes


def _to_do(workspace: Workspace, size: StudySize) -> ToDo:
    """What is not fresh; of a study whose images are only stated, everything."""
    backbones = workspace.backbones
    scored = [variant for own in backbones for variant, _ in workspace.mixtures(own)]
    images = {own.name: _to_extract(workspace, own, size) for own in backbones}
    if not size.counted:
        mixtures = {own.name: workspace.mixtures(own) for own in backbones}
        finetunes = {own.name for own in workspace.finetuned}
        return ToDo(images, mixtures, set(images), finetunes, True, True, scored)
    mixtures = {own.name: workspace.to_train(own) for own in backbones}
    probes = {own.name for own in backbones if not _has_probe(workspace, own)}
    finetunes = {own.name for own in workspace.finetuned if not workspace.is_finetuned(own)}
    score = bool(finetunes or probes or any(mixtures.values()) or any(sum(own.values()) for own in images.values()))
    score = score or not _is_fresh(Score(workspace, fits=False))
    return ToDo(images, mixtures, probes, finetunes, score, score or not _is_fresh(Report(workspace)), scored)


def _to_extract(workspace: Workspace, backbone: StudyBackbone, size: StudySize) -> dict[str, int]:
    """Images of each set of which a backbone has no features."""
    spec = workspace.known_spec(backbone) if size.counted and workspace.is_finetuned(backbone) else None
    pseudo = PseudoOOD(workspace, backbone)
    made = spec is not None and backbone.exists and pseudo.found(spec) is not None
    n_pseudo = 0 if made else _pseudo(pseudo, size)
    found = {pseudo.name: n_pseudo} if n_pseudo else {}
    for entry in workspace.config.sets:
        changes = None
        if spec is not None:
            table = workspace.sets.table(entry)
            changes = compare_versions(entry.name, table, spec, workspace.config.cache.root)
        found[entry.name] = size.rows[entry.name] if changes is None else changes.to_extract
    return found


def _pseudo(pseudo: PseudoOOD, size: StudySize) -> int:
    """Images that are made to play OOD, at most."""
    needed = pseudo.needed if size.counted else pseudo.wanted and not 0 < size.n_classes < FEWEST_CLASSES
    return pseudo.at_most if needed else 0


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
