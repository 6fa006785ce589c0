"""Scores against their formulas written out plainly; calibration, thresholds and the choice of k."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from stages.config import SCORE_NAMES
from stages.detection.calibration import ExpertCalibration, Standardiser, sum_scores, threshold_at
from stages.detection.selection import BY_LEFT_OUT_CLASSES, K_GRID, SMALLEST, Fold, choose_k
from stages.errors import InputError, StageError
from stages.heads.affine import LinearHead
from stages.metrics.ranking import auroc
from stages.scorers import (
    SCORERS,
    ExpertBanks,
    KNNScorer,
    NCMScorer,
    ScoreInputs,
    energy_score,
    get_scorer,
    knn_score,
    mos_score,
    msp_score,
)
from stages.scorers.neighbours.bank import FeatureBank

GOLDEN = Path(__file__).parents[2] / "golden" / "scores.json"
logit_rows = arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 7)), elements=st.floats(-50, 50, width=32))
temperatures = st.floats(0.1, 10)


@settings(deadline=None)
@given(logit_rows, temperatures)
def test_energy_and_msp_equal_their_formulas(logits, t):
    exponentials = np.exp(np.longdouble(logits) / t)
    energy = np.float64(-t * np.log(exponentials.sum(1)))
    np.testing.assert_allclose(energy_score(logits, t), energy, rtol=1e-5, atol=1e-5)
    softmax = exponentials / exponentials.sum(1, keepdims=True)
    np.testing.assert_allclose(np.expm1(msp_score(logits, t)), np.float64(-softmax.max(1)), rtol=1e-5)


@settings(deadline=None)
@given(logit_rows, temperatures)
def test_energy_and_msp_stay_within_their_bounds(logits, t):
    largest, classes, slack = logits.max(axis=1), logits.shape[1], 1e-4
    energy, msp = energy_score(logits, t), msp_score(logits, t)
    assert (energy <= -largest + slack).all()
    assert (energy >= -largest - t * np.log(classes) - slack).all()
    assert (np.expm1(msp) <= -1 / classes + slack).all()


@settings(deadline=None)
@given(logit_rows, st.floats(-5, 5), st.randoms(use_true_random=False))
def test_shifts_and_the_order_of_classes(logits, shift, random):
    columns = list(range(logits.shape[1]))
    random.shuffle(columns)
    np.testing.assert_allclose(energy_score(logits[:, columns]), energy_score(logits), rtol=1e-6, atol=1e-6)
    shifted = np.float64(logits) + shift
    np.testing.assert_allclose(energy_score(shifted), energy_score(logits) - shift, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(msp_score(shifted), msp_score(logits), rtol=1e-5, atol=1e-4)


@settings(deadline=None)
@given(logit_rows, temperatures)
def test_a_class_that_does_not_apply_changes_nothing(logits, t):
    padded = np.concatenate([logits, np.full((len(logits), 2), -np.inf, np.float32)], axis=1)
    np.testing.assert_array_equal(energy_score(padded, t), energy_score(logits, t))
    np.testing.assert_allclose(msp_score(padded, t), msp_score(logits, t), rtol=1e-6)


def test_extreme_logits_neither_overflow_nor_vanish():
    assert energy_score(np.float16([[60000, -60000]])).tolist() == [-60000]
    assert msp_score([[1e5, 0], [-1e5, -1e5]]).tolist() == [-1e5, np.float32(np.log(0.5))]


@pytest.mark.parametrize("score", [energy_score, msp_score])
@pytest.mark.parametrize(
    ("logits", "temperature", "says"),
    [
        ([1.0, 2.0], 1, r"shape \(2,\)"),
        (np.empty((3, 0)), 1, r"shape \(3, 0\)"),
        ([[1.0]], 0, "temperature = 0 given"),
        ([[1.0], [np.nan]], 1, "1 of 2 rows of logits hold NaN, .* row 1 first"),
        ([[np.inf, 0]], 1, "1 of 1 rows"),
        ([[-np.inf, -np.inf]], 1, "1 of 1 rows"),
    ],
)
def test_bad_logits_are_refused(score, logits, temperature, says):
    with pytest.raises(InputError, match=says):
        score(logits, temperature)


def inputs(n=60, dim=8, classes=5, experts=None, seed=0, noise=0.2):
    """Rows of ``classes`` directions with noise; an expert owns the classes that are equal modulo ``experts``."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    features = np.eye(classes, dim)[labels] + rng.normal(scale=noise, size=(n, dim))
    expert = labels % experts if experts else None
    logits, others = rng.normal(size=(n, classes)), rng.uniform(size=(n, 2))
    head = LinearHead(np.eye(classes, dim) + np.linspace(0, 0.1, dim), np.linspace(-1, 1, classes))
    other = logits.mean(axis=1)
    patches = np.stack([features, features[:, ::-1]], axis=1)
    return ScoreInputs(features, logits, labels, expert, others, other, patches, head)


@pytest.mark.parametrize("name", SCORERS)
def test_every_scorer_keeps_the_contract(name):
    train, x = inputs(), inputs(n=17, seed=1)
    scorer = get_scorer(name)
    assert scorer.name == name
    assert scorer.needs <= {"logits", "features", "others", "other", "patches", "head", "bank", "select"}
    scores = scorer.fit(train, inputs(n=20, seed=2)).score(x)
    assert (scores.shape, scores.dtype) == ((17,), np.float32)
    rows = np.array([5, 2])
    np.testing.assert_allclose(scorer.score(x.take(rows)), scores[rows], atol=1e-6)  # a row's score is its own
    assert scorer.score(x.take(np.array([], dtype=int))).shape == (0,)
    json.dumps(scorer.params())


def test_scores_of_the_experiment_file_are_there():
    """The list that experiment files are checked against, without importing a score, is the registry's."""
    assert tuple(SCORERS) == SCORE_NAMES


def test_an_unknown_score_names_the_nearest_known_one():
    with pytest.raises(InputError, match=r"'enrgy'; did you mean 'energy'\? \(known: msp, energy, knn, "):
        get_scorer("enrgy")


def test_missing_inputs_are_named():
    with pytest.raises(InputError, match="energy needs logits"):
        get_scorer("energy").score(ScoreInputs(features=np.ones((2, 2))))
    with pytest.raises(InputError, match="one number of rows"):
        ScoreInputs(features=np.ones((2, 2)), labels=np.zeros(3, int))
    with pytest.raises(InputError, match="no array"):
        ScoreInputs()


def test_knn_is_the_distance_to_the_kth_neighbour():
    train, x = inputs(), inputs(n=9, seed=1)
    cosine = (x.features @ train.features.T) / np.outer(*(np.linalg.norm(r.features, axis=1) for r in (x, train)))
    plain = np.sort(np.sqrt(2 - 2 * cosine), axis=1)
    for k in (1, 4, 60):
        np.testing.assert_allclose(KNNScorer(k).fit(train).score(x), plain[:, k - 1], atol=1e-6)
        np.testing.assert_allclose(knn_score(x.features, FeatureBank(train.features), k), plain[:, k - 1], atol=1e-6)


def test_each_row_is_searched_in_the_bank_of_its_expert():
    train, x = inputs(experts=2), inputs(n=20, experts=2, seed=1)
    scores = KNNScorer(k=3).fit(train).score(x)
    for e in (0, 1):
        own = KNNScorer(k=3).fit(ScoreInputs(features=train.features[train.expert == e]))
        expected = own.score(ScoreInputs(features=x.features[x.expert == e]))
        np.testing.assert_allclose(scores[x.expert == e], expected, atol=1e-6)


def test_k_larger_than_a_bank_is_clipped_and_said():
    train = inputs(n=10, classes=5, experts=2)  # 6 rows of expert 0, 4 of expert 1
    scorer = KNNScorer(k=5).fit(train)
    assert scorer.params() == {"k": 5, "k_used": {"1": 4}}
    assert scorer.remarks() == ["fewer rows than k: the farthest is the k-th"]
    assert KNNScorer(k=4).fit(train).remarks() == []
    clipped = train.expert == 1
    np.testing.assert_array_equal(scorer.score(train)[clipped], KNNScorer(4).fit(train).score(train)[clipped])
    columns = ExpertBanks(train).distances(train, k_max=8)
    assert (np.diff(columns, axis=1) >= 0).all()
    np.testing.assert_allclose(columns[:, 4], scorer.score(train), atol=1e-6)


def test_knn_refuses_what_it_cannot_search():
    train = inputs(experts=2)
    with pytest.raises(StageError, match="knn is not fitted yet"):
        KNNScorer().score(train)
    with pytest.raises(InputError, match=r"knn\.k: 0 given, must be greater than or equal to 1"):
        KNNScorer(k=0)
    with pytest.raises(InputError, match="name an expert"):
        KNNScorer(1).fit(train).score(inputs())
    with pytest.raises(InputError, match=r"experts \[7\], which have no training rows"):
        KNNScorer(1).fit(train).score(ScoreInputs(features=np.ones((1, 8)), expert=np.array([7])))
    with pytest.raises(InputError, match="none given"):
        KNNScorer(1).fit(train.take(np.zeros(60, dtype=bool)))


def test_ncm_is_the_distance_to_the_nearest_class_mean():
    train, x = inputs(), inputs(n=9, seed=1)
    unit = train.features / np.linalg.norm(train.features, axis=1, keepdims=True)
    means = np.stack([unit[train.labels == c].mean(0) for c in range(5)])
    cosine = (x.features @ means.T) / np.outer(*(np.linalg.norm(r, axis=1) for r in (x.features, means)))
    scorer = NCMScorer().fit(train)
    np.testing.assert_allclose(scorer.score(x), np.sqrt(2 - 2 * cosine).min(1), atol=1e-6)
    longer = ScoreInputs(features=train.features * np.arange(1, 61)[:, None], labels=train.labels)
    np.testing.assert_allclose(NCMScorer().fit(longer).score(x), scorer.score(x), atol=1e-6)  # directions alone count


def test_each_row_is_compared_with_the_classes_of_its_expert():
    train, x = inputs(experts=2), inputs(n=20, experts=2, seed=1)
    scores = NCMScorer().fit(train).score(x)
    for e in (0, 1):
        own = NCMScorer().fit(
            ScoreInputs(features=train.features[train.expert == e], labels=train.labels[train.expert == e])
        )
        expected = own.score(ScoreInputs(features=x.features[x.expert == e]))
        np.testing.assert_allclose(scores[x.expert == e], expected, atol=1e-6)


def test_ncm_refuses_what_has_no_means():
    with pytest.raises(StageError, match="ncm is not fitted yet"):
        NCMScorer().score(inputs())
    with pytest.raises(InputError, match="a class mean needs labels"):
        NCMScorer().fit(ScoreInputs(features=np.ones((3, 8))))
    with pytest.raises(InputError, match="none given"):
        NCMScorer().fit(inputs().take(np.zeros(60, dtype=bool)))
    with pytest.raises(InputError, match="1 of 3 ID training features hold NaN or inf, row 1 first"):
        NCMScorer().fit(ScoreInputs(features=np.array([[1.0], [np.nan], [2.0]]), labels=np.zeros(3, int)))
    with pytest.raises(InputError, match=r"experts \[7\], which have no training rows"):
        NCMScorer().fit(inputs(experts=2)).score(ScoreInputs(features=np.ones((1, 8)), expert=np.array([7])))


def test_mos_is_low_where_one_group_knows_the_row():
    assert mos_score([[5.0, -9.0, 4.0], [5.0, 3.0, 4.0]]).tolist() == [-9, 3]
    assert mos_score(np.zeros((0, 3))).shape == (0,)
    for others, says in (
        ([[0.5, np.inf]], "1 of 1 rows of log odds"),
        ([[0.5], [np.nan]], "row 1 first"),
        (np.zeros((2, 0)), r"shape \(2, 0\)"),
    ):
        with pytest.raises(InputError, match=says):
            mos_score(others)


@settings(deadline=None)
@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=30))
def test_standardised_calibration_rows_have_mean_0_and_std_1(scores):
    scaled = Standardiser.fit(scores).apply(scores).astype(float)
    assert scaled.mean() == pytest.approx(0, abs=1e-3)
    assert np.isclose(scaled.std(), 1, atol=1e-3) or np.allclose(scaled, 0, atol=1e-4)  # the latter: constant


def test_a_constant_part_adds_nothing_to_a_sum():
    knn, energy = np.array([0.1, 0.5, 0.3]), np.full(3, -7.1)
    fitted = [Standardiser.fit(knn), Standardiser.fit(energy)]
    np.testing.assert_allclose(sum_scores([knn, energy], fitted), fitted[0].apply(knn), atol=1e-6)
    assert Standardiser.fit([1.5]) == Standardiser(1.5, 1.0)
    assert Standardiser.remark(1)
    assert not Standardiser.remark(2)


def test_calibration_puts_experts_on_one_scale():
    rng = np.random.default_rng(0)
    expert = np.repeat([0, 1], 500)
    raw = np.where(expert == 0, rng.normal(5, 0.1, 1000), rng.normal(-3, 20, 1000))
    calibrated = ExpertCalibration.fit(raw, expert, n_experts=2).apply(raw, expert)
    for e in (0, 1):
        assert np.median(calibrated[expert == e]) == pytest.approx(0, abs=0.1)
        assert np.std(calibrated[expert == e]) == pytest.approx(1, abs=0.25)
        order = np.argsort(raw[expert == e])
        assert (np.diff(calibrated[expert == e][order]) >= 0).all()  # within an expert the order stays


def test_an_expert_with_few_rows_leans_on_all_rows():
    values = np.concatenate([np.linspace(-1, 1, 101), [8.0] * 10])
    expert = np.repeat([0, 2], [101, 10])  # expert 1 has none, expert 2 ten constant ones
    calibration = ExpertCalibration.fit(values, expert, n_experts=3)
    everybody = float(np.median(values)), 1.4826 * float(np.median(np.abs(values - np.median(values))))
    assert (calibration.centre[1], calibration.scale[1]) == pytest.approx(everybody)
    assert calibration.centre[2] == pytest.approx((8 + everybody[0]) / 2)  # 10 rows against 10 pseudo-rows
    assert calibration.scale[2] == pytest.approx(everybody[1] / 2)


def test_calibration_of_constants_stays_finite_and_bad_experts_are_refused():
    constant = ExpertCalibration.fit(np.full(8, 3.3), np.zeros(8, int), n_experts=2)
    assert constant.apply([3.3, 4.3], np.array([0, 1])).tolist() == pytest.approx([0, 1])
    with pytest.raises(InputError, match="experts 0 to 2 given, there are 0 to 1"):
        constant.apply([1.0, 2.0], np.array([0, 2]))
    with pytest.raises(InputError, match="one expert a row"):
        ExpertCalibration.fit([1.0, 2.0], np.array([0]), n_experts=1)


def test_threshold_admits_what_it_says_with_an_interval_that_holds():
    rng = np.random.default_rng(1)
    truth = 1.6448536  # 95 % quantile of a unit normal
    held = 0
    for _ in range(300):
        scores = rng.normal(size=150)
        estimate = threshold_at(scores)
        assert np.sum(scores <= estimate.threshold) == 144  # 0.95 of 151, rounded up
        assert estimate.lo <= estimate.threshold <= estimate.hi
        held += estimate.lo <= truth <= estimate.hi
    assert held / 300 >= 0.93  # 95 % promised; two standard errors are 2.5 %


@pytest.mark.parametrize(("admit", "rows"), [(0.95, 72), (0.99, 368)])
def test_too_few_rows_leave_the_interval_open(admit, rows):
    assert threshold_at(np.arange(rows), admit).hi == rows - 1
    assert threshold_at(np.arange(rows - 1), admit).hi is None
    assert threshold_at([1.0], 0.95).lo is None


def test_k_is_chosen_as_the_rule_says():
    """The rule once more, by one scorer for each k and group."""
    fold = Fold(inputs(n=200, classes=6, noise=0.6), inputs(n=90, classes=6, noise=0.6, seed=1))
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


def test_k_among_equals_is_the_smallest_and_outliers_want_a_larger_one():
    clean = inputs(n=100, classes=5)
    apart = ScoreInputs(features=np.eye(5)[clean.labels], labels=clean.labels)  # every k separates perfectly
    assert choose_k([Fold(apart, apart)], grid=(2, 5, 1))[0] == 1

    stray = inputs(n=100, classes=5, seed=2)  # a stray row of another class beside each class: only k > 1 sees past it
    features = np.concatenate([stray.features, np.eye(5, 8)[[1, 2, 3, 4, 0]]])
    bank = ScoreInputs(features=features, labels=np.concatenate([stray.labels, np.arange(5)]))
    assert choose_k([Fold(bank, clean)])[0] > 1


def test_queries_of_an_expert_that_lost_all_its_classes_are_left_out_and_counted():
    train, queries = inputs(n=120, classes=4, experts=4), inputs(n=40, classes=4, experts=4, seed=1)
    strays = np.arange(40) % 8 == 0  # some of class 0 are routed to expert 1
    queries = ScoreInputs(queries.features, labels=queries.labels, expert=np.where(strays, 1, queries.expert))
    _, record = choose_k([Fold(train, queries)])
    assert record["queries_without_bank"] == 40  # each query once: when its expert's class is left out


def test_a_group_that_has_all_classes_of_an_expert_is_taken_apart():
    """Four classes, two experts: both groups of classes are one expert's, and nothing is left to compare with."""
    train, queries = inputs(n=120, classes=4, experts=2), inputs(n=40, classes=4, experts=2, seed=1)
    assert set(train.labels[train.expert == 0]) == {0, 2}
    k, record = choose_k([Fold(train, queries)])
    assert record["rule"] == BY_LEFT_OUT_CLASSES
    assert (record["class_groups"], record["k"]) == (4, k)
    assert all(0.5 < area <= 1 for area in record["auroc"].values())


@pytest.mark.parametrize(
    "fold",
    [
        Fold(inputs(n=40, classes=1), inputs(n=9, classes=1)),
        Fold(inputs(n=40, classes=4, experts=4), inputs(n=20, classes=4, experts=4)),  # each expert has one
        Fold(inputs(), inputs().take(np.array([0, 5]))),  # queries of one class
        Fold(inputs(), inputs().take(np.zeros(0, dtype=int))),
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

    folds = [Fold(drawn(per_class, routed=False), drawn(held_out, routed=True)) for _ in range(1 if one_fold else 3)]
    k, record = choose_k(folds)
    smallest = min(np.unique(fold.bank.expert, return_counts=True)[1].min() for fold in folds)
    assert k in K_GRID
    assert k == 1 or k <= smallest // 2
    assert record["rule"] in (BY_LEFT_OUT_CLASSES, SMALLEST)
    json.dumps(record)


@pytest.mark.parametrize(
    ("folds", "says"),
    [
        ([], "needs a fold"),
        ([Fold(inputs(), ScoreInputs(features=np.ones((3, 8))))], "choosing k needs labels"),
        ([Fold(ScoreInputs(np.ones((3, 8)), labels=np.array([0, 1, -1])), inputs())], "needs known ID classes"),
    ],
)
def test_k_that_cannot_be_chosen_is_refused(folds, says):
    with pytest.raises(InputError, match=says):
        choose_k(folds)


def test_golden_values():
    """A changed number here is a changed score: change the file on purpose or not at all."""
    train, x = inputs(n=40, experts=2, seed=2021), inputs(n=5, experts=2, seed=2022)
    select = inputs(n=20, experts=2, seed=2023)
    golden = json.loads(GOLDEN.read_text())
    assert golden.keys() == SCORERS.keys()
    for name, case in golden.items():
        scores = get_scorer(name, **case["params"]).fit(train, select).score(x)
        np.testing.assert_allclose(scores, case["scores"], rtol=1e-5, err_msg=name)
