"""A threshold admits the share of new ID rows that it says, for every score, by the whole way that it comes."""

import math
from functools import cache

import numpy as np
import pytest

from stages.config import ScoreConfig, TrainConfig
from stages.detection.conformal import threshold_at
from stages.detection.factory import DetectorFactory
from stages.detection.frozen import FrozenFeatures
from stages.errors import InputError
from stages.heads.choose import fit_head
from stages.predict import Predictor
from tests.test_stages.answers import answers_of
from tests.test_stages.drawn_studies import OF_FEATURES, OF_MIXTURES, PARAMS, World, make_study, outside

SCORES = ScoreConfig(scores=OF_FEATURES, k=3, params=PARAMS)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Studies of so many rows a class, each made once."""
    made = {}

    def get(per_class, seed=0):
        if (per_class, seed) not in made:
            made[per_class, seed] = make_study(World(seed), per_class, tmp_path_factory.mktemp("study"))
        return made[per_class, seed]

    return get


@pytest.fixture(scope="module")
def judged(study):
    """Every score of frozen features, in each of three studies of so many rows a class."""

    @cache
    def get(per_class):
        studies = [study(per_class, seed) for seed in range(3)]
        return [own.judged(FrozenFeatures(own.source), SCORES) for own in studies]

    return get


@pytest.mark.parametrize(("per_class", "cross_fitted"), [(20, True), (100, False)])
def test_new_rows_are_admitted_as_often_as_the_threshold_says(study, judged, per_class, cross_fitted):
    """Of every score; where banks of two thirds calibrated the whole one, nearly all were."""
    assert all(study(per_class, seed).source.data.split.cross_fitted == cross_fitted for seed in range(3))
    assert outside(judged(per_class)) == {}


def test_with_few_rows_a_class_no_fewer_are_admitted_than_it_says(judged):
    """Of the few rows that a class has in the bank one is left out: what is nearest is a little farther then."""
    found = outside(judged(5))
    n = 8 * 4  # rows of id-train that are cross-fitted
    assert all(math.ceil(0.95 * (n + 1)) / (n + 1) < share for share in found.values())
    assert len(found) < len(OF_FEATURES) / 4


@pytest.mark.parametrize("per_class", [20, 100])
@pytest.mark.parametrize("space", ["whitened", "pca:0.9"])
def test_so_they_are_by_neighbours_in_another_space(study, per_class, space):
    """Which is fitted without the row, as the bank is."""
    config = ScoreConfig(
        scores=["knn", "knn-mean"], k=3, params={"knn": {"space": space}, "knn-mean": {"space": space}}
    )
    found = (study(per_class, seed) for seed in range(3))
    assert outside(own.judged(FrozenFeatures(own.source), config) for own in found) == {}


def test_so_they_are_by_scores_of_a_mixture(study, tmp_path):
    """Refitted heads, banks and class means, as they are and on their experts' scales.

    Of six studies: of so many scores one is outside the band of three studies now and then, however a mixture starts.
    """
    config = TrainConfig(expert="frozen", experts=2, epochs=1)
    found = []
    for seed in range(6):
        own = study(20, seed)
        refined = own.refined(config, seed, tmp_path / str(seed))
        judged = own.judged(refined, SCORES.model_copy(update={"scores": OF_MIXTURES}))
        found.append({key: each for key, each in judged.items() if key[1] != "trained"})
    assert outside(found) == {}


def test_the_interval_holds_the_threshold_of_all_new_rows(judged):
    held = [each.interval_holds for found in judged(20) for each in found.values()]
    assert np.mean(held) > 0.9


def test_a_row_is_scored_by_all_rows_but_its_part_written_out(study):
    """kNN by brute force: every other row of the final bank is there."""
    data = study(20).source.data
    features = np.float64(data.train.read("cls"))
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    expected = []
    for part in data.split.parts:
        others = np.setdiff1d(data.split.final_train, part.rows)
        cosine = unit[part.rows] @ unit[others].T
        expected.append(np.sort(np.sqrt(np.maximum(0, 2 - 2 * cosine)), axis=1)[:, 2])
    found = DetectorFactory(FrozenFeatures(study(20).source).subject(), SCORES).detector("none", "knn")
    np.testing.assert_allclose(found.calibration_scores, np.concatenate(expected), atol=1e-5)


def test_the_head_of_a_part_has_seen_all_other_rows_and_no_others(study):
    source = study(5).source
    data, fitted = source.data, source.probe
    assert len(fitted.parts) == len(data.split.parts) > 10
    for part, head in zip(data.split.parts, fitted.parts, strict=True):
        rows = data.split.without(part)
        again = fit_head(data.train.read("cls", rows), data.train_labels[rows], 8, fitted.strength)
        np.testing.assert_allclose(head.weight, again.weight, atol=1e-5)


@pytest.mark.parametrize(("admit", "needed"), [(0.95, 19), (0.99, 99), (0.9, 9)])
def test_the_rank_is_that_of_a_new_row_among_all(admit, needed):
    for n in range(1, 260):
        estimate = threshold_at(np.arange(n, dtype=float), admit)
        rank = next(rank for rank in range(1, n + 2) if rank * 100 >= round(100 * admit) * (n + 1))
        assert estimate.threshold == (rank - 1 if rank <= n else None)
        assert (estimate.threshold is None) == (n < needed) == bool(estimate.too_few)
        assert estimate.n_needed == needed


def test_equal_scores_are_admitted_together():
    scores = np.repeat([1.0, 2.0, 3.0], [10, 25, 5])
    assert threshold_at(scores, 0.5).threshold == 2
    assert threshold_at(np.zeros(30)).decide(0.0) == "ID"


def test_what_new_images_are_told_is_what_the_calibration_rows_say(study):
    """Of 100 rows a class nothing is cross-fitted, and what a score that is no sum promises is exact."""
    own = study(100)
    predictor = Predictor(own.source, ScoreConfig(k=3), "knn")
    assert predictor.fitted.is_exact
    assert not Predictor(own.source, ScoreConfig(k=3), "knn+energy").fitted.is_exact
    calibration = predictor.fitted.calibration_scores
    answers = answers_of(predictor, own.fresh)
    assert [each.decision == "OOD" for each in answers] == [each.p_value <= 0.05 for each in answers]
    for each in answers[::100]:
        assert each.p_value == (1 + (calibration >= np.float32(each.score)).sum()) / (len(calibration) + 1)


def test_and_within_predicted_classes(tmp_path):
    """Of each class about as many images are flagged as of all, where without groups hard classes meet more alarms."""
    own = make_study(World(0, classes=4), 400, tmp_path)
    plain, grouped = (Predictor(own.source, ScoreConfig(k=3), "knn", per=per) for per in ("all", "class"))
    (run,) = grouped.fitted.subject.calibrating
    classes = run.calibrate.predictions()[grouped.fitted.head]
    shares = {}
    for name, predictor in (("plain", plain), ("grouped", grouped)):
        answers = answers_of(predictor, own.fresh)
        predicted = np.array([int(each.prediction) for each in answers])
        small = np.array([each.p_value <= 0.2 for each in answers])
        shares[name] = [small[predicted == group].mean() for group in range(4)]
    assert np.ptp(shares["grouped"]) < np.ptp(shares["plain"])
    group = next(group for group in range(4) if (classes == group).sum() >= 19)
    one = next(each for each in answers if int(each.prediction) == group)
    rows = grouped.fitted.calibration_scores[classes == group]
    assert one.p_value == (1 + (rows >= np.float32(one.score)).sum()) / (len(rows) + 1)
    assert one.threshold == threshold_at(rows).threshold
    with pytest.raises(InputError, match="per expert needs a mixture"):
        Predictor(own.source, ScoreConfig(k=3), "knn", per="expert")


def test_without_a_threshold_nothing_is_decided(tmp_path):
    """Two classes of eight: 12 rows calibrate, 19 would be needed."""
    few = make_study(World(0, classes=2), 8, tmp_path, fresh=4)
    predictor = Predictor(few.source, ScoreConfig(k=1))
    assert predictor.threshold.too_few == "95% of ID needs 19 calibration rows, there are 12"
    answers = answers_of(predictor, few.fresh)
    assert {(each.decision, each.threshold, each.threshold_hi) for each in answers} == {("unknown", None, None)}
    assert all(math.isfinite(each.score) for each in answers)
