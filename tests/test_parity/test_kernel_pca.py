"""Kernel PCA against scikit-learn, which the authors of the scores use parts of."""

import numpy as np
import pytest
from scipy.special import logsumexp
from sklearn.decomposition import PCA, KernelPCA
from sklearn.kernel_approximation import Nystroem, RBFSampler
from sklearn.preprocessing import normalize

from stages.scorers import get_scorer
from stages.scorers.subspace.kernelpca import fourier_features
from tests.test_parity.digits import digits_rows


@pytest.fixture(scope="module")
def digits():
    return digits_rows()


def unit(rows):
    return normalize(np.float64(rows.features))


def left_by_pca(train, x, variance):
    """Of mapped rows, and how many components there are."""
    pca = PCA(variance, svd_solver="full").fit(train)
    return np.linalg.norm(x - pca.inverse_transform(pca.transform(x)), axis=1), pca.n_components_


@pytest.mark.parametrize("variance", [0.3, 0.7, 0.99])
def test_cop(digits, variance):
    scorer = get_scorer("cop", variance=variance).fit(digits["train"])
    for part in ("test", "ood"):
        expected, q = left_by_pca(unit(digits["train"]), unit(digits[part]), variance)
        np.testing.assert_allclose(scorer.score(digits[part]), expected, rtol=1e-6)
        assert scorer.params() == {"variance": variance, "dim_used": q}


def test_corp(digits):
    """With the same random features."""
    scorer = get_scorer("corp", gamma=0.7, features=200, variance=0.8).fit(digits["train"])
    sampler = RBFSampler(gamma=0.7, n_components=200).fit(unit(digits["train"]))
    arrays = scorer.state().arrays
    sampler.random_weights_ = np.sqrt(2 * 0.7) * np.float64(arrays["none.1.frequencies"].T)
    sampler.random_offset_ = np.float64(arrays["none.1.phases"])
    for part in ("test", "ood"):
        mapped = [sampler.transform(unit(digits[each])) for each in ("train", part)]
        expected, q = left_by_pca(*mapped, 0.8)
        np.testing.assert_allclose(scorer.score(digits[part]), expected, rtol=1e-6)
    assert scorer.params()["dim_used"] == q


def test_kpca_nystrom(digits):
    """The authors' landmarks: the rows whose logsumexp is smallest."""
    train = digits["train"]
    scorer = get_scorer("kpca-nystrom", gamma=0.7, landmarks=60, variance=0.9).fit(train)
    unsure = np.argsort(logsumexp(np.float64(train.logits), axis=1))[:60]
    sampler = Nystroem(gamma=0.7, n_components=60, random_state=0).fit(unit(train)[unsure])
    for part in ("test", "ood"):
        mapped = [sampler.transform(unit(digits[each])) for each in ("train", part)]
        expected, q = left_by_pca(*mapped, 0.9)
        np.testing.assert_allclose(scorer.score(digits[part]), expected, rtol=1e-5)
    assert scorer.params()["dim_used"] == q


def test_with_all_rows_as_landmarks_it_is_kernel_pca_itself(digits):
    """Of the ID training rows, which lie in what the landmarks span: the length that a projection leaves, centred."""
    train = digits["train"].take(slice(None, None, 3))
    scorer = get_scorer("kpca-nystrom", gamma=0.7, landmarks=len(train), variance=0.9).fit(train)
    exact = KernelPCA(scorer.params()["dim_used"], kernel="rbf", gamma=0.7).fit(unit(train))
    kernel = np.exp(-0.7 * np.square(unit(train)[:, None] - unit(train)).sum(axis=2))
    lengths = np.diag(kernel) - 2 * kernel.mean(axis=1) + kernel.mean()
    left = lengths - np.square(exact.transform(unit(train))).sum(axis=1)
    np.testing.assert_allclose(np.square(np.float64(scorer.score(train))), left, atol=1e-6)


def test_products_of_many_random_features_are_the_gaussian_kernel(digits):
    rng, rows = np.random.default_rng(0), digits["test"].features[:40]
    mapped = fourier_features(rows, rng.normal(size=(20_000, 24)), rng.uniform(0, 2 * np.pi, 20_000), gamma=0.5)
    unit_rows = normalize(np.float64(rows))
    kernel = np.exp(-0.5 * np.square(unit_rows[:, None] - unit_rows).sum(axis=2))
    np.testing.assert_allclose(mapped @ mapped.T, kernel, atol=0.03)
