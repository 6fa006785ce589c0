"""OOD scores: `SCORERS` has them all by name. Higher = more OOD, everywhere.

``README.md`` beside this file says how scores are organised and how one is added: a file in one of the folders, and a
line below. No score is imported before it is asked for.
"""

import difflib
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from stages.config import Profile
from stages.errors import InputError

if TYPE_CHECKING:
    from stages.scorers.scorer import Scorer, ScorerState


class Registry(Mapping[str, "type[Scorer]"]):
    """Scores by name; a score's module is imported when its class is first asked for.

    Args:
        places: ``"module:Class"`` of each score, the module by its name in this package.
    """

    def __init__(self, places: Mapping[str, str]) -> None:
        self._places = places

    def __getitem__(self, name: str) -> "type[Scorer]":
        module, _, scorer = self._places[name].partition(":")
        found: type[Scorer] = getattr(import_module(f"{__name__}.{module}"), scorer)
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


SCORERS = Registry({
    "msp": "logits.msp:MSPScorer",
    "energy": "logits.energy:EnergyScorer",
    "knn": "neighbours.knn:KNNScorer",
    "ncm": "features.ncm:NCMScorer",
    "mos": "logits.mos:MOSScorer",
    "temperature-scaling": "logits.temperature:TemperatureScalingScorer",
    "max-logit": "logits.maxlogit:MaxLogitScorer",
    "entropy": "logits.entropy:EntropyScorer",
    "gen": "logits.gen:GENScorer",
    "kl-matching": "logits.klmatching:KLMatchingScorer",
    "react": "features.react:ReActScorer",
    "ash-s": "features.ash:ASHSScorer",
    "ash-p": "features.ash:ASHPScorer",
    "ash-b": "features.ash:ASHBScorer",
    "scale": "features.scale:SCALEScorer",
    "lts": "features.lts:LTSScorer",
    "vra": "features.vra:VRAScorer",
    "dice": "features.dice:DICEScorer",
    "gradnorm": "features.gradnorm:GradNormScorer",
    "mahalanobis": "features.mahalanobis:MahalanobisScorer",
    "mahalanobis-pp": "features.mahalanobis:MahalanobisPPScorer",
    "mahalanobis-radial": "features.mahalanobis:RadialMahalanobisScorer",
    "relative-mahalanobis": "features.mahalanobis:RelativeMahalanobisScorer",
    "relative-mahalanobis-pp": "features.mahalanobis:RelativeMahalanobisPPScorer",
    "ssd": "features.mahalanobis:SSDScorer",
    "wdiscood": "features.wdiscood:WDiscOODScorer",
    "vmf": "features.vmf:VMFScorer",
    "gmm": "features.gmm:GMMScorer",
    "cosine": "features.cosine:CosineScorer",
    "vim": "subspace.vim:ViMScorer",
    "residual": "subspace.vim:ResidualScorer",
    "neco": "subspace.neco:NECOScorer",
    "cop": "subspace.kernelpca:CoPScorer",
    "corp": "subspace.kernelpca:CoRPScorer",
    "kpca-nystrom": "subspace.kernelpca:NystromKPCAScorer",
    "core": "subspace.core:COREScorer",
    "she": "features.she:SHEScorer",
    "fdbd": "features.fdbd:FDBDScorer",
    "nci": "features.nci:NCIScorer",
    "pnml": "subspace.pnml:PNMLScorer",
    "nac": "features.nac:NACScorer",
    "cadref": "features.cadref:CADRefScorer",
    "nnguide": "neighbours.nnguide:NNGuideScorer",
    "relation": "neighbours.relation:RelationScorer",
    "knn-mean": "neighbours.knn_mean:KNNMeanScorer",
    "patch-knn": "neighbours.patch_knn:PatchKNNScorer",
    "other": "logits.other:OtherScorer",
    "mm-pp": "layers.mm:MMPlusPlusScorer",
    "knn-layers": "layers.knn:KNNLayersScorer",
})  # fmt: skip


AUTO = "auto"  # among the scores of a study: the one that is chosen for it, see `stages.detection.auto`
FROZEN = "frozen:"  # before a part of a sum on a mixture's features: it looks at the backbone's own


class ScorePart(NamedTuple):
    """A summand of a score.

    Attributes:
        name: of `SCORERS`.
        frozen: whether it looks at the backbone's own features beside those of a mixture.
    """

    name: str
    frozen: bool


def parts_of(score: str) -> list[ScorePart]:
    """The summands of a score, or the score itself.

    >>> parts_of("frozen:knn+energy")
    [ScorePart(name='knn', frozen=True), ScorePart(name='energy', frozen=False)]
    """
    return [ScorePart(part.removeprefix(FROZEN), part.startswith(FROZEN)) for part in score.split("+")]


def unknown_part(score: str) -> str | None:
    """The first part of a score or sum of scores that nobody knows; the score itself where a part is repeated.

    >>> unknown_part("knn+energy"), unknown_part("knn+enrgy"), unknown_part("frozen:knn+knn")
    (None, 'enrgy', None)
    """
    parts = score.split("+")
    unknown = [part for part in parts if part.removeprefix(FROZEN) not in SCORERS and score != AUTO]
    return unknown[0] if unknown else score if len(set(parts)) < len(parts) else None


def scorer_class(name: str) -> "type[Scorer]":
    """The class of the score called ``name``.

    Raises:
        InputError: no such score; the nearest known name is in the message.
    """
    if name not in SCORERS:
        near = difflib.get_close_matches(name, SCORERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"no score is called {name!r}{hint} (known: {', '.join(SCORERS)})")
    return SCORERS[name]


def needs_of(score: str, frozen: bool | None = None) -> frozenset[str]:
    """What a score, or the parts of a sum, need; see `stages.scorers.scorer.Scorer`. Nothing of ``auto``.

    Args:
        score: name.
        frozen: of a sum of two subjects, the parts that look at the backbone's own features, or the others; None: all.

    Raises:
        InputError: no such score.
    """
    asked = (part.name for part in parts_of(score) if score != AUTO and frozen in (None, part.frozen))
    return frozenset().union(*(scorer_class(name).needs for name in asked))


def reads_head(score: str) -> bool:
    """Whether a score, or a part of a sum, reads a head's logits or its weights; of the features that are scored.

    ``auto`` stands with those that do, whatever is chosen.

    >>> reads_head("knn+energy"), reads_head("frozen:energy+knn"), reads_head("auto")
    (True, False, True)
    """
    return score == AUTO or bool(needs_of(score, frozen=False) & {"logits", "head"})


def title_of(score: str) -> str:
    """A score, or a sum of scores, as the field writes it; what nobody knows stays as it is.

    >>> title_of("knn+energy"), title_of("of another time")
    ('kNN+energy', 'of another time')
    """
    titles = [(SCORERS[name].title if name in SCORERS else name, frozen) for name, frozen in parts_of(score)]
    return "+".join(f"frozen {title}" if frozen else title for title, frozen in titles)


def restored(state: "ScorerState") -> "Scorer":
    """The fitted score that `Scorer.state` gave the state of.

    Raises:
        InputError: no such score, or not a state of it.
    """
    return scorer_class(state.name).from_state(state)


def get_scorer(name: str, profile: Profile = "paper", **params: Any) -> "Scorer":
    """The score called ``name``, not yet fitted.

    Args:
        name: a key of `SCORERS`.
        profile: whose defaults, where implementations differ.
        params: settings that differ from the defaults.

    Raises:
        InputError: no such score, no such setting, or a value that the setting cannot have.

    >>> get_scorer("energy", temperature=2.0).params()
    {'temperature': 2.0}
    """
    return scorer_class(name).of(profile, **params)
