"""Logistic regression by blocks against scikit-learn's, on all rows at once: on digits and on real cached features."""

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from stages.heads import sums
from stages.heads.affine import Standardisation
from stages.heads.choose import STRENGTHS, fit_head
from stages.heads.logistic import HEAD_TOLERANCE
from stages.heads.sums import standardisation
from stages.id_data.rows import lazy_rows
from tests.test_stages.test_heads.fitting import minimum


def mean_log_likelihood(logits, labels) -> float:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return float((shifted[np.arange(len(labels)), labels] - np.log(np.exp(shifted).sum(axis=1))).mean())


def loss(fit, rows, labels, strength) -> float:
    """What is minimised, a row."""
    one_vector = 2 if len(fit.bias) == 2 else 1  # the difference of two classes is what is penalised
    penalty = one_vector * np.square(fit.weight).sum() / (2 * strength * len(rows))
    return penalty - mean_log_likelihood(rows @ fit.weight.T + fit.bias, labels)


def compare(features, labels, strength, standardise: Standardisation) -> None:
    n_classes = int(labels.max()) + 1
    exact, near = (
        minimum(features, labels, n_classes, strength, standardise, tolerance=gap) for gap in (1e-20, HEAD_TOLERANCE)
    )
    assert near.converged
    weight, bias = exact.weight, exact.bias
    rows = standardise(np.asarray(features), np.float64)
    reference = LogisticRegression(C=strength, solver="newton-cg", tol=1e-10, max_iter=1000).fit(rows, labels)
    coefficients, intercept = reference.coef_, reference.intercept_
    if n_classes == 2:
        coefficients = np.concatenate([-coefficients, coefficients]) / 2
        intercept = np.concatenate([-intercept, intercept]) / 2
    relative = 1e-4 if strength <= max(STRENGTHS) else 1e-2  # no penalty to speak of, and separable rows: a flat valley
    assert np.linalg.norm(weight - coefficients) <= relative * np.linalg.norm(coefficients)
    assert np.linalg.norm(bias - intercept) <= relative * max(np.linalg.norm(intercept), 1e-3)
    ours, theirs = (rows @ w.T + b for w, b in ((weight, bias), (coefficients, intercept)))
    assert mean_log_likelihood(ours, labels) == pytest.approx(mean_log_likelihood(theirs, labels), abs=1e-6)
    # By how much it is above the minimum can only be estimated; worst where rows are separable and the penalty is weak.
    assert loss(near, rows, labels, strength) - loss(exact, rows, labels, strength) <= 1e-5


@pytest.fixture
def small_blocks(monkeypatch):
    """Many blocks, most of which are read anew in every step."""
    monkeypatch.setattr(sums, "BLOCK", 64)
    monkeypatch.setattr(sums, "KEPT_BYTES", 64 * 64 * 8)


@pytest.mark.parametrize("strength", [0.001, 0.1, 10.0, 1e4])
@pytest.mark.parametrize("classes", [range(10), (3, 8), (0, 4, 9)])
def test_digits(classes, strength, small_blocks):
    data = load_digits()
    own = np.flatnonzero(np.isin(data.target, classes))[:500]
    features = data.data[own].astype(np.float32) + np.arange(64) % 2 * 50
    labels = np.searchsorted(classes, data.target[own])
    compare(features, labels, strength, standardisation(features))


@pytest.mark.parametrize("strength", [min(STRENGTHS), 0.1, max(STRENGTHS)])
def test_features_as_they_stand_in_a_cache(data, strength, monkeypatch):
    monkeypatch.setattr(sums, "BLOCK", 100)
    monkeypatch.setattr(sums, "KEPT_BYTES", 0)
    rows = data.split.folds[0].train
    features = lazy_rows(data.train, "cls", data.train.spec.cls_dim)[rows]
    compare(features, data.train_labels[rows], strength, standardisation(features))
    head = fit_head(features, data.train_labels[rows], data.n_classes, strength)
    whole = np.float64(data.train.read("cls", rows))
    assert head.standardise.mean == pytest.approx(whole.mean(0), rel=1e-6, abs=1e-6)
    assert head.standardise.scale[0] == pytest.approx(np.sqrt(whole.var(0).mean()), rel=1e-6)
