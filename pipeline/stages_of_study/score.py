"""Stage three: scores of every set with every detector, thresholds and the table."""

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Self

from cache import CacheError, fingerprint
from pipeline.backbones import StudyBackbone
from pipeline.layers import check_layers
from pipeline.sources import sources_to_score
from pipeline.stage import Done, Stage
from pipeline.tables import table_lines
from pipeline.terminal import Lines
from pipeline.workspace import Workspace
from stages.context import Context
from stages.detection.choice import AUTO_SEMANTICS
from stages.detection.sources import BackboneSource, MixtureFolder
from stages.errors import InputError
from stages.files.documents import CONTENTS, has_contents, read_document
from stages.results.scored_study import SCORE_SEMANTICS
from stages.scorers import AUTO


class Score(Stage):
    """Score the features of all backbones of a kind; ends in the table.

    Args:
        workspace: the study.
        which: kind of the backbones.
        fits: whether it may fit a linear probe that is not there: not where it is only asked what is fresh.
    """

    def __init__(self, workspace: Workspace, which: str = "all", fits: bool = True) -> None:
        self.workspace = workspace
        self.which = which
        self.fits = fits
        self.folder = workspace.config.work / "scores"

    @classmethod
    def of(cls, workspace: Workspace, backbones: Iterable[StudyBackbone], which: str) -> Iterator[Self]:
        """One for all."""
        yield cls(workspace, which)

    @property
    def name(self) -> str:
        """``score``."""
        return "score"

    def identity(self) -> str:
        """Digest of settings, features, models and test sets: of all that the scores are made of."""
        return self._identity

    @cached_property
    def _identity(self) -> str:
        return fingerprint(
            {
                "semantics": SCORE_SEMANTICS,
                **self._auto(),
                "config": self.workspace.config.score.model_dump(),
                "sources": [
                    {
                        "name": [source.name, source.seed],
                        "data": source.data.identity,
                        "tests": [[test.name, test.group, test.cache.digest] for test in source.tests],
                        "mixtures": [_named(mixture) for mixture in source.mixtures],
                        "models": dict(source.models),
                    }
                    for source in self._sources
                ],
            }
        )

    def _auto(self) -> dict[str, object]:
        """What a chosen score depends on beside, where one is asked for."""
        if AUTO not in self.workspace.config.score.scores:
            return {}
        pseudo = [None if source.pseudo is None else source.pseudo.digest for source in self._sources]
        return {"auto": AUTO_SEMANTICS, "pseudo": pseudo}

    def is_fresh(self) -> bool:
        """Whether the record tells of these scores, and they are there, as they were left."""
        identity = self.identity()
        return self.workspace.record.is_fresh(self.name, identity) and has_contents(self.folder, identity)

    @cached_property
    def _sources(self) -> list[BackboneSource]:
        return sources_to_score(self.workspace, self.which, self.fits)

    def check(self) -> None:
        """Refuse layers that the features do not have; of features that came as arrays no file is opened for it."""
        spec = None if self.workspace.config.has_features else self.workspace.pretrained.known_spec()
        if spec is not None:
            check_layers(self.workspace.config, spec)

    def plan(self) -> Lines:
        """Whether the scores are those of now."""
        self.check()
        try:
            finetuned = all(map(self.workspace.is_finetuned, self.workspace.asked(self.which)))
            fresh = finetuned and Score(self.workspace, self.which, fits=False).is_fresh()
        except (InputError, CacheError):  # what it reads is not there yet
            fresh = False
        what = f"fresh, {self.folder}" if fresh else f"would read caches and models, write {self.folder}"
        return [f"{self.name}: {what}"]

    def run(self, context: Context) -> Done:
        """Score everything."""
        from stages.score import score  # and all detectors, for those alone who have something to score

        result = score(
            self._sources,
            self.workspace.config.score,
            self.folder,
            context.progress,
            self.identity(),
            context.cluster,
        )
        return Done([*result.notes, *self.found()])

    def found(self) -> Lines:
        """The table."""
        return table_lines(self.folder)


def _named(mixture: MixtureFolder) -> list[object]:
    fewer = [] if mixture.scores is None else [mixture.scores]
    return [mixture.variant, mixture.seed, *fewer]


def stale_scores(workspace: Workspace) -> str | None:
    """Why the scores are not those of now, as far as that can be seen: what they were made from may be gone."""
    scored = (read_document(workspace.config.work / "scores" / CONTENTS) or {}).get("identity")
    if scored is None or not workspace.pretrained.link_path.exists():
        return None
    try:
        asked = ["all"] if workspace.config.finetune is None else ["all", "pretrained"]
        if any(Score(workspace, which, fits=False).identity() == scored for which in asked):
            return None
    except CacheError:
        return None
    except InputError as error:
        return f"the scores are not of the models of now: {error}"
    return "the scores are of other models, features or settings than those of now: run make score"
