"""Scores of several layers, held to scikit-learn, and the rule that chooses the layers."""

import numpy as np
import pytest
from sklearn.covariance import LedoitWolf
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize

from stages.errors import InputError
from stages.id_data.taps import TapRows
from stages.scorers import get_scorer
from stages.scorers.inputs import ScoreInputs
from stages.scorers.shared.fusion import choose_layers, layers_after_drops

LAYERS, WIDTHS = (2, 5, 9, 12), (6, 10, 8, 8)


def rows(n: int, seed: int, tokens: int = 2) -> ScoreInputs:
    """Four classes. After block 5 the within-class variance is left in a single direction, after 12 in four."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 4
    scale = {2: np.ones(6), 5: np.r_[1, np.full(9, 1e-3)], 9: np.ones(8), 12: np.r_[np.ones(4), np.full(4, 1e-3)]}
    values = np.full((n, 4, 2, 10), 7.0)  # what is beyond a layer's width is no feature
    for place, (layer, width) in enumerate(zip(LAYERS, WIDTHS, strict=True)):
        for token in range(2):
            noise = rng.normal(scale=scale[layer], size=(n, width))
            values[:, place, token, :width] = 3 * (token + 1) * np.eye(4, width)[labels] + noise
    features = (2 * np.eye(4, 5)[labels] + rng.normal(size=(n, 5))).astype(np.float32)
    taps = values if tokens == 2 else values[:, :, 1]
    return ScoreInputs(features, labels=labels, taps=TapRows.of(taps.astype(np.float32), LAYERS, WIDTHS))


def joint(x: ScoreInputs, layers: list[int], token: int = 0) -> np.ndarray:
    """[z̄₁; …; z̄], by scikit-learn."""
    values = x.taps._read(np.arange(len(x)))
    parts = [values[:, LAYERS.index(layer), token, : WIDTHS[LAYERS.index(layer)]] for layer in layers]
    return np.concatenate([normalize(part.astype(np.float64)) for part in (*parts, x.features)], axis=1)


@pytest.mark.parametrize(("token", "place"), [("auto", 0), ("cls", 0), ("mean", 1)])
def test_mm_pp_is_mahalanobis_by_ledoit_and_wolfs_covariance_of_all_blocks_end_to_end(token, place):
    train, x = rows(200, 0), rows(30, 1)
    phi, new = joint(train, [5, 12], place), joint(x, [5, 12], place)
    means = np.stack([phi[train.labels == c].mean(0) for c in range(4)])
    covariance = LedoitWolf(assume_centered=True).fit(phi - means[train.labels])
    expected = np.min([covariance.mahalanobis(new - mean) for mean in means], axis=0)
    scorer = get_scorer("mm-pp", layers=[12, 5], token=token).fit(train)
    np.testing.assert_allclose(scorer.score(x), expected, rtol=1e-4)
    assert scorer.params()["layers_used"] == [5, 12]
    assert scorer.params()["shrinkage_intensity"] == pytest.approx(covariance.shrinkage_, rel=1e-4)


def test_multi_layer_knn_is_knn_of_all_blocks_end_to_end():
    train, x = rows(60, 0), rows(20, 1)
    bank, new = normalize(joint(train, [2])), normalize(joint(x, [2]))
    expected = NearestNeighbors(n_neighbors=3).fit(bank).kneighbors(new)[0][:, -1]
    np.testing.assert_allclose(get_scorer("knn-layers", layers=[2], k=3).fit(train).score(x), expected, rtol=1e-4)


def test_the_rule_is_entropy_density_by_numpy_and_takes_the_largest_drops():
    train = rows(400, 0)
    chosen = choose_layers(train, "a test", "auto", "auto", 1)
    assert chosen.layers == (5,)
    assert choose_layers(train, "a test", "auto", "auto", 3).layers == (5, 12)  # from 5 to 9 it rises
    for place, width in enumerate(WIDTHS):
        unit = normalize(train.taps._read(np.arange(400))[:, place, 0, :width].astype(np.float64))
        means = np.stack([unit[train.labels == c].mean(0) for c in range(4)])
        values = np.linalg.eigvalsh(np.cov((unit - means[train.labels]).T, bias=True))
        shares = values / values.sum()
        assert chosen.densities[place] == pytest.approx(-(shares * np.log(shares)).sum() / width, rel=1e-5)


def test_where_no_density_drops_the_last_layer_stands_alone_and_it_is_said():
    assert layers_after_drops({1: 0.1, 2: 0.2, 3: 0.2}, 2) == ()
    train, x = rows(200, 0), rows(30, 1)
    one = TapRows.of(np.ones((200, 1, 6), np.float32), [4])
    scorer = get_scorer("mm-pp").fit(ScoreInputs(train.features, labels=train.labels, taps=one))
    plain = get_scorer("mahalanobis-pp", shrinkage="ledoit-wolf").fit(train)
    alone = ScoreInputs(x.features, taps=TapRows.of(np.ones((30, 1, 6), np.float32), [4]))
    np.testing.assert_allclose(scorer.score(alone), plain.score(x), rtol=1e-4)
    assert scorer.remarks() == ["of the last layer alone, for no layer's entropy density drops"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [3]}, "layers: 3 given, the cache has taps after 2, 5, 9, 12"),
        ({"layers": []}, "mm-pp.layers"),
        ({"layers": [0]}, "mm-pp.layers: 0 given, must be greater than or equal to 1"),
        ({"token": "cls"}, 'token: "cls" given, these taps have no class token'),
    ],
)
def test_layers_and_tokens_that_are_not_there_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        get_scorer("mm-pp", **settings).fit(rows(40, 0, tokens=1))
