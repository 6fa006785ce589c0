"""k from ID rows alone: the rule written out once more, and what happens where it has nothing to compare."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.detection.selection import BY_LEFT_OUT_CLASSES, K_GRID, SMALLEST, SearchFold, choose_k
from stages.errors import InputError
from stages.metrics.ranking import auroc
from stages.scorers.inputs import ScoreInputs
from stages.scorers.neighbours.bank import FeatureBank
from stages.scorers.neighbours.knn import KNNScorer
from tests.test_stages.tallies import Tallies
from tests.test_stages.test_scorers.drawn import inputs


def test_k_is_chosen_as_the_rule_says():
    """The rule once more, by one scorer for each k and group."""
    fold = SearchFold(inputs(n=200, classes=6, noise=0.6), inputs(n=90, classes=6, noise=0.6, seed=1))
    k, record = choose_k([fold], grid=(1, 2, 5, 20, 500))
    expected = {}
    for candidate in (1, 2, 5, 20):  # 500 is more than half of the bank
        areas = []
        for group in range(3):  # 6 // 2
            kept, out = fold.bank.labels % 3 != group, fold.queries.labels % 3 == group
            scores = KNNScorer(candidate).fit(fold.bank.take(kept)).score(fold.queries)
            areas.append(auroc(scores[~out], scores[out]))
        expected[str(candidate)] = np.mean(areas)
    assert len(set(expected.values())) == 4
    assert record["auroc"] == pytest.approx(expected, abs=1e-6)
    assert k == record["k"] == int(max(expected, key=expected.get))
    assert (record["class_groups"], record["queries"], record["queries_without_bank"]) == (3, 90, 0)
    json.dumps(record)


def test_every_row_is_searched_once_whichever_group_plays_ood(monkeypatch):
    """A search costs queries times rows: so many pairs are compared, and not once more for each group."""
    compared, search = [], FeatureBank.search

    def counted(bank, queries, k, exclude_self=False):
        compared.append(len(queries) * len(bank))
        return search(bank, queries, k, exclude_self)

    monkeypatch.setattr(FeatureBank, "search", counted)
    for experts in (None, 2):
        bank, queries = (inputs(n=n, classes=10, experts=experts, seed=n) for n in (200, 90))
        compared.clear()
        choose_k([SearchFold(bank, queries)])
        pairs = (
            200 * 90
            if experts is None
            else sum(np.sum(bank.expert == e) * np.sum(queries.expert == e) for e in range(experts))
        )
        assert sum(compared) == pairs


def test_of_many_queries_some_are_drawn_the_same_every_time():
    bank, queries = inputs(n=200, classes=6, noise=0.6), inputs(n=500, classes=6, noise=0.6, seed=1)
    (k, record), again = (choose_k([SearchFold(bank, queries)], most_queries=300) for _ in range(2))
    assert (k, record) == again
    assert record["queries"] == 300
    assert record["auroc"] == pytest.approx(choose_k([SearchFold(bank, queries)])[1]["auroc"], abs=0.05)


def test_k_among_equals_is_the_smallest_and_outliers_want_a_larger_one():
    clean = inputs(n=100, classes=5)
    apart = ScoreInputs(features=np.eye(5)[clean.labels], labels=clean.labels)  # every k separates perfectly
    assert choose_k([SearchFold(apart, apart)], grid=(2, 5, 1))[0] == 1

    stray = inputs(n=100, classes=5, seed=2)  # a stray row of another class beside each class: only k > 1 sees past it
    features = np.concatenate([stray.features, np.eye(5, 8)[[1, 2, 3, 4, 0]]])
    bank = ScoreInputs(features=features, labels=np.concatenate([stray.labels, np.arange(5)]))
    assert choose_k([SearchFold(bank, clean)])[0] > 1


def test_queries_of_an_expert_that_lost_all_its_classes_are_left_out_and_counted():
    train, queries = inputs(n=120, classes=4, experts=4), inputs(n=40, classes=4, experts=4, seed=1)
    strays = np.arange(40) % 8 == 0  # some of class 0 are routed to expert 1
    queries = ScoreInputs(queries.features, labels=queries.labels, expert=np.where(strays, 1, queries.expert))
    _, record = choose_k([SearchFold(train, queries)])
    assert record["queries_without_bank"] == 40  # each query once: when its expert's class is left out


def test_a_group_that_has_all_classes_of_an_expert_is_taken_apart():
    """Four classes, two experts: both groups of classes are one expert's, and nothing is left to compare with."""
    train, queries = inputs(n=120, classes=4, experts=2), inputs(n=40, classes=4, experts=2, seed=1)
    assert set(train.labels[train.expert == 0]) == {0, 2}
    k, record = choose_k([SearchFold(train, queries)])
    assert record["rule"] == BY_LEFT_OUT_CLASSES
    assert (record["class_groups"], record["k"]) == (4, k)
    assert all(0.5 < area <= 1 for area in record["auroc"].values())


@pytest.mark.parametrize(
    "fold",
    [
        SearchFold(inputs(n=40, classes=1), inputs(n=9, classes=1)),
        SearchFold(inputs(n=40, classes=4, experts=4), inputs(n=20, classes=4, experts=4)),  # each expert has one
        SearchFold(inputs(), inputs().take(np.array([0, 5]))),  # queries of one class
        SearchFold(inputs(), inputs().take(np.zeros(0, dtype=int))),
    ],
)
def test_where_no_class_can_be_left_out_k_is_the_smallest_and_the_rule_says_so(fold):
    k, record = choose_k([fold], grid=(2, 5, 10))
    assert (k, record["k"], record["rule"], record["auroc"]) == (2, 2, SMALLEST, {})


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 12), st.integers(1, 8), st.integers(1, 12), st.integers(0, 3), st.integers(0, 99), st.booleans())
def test_k_can_be_chosen_however_small_the_data(classes, experts, per_class, held_out, seed, one_fold):
    """Any routing: experts of one class, of none, and queries that went to another's."""
    rng = np.random.default_rng(seed)

    def drawn(n: int, routed: bool) -> ScoreInputs:
        labels = np.arange(n * classes) % classes
        features = np.eye(classes, 13)[labels] + rng.normal(scale=0.5, size=(n * classes, 13))
        expert = rng.integers(0, min(experts, classes), len(labels)) if routed else labels % experts
        return ScoreInputs(features=features, labels=labels, expert=expert)

    folds = [
        SearchFold(drawn(per_class, routed=False), drawn(held_out, routed=True)) for _ in range(1 if one_fold else 3)
    ]
    tallies = Tallies()
    k, record = choose_k(folds, progress=tallies)
    assert all(done == total for _, total, done in tallies.told)
    smallest = min(np.unique(fold.bank.expert, return_counts=True)[1].min() for fold in folds)
    assert k in K_GRID
    assert k == 1 or k <= smallest // 2
    assert record["rule"] in (BY_LEFT_OUT_CLASSES, SMALLEST)
    json.dumps(record)


@pytest.mark.parametrize(
    ("folds", "says"),
    [
        ([], "needs a fold"),
        ([SearchFold(inputs(), ScoreInputs(features=np.ones((3, 8))))], "choosing k needs labels"),
        ([SearchFold(ScoreInputs(np.ones((3, 8)), labels=np.array([0, 1, -1])), inputs())], "needs known ID classes"),
    ],
)
def test_k_that_cannot_be_chosen_is_refused(folds, says):
    with pytest.raises(InputError, match=says):
        choose_k(folds)
