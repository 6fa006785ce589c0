"""From what pilots took to what a study takes: nothing shrinks with more rows, or grows with more workers."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline.config import load_config
from pipeline.config.tables import VariantConfig
from pipeline.planning.forecast import Calibration, Forecast, StageCost, ToDo, line
from pipeline.planning.pilot import ScoreTime, Timed, TrainTime
from pipeline.planning.size import StudySize
from tests.test_pipeline.tiny import STUDY

EXTRACTED = {"train": 1000, "test": 100, "threes": 100, "photos": 100}


@pytest.fixture
def config(tmp_path):
    (tmp_path / "tiny.toml").write_text(STUDY)
    return load_config(tmp_path / "tiny.toml")


def timed(n_train, seconds):
    """A pilot whose parts all took the same."""
    peaks = dict.fromkeys(("train", "score", "report"), 1 << 30)
    mixtures, score = {"default": TrainTime(seconds, seconds, seconds)}, ScoreTime(seconds, seconds, (4, 40))
    return Timed(n_train, n_train, 10, seconds, mixtures, None, 1.0, seconds, score, seconds, peaks)


MEASURED = Calibration(1.0, 0.01, 1 << 30, [timed(100, 1.0), timed(300, 2.0)], search=1e-9, method=0.1)


def costs(config, backbone, n, workers=1, scored=("default",)):
    """Seconds of all stages of a study with n images to train on, and mixtures of some variants to score."""
    size = StudySize(EXTRACTED | {"train": n}, 10, n // 10)
    forecast = Forecast(config, size, backbone.feature_spec("float16", "full"), MEASURED)
    todo = ToDo(
        {"pretrained": dict(size.rows)}, {"pretrained": [("default", 0)]}, {"pretrained"}, set(), True, True, scored
    )
    stages = [
        forecast.extract("pretrained", size.rows),
        forecast.train("pretrained", [("default", 0)], probe=True),
        forecast.score(todo),
        forecast.report(todo),
    ]
    return np.array([cost.with_workers(workers) for cost in stages]), stages


def test_more_images_take_longer(config, backbone):
    sizes = [300, 1000, 10_000, 1_281_167]
    seconds = np.array([costs(config, backbone, n)[0] for n in sizes])
    assert (np.diff(seconds[:, :3], axis=0) > 0).all()
    memory = [[cost.memory for cost in costs(config, backbone, n)[1]] for n in sizes]
    assert (np.diff(memory, axis=0) >= 0).all()


def test_images_are_proportional(config, backbone):
    """So many more images take so much longer to extract, whatever the network takes to load."""
    (few, *_), (many, *_) = (costs(config, backbone, n)[0] for n in (1000, 100_000))
    assert many - few == pytest.approx(99_000 * MEASURED.image)


def test_more_workers_take_no_longer(config, backbone):
    seconds = np.array([costs(config, backbone, 1_281_167, workers)[0] for workers in (1, 2, 4, 1000)])
    assert (np.diff(seconds, axis=0) <= 0).all()
    extract = seconds[:, 0] - MEASURED.loading
    assert extract[1] == pytest.approx(extract[0] / 2, rel=0.01)
    train, score, report = (seconds[:, stage] for stage in (1, 2, 3))
    assert train[0] > train[1] > 0.5 * train[0]  # heads and refined rows are shared, steps are not
    assert score[0] > score[1] > 0.5 * score[0]  # searches
    assert np.ptp(report) == 0


def test_of_few_rows_only_extraction_and_refining_are_shared(config, backbone):
    """As `train` and `score` do it, which keep heads and searches for themselves then."""
    _, *alone = costs(config, backbone, 1000)[0]
    _, *shared = costs(config, backbone, 1000, workers=4)[0]
    assert shared == pytest.approx(alone)  # fewer than the rows of one part
    _, (_, train, *_) = costs(config, backbone, 4096)
    assert [pieces for _, pieces in train.shared] == [1, 2]


def test_shards_bound_the_workers():
    cost = StageCost("extract", 10.0, ((9.0, 3),), 0, "")
    assert [cost.with_workers(n) for n in (1, 2, 3, 100)] == pytest.approx([10, 7, 4, 4])


def test_choosing_is_counted_by_folds(config, backbone):
    """``auto`` is judged in ten pairs of folds, for the backbone's features and the mixture's."""
    *_, before, _ = costs(config, backbone, 300)[0]
    chosen = config.model_copy(
        update={"score": config.score.model_copy(update={"scores": ["auto", *config.score.scores]})}
    )
    *_, after, _ = costs(chosen, backbone, 300)[0]
    assert after - before == pytest.approx(2 * 10 * 2.0 + 2 * 0.1)


def test_a_variant_with_fewer_scores_costs_less(config, backbone):
    """Fewer lines of the table, and no folds where it is not asked for ``auto``."""
    given = {"scores": ["auto", "knn", "energy", "msp"]}
    fewer = VariantConfig(name="control", set={"train.experts": 1}, scores=["knn"])
    chosen = config.model_copy(update={"score": config.score.model_copy(update=given), "variants": (fewer,)})
    both = [costs(chosen, backbone, 300, scored=["default", name])[0][2] for name in ("default", "control")]
    n_lines = MEASURED.pilots[0].score.methods[1]
    assert both[0] - both[1] == pytest.approx(10 * 2.0 + (1 + n_lines * 3 / 4) * 0.1)


def test_heads_that_were_timed_apart_are_counted_by_rows_and_classes(config, backbone):
    size = StudySize(EXTRACTED | {"train": 1_000_000}, 1000, 1000)
    forecast = Forecast(config, size, backbone.feature_spec("float16", "full"), replace(MEASURED, head=1e-8))
    assert forecast.train("pretrained", [], probe=True).seconds == pytest.approx(1e-8 * 1e9, abs=3)


def test_what_is_fresh_costs_nothing(config, backbone):
    size = StudySize(EXTRACTED, 10, 100)
    forecast = Forecast(config, size, backbone.feature_spec("float16", "full"), replace(MEASURED, pilots=[]))
    todo = ToDo({"pretrained": {}}, {"pretrained": []}, set(), set(), False, False, ["default"])
    fresh = [
        forecast.extract("pretrained", {}),
        forecast.train("pretrained", [], probe=False),
        forecast.score(todo),
        forecast.report(todo),
    ]
    assert [(cost.seconds, cost.memory, cost.about) for cost in fresh] == [(0, 0, "fresh")] * 4


def test_line_through_two_pilots():
    rng = np.random.default_rng(0)
    for first, second, begin, slope in rng.uniform(0.1, 10, (50, 4)):
        at = [first, first + second]
        seconds = [begin + slope * x for x in at]
        assert line(at, seconds, 123.0) == pytest.approx(begin + slope * 123.0)
