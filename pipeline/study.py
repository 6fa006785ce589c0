"""A study and its verbs: loops over the stages that `pipeline.stages_of_study` lists."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from pipeline.config import RunConfig, RunOptions
from pipeline.deciding import Deciding, Exporting
from pipeline.stages_of_study import STAGES
from pipeline.terminal import Lines
from pipeline.workspace import Workspace
from stages.progress import Progress

if TYPE_CHECKING:
    from pipeline.predictions import Format
    from pipeline.report.study import Evidence
    from pipeline.stage import Stage


class Study:
    """The verbs of one experiment file.

    Args:
        config: the study.
        options: how to run it.
        on_trained: told the variant and the seconds of every mixture that was trained on pre-trained features.

    Raises:
        InputError: a file stands where a folder is to be.
    """

    def __init__(
        self, config: RunConfig, options: RunOptions, on_trained: Callable[[str, float], None] | None = None
    ) -> None:
        self.config = config
        self.workspace = Workspace(config, options, on_trained)

    @property
    def progress(self) -> Progress:
        """Who is told how far the work is."""
        return self.workspace.progress

    # ----------------------------------------------------------------------------------------------------- the stages

    def do(self, verb: str, which: str = "all") -> Lines:
        """One stage, for the backbones of a kind that exist: ``pretrained``, ``finetuned`` or ``all``."""
        kind = _kind(verb)
        kind.before(self.workspace, planning=False)
        return list(self._work(kind.of(self.workspace, self.workspace.existing(which), which)))

    def run(self) -> Iterator[object]:
        """Every stage that is not fresh, in order; lines as they come."""
        return self._work(self._in_order())

    def plan(self, verb: str, which: str = "all") -> Lines:
        """What a verb would do: what is fresh, what would run, and the bytes that it would write."""
        kinds = [listed.load() for listed in STAGES if verb in (listed.verb, "run")]
        for kind in kinds:
            kind.before(self.workspace, planning=True)
        asked = self.workspace.asked(which)
        return [line for kind in kinds for stage in kind.of(self.workspace, asked, which) for line in stage.plan()]

    def _in_order(self) -> "Iterator[Stage]":
        """Every stage of the pre-trained backbone and of the study; where backbones are made, also of those."""
        workspace, done = self.workspace, list["type[Stage]"]()
        for kind in (listed.load() for listed in STAGES):
            if not kind.makes_backbones or workspace.finetuned:
                kind.before(workspace, planning=False)
                yield from kind.of(workspace, [workspace.pretrained], "all")
            if kind.makes_backbones:
                for backbone in workspace.finetuned:
                    for earlier in (kind for kind in done if kind.of_backbone):
                        yield from earlier.of(workspace, [backbone], "all")
            done.append(kind)

    def _work(self, stages: "Iterable[Stage]") -> Iterator[object]:
        """Do one stage after the other, each looked for when it is its turn; lines as they come."""
        alone = False
        with ExitStack() as held:
            for stage in stages:
                if stage.alone and not alone:
                    held.enter_context(self.workspace.alone())
                    alone = True
                yield from self._done(stage)

    def _done(self, stage: "Stage") -> Lines:
        stage.check()
        if not stage.looks_again and stage.is_fresh():
            return stage.found()
        with self.workspace.record.running(stage.name, stage.identity()) as recorded:
            done = stage.run(self.workspace.context())
            recorded.fresh = done.fresh
        return done.lines

    # -------------------------------------------------------------------------------------------------- other verbs

    def report(self) -> Lines:
        """The table, and ``report/index.html``."""
        from pipeline.stages_of_study.score import stale_scores
        from pipeline.tables import table_lines

        if (stale := stale_scores(self.workspace)) is not None:
            self.progress.note(f"report: {stale}")
        lines = self.do("report")
        return [*table_lines(self.config.work / "scores"), *lines]

    def evidence(self) -> "Evidence":
        """What a report may look at beside the study's own files, as far as it is still there."""
        from pipeline.stages_of_study.report import evidence_of

        return evidence_of(self.workspace)

    def predict(
        self, paths: Sequence[str], deciding: Deciding, form: "Format" = "csv", which: str = "pretrained"
    ) -> Lines:
        """Score new images with the fitted detector of the study; of fine-tuned backbones, with the first's."""
        from pipeline.predictions import predict_paths

        return [predict_paths(self.workspace, paths, deciding, form, which)]

    def export(self, exporting: Exporting, which: str = "pretrained") -> Lines:
        """The fitted detector of the study as one sealed file."""
        from pipeline.exports import export_study

        return export_study(self.workspace, which, exporting)

    def verify(self, repair: bool = False) -> Lines:
        """Compare every byte of caches, models and scores with what is said of them; make damaged shards again."""
        from pipeline.upkeep import verify_study

        return verify_study(self.workspace, repair)

    def info(self) -> Lines:
        """What the study has on disk."""
        from pipeline.upkeep import study_lines

        return study_lines(self.workspace)

    # ---------------------------------------------------------------------------------------------- of several studies

    def outline(self) -> str:
        """What the study is and what of it is still to be trained, in one line.

        Raises:
            InputError: a set is not there, or some stage is bound to refuse something.
        """
        from pipeline.checks import check_before_extraction

        workspace, config = self.workspace, self.config
        check_before_extraction(workspace, lambda: workspace.pretrained.architecture)
        n_rows = sum(len(workspace.sets.table(entry)) for entry in config.sets)
        n_mixtures, n_left = len(workspace.mixtures(workspace.pretrained)), len(self.to_train())
        unit = "rows" if config.has_features else "images"
        return (
            f"{config.name}: {len(config.sets)} sets of {n_rows:,} {unit}; {n_left} of {n_mixtures} mixtures to "
            f"train, in {1 + len(config.variants)} variants; {config.work}"
        )

    def to_train(self) -> list[tuple[str, int]]:
        """Variant and seed of every mixture on the pre-trained backbone's features that is not fresh."""
        return self.workspace.to_train(self.workspace.pretrained)

    def training_cost(self, variant: str) -> float:
        """What a mixture takes to train, in tokens that its epochs read; the caches must be there."""
        from stages.training.recipes import resolve_settings

        data = self.workspace.pretrained.id_data()
        height, width = data.train.spec.grid
        rows = sum(map(len, data.train_rows().values()))
        settings = resolve_settings(self.config.variant_configs()[variant], data.n_classes)
        return float(settings.epochs * rows * (1 + height * width))


def _kind(verb: str) -> "type[Stage]":
    return next(listed.load() for listed in STAGES if listed.verb == verb)
