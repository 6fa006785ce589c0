"""OOD scores: a pure function with its paper for each formula, and a thin fitted object around it.

Higher = more OOD, everywhere. A new score is one file beside these, a line in `SCORERS`, and its name in
`stages.config.SCORE_NAMES`.

    base          ScoreInputs, what a score may look at; Scorer, what a score is, and its routing over experts
    energy, msp, temperature, maxlogit, entropy, gen, klmatching    scores of the logits
    react, ash, scale, lts, vra, dice, gradnorm                     scores of the last layer's input and weights
    mos           the smallest odds of "other" over the groups
    other         the routed expert's odds of "other"
    softmax, quantiles, shaping    what several of them share
    knn, knn_mean distance to the k-th neighbour, and mean distance to the k nearest
    patch_knn     the patches farthest from all patches of ID training images
    ncm, cosine   the nearest class mean
    mahalanobis   distances with one covariance: to the nearest class mean, relative to all, to the mean (ssd); ++
    gmm           density of a Gaussian for each class
    vim, neco     outside, and inside, of the principal subspace of ID features (vim: residual too)
    she           inner product with the predicted class's pattern
    fdbd, nci     a feature and the weights of the linear head
    pnml          regret
    nnguide, relation  products with all ID training rows
    moments       counts, means and scatter of ID rows, block by block; whitening
    shrinkage     covariances of few rows
    pairs         blocks of rows times blocks of ID training rows
    selection     choose_k(): k from ID rows alone
    calibration   scores of several experts or kinds onto one scale; thresholds
"""

import difflib
from typing import Any

from stages.config import Profile
from stages.errors import InputError
from stages.scorers.features.ash import ASHBScorer, ASHPScorer, ASHSScorer, ash_score
from stages.scorers.features.cosine import CosineScorer, cosine_score
from stages.scorers.features.dice import DICEScorer, dice_score, sparse_head
from stages.scorers.features.fdbd import FDBDScorer, fdbd_score
from stages.scorers.features.gmm import GMMScorer, gmm_score
from stages.scorers.features.gradnorm import GradNormScorer, gradnorm_score
from stages.scorers.features.lts import LTSScorer, lts_score
from stages.scorers.features.mahalanobis import (
    MahalanobisPPScorer,
    MahalanobisScorer,
    RelativeMahalanobisPPScorer,
    RelativeMahalanobisScorer,
    SSDScorer,
    mahalanobis_score,
    relative_mahalanobis_score,
)
from stages.scorers.features.nci import NCIScorer, nci_score
from stages.scorers.features.ncm import NCMScorer, class_means
from stages.scorers.features.react import ReActScorer, react_score
from stages.scorers.features.scale import SCALEScorer, scale_score
from stages.scorers.features.she import SHEScorer, she_score
from stages.scorers.features.vra import VRAScorer, vra_score
from stages.scorers.logits.energy import EnergyScorer, energy_score
from stages.scorers.logits.entropy import EntropyScorer, entropy_score
from stages.scorers.logits.gen import GENScorer, gen_score
from stages.scorers.logits.klmatching import KLMatchingScorer, class_templates, kl_matching_score
from stages.scorers.logits.maxlogit import MaxLogitScorer, max_logit_score
from stages.scorers.logits.mos import MOSScorer, mos_score
from stages.scorers.logits.msp import MSPScorer, msp_score
from stages.scorers.logits.other import OtherScorer, other_score
from stages.scorers.logits.temperature import TemperatureScalingScorer, fit_temperature
from stages.scorers.neighbours.knn import ExpertBanks, KNNScorer, knn_score
from stages.scorers.neighbours.knn_mean import KNNMeanScorer, knn_mean_score
from stages.scorers.neighbours.nnguide import NNGuideScorer, nnguide_score
from stages.scorers.neighbours.patch_knn import PatchKNNScorer, patch_knn_score
from stages.scorers.neighbours.relation import RelationScorer, relation_score
from stages.scorers.shared.base import ScoreInputs, Scorer, check_settings
from stages.scorers.subspace.neco import NECOScorer, neco_score
from stages.scorers.subspace.pnml import PNMLScorer, pnml_score
from stages.scorers.subspace.vim import ResidualScorer, ViMScorer, residual_score, vim_score

SCORERS: dict[str, type[Scorer]] = {
    scorer.name: scorer
    for scorer in (
        MSPScorer,
        EnergyScorer,
        KNNScorer,
        NCMScorer,
        MOSScorer,
        TemperatureScalingScorer,
        MaxLogitScorer,
        EntropyScorer,
        GENScorer,
        KLMatchingScorer,
        ReActScorer,
        ASHSScorer,
        ASHPScorer,
        ASHBScorer,
        SCALEScorer,
        LTSScorer,
        VRAScorer,
        DICEScorer,
        GradNormScorer,
        MahalanobisScorer,
        MahalanobisPPScorer,
        RelativeMahalanobisScorer,
        RelativeMahalanobisPPScorer,
        SSDScorer,
        GMMScorer,
        CosineScorer,
        ViMScorer,
        ResidualScorer,
        NECOScorer,
        SHEScorer,
        FDBDScorer,
        NCIScorer,
        PNMLScorer,
        NNGuideScorer,
        RelationScorer,
        KNNMeanScorer,
        PatchKNNScorer,
        OtherScorer,
    )
}


def scorer_class(name: str) -> type[Scorer]:
    """The class of the scorer called ``name``.

    Raises:
        InputError: no such scorer; the nearest known name is in the message.
    """
    if name not in SCORERS:
        near = difflib.get_close_matches(name, SCORERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"no score is called {name!r}{hint} (known: {', '.join(SCORERS)})")
    return SCORERS[name]


def get_scorer(name: str, profile: Profile = "paper", **params: Any) -> Scorer:
    """The scorer called ``name``, not yet fitted.

    Args:
        name: a key of `SCORERS`.
        profile: whose defaults, where implementations differ.
        params: settings that differ from the defaults.

    Raises:
        InputError: no such scorer, no such setting, or a value that the setting cannot have.

    >>> get_scorer("energy", temperature=2.0).params()
    {'temperature': 2.0}
    """
    scorer = scorer_class(name)
    settings = dict(scorer.profiles.get(profile, {})) | params
    check_settings(scorer, settings)
    return scorer(**settings)


__all__ = [
    "SCORERS",
    "ASHBScorer",
    "ASHPScorer",
    "ASHSScorer",
    "CosineScorer",
    "DICEScorer",
    "EnergyScorer",
    "EntropyScorer",
    "ExpertBanks",
    "FDBDScorer",
    "GENScorer",
    "GMMScorer",
    "GradNormScorer",
    "KLMatchingScorer",
    "KNNMeanScorer",
    "KNNScorer",
    "LTSScorer",
    "MOSScorer",
    "MSPScorer",
    "MahalanobisPPScorer",
    "MahalanobisScorer",
    "MaxLogitScorer",
    "NCIScorer",
    "NCMScorer",
    "NECOScorer",
    "NNGuideScorer",
    "OtherScorer",
    "PNMLScorer",
    "PatchKNNScorer",
    "ReActScorer",
    "RelationScorer",
    "RelativeMahalanobisPPScorer",
    "RelativeMahalanobisScorer",
    "ResidualScorer",
    "SCALEScorer",
    "SHEScorer",
    "SSDScorer",
    "ScoreInputs",
    "Scorer",
    "TemperatureScalingScorer",
    "VRAScorer",
    "ViMScorer",
    "ash_score",
    "class_means",
    "class_templates",
    "cosine_score",
    "dice_score",
    "energy_score",
    "entropy_score",
    "fdbd_score",
    "fit_temperature",
    "gen_score",
    "get_scorer",
    "gmm_score",
    "gradnorm_score",
    "kl_matching_score",
    "knn_mean_score",
    "knn_score",
    "lts_score",
    "mahalanobis_score",
    "max_logit_score",
    "mos_score",
    "msp_score",
    "nci_score",
    "neco_score",
    "nnguide_score",
    "other_score",
    "patch_knn_score",
    "pnml_score",
    "react_score",
    "relation_score",
    "relative_mahalanobis_score",
    "residual_score",
    "scale_score",
    "scorer_class",
    "she_score",
    "sparse_head",
    "vim_score",
    "vra_score",
]
