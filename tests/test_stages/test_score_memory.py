"""Memory of scoring does not follow the rows: features and logits are read, judged and forgotten by blocks."""

import tracemalloc
from functools import partial, partialmethod

import numpy as np
import pytest

from stages.config import ScoreConfig
from stages.detection.sources import BackboneSource, ScoredSet
from stages.detection.subject import SetRows
from stages.extract import import_set
from stages.heads.affine import LinearHead
from stages.heads.choose import FittedHeads
from stages.id_data.rows import id_data
from stages.inputs.arrays import list_arrays
from stages.score import score
from stages.scorers import SCORERS
from stages.scorers.features import mahalanobis, vra
from stages.scorers.neighbours.bank import FeatureBank
from stages.scorers.shared.quantiles import column_quantiles

DIM, CLASSES = 256, 4
FEW_TO_SCORE = 2_500  # more than a block that is scored, so that both sizes fill one
FEW = 5_000  # more than a block that is fitted on
OF_MIXTURES_OR_IMAGES = {"mos", "other", "patch-knn", "mm-pp", "knn-layers"}
PARAMS = {"corp": {"features": 64}, "kpca-nystrom": {"landmarks": 64}}  # their own memory, whatever the rows
COMPARES_ALL_PAIRS = {"knn-mean", "nnguide", "relation"}  # slow on many training rows


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(SetRows, "blocks", partialmethod(SetRows.blocks, size=2048))
    monkeypatch.setattr(FeatureBank, "__init__", partialmethod(FeatureBank.__init__, block_rows=2048))


@pytest.fixture(scope="module")
def source_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flat")

    def cached(name, n, seed):
        rng = np.random.default_rng(seed)
        labels = rng.integers(CLASSES, size=n)
        features = rng.standard_normal((n, DIM), dtype=np.float32) + 3 * np.eye(CLASSES, DIM)[labels]
        np.savez(folder / f"{name}.npz", cls=features.astype(np.float16), label=labels)
        arrays = list_arrays(str(folder / f"{name}.npz"))
        return import_set(name, arrays, arrays.spec("drawn", "float16"), folder / "caches")

    def make(n_train, n_test):
        data = id_data(cached(f"train-{n_train}", n_train, 0), cached("val", 500, 1), 0.2)
        weight = np.eye(CLASSES, DIM, dtype=np.float32)
        head = LinearHead(weight, np.zeros(CLASSES, np.float32))
        tests = (
            ScoredSet("test", "id", cached(f"test-{n_test}", n_test, 2)),
            ScoredSet("far", "far", cached("far", 500, 3)),
        )
        probe = FittedHeads((head,), head, 1.0, {})
        return BackboneSource("pretrained", None, data, probe, None, (), tests, lambda: None)

    return make


def peak_of(source, scores, folder):
    config = ScoreConfig(scores=sorted(scores), k=5, bootstrap=100, params=PARAMS)
    for cache in (source.data.train, *(test.cache for test in source.tests)):
        assert cache.ids is not None  # what says which row is which is held: it is no feature
        assert cache.image_hashes is not None
    tracemalloc.start()
    score([source], config, folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_four_times_the_rows_to_score_take_hardly_more_memory(source_of, tmp_path):
    scores = set(SCORERS) - OF_MIXTURES_OR_IMAGES
    few, many = (peak_of(source_of(500, n), scores, tmp_path / str(n)) for n in (FEW_TO_SCORE, 4 * FEW_TO_SCORE))
    # A row's scores, its label and its draws of the bootstrap are kept; its features alone would take 4 * DIM bytes.
    assert (many - few) / (3 * FEW_TO_SCORE) < 2 * DIM


def test_four_times_the_training_rows_take_hardly_more_memory(source_of, tmp_path, monkeypatch):
    monkeypatch.setattr(FeatureBank, "__init__", partialmethod(FeatureBank.__init__, held_bytes=0))  # as one of 4 GiB
    monkeypatch.setattr(vra, "column_quantiles", partial(column_quantiles, strip_size=1 << 17))
    monkeypatch.setattr(mahalanobis, "_ROWS_TO_CHOOSE", FEW)  # a beta by, of however many
    scores = set(SCORERS) - OF_MIXTURES_OR_IMAGES - COMPARES_ALL_PAIRS
    few, many = (peak_of(source_of(n, 500), scores, tmp_path / str(n)) for n in (FEW, 4 * FEW))
    assert (many - few) / (3 * FEW) < 2 * DIM
