"""Scores fitted and rows scored by others: to the bits of one process."""

from dataclasses import replace

import numpy as np
import pytest

from stages.config import ScoreConfig, TrainConfig
from stages.detection.factory import DetectorFactory
from stages.detection.frozen import FrozenFeatures
from stages.detection.handing import Handing
from stages.detection.subject import BLOCK_ROWS
from stages.errors import NotFiniteError, StageError
from tests.test_parity.clusters import InHere, Killing
from tests.test_stages.drawn_studies import OF_FEATURES, PARAMS, World, make_study

CONFIG = ScoreConfig(scores=OF_FEATURES, k=3, params=PARAMS)
MIXED = ScoreConfig(scores=["energy", "ncm", "mahalanobis", "other", "energy+frozen:msp", "knn"], k=3)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return make_study(World(0), 40, tmp_path_factory.mktemp("own"), fresh=BLOCK_ROWS // 8 + 1)


@pytest.fixture(scope="module")
def mixture(study, tmp_path_factory):
    config = TrainConfig(expert="frozen", experts=2, epochs=1)
    return study.refined(config, 0, tmp_path_factory.mktemp("mixture") / "mixture")


def rows_of(study, features):
    labels = np.full(study.fresh.n_rows, -1, np.int32)
    if isinstance(features, FrozenFeatures):
        return features.rows(study.fresh, labels)
    return features.rows("fresh", study.fresh, labels)


def scored(handing, subject, config, sets):
    """Of each detector: settings that were chosen, scores of the calibration rows, and of each set."""
    detectors = DetectorFactory(subject, config, handing=handing).detectors()
    raw = handing.raw_scores([(part.scorer, part.head) for each in detectors for part in each.parts], sets)
    return [(each.score, each.head, each.params, each.calibration_scores) for each in detectors], raw


def same(found, expected):
    for (*names, calibration), (*others, theirs) in zip(found[0], expected[0], strict=True):
        assert names == others
        assert np.array_equal(calibration, theirs), names
    assert found[1].keys() == expected[1].keys()
    for name, own in found[1].items():
        for index, (scores, theirs) in enumerate(zip(own, expected[1][name], strict=True)):
            assert np.array_equal(scores, theirs), (name, index)


def test_every_score_is_the_same(study, tmp_path):
    subject, fresh = FrozenFeatures(study.source).subject(), rows_of(study, FrozenFeatures(study.source))
    sets, here = {"few": fresh.take(slice(0, 300)), "none": fresh.take(slice(0, 0))}, InHere()
    same(scored(Handing(here, tmp_path, 0), subject, CONFIG, sets), scored(Handing(), subject, CONFIG, sets))
    done = [*map(str, here.done)]
    assert "the fit of mahalanobis" in done
    assert "rows of few from 0 on, to be scored" in done
    assert list(tmp_path.iterdir()) == []


@pytest.mark.dask
def test_workers_make_the_scores_that_one_process_makes(workers, study, mixture, tmp_path):
    """Of a mixture's rows in two blocks, beside which stand the backbone's own; a worker is killed."""
    subject, sets = mixture.subject(), {"fresh": rows_of(study, mixture)}
    alone = scored(Handing(), subject, MIXED, sets)
    killing = Killing(workers, tmp_path / "killed")
    same(scored(Handing(killing, tmp_path / "scores", 0), subject, MIXED, sets), alone)
    assert (tmp_path / "killed").exists()


def test_few_rows_stay_here(study, tmp_path):
    subject, here = FrozenFeatures(study.source).subject(), InHere()
    DetectorFactory(subject, ScoreConfig(scores=["msp"], k=3), handing=Handing(here, tmp_path)).detectors()
    assert here.done == []


def test_what_is_not_finite_is_counted_in_all_rows(study, tmp_path):
    rows = rows_of(study, FrozenFeatures(study.source)).take(slice(0, 50))
    rows = replace(rows, features=np.where(np.arange(50)[:, None] % 20 == 7, np.nan, np.asarray(rows.features)))
    subject = FrozenFeatures(study.source).subject()
    (detector,) = DetectorFactory(subject, ScoreConfig(scores=["ncm"], k=3)).detectors()
    pairs = [(part.scorer, part.head) for part in detector.parts]
    with pytest.raises(NotFiniteError, match="3 of 50 scored features hold NaN or inf, row 7 first"):
        Handing(InHere(), tmp_path, 0).raw_scores(pairs, {"odd": rows})


def test_a_cluster_that_goes_away_leaves_nothing_behind(study, tmp_path):
    with pytest.raises(StageError, match="gone"):
        DetectorFactory(
            FrozenFeatures(study.source).subject(), CONFIG, handing=Handing(InHere(most=1), tmp_path, 0)
        ).detectors()
    assert list(tmp_path.iterdir()) == []
