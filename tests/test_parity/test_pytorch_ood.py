"""Scores and metrics against pytorch-ood, and what it lacks against scikit-learn: independent code, on real data."""

import numpy as np
import pytest
import torch
from pytorch_ood.detector import KNN, EnergyBased, MaxSoftmax
from pytorch_ood.metrics import functional as reference
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import pairwise_distances
from sklearn.neighbors import NearestCentroid
from sklearn.preprocessing import normalize

from stages.metrics.ranking import ood_metrics
from stages.scorers.features.ncm import NCMScorer
from stages.scorers.inputs import ScoreInputs
from stages.scorers.logits.energy import energy_score
from stages.scorers.logits.msp import msp_score
from stages.scorers.neighbours.knn import KNNScorer


@pytest.fixture(scope="module")
def digits():
    """Digits 0 to 6 as ID, 7 to 9 as OOD: train, test and OOD rows with features and a linear head's logits."""
    images, labels = load_digits(return_X_y=True)
    known = labels < 7
    head = LogisticRegression(max_iter=500, C=0.01).fit(images[known][::2], labels[known][::2])
    rows = {"train": known & (np.cumsum(known) % 2 == 1), "test": known & (np.cumsum(known) % 2 == 0), "ood": ~known}
    return {
        name: ScoreInputs(features=images[mask], logits=head.decision_function(images[mask]), labels=labels[mask])
        for name, mask in rows.items()
    }


@pytest.mark.parametrize("t", [1.0, 0.5, 20.0])
@pytest.mark.parametrize("part", ["test", "ood"])
def test_energy_and_msp(digits, part, t):
    logits = digits[part].logits
    torch_logits = torch.from_numpy(logits)
    np.testing.assert_allclose(energy_score(logits, t), EnergyBased.score(torch_logits, t=t), rtol=1e-5)
    theirs, ours = MaxSoftmax.score(torch_logits, t=t).numpy(), msp_score(logits, t)
    np.testing.assert_allclose(np.expm1(ours), theirs, rtol=1e-5)
    order = np.argsort(ours)
    assert (np.diff(theirs[order]) >= -1e-6).all()  # theirs is equal where ours still differs


@pytest.mark.parametrize("k", [1, 5, 50, 300])
def test_knn(digits, k):
    train, ood = digits["train"], digits["ood"]
    detector = KNN(None, k=k).fit_features(torch.from_numpy(train.features), torch.from_numpy(train.labels))
    expected = detector.predict_features(torch.from_numpy(ood.features)).numpy()
    scores = KNNScorer(k).fit(train).score(ood)
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    order = np.argsort(expected)
    apart = np.diff(expected[order]) > 2e-6  # equal ranks, wherever float32 can tell two rows apart
    assert (np.diff(scores[order])[apart] > 0).all()


@pytest.mark.filterwarnings("ignore:self.within_class_std_dev_")  # of pixels that are 0 in every digit
def test_ncm(digits):
    """Against scikit-learn's centroids, of rows of length 1; its distance to them would be the Euclidean one."""
    train, scorer = digits["train"], NCMScorer().fit(digits["train"])
    centroids = normalize(NearestCentroid().fit(normalize(train.features), train.labels).centroids_)
    for part in ("test", "ood"):
        expected = pairwise_distances(normalize(digits[part].features), centroids).min(axis=1)
        np.testing.assert_allclose(scorer.score(digits[part]), expected, rtol=1e-5)


def scores_of(kind, digits):
    """ID and OOD scores: real ones, and those on which libraries are known to disagree."""
    test, ood = digits["test"], digits["ood"]
    return {
        "energy": lambda: (energy_score(test.logits), energy_score(ood.logits)),
        "msp, saturated": lambda: (msp_score(test.logits * 9), msp_score(ood.logits * 9)),
        "knn": lambda: tuple(KNNScorer(5).fit(digits["train"]).score(x) for x in (test, ood)),
        "ties": lambda: (energy_score(test.logits).round(), energy_score(ood.logits).round()),
        "constants": lambda: (np.zeros(10), np.zeros(7)),
        "one sample a side": lambda: (np.array([0.3]), np.array([0.2])),
    }[kind]()


@pytest.mark.parametrize("kind", ["energy", "msp, saturated", "knn", "ties", "constants", "one sample a side"])
def test_metrics(digits, kind):
    ids, oods = scores_of(kind, digits)
    ours = ood_metrics(ids, oods)
    scores = torch.from_numpy(np.concatenate([ids, oods]))
    labels = torch.from_numpy(np.repeat([0, -1], [len(ids), len(oods)]))  # negative: OOD, the positive class there
    assert ours.auroc == pytest.approx(reference.auroc(scores, labels).item(), abs=1e-9)
    assert ours.fpr95_ood == pytest.approx(reference.fpr_at_tpr(scores, labels).item(), abs=1e-9)
    assert ours.fpr95 == pytest.approx(reference.fpr_at_tpr(-scores, -labels - 1).item(), abs=1e-9)  # sides swapped
    assert ours.aupr_in == pytest.approx(reference.aupr(scores, labels, positive="id").item(), abs=1e-9)
    assert ours.aupr_out == pytest.approx(reference.aupr(scores, labels, positive="ood").item(), abs=1e-9)
