"""Logistic regression by blocks against scikit-learn's, on all rows at once: on digits and on real cached features."""

import warnings

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from stages.heads import logistic
from stages.heads.affine import Standardisation
from stages.heads.choose import STRENGTHS, fit_head
from stages.heads.logistic import fit_logistic, standardisation
from stages.id_data.rows import lazy_rows


def mean_log_likelihood(logits, labels) -> float:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return float((shifted[np.arange(len(labels)), labels] - np.log(np.exp(shifted).sum(axis=1))).mean())


def compare(features, labels, strength, standardise: Standardisation) -> None:
    n_classes = int(labels.max()) + 1
    weight, bias, _ = fit_logistic(features, labels, n_classes, strength, standardise)
    rows = standardise(np.asarray(features), np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # both stop after as many steps
        reference = LogisticRegression(C=strength, max_iter=1000).fit(rows, labels)
    coefficients, intercept = reference.coef_, reference.intercept_
    if n_classes == 2:
        coefficients = np.concatenate([-coefficients, coefficients]) / 2
        intercept = np.concatenate([-intercept, intercept]) / 2
    assert np.linalg.norm(weight - coefficients) <= 1e-4 * np.linalg.norm(coefficients)
    assert np.linalg.norm(bias - intercept) <= 1e-4 * max(np.linalg.norm(intercept), 1e-3)
    ours, theirs = (rows @ w.T + b for w, b in ((weight, bias), (coefficients, intercept)))
    assert mean_log_likelihood(ours, labels) == pytest.approx(mean_log_likelihood(theirs, labels), abs=1e-6)


@pytest.fixture
def small_blocks(monkeypatch):
    """Many blocks, most of which are read anew in every step."""
    monkeypatch.setattr(logistic, "BLOCK", 64)
    monkeypatch.setattr(logistic, "_KEPT_BYTES", 64 * 64 * 8)


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
    monkeypatch.setattr(logistic, "BLOCK", 100)
    monkeypatch.setattr(logistic, "_KEPT_BYTES", 0)
    rows = data.split.folds[0].train
    features = lazy_rows(data.train, "cls", data.train.spec.cls_dim)[rows]
    compare(features, data.train_labels[rows], strength, standardisation(features))
    head = fit_head(features, data.train_labels[rows], data.n_classes, strength)
    whole = np.float64(data.train.read("cls", rows))
    assert head.standardise.mean == pytest.approx(whole.mean(0), rel=1e-6, abs=1e-6)
    assert head.standardise.scale[0] == pytest.approx(np.sqrt(whole.var(0).mean()), rel=1e-6)
