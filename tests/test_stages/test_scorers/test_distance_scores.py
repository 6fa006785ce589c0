"""Scores by distance and by subspace, against their formulas written out plainly; what they do at the edges."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import iv
from scipy.stats import multivariate_normal, vonmises_fisher
from sklearn.metrics import roc_auc_score

from stages.errors import InputError, StageError
from stages.heads.affine import LinearHead
from stages.scorers import get_scorer
from stages.scorers.features.fdbd import fdbd_score
from stages.scorers.features.gmm import GaussianMixture, GMMScorer
from stages.scorers.inputs import ScoreInputs
from stages.scorers.logits.other import other_score
from stages.scorers.neighbours.bank import FeatureBank
from stages.scorers.neighbours.nnguide import NNGuideScorer, nnguide_score
from stages.scorers.neighbours.patch_knn import PatchKNNScorer, patch_knn_score
from stages.scorers.shared.softmax import ALONE
from stages.scorers.subspace.neco import NECOScorer, neco_score
from stages.scorers.subspace.pnml import pnml_score
from stages.scorers.subspace.vim import ViMScorer, virtual_origin

GAUSSIAN = ("mahalanobis", "mahalanobis-pp", "mahalanobis-radial", "relative-mahalanobis", "relative-mahalanobis-pp",
            "ssd", "gmm", "wdiscood")  # fmt: skip
SUBSPACE = ("vim", "residual", "neco")
HEAD = ("she", "fdbd", "nci", "pnml")
PAIRS = ("nnguide", "relation")
EVERY = (*GAUSSIAN, *SUBSPACE, *HEAD, *PAIRS, "cosine", "vmf", "knn-mean")

C, D = 4, 7


def rows(n=80, seed=0, dim=D, classes=C, spread=0.7):
    """Rows around ``classes`` directions, away from the origin, with a head that knows them."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    features = 0.5 + np.eye(classes, dim)[labels] * 3 + rng.normal(scale=spread, size=(n, dim))
    weight = np.random.default_rng(99).normal(scale=0.3, size=(classes, dim)) + np.eye(classes, dim) * 2
    head = LinearHead(weight, np.linspace(-1, 1, classes))
    return ScoreInputs(features=features, labels=labels, logits=features @ weight.T + head.bias, head=head)


def unit(features):
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def covariance_around_class_means(z, labels):
    means = np.stack([z[labels == c].mean(axis=0) for c in np.unique(labels)])
    return means, np.cov((z - means[labels]).T, bias=True)


def distances(z, means, covariance):
    """Squared Mahalanobis distances, one by one, [n, C]."""
    inverse = np.linalg.inv(covariance)
    return np.array([[(row - mean) @ inverse @ (row - mean) for mean in means] for row in z])


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)


# --------------------------------------------------------------------------------------- formulas of SCORES.md, plainly


def plain_mahalanobis(train, x):
    return distances(x.features, *covariance_around_class_means(train.features, train.labels)).min(axis=1)


def plain_relative(train, x):
    mean, covariance = train.features.mean(axis=0), np.cov(train.features.T, bias=True)
    return plain_mahalanobis(train, x) - distances(x.features, [mean], covariance)[:, 0]


def plain_ssd(train, x):
    z = unit(train.features)
    return distances(unit(x.features), [z.mean(axis=0)], np.cov(z.T, bias=True))[:, 0]


def normalised(plain):
    def on_unit_rows(train, x):
        return plain(*(ScoreInputs(features=unit(each.features), labels=each.labels) for each in (train, x)))

    return on_unit_rows


def radial(z, beta):
    return z / np.linalg.norm(z, axis=1, keepdims=True) ** beta


def plain_radial(train, x):
    """β told by rows whose own class is left out, each row alone; every second row of a class is fitted on."""
    number = np.array([np.sum(train.labels[:i] == label) for i, label in enumerate(train.labels)])
    half, asked, areas = number % 2 == 0, number % 2 == 1, {}
    for beta in (1.0, 0.5, 1.5, 0.0, 2.0):
        z = radial(train.features, beta)
        away = distances(z[asked], *covariance_around_class_means(z[half], train.labels[half]))
        left_out = [np.delete(row, label).min() for row, label in zip(away, train.labels[asked], strict=True)]
        areas[beta] = roc_auc_score(np.repeat([0, 1], len(away)), np.r_[away.min(axis=1), left_out])
    beta = max(areas, key=areas.get)
    each = (ScoreInputs(features=radial(rows.features, beta), labels=rows.labels) for rows in (train, x))
    return plain_mahalanobis(*each)


def plain_wdiscood(train, x):
    """As the authors' code has it: whitened on both sides, the discriminants from a general eigenproblem."""
    z = unit(train.features)
    values, vectors = np.linalg.eigh(covariance_around_class_means(z, train.labels)[1])
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    white, seen = z @ root, unit(x.features) @ root
    means, within = covariance_around_class_means(white, train.labels)
    apart = means - white.mean(axis=0)
    ratios, found = np.linalg.eig(np.linalg.inv(within + 1e-5 * np.eye(D)) @ (apart.T @ apart / C))
    discriminants = np.real(found[:, np.argsort(-np.real(ratios))[: C - 1]]).T
    basis = np.linalg.svd(discriminants, full_matrices=False)[2]
    left = np.eye(D) - basis.T @ basis
    nearest = np.linalg.norm((seen[:, None] - means) @ discriminants.T, axis=2).min(axis=1)
    return nearest + np.linalg.norm((seen - white.mean(axis=0)) @ left, axis=1)


def plain_vmf(train, x):
    z = unit(train.features)
    cosines = [a @ b for i, a in enumerate(z) for j, b in enumerate(z) if i != j and train.labels[i] == train.labels[j]]
    length = np.sqrt(np.mean(cosines))
    kappa = brentq(lambda k: iv(D / 2, k) / iv(D / 2 - 1, k) - length, 0.1, 500)
    means = unit(np.stack([z[train.labels == c].mean(axis=0) for c in range(C)]))
    density = sum(vonmises_fisher(mean, kappa).pdf(unit(x.features)) / C for mean in means)
    return -np.log(density)


def plain_gmm(train, x):
    density = 0
    for c in range(C):
        own = train.features[train.labels == c]
        density += len(own) / len(train) * multivariate_normal(own.mean(0), np.cov(own.T, bias=True)).pdf(x.features)
    return -np.log(density)


def left_of_principal(train, x, dim):
    u = -np.linalg.pinv(train.head.weight) @ train.head.bias
    lengths, directions = np.linalg.eigh((train.features - u).T @ (train.features - u))
    principal = directions[:, np.argsort(-lengths)[:dim]]
    return [np.linalg.norm((each - u) - (each - u) @ principal @ principal.T, axis=1) for each in (train.features, x)]


def plain_residual(train, x):
    return left_of_principal(train, x.features, D // 2)[1]


def plain_vim(train, x):
    of_train, of_x = left_of_principal(train, x.features, D // 2)
    alpha = train.logits.max(axis=1).mean() / of_train.mean()
    return alpha * of_x - np.log(np.exp(x.logits).sum(axis=1))


def plain_neco(train, x):
    mean, std = train.features.mean(axis=0), train.features.std(axis=0)
    z, standard = (x.features - mean) / std, (train.features - mean) / std
    _, lengths, directions = np.linalg.svd(standard, full_matrices=False)
    dim = np.flatnonzero(np.cumsum(lengths**2) / (lengths**2).sum() >= 0.9)[0] + 1
    share = np.linalg.norm(z @ directions[:dim].T, axis=1) / np.linalg.norm(z, axis=1)
    return -share * x.logits.max(axis=1)


def plain_she(train, x):
    right = train.logits.argmax(axis=1) == train.labels
    patterns = np.stack([train.features[right & (train.labels == c)].mean(axis=0) for c in range(C)])
    return [-z @ patterns[logits.argmax()] for z, logits in zip(x.features, x.logits, strict=True)]


def plain_fdbd(train, x):
    w, mean = train.head.weight, train.features.mean(axis=0)
    scores = []
    for z, logits in zip(x.features, x.logits, strict=True):
        top = logits.argmax()
        terms = [(logits[top] - logits[c]) / np.linalg.norm(w[top] - w[c]) for c in range(C) if c != top]
        scores.append(-np.mean(terms) / np.linalg.norm(z - mean))
    return scores


def plain_nci(train, x):
    mean, w = train.features.mean(axis=0), train.head.weight[x.logits.argmax(axis=1)]
    along = ((x.features - mean) * w).sum(axis=1) / np.linalg.norm(x.features - mean, axis=1)
    return -along - 1e-4 * np.abs(x.features).sum(axis=1)


def plain_pnml(train, x):
    z, bank = unit(x.features), unit(train.features)
    h = np.einsum("nd,de,ne->n", z, np.linalg.inv(bank.T @ bank), z)
    p = softmax(z @ train.head.weight.T + train.head.bias)
    regrets = np.log((p / (p + (1 - p) * p ** (h / (1 + h))[:, None])).sum(axis=1))
    return np.log(regrets / np.log(C))


def plain_nnguide(train, x):
    energy = [np.log(np.exp(each.logits).sum(axis=1)) for each in (train, x)]
    products = unit(x.features) @ (unit(train.features) * energy[0][:, None]).T
    return -energy[1] * np.sort(products, axis=1)[:, -10:].mean(axis=1)


def plain_relation(train, x):
    relations = np.maximum(unit(x.features) @ unit(train.features).T, 0) * (softmax(x.logits) @ softmax(train.logits).T)
    return -np.where(relations > 0.03, relations, 0).sum(axis=1)


def plain_cosine(train, x):
    means, _ = covariance_around_class_means(train.features, train.labels)
    return -(unit(x.features) @ unit(means).T).max(axis=1)


def plain_knn_mean(train, x):
    apart = np.linalg.norm(unit(x.features)[:, None] - unit(train.features), axis=2)
    return np.sort(apart, axis=1)[:, :50].mean(axis=1)


PLAIN = {
    "knn-mean": plain_knn_mean,
    "mahalanobis": plain_mahalanobis,
    "mahalanobis-pp": normalised(plain_mahalanobis),
    "relative-mahalanobis": plain_relative,
    "relative-mahalanobis-pp": normalised(plain_relative),
    "mahalanobis-radial": plain_radial,
    "wdiscood": plain_wdiscood,
    "vmf": plain_vmf,
    "ssd": plain_ssd,
    "gmm": plain_gmm,
    "residual": plain_residual,
    "vim": plain_vim,
    "neco": plain_neco,
    "she": plain_she,
    "fdbd": plain_fdbd,
    "nci": plain_nci,
    "pnml": plain_pnml,
    "nnguide": plain_nnguide,
    "relation": plain_relation,
    "cosine": plain_cosine,
}


@pytest.mark.parametrize("name", EVERY)
def test_it_is_its_formula(name):
    train, x = rows(n=400), rows(n=23, seed=1, spread=2)  # enough for a covariance a class
    scores = get_scorer(name).fit(train).score(x)
    np.testing.assert_allclose(scores, PLAIN[name](train, x), rtol=2e-6, atol=1e-6)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.floats(0.1, 10), st.sampled_from([0.0, 3.0, 100.0]))
def test_gaussians_know_no_axes_and_no_units(seed, scale, shift):
    """Rotated, scaled and shifted features keep their Mahalanobis distances; their order, where one is far away."""
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.normal(size=(D, D)))[0]
    train, x = rows(seed=seed), rows(n=9, seed=seed + 1, spread=2)

    def moved(each):
        return ScoreInputs(features=scale * each.features @ rotation + shift, labels=each.labels)

    for name in ("mahalanobis", "relative-mahalanobis"):
        plain, other = (get_scorer(name).fit(a).score(b) for a, b in ((train, x), (moved(train), moved(x))))
        np.testing.assert_allclose(other, plain, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000))
def test_subspaces_and_products_know_no_axes(seed):
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(D, D)))[0]
    train, x = rows(seed=seed), rows(n=9, seed=seed + 1, spread=2)

    def turned(each):
        head = LinearHead(each.head.weight @ rotation, each.head.bias)
        return ScoreInputs(each.features @ rotation, each.logits, each.labels, head=head)

    for name in ("residual", "vim", "she", "fdbd", "pnml", "nnguide", "relation", "cosine"):
        plain, other = (get_scorer(name).fit(a).score(b) for a, b in ((train, x), (turned(train), turned(x))))
        np.testing.assert_allclose(other, plain, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    "name", ["mahalanobis-pp", "relative-mahalanobis-pp", "ssd", "pnml", "cosine", "wdiscood", "vmf"]
)
def test_only_the_direction_counts_where_features_are_normalised(name):
    train, x = rows(), rows(n=9, seed=1)
    scorer = get_scorer(name).fit(train)
    longer = ScoreInputs(features=x.features * np.arange(1, 10)[:, None])
    np.testing.assert_allclose(scorer.score(longer), scorer.score(x), rtol=1e-6)


# ------------------------------------------------------------------------------------------------------------ edges


@pytest.mark.parametrize("name", EVERY)
def test_equal_rows_tie_and_one_row_is_scored_as_among_others(name):
    scorer, x = get_scorer(name).fit(rows()), rows(n=9, seed=1)
    scores = scorer.score(x.take(np.array([3, 3, 5, 3])))
    assert scores[0] == scores[1] == scores[3]
    np.testing.assert_allclose(scorer.score(x.take(np.array([5]))), scores[2:3], rtol=1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_more_features_than_rows(name):
    """The covariance has no inverse then, and the head fewer rows than columns."""
    train, x = rows(n=24, dim=40), rows(n=9, seed=1, dim=40, spread=2)
    scores = get_scorer(name).fit(train).score(x)
    assert np.isfinite(scores).all()
    assert len(np.unique(scores)) > 1


def test_a_deficient_covariance_has_the_pseudo_inverse_and_says_its_rank():
    train, x = rows(n=24, dim=40), rows(n=9, seed=1, dim=40)
    means, covariance = covariance_around_class_means(train.features, train.labels)
    inverse = np.linalg.pinv(covariance, hermitian=True, rcond=1e-10)
    apart = x.features[:, None] - means
    scorer = get_scorer("mahalanobis", "openood", rank_rtol=1e-12).fit(train)
    np.testing.assert_allclose(
        scorer.score(x), np.einsum("ncd,de,nce->nc", apart, inverse, apart).min(axis=1), rtol=1e-5
    )
    assert scorer.params()["rank"] == 24 - C
    assert "rank" not in get_scorer("mahalanobis").fit(rows()).params()


@pytest.mark.parametrize("name", EVERY)
def test_a_class_with_one_row(name):
    train = rows()
    train = train.take(np.flatnonzero((train.labels != 2) | (np.arange(80) == 2)))
    scores = get_scorer(name).fit(train).score(rows(n=9, seed=1))
    assert np.isfinite(scores).all()


@pytest.mark.parametrize("name", EVERY)
def test_a_feature_that_is_constant_over_id_rows(name):
    train, x = rows(), rows(n=9, seed=1)
    train.features[:, 3] = 0.25
    x.features[:4, 3] = 0.25
    scores = get_scorer(name).fit(train).score(x)
    assert np.isfinite(scores).all()


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_one_id_row_is_enough(name, n):
    scores = get_scorer(name).fit(rows().take(np.arange(n))).score(rows(n=9, seed=1))
    assert np.isfinite(scores).all()


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("value", [0.0, 3.0])
@pytest.mark.parametrize("n", [6, 80])
def test_id_rows_that_are_all_alike(name, value, n):
    """Whatever has to vary takes the same of every direction, or says that it can tell nothing."""
    train = rows(n)
    same = ScoreInputs(np.full((n, D), value), train.logits, train.labels, head=train.head)
    scorer = get_scorer(name).fit(same)
    assert np.isfinite(scorer.score(rows(n=9, seed=1))).all()
    if name in (*GAUSSIAN, "neco"):
        assert any("differ" in remark for remark in scorer.remarks())


@pytest.mark.parametrize(("name", "params"), [*((name, {"shrinkage": "none"}) for name in GAUSSIAN)])
def test_id_rows_that_are_all_alike_have_no_inverse_where_one_is_asked_for(name, params):
    train = rows()
    same = ScoreInputs(np.zeros((80, D)), train.logits, train.labels, head=train.head)
    with pytest.raises(InputError, match=r"do not vary|singular"):
        get_scorer(name, **params).fit(same)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_no_numbers_are_refused(name, value):
    train, x = rows(), rows(n=9, seed=1)
    scorer = get_scorer(name).fit(train)
    x.features[4, 2] = value
    with pytest.raises(InputError, match=r"1 of 9 .*NaN or inf, row 4 first"):
        scorer.score(x)
    train.features[7, 0] = value
    if name not in PAIRS:  # these read the rows when they score
        with pytest.raises(InputError, match=r"1 of 80 .*row 7 first"):
            get_scorer(name).fit(train)


@pytest.mark.parametrize("name", EVERY)
def test_features_of_another_width_are_refused(name):
    x = rows(n=3)
    narrow = ScoreInputs(x.features[:, :5], x.logits, x.labels)
    with pytest.raises(InputError, match=r"have 5 .* 7"):
        get_scorer(name).fit(rows()).score(narrow)


@pytest.mark.parametrize("name", EVERY)
def test_without_a_fit_there_is_no_score(name):
    with pytest.raises(StageError, match=f"^{name} .*fit"):
        get_scorer(name).score(rows(n=3))


@pytest.mark.parametrize(
    "name", ["mahalanobis", "mahalanobis-radial", "relative-mahalanobis-pp", "gmm", "she", "cosine", "wdiscood", "vmf"]
)
def test_rows_of_no_class_are_refused(name):
    train = rows()
    train.labels[5] = -1
    with pytest.raises(InputError, match=f"{name} .* class .*, 1 rows"):
        get_scorer(name).fit(train)


@pytest.mark.parametrize("name", ["vim", "residual", "fdbd", "nci", "pnml"])
def test_scores_of_the_head_want_its_weights(name):
    train = rows()
    with pytest.raises(InputError, match=f"{name} .* weights"):
        get_scorer(name).fit(ScoreInputs(train.features, train.logits, train.labels))


# ------------------------------------------------------------------------------------------------- each for itself


def test_the_origin_of_vim_survives_a_softmax_head_in_float32():
    """Such a head has rank C − 1 but for rounding: numpy's own cut inverts that rounding."""
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(scale=0.05, size=(50, 384)), rng.normal(scale=0.1, size=50)
    weight, bias = weight - weight.mean(axis=0), bias - bias.mean()
    exact = virtual_origin(weight, bias)
    single = weight.astype(np.float32), bias.astype(np.float32)
    np.testing.assert_allclose(virtual_origin(*single), exact, rtol=1e-3, atol=1e-5)
    numpys = -np.linalg.pinv(single[0]) @ (single[1] + np.float32(0.1))  # a bias of 0.1 to all changes no softmax
    assert np.linalg.norm(numpys) > 100 * np.linalg.norm(exact)
    np.testing.assert_allclose(virtual_origin(single[0], single[1] + np.float32(0.1)), exact, rtol=1e-2, atol=1e-4)


def test_dimensions_of_vim():
    assert ViMScorer().fit(rows()).params()["dim_used"] == 3
    assert "dim_used" not in ViMScorer(dim=5).fit(rows()).params()
    assert ViMScorer(dim=7).fit(rows()).params()["dim_used"] == 3  # nothing would be left
    few = rows(n=6, dim=40)  # 6 rows span 6 dimensions: with 20 of them nothing would be left either
    assert ViMScorer().fit(few).params()["dim_used"] == 1  # ten rows a direction, or one
    assert ViMScorer(dim=20).fit(few).params()["dim_used"] == 3
    assert ViMScorer().fit(rows(n=90, dim=40)).params()["dim_used"] == 9
    assert get_scorer("vim", "openood", dim=2).settings() == {"dim": 2}
    assert get_scorer("vim", "openood").settings() == {"dim": 256}


def test_alpha_makes_residual_and_largest_logit_alike():
    train = rows()
    scorer = ViMScorer().fit(train)
    virtual = scorer.score(train) + np.log(np.exp(train.logits).sum(axis=1))
    assert virtual.mean() == pytest.approx(train.logits.max(axis=1).mean(), rel=1e-6)


def test_neco_takes_the_components_that_explain_the_variance():
    train, x = rows(), rows(n=9, seed=1)
    assert NECOScorer(variance=1.0).fit(train).params()["dim_used"] == D
    assert 1 < NECOScorer().fit(train).params()["dim_used"] < D
    np.testing.assert_allclose(NECOScorer(variance=1.0, max_logit=False).fit(train).score(x), -1, rtol=1e-6)
    plain, times = (NECOScorer(dim=2, max_logit=flag).fit(train).score(x) for flag in (False, True))
    np.testing.assert_allclose(times, plain * x.logits.max(axis=1), rtol=1e-6)
    mean = np.zeros(D), np.ones(D)
    assert neco_score(np.zeros((1, D)), *mean, np.eye(D)[:, :2]).tolist() == [0]  # the mean itself has no direction


def test_gmm_gives_all_classes_one_covariance_where_asked():
    train, x = rows(), rows(n=9, seed=1)
    means, covariance = covariance_around_class_means(train.features, train.labels)
    density = sum(multivariate_normal(mean, covariance).pdf(x.features) / C for mean in means)
    scores = GMMScorer(covariance="shared").fit(train).score(x)
    np.testing.assert_allclose(scores, -np.log(density), rtol=1e-5)


def test_jitter_is_the_smallest_that_gives_full_rank_and_is_said():
    full, flat = rows(), rows(n=24, dim=40)
    assert GMMScorer().fit(full).params()["jitter_used"] == 0
    used = GMMScorer(shrinkage="none").fit(flat).params()["jitter_used"]
    assert 0 < used < 1e-6
    assert "jitter_used" not in GMMScorer(jitter=1e-3).fit(flat).params()
    with pytest.raises(InputError, match=r"singular, with 0 .* jitter"):
        GaussianMixture.of([1.0], np.zeros((1, 2)), [[[1.0, 1.0], [1.0, 1.0]]], jitter=0)


def test_class_covariances_that_fill_the_memory_are_refused_before_any_work():
    wide = ScoreInputs(features=np.broadcast_to(np.float32(1), (1000, 1536)), labels=np.arange(1000))
    with pytest.raises(InputError, match=r'1000 classes and 1536 features take 17.6 GiB, 2 are allowed: .*"shared"'):
        GMMScorer().fit(wide)


def test_a_class_that_is_never_right_takes_the_mean_of_its_rows_and_she_says_so():
    train, x = rows(), rows(n=9, seed=1)
    train.logits[train.labels == 1, 1] = -50
    scorer = get_scorer("she").fit(train)
    assert scorer.params() == {"classes_never_right": 1}
    x.logits[:, 1] = 50
    np.testing.assert_allclose(scorer.score(x), -x.features @ train.features[train.labels == 1].mean(axis=0), rtol=1e-5)
    assert get_scorer("she").fit(rows()).params() == {}
    assert get_scorer("she").fit(rows()).remarks() == []
    assert scorer.remarks() == ["classes of which no row is classified right have all their rows as pattern"]
    never = ScoreInputs(train.features, np.eye(C)[(train.labels + 1) % C], train.labels)  # no row of any class
    assert get_scorer("she").fit(never).params() == {"classes_never_right": C}
    assert np.isfinite(get_scorer("she").fit(never).score(x)).all()
    unseen = (
        get_scorer("she").fit(train.take(train.labels != 1)).score(x)
    )  # class 1 has no rows: the best of the others
    np.testing.assert_array_equal(unseen, get_scorer("she").fit(train.take(train.labels != 1)).score(masked(x, 1)))
    with pytest.raises(InputError, match=r"class 3, .* 3 classes"):
        get_scorer("she").fit(ScoreInputs(train.features, train.logits[:, :3], train.labels))


def masked(x, c):
    logits = x.logits.copy()
    logits[:, c] = -1000
    return ScoreInputs(features=x.features, logits=logits)


def test_fdbd_without_a_boundary():
    two = [[0.0, 0.0], [0.0, 0.0]]  # weights that are equal: nothing between the classes
    assert fdbd_score([[1.0]], [[2.0, 1.0]], two, mean=[0.0]).tolist() == [0]
    assert fdbd_score([[1.0]], [[2.0]], [[0.0]], mean=[0.0]).tolist() == [0]
    assert fdbd_score([[0.0]], [[2.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]], mean=[0.0]).tolist() == [-1e8]


def test_fdbd_sums_where_openood_does():
    train, x = rows(), rows(n=9, seed=1)
    mean, total = (get_scorer("fdbd", profile).fit(train).score(x) for profile in ("paper", "openood"))
    np.testing.assert_allclose(total, (C - 1) * mean, rtol=1e-6)


def test_other_is_one_probability_among_those_of_the_group():
    rng = np.random.default_rng(0)
    logits, other = rng.normal(size=(20, 3)), rng.normal(size=20)
    probability = softmax(np.c_[logits, other])[:, -1]
    np.testing.assert_allclose(other_score(logits, other), np.log(probability / (1 - probability)), rtol=1e-5)
    padded = np.c_[logits, np.full(20, -np.inf)]
    np.testing.assert_array_equal(other_score(padded, other), other_score(logits, other))
    assert other_score([[-1e4], [1e4]], [1e4, -1e4]).tolist() == [2e4, -2e4]
    for bad in (other[:3], np.where(np.arange(20) == 3, np.nan, other)):
        with pytest.raises(InputError, match="one finite number a row"):
            other_score(logits, bad)


def test_knn_mean_of_one_neighbour_is_knn_and_k_is_cut():
    train, x = rows(), rows(n=9, seed=1)
    scores = [get_scorer(name, k=1).fit(train).score(x) for name in ("knn", "knn-mean")]
    np.testing.assert_allclose(*scores, atol=1e-7)
    assert get_scorer("knn-mean", k=100).fit(train).params() == {"k": 100, "k_used": 80}


def test_patch_knn_averages_the_largest_share_and_at_least_one():
    rng = np.random.default_rng(0)
    bank, patches = rng.normal(size=(40, 5)), rng.normal(size=(6, 20, 5))
    nearest = np.array([(1 - unit(each) @ unit(bank).T).min(axis=1) for each in patches])
    for share, count in ((0.01, 1), (0.1, 2), (0.29, 5), (1.0, 20)):
        expected = np.sort(nearest, axis=1)[:, -count:].mean(axis=1)
        np.testing.assert_allclose(patch_knn_score(patches, FeatureBank(bank), share), expected, atol=1e-6)
    for bad, says in ((bank, r"shape \(40, 5\)"), (np.zeros((2, 0, 5)), r"shape \(2, 0, 5\)")):
        with pytest.raises(InputError, match=says):
            patch_knn_score(bad, FeatureBank(bank))
    patches[3, 2, 1] = np.nan
    with pytest.raises(InputError, match="NaN or inf"):
        patch_knn_score(patches, FeatureBank(bank))


def test_a_bank_of_patches_is_no_larger_than_asked_and_the_same_every_time():
    rng = np.random.default_rng(0)
    train, x = ScoreInputs(patches=rng.normal(size=(50, 4, 5))), ScoreInputs(patches=rng.normal(size=(20, 4, 5)))
    small = [PatchKNNScorer(bank=30).fit(train) for _ in range(2)]
    assert small[0].params() == {"share": 0.01, "bank": 30, "bank_images": 7}
    np.testing.assert_array_equal(small[0].score(x), small[1].score(x))
    assert PatchKNNScorer().fit(train).params()["bank_images"] == 50
    assert (small[0].score(x) >= PatchKNNScorer().fit(train).score(x)).all()  # fewer patches to be near to
    with pytest.raises(InputError, match=r"^patch-knn .*patch tokens"):
        PatchKNNScorer().fit(ScoreInputs(patches=np.zeros((3, 0, 5))))


@settings(deadline=None)
@given(st.floats(0.01, 10), st.floats(1, 1000))
def test_regrets_of_sure_heads_do_not_vanish(size, weight):
    """In a float format with more exponents: at p = 1 − exp(−1000) the regret itself is far below float64's least."""
    rows = np.float64([[np.cos(angle), np.sin(angle)] for angle in (0.1, 0.4, 0.7)])  # the third is between the classes
    scores = pnml_score(rows, weight * np.eye(2), np.zeros(2), size * np.eye(2))
    p = np.exp(np.longdouble(weight * (rows - rows.max(axis=1, keepdims=True))))
    p /= p.sum(axis=1, keepdims=True)
    small = p[:, 1]  # the first class is the largest: 1 − p of it is p of the other
    power = np.longdouble(1 / (1 + size**2))
    lacking = small / (small + (1 - small) ** power)  # 1 − t of the first
    other = small**power / (small**power + 1 - small)
    np.testing.assert_allclose(scores, np.float64(np.log(np.log1p(other - lacking) / np.log(2))), rtol=1e-5, atol=1e-5)
    assert len(set(scores.tolist())) == 3


def test_one_class_has_no_regret():
    assert pnml_score([[1.0, 2.0]], np.ones((1, 2)), np.zeros(1), np.eye(2)).tolist() == [np.float32(ALONE)]


def test_nnguide_says_that_k_was_cut_and_takes_its_share():
    train, x = rows(), rows(n=9, seed=1)
    assert NNGuideScorer(k=100).fit(train).params()["k_used"] == 80
    assert NNGuideScorer(k=100).fit(train).remarks() == ["fewer rows than k: all are averaged"]
    assert NNGuideScorer(k=100, share=0.25).fit(train).params()["k_used"] == 20
    np.testing.assert_array_equal(*(NNGuideScorer(share=0.25).fit(train).score(x) for _ in range(2)))
    with pytest.raises(InputError, match=r"nnguide\.k: 0 given, must be 1 to 80"):
        nnguide_score(x.features, x.logits, train, k=0)


@pytest.mark.parametrize("name", PAIRS)
def test_scores_of_all_pairs_do_not_depend_on_the_blocks(name, monkeypatch):
    train, x = rows(n=300), rows(n=150, seed=1)
    whole = get_scorer(name).fit(train).score(x)
    monkeypatch.setattr("stages.scorers.shared.pairs._QUERIES", 64)
    monkeypatch.setattr("stages.scorers.shared.pairs._BANK", 7)
    np.testing.assert_allclose(get_scorer(name).fit(train).score(x), whole, rtol=1e-6)


@pytest.mark.parametrize("name", PAIRS)
def test_the_company_of_a_row_does_not_change_a_bit(name):
    scorer, x = get_scorer(name).fit(rows(n=300)), rows(n=150, seed=1)
    np.testing.assert_array_equal(scorer.score(x.take(np.arange(40, 50))), scorer.score(x)[40:50])
