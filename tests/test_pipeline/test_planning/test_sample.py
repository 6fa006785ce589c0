"""Which rows pilots have: whole classes, split by the study's own rule, the small pilot's among the large one's."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline.config import load_config
from pipeline.planning.sample import PilotScale, between, pilot_sets, scales, smaller
from pipeline.planning.size import StudySize
from stages.id_data.split import split_rows
from stages.inputs.images import list_images
from tests.test_pipeline.tiny import STUDY


@pytest.fixture
def config(tmp_path):
    (tmp_path / "tiny.toml").write_text(STUDY.replace("experts = 2", 'experts = "auto"'))
    return load_config(tmp_path / "tiny.toml")


def sizes(n_classes, per_class, tests=1000):
    rows = {"train": n_classes * per_class, "test": tests, "threes": tests, "photos": tests}
    return StudySize(rows, n_classes, per_class, counted=False)


@pytest.mark.parametrize(
    ("n_classes", "per_class"), [(2, 8), (7, 140), (40, 24), (60, 60), (1000, 1281), (10450, 1000)]
)
def test_scales(config, n_classes, per_class):
    """Pilots are split as the study is, have two classes an expert, and no more rows than there are."""
    size = sizes(n_classes, per_class)
    small, large = scales(config, size)
    assert small.classes <= large.classes <= n_classes
    assert small.per_class <= large.per_class <= per_class
    assert large.classes * large.per_class <= 2000
    for scale in (small, large):
        labels = np.repeat(np.arange(scale.classes, dtype=np.int32), scale.per_class)
        hashes = np.random.default_rng(0).integers(0, 256, (len(labels), 32), dtype=np.uint8)
        split = split_rows(labels, hashes, config.split.val)
        assert split.cross_fitted == size.is_cross_fitted(config)


def test_rows_are_spread_over_the_set(config):
    table = list_images("sklearn:digits[0-6]/train")
    names = {"train": "sklearn:digits[0-6]/train", "test": "sklearn:digits[0-6]/test"}
    tables = {name: list_images(source) for name, source in names.items()} | {"threes": table, "photos": table}
    rows = {name: len(own) for name, own in tables.items()}
    size = StudySize(rows, 7, int(np.bincount(table.labels).min()))
    large, small = PilotScale(5, 40, 0.3), PilotScale(4, 20, 0.1)
    sets = pilot_sets(config, size, tables, large)
    train = sets["train"]
    assert np.bincount(train.labels).tolist() == [40] * 5
    assert [table.class_names[label] for label in table.labels[train.rows]] == [
        train.class_names[x] for x in train.labels
    ]
    assert len(set(train.ids)) == 200
    assert set(sets["test"].labels.tolist()) == set(range(5))
    assert (sets["threes"].labels == -1).all()
    few = smaller(sets, config, size, small)
    assert np.bincount(few["train"].labels).tolist() == [20] * 4
    assert all(set(few[name].ids) <= set(sets[name].ids) for name in sets)
    assert all(own.ids == tuple(sets[name].ids[at] for at in own.wanted) for name, own in few.items())


def test_drawn_rows_are_of_as_many_classes(config):
    size = sizes(1000, 1281)
    _, large = scales(config, size)
    train = pilot_sets(config, size, {}, large)["train"]
    assert np.bincount(train.labels).tolist() == [large.per_class] * large.classes


def test_between_is_between():
    small, large = PilotScale(4, 30, 0.04), PilotScale(40, 60, 0.8)
    for times in (1.5, 2, 5, 19):
        scale = between(small, large, times)
        assert scale.classes * scale.per_class <= times * 120
        assert small.share < scale.share <= large.share
    assert between(small, large, 20) == large


def test_ids_alone_decide_what_is_cross_fitted(config):
    assert sizes(40, 24).is_cross_fitted(config)
    assert not sizes(40, 32).is_cross_fitted(config)
    assert not replace(sizes(40, 24), per_class=100).is_cross_fitted(config)
