"""Metrics against their definitions written out plainly, scikit-learn, and each other."""

import json
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import auc, precision_recall_curve, roc_auc_score

from stages.errors import InputError
from stages.metrics.ranking import (
    METRICS,
    OODMetrics,
    admitting_threshold,
    auroc,
    fpr95,
    fpr95_ood,
    fpr_at_tpr,
    ood_metrics,
)

GOLDEN = Path(__file__).parents[2] / "golden" / "metrics.json"
tied_scores = st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=40).map(np.array)  # ties in every example


def plain_fpr95(ids, oods):
    """METHOD.md's words: the smallest P_OOD(s <= t) over observed t with P_ID(s <= t) >= 0.95."""
    observed = np.concatenate([ids, oods])
    return min(np.mean(oods <= t) for t in observed if np.mean(ids <= t) >= 0.95)


def plain_fpr95_ood(ids, oods):
    """The mirrored rule: the smallest P_ID(s >= t) over observed t with P_OOD(s >= t) >= 0.95."""
    observed = np.concatenate([ids, oods])
    return min(np.mean(ids >= t) for t in observed if np.mean(oods >= t) >= 0.95)


def sklearn_aupr(positive, negative):
    """By trapezoid; positives score high."""
    labels = np.repeat([1, 0], [len(positive), len(negative)])
    precision, recall, _ = precision_recall_curve(labels, np.concatenate([positive, negative]))
    return auc(recall, precision)


@settings(deadline=None)
@given(tied_scores, tied_scores)
def test_every_metric_equals_its_definition_ties_included(ids, oods):
    metrics = ood_metrics(ids, oods)
    labels, scores = np.repeat([0, 1], [len(ids), len(oods)]), np.concatenate([ids, oods])
    wins = np.mean([(o > i) + 0.5 * (o == i) for o in oods for i in ids])
    assert metrics.auroc == pytest.approx(wins)
    assert metrics.auroc == pytest.approx(roc_auc_score(labels, scores))
    assert metrics.fpr95 == plain_fpr95(ids, oods)
    assert metrics.fpr95_ood == plain_fpr95_ood(ids, oods)
    assert metrics.aupr_in == pytest.approx(sklearn_aupr(-ids, -oods))
    assert metrics.aupr_out == pytest.approx(sklearn_aupr(oods, ids))


def test_the_two_fpr95_are_different_numbers():
    ids = np.arange(100.0)  # 95 % of ID lie at or below 94
    oods = np.concatenate([[50.0], np.full(9, 94.5)])  # 95 % of OOD means all ten: from 50 on
    assert fpr95(ids, oods) == 0.1
    assert fpr95_ood(ids, oods) == 0.5


@pytest.mark.parametrize("n", [20, 40, 60, 100, 1000, 11 * 20])
def test_exactly_95_per_cent_is_enough(n):
    assert admitting_threshold(np.arange(1, n + 1), 0.95) == round(0.95 * n)


def test_separated_constant_and_single_scores():
    assert asdict(ood_metrics([0, 1], [2, 3])) == {
        "n_id": 2, "n_ood": 2, "auroc": 1, "fpr95": 0, "fpr95_ood": 0, "aupr_in": 1, "aupr_out": 1,
    }  # fmt: skip
    constant = ood_metrics(np.ones(30), np.ones(10))
    assert (constant.auroc, constant.fpr95, constant.fpr95_ood) == (0.5, 1, 1)  # no threshold tells them apart
    assert ood_metrics([0.0], [1.0]).auroc == 1
    assert ood_metrics([1.0], [0.0]) == ood_metrics(np.float16([1]), np.float32([0]))


@settings(deadline=None)
@given(tied_scores, tied_scores, st.floats(0.5, 4), st.integers(-10, 10))
def test_only_the_order_of_scores_counts(ids, oods, scale, shift):
    moved, mirrored = ood_metrics(scale * ids + shift, scale * oods + shift), ood_metrics(-oods, -ids)
    metrics = ood_metrics(ids, oods)
    assert moved == metrics
    assert ood_metrics(ids[::-1], oods[::-1]) == metrics
    assert mirrored.auroc == pytest.approx(metrics.auroc)
    assert (mirrored.fpr95, mirrored.aupr_out) == (metrics.fpr95_ood, metrics.aupr_in)
    assert auroc(oods, ids) == pytest.approx(1 - metrics.auroc)


@pytest.mark.parametrize(
    ("ids", "oods", "says"),
    [
        ([], [1.0], r"ID scores have shape \(0,\)"),
        ([1.0], [], "OOD scores have shape"),
        ([[1.0]], [1.0], r"\(1, 1\)"),
        ([1.0, np.nan, np.inf], [1.0], "2 of 3 ID scores are NaN or inf"),
    ],
)
def test_scores_that_mean_nothing_are_refused(ids, oods, says):
    with pytest.raises(InputError, match=says):
        ood_metrics(ids, oods)


def test_a_share_outside_0_to_1_is_refused():
    with pytest.raises(InputError, match="admit = 0 "):
        fpr_at_tpr([1.0], [1.0], tpr=0)


def test_every_metric_is_called_the_same_and_better_the_way_it_says():
    assert [field.name for field in fields(OODMetrics)] == ["n_id", "n_ood", *METRICS]
    apart, mixed = ood_metrics([0, 1, 2, 3], [4, 5, 6, 7]), ood_metrics([0, 2, 4, 6], [1, 3, 5, 7])
    for name, metric in METRICS.items():
        values = [getattr(each, name) for each in (mixed, apart)]
        assert metric.name == name
        assert metric.best(values) == values[1] != values[0]
    assert [METRICS[name].heading for name in ("auroc", "fpr95")] == ["AUROC ↑", "FPR95 ↓"]


@pytest.mark.parametrize("name", METRICS)
def test_the_positive_class_is_the_one_it_says(name):
    """Sides changed and scores mirrored: what was ID is OOD and in its place, and a metric of it another's."""
    ids, oods = np.array([0.0, 1, 2, 2, 5]), np.array([1.0, 3, 4])
    mirrored = {"ID": "OOD", "OOD": "ID", "": ""}[METRICS[name].positive]
    twin = next(
        each.name for each in METRICS.values() if (each.title, each.positive) == (METRICS[name].title, mirrored)
    )
    assert getattr(ood_metrics(ids, oods), name) == pytest.approx(getattr(ood_metrics(-oods, -ids), twin))


def test_golden_values():
    """A changed number here is a changed metric: change the file on purpose or not at all."""
    rng = np.random.default_rng(2510)
    ids, oods = rng.normal(size=300).round(1), rng.normal(1.2, size=200).round(1)  # rounded: full of ties
    assert asdict(ood_metrics(ids, oods)) == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-12)
