"""What an extraction says of its features: neighbours of one class, and rows that differ."""

import numpy as np
import pytest
from sklearn.model_selection import LeaveOneOut, cross_val_score
from sklearn.neighbors import KNeighborsClassifier

from cache import CacheBuilder, InputTable, commit_shard, plan_shards
from stages import sanity
from stages.sanity import check_features, leave_one_out_accuracy
from tests.test_cache.toy import make_spec


def sealed(path, features, labels):
    """A cache of these class embeddings [n, 6]."""
    n, spec = len(features), make_spec(patches="none", grid=(0, 0), n_registers=0)
    inputs = InputTable.listing([f"{i:05d}.png" for i in range(n)], labels, np.ones(n), np.ones(n))
    plans = plan_shards(n, spec.row_bytes)
    arrays = {"cls": np.asarray(features, np.float32), "tap_cls": np.ones((n, 4), np.float32)}
    with CacheBuilder.begin(path, "pets", spec, inputs, ("cat", "dog", "cow"), plans, {}) as builder:
        for plan in plans:
            commit_shard(path, plan, arrays, inputs, [])
        return builder.seal()


def test_real_features_of_digits_know_their_neighbours(caches):
    (line,) = check_features(caches["train"], by_class=True)
    assert line.startswith("train: leave-one-out 5-NN accuracy of cls 9")
    assert line.endswith(f"on {caches['train'].n_rows} rows, chance 25.5 %")
    assert check_features(caches["train"], by_class=False) == []


def test_accuracy_is_scikit_learns(caches):
    train = caches["train"]
    features, labels = train.read("cls").astype(np.float32), train.labels
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    knn = KNeighborsClassifier(5, algorithm="brute")
    expected = cross_val_score(knn, features, labels, cv=LeaveOneOut()).mean()
    # scikit-learn gives a tie to the class of the smaller number, here the nearest neighbour decides.
    assert leave_one_out_accuracy(features, labels) == pytest.approx(expected, abs=0.005)


def test_noise_is_told_from_features(tmp_path):
    rng = np.random.default_rng(0)
    lines = check_features(sealed(tmp_path / "noise", rng.standard_normal((300, 6)), np.arange(300) % 3), by_class=True)
    assert "chance 33.3 %" in lines[0]
    assert lines[1].startswith("warning: pets: neighbours are hardly of one class more often than by chance")


def test_identical_rows_are_told(tmp_path):
    rng = np.random.default_rng(0)
    features = rng.standard_normal((300, 6))
    features[:120] = features[0]
    (line,) = check_features(sealed(tmp_path / "same", features, np.full(300, -1)), by_class=True)
    assert line.startswith("warning: pets: 40 % of the rows are identical")
    features[90:120] = rng.standard_normal((30, 6))  # under a third
    assert check_features(sealed(tmp_path / "fewer", features, np.full(300, -1)), by_class=True) == []


def test_of_many_rows_some_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(sanity, "MOST_ROWS", 100)
    labels = np.arange(300) % 3
    features = np.eye(6)[labels] + np.arange(300)[:, None] * 1e-3
    (line,) = check_features(sealed(tmp_path / "pets", features, labels), by_class=True)
    assert "100.0 % on 100 of 300 rows" in line


@pytest.mark.parametrize("labels", [[], [0], [0, 1], [0] * 30, [-1] * 30])
def test_where_there_is_nothing_to_say_it_is_silent(tmp_path, labels):
    rng = np.random.default_rng(0)
    assert check_features(sealed(tmp_path / "few", rng.standard_normal((len(labels), 6)), labels), by_class=True) == []
