"""Distances that are kept: the same as those of a search, found by content, searched again where they are not whole."""

import numpy as np
import pytest

from stages.errors import InputError
from stages.scorers import get_scorer
from stages.scorers.inputs import ScoreInputs
from stages.scorers.neighbours.bank import FeatureBank
from stages.scorers.neighbours.knn import KNNScorer
from stages.scorers.neighbours.store import NeighbourStore


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    return np.float32(rng.normal(size=(300, 16))), np.float32(rng.normal(size=(90, 16)))


@pytest.fixture
def store(tmp_path):
    return NeighbourStore(tmp_path, kept=20)


@pytest.fixture
def no_search(monkeypatch):
    """Called when everything is kept: from then on a search fails the test."""
    return lambda: monkeypatch.setattr(FeatureBank, "search", lambda *_: pytest.fail("a bank was searched"))


def test_what_is_kept_is_what_was_searched(rows, store, no_search):
    bank, queries = FeatureBank(rows[0]), rows[1]
    plain = bank.search(queries, 20)[0].T
    np.testing.assert_array_equal(store.distances(bank, queries, 5), plain[:5])
    no_search()
    again = NeighbourStore(store.folder)
    for k, first in ((1, 0), (20, 0), (20, 19), (7, 3)):
        kept = again.distances(FeatureBank(rows[0].copy()), queries.copy(), k, first)
        np.testing.assert_array_equal(kept, plain[first:k])


def test_more_neighbours_than_are_kept_are_searched(rows, store):
    bank = FeatureBank(rows[0])
    store.distances(bank, rows[1], 5)
    np.testing.assert_allclose(store.distances(bank, rows[1], 50), bank.search(rows[1], 50)[0].T, atol=1e-6)
    assert store.distances(FeatureBank(rows[0][:3]), rows[1], 3).shape == (3, 90)


def test_other_rows_are_searched_for_themselves(rows, store):
    bank, other = FeatureBank(rows[0]), FeatureBank(rows[0][:200])
    moved = rows[1].copy()
    moved[0, 0] += 1
    for searched, queries in ((bank, rows[1]), (other, rows[1]), (bank, moved), (bank, rows[1][:50])):
        expected = searched.search(queries, 20)[0].T
        for _ in range(2):
            np.testing.assert_array_equal(store.distances(searched, queries, 20), expected)
    assert len(list(store.folder.glob("*/*"))) == 4


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: b"\xff" * 99])
def test_a_damaged_file_is_searched_again(rows, store, damage):
    bank = FeatureBank(rows[0])
    expected = store.distances(bank, rows[1], 20)
    (file,) = store.folder.glob("*/*")
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    np.testing.assert_array_equal(store.distances(bank, rows[1], 20), expected)
    assert file.read_bytes() == whole


def test_what_nobody_asks_for_any_more_is_removed(rows, store):
    bank = FeatureBank(rows[0])
    store.distances(bank, rows[1], 5)
    store.distances(FeatureBank(rows[0][:200]), rows[1], 5)
    later = NeighbourStore(store.folder)
    later.distances(bank, rows[1], 3)
    later.forget_others()
    assert [path.parent.name for path in store.folder.glob("*/*")] == [bank.digest]
    assert len(list(store.folder.iterdir())) == 1


@pytest.mark.parametrize("name", ["knn", "knn-mean"])
@pytest.mark.parametrize("routed", [False, True])
def test_scores_are_the_same_with_and_without(name, routed, rows, store, no_search):
    expert = [np.arange(len(part)) % 3 if routed else None for part in rows]
    train, x = (ScoreInputs(features=part, expert=e) for part, e in zip(rows, expert, strict=True))
    plain = {k: get_scorer(name, k=k).fit(train).score(x) for k in (1, 8)}

    def kept(k):
        scorer = get_scorer(name, k=k)
        scorer.neighbours = store
        return scorer.fit(train).score(x)

    np.testing.assert_allclose(kept(8), plain[8], atol=1e-6)
    no_search()
    np.testing.assert_allclose(kept(1), plain[1], atol=1e-6)


def test_a_share_of_the_bank_is_drawn_once_and_for_all(rows):
    train, x = ScoreInputs(features=rows[0]), ScoreInputs(features=rows[1])
    half, whole = KNNScorer(k=5, bank=0.5).fit(train), KNNScorer(k=5).fit(train)
    assert half.params() == {"k": 5, "bank": 0.5}
    np.testing.assert_array_equal(half.score(x), KNNScorer(k=5, bank=0.5).fit(train).score(x))
    assert (half.score(x) >= whole.score(x)).all()
    assert (half.score(x) > whole.score(x)).mean() > 0.5
    assert KNNScorer(k=200, bank=0.5).fit(train).params() == {"k": 200, "bank": 0.5, "k_used": 150}


@pytest.mark.parametrize("index", ["ivf", "hnsw"])
def test_an_approximate_index_reports_its_recall(index, rows):
    train, x = ScoreInputs(features=rows[0]), ScoreInputs(features=rows[1])
    scorer = KNNScorer(k=5, index=index).fit(train, x)
    exact = KNNScorer(k=5).fit(train).score(x)
    assert scorer.params() == {"k": 5, "index": index, "recall": FeatureBank(rows[0], index=index).recall(rows[1], 5)}
    assert scorer.params()["recall"] > 0.9
    assert (np.abs(scorer.score(x) - exact) < 1e-6).mean() > 0.9
    assert KNNScorer(k=5, index=index).fit(train).params()["recall"] > 0.9  # judged by training rows


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"index": "lsh"}, r"knn\.index: 'lsh' given, must be 'flat', 'ivf' or 'hnsw'"),
        ({"bank": 0.0}, r"knn\.bank: 0\.0 given, must be greater than 0"),
        ({"bank": 1.5}, r"knn\.bank: 1\.5 given, must be less than or equal to 1"),
    ],
)
def test_settings_refused(settings, message):
    with pytest.raises(InputError, match=message):
        get_scorer("knn", **settings)
