"""kNN in whitened and in principal coordinates: written out plainly, of each expert, stored, and where rows are few."""

import json

import numpy as np
import pytest
from sklearn.covariance import ledoit_wolf
from sklearn.decomposition import PCA

from stages.errors import InputError
from stages.id_data.lazy import LazyArray
from stages.scorers import get_scorer, restored
from stages.scorers.inputs import ScoreInputs
from stages.scorers.neighbours.bank import FeatureBank
from stages.scorers.neighbours.knn import ExpertBanks
from stages.scorers.neighbours.space import NO_SPACE, Space, bank_in
from stages.scorers.neighbours.store import NeighbourStore
from stages.scorers.scorer import ScorerState

SPACES = ("whitened", "pca:0.9")
NAMES = ("knn", "knn-mean")


def rows(n, seed=0, dim=12, classes=4):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    means = np.random.default_rng(9).normal(size=(classes, dim))
    features = 1 + means[labels] + rng.normal(size=(n, dim)) * np.logspace(0, -1.5, dim)
    return ScoreInputs(features.astype(np.float32), labels=labels)


def unit(features):
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def plain(space, train, x, k, mean=False):
    """In float64, by scikit-learn's components and covariance."""
    z, seen = unit(np.float64(train.features)), unit(np.float64(x.features))
    if space == "whitened":
        centred = z - z.mean(axis=0)
        few = len(z) - 1 < 10 * z.shape[1]
        covariance = ledoit_wolf(centred, assume_centered=True)[0] if few else centred.T @ centred / len(z)
        values, vectors = np.linalg.eigh(covariance)
        z, seen = (unit((each - z.mean(axis=0)) @ (vectors / np.sqrt(values))) for each in (z, seen))
    else:
        found = PCA(float(space.removeprefix("pca:")), svd_solver="full").fit(z)
        z, seen = (unit(found.transform(each)) for each in (z, seen))
    distances = np.sort(np.linalg.norm(seen[:, None] - z, axis=2), axis=1)[:, :k]
    return distances.mean(axis=1) if mean else distances[:, -1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("n", [40, 200])  # of 12 features: shrunk, and not
def test_it_is_what_is_written_out(name, space, n):
    train, x = rows(n), rows(25, 1)
    scorer = get_scorer(name, k=3, space=space).fit(train)
    np.testing.assert_allclose(scorer.score(x), plain(space, train, x, 3, name == "knn-mean"), rtol=1e-5, atol=1e-6)
    whole = get_scorer(name, k=3).fit(train).score(x)
    assert not np.allclose(scorer.score(x), whole, atol=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_raw_is_as_ever(name):
    train, x = rows(60), rows(25, 1)
    scorer, ever = get_scorer(name, k=3, space="raw").fit(train), get_scorer(name, k=3).fit(train)
    np.testing.assert_array_equal(scorer.score(x), ever.score(x))
    assert scorer.params() == ever.params() == {"k": 3}
    assert scorer.state().learnt == ever.state().learnt
    assert set(ever.state().learnt["none"][1]) == {"bank", "judged"}  # what files of detectors have held so far


def test_what_was_fitted_is_recorded_and_few_rows_are_said():
    few = get_scorer("knn", k=3, space="whitened").fit(rows(40))
    assert few.params().keys() == {"k", "space", "shrinkage_intensity"}
    assert few.remarks() == ["the covariance is shrunk, for there are fewer than 10 rows a feature"]
    enough = get_scorer("knn", k=3, space="whitened").fit(rows(200))
    assert (enough.params(), enough.remarks()) == ({"k": 3, "space": "whitened"}, [])
    components = get_scorer("knn", k=50, space="pca:0.5").fit(rows(40))
    assert components.params()["dim_used"] < 6
    assert components.params()["k_used"] == 40
    assert components.remarks() == ["fewer rows than k: the farthest is the k-th"]
    assert "dim_used" not in get_scorer("knn", space="pca:1").fit(rows(200)).params()


@pytest.mark.parametrize("space", [*SPACES, "pca:1"])
@pytest.mark.parametrize("n", [1, 2, 8])
def test_fewer_rows_than_features_and_rows_that_are_alike(space, n):
    x = rows(9, 1, dim=30)
    wild = ScoreInputs(np.r_[np.zeros((1, 30)), 1e15 * x.features, 1e-15 * x.features].astype(np.float32))
    for train in (rows(n, dim=30), ScoreInputs(np.full((n, 30), 0.5, np.float32)), ScoreInputs(np.zeros((n, 30)))):
        scorer = get_scorer("knn", k=1, space=space).fit(train)
        for scored in (x, train, wild):
            assert np.isfinite(scorer.score(scored)).all()
    assert scorer.remarks() == [NO_SPACE]
    raw = get_scorer("knn", k=1).fit(train).score(x)
    np.testing.assert_array_equal(scorer.score(x), raw)


@pytest.mark.parametrize("space", SPACES)
def test_each_expert_has_a_space_of_its_own_rows(space):
    train, x = rows(80), rows(30, 1)
    routed = [ScoreInputs(each.features, labels=each.labels, expert=each.labels % 2) for each in (train, x)]
    scores = get_scorer("knn", k=2, space=space).fit(routed[0]).score(routed[1])
    columns = ExpertBanks(routed[0], space=space).distances(routed[1], 2)
    for e in (0, 1):
        own, asked = train.take(train.labels % 2 == e), x.labels % 2 == e
        np.testing.assert_allclose(scores[asked], plain(space, own, x.take(asked), 2), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(columns[:, 1], scores, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("space", SPACES)
def test_what_it_learnt_is_stored_and_read_again_to_the_bit(name, space):
    scorer, x = get_scorer(name, k=2, space=space).fit(rows(40)), rows(25, 1)
    state = scorer.state()
    document = json.loads(json.dumps({"settings": state.settings, "learnt": state.learnt}, allow_nan=False))
    again = restored(ScorerState(name, document["settings"], document["learnt"], state.arrays))
    np.testing.assert_array_equal(again.score(x), scorer.score(x))
    assert (again.params(), again.remarks()) == (scorer.params(), scorer.remarks())


@pytest.mark.parametrize("space", SPACES)
def test_kept_neighbours_are_those_of_their_space(space, tmp_path):
    train, x, store = rows(60), rows(25, 1), NeighbourStore(tmp_path)

    def scored(where):
        scorer = get_scorer("knn", k=3, space=where)
        scorer.neighbours = store
        return scorer.fit(train).score(x)

    for where in ("raw", space, "raw", space):
        np.testing.assert_allclose(scored(where), get_scorer("knn", k=3, space=where).fit(train).score(x), atol=1e-6)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_bank_that_is_not_held_is_mapped_when_it_is_read(monkeypatch):
    train = rows(60)
    space = Space.of("whitened", train, "a test")
    held = bank_in(space, train.features)
    monkeypatch.setattr("stages.scorers.neighbours.space.HELD_BYTES", 0)
    read = bank_in(space, train.features)
    assert isinstance(read, LazyArray)
    np.testing.assert_allclose(np.asarray(read), held, rtol=1e-6)
    found = FeatureBank(read, held_bytes=0, block_rows=7).search(space.apply(rows(5, 1).features), 3)[0]
    np.testing.assert_allclose(found, FeatureBank(held).search(space.apply(rows(5, 1).features), 3)[0], atol=1e-5)


def test_half_of_the_bank_is_searched_in_the_space_of_all():
    train, x = rows(60), rows(25, 1)
    whole, half = (get_scorer("knn", k=1, space="whitened", bank=bank).fit(train).score(x) for bank in (1.0, 0.5))
    assert (half >= whole - 1e-6).all()
    assert (half > whole).any()


@pytest.mark.parametrize("space", ["white", "pca", "pca:0", "pca:1.5", "pca:-1", "pca:95"])
def test_other_spaces_are_refused(space):
    with pytest.raises(InputError, match=rf"^knn\.space: '{space}' given, must be 'raw', 'whitened', or 'pca:' with"):
        get_scorer("knn", space=space)
