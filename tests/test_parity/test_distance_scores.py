"""Distance and subspace scores against pytorch-ood, and what it lacks against scikit-learn, on real data.

pytorch-ood computes in float32, all but its mixture, so 1e-4 is the tolerance and 1e-5 the mixture's. The features are
principal components of digits, all of which vary: where the covariance has no inverse the libraries do not agree on
what stands for it (`test_a_singular_covariance_is_another_matter`).
"""

import numpy as np
import pytest
import torch
from pytorch_ood import detector
from scipy.stats import multivariate_normal
from sklearn.covariance import EmpiricalCovariance
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.preprocessing import StandardScaler, normalize
from torch.nn.functional import normalize as torch_normalize

from stages.heads.affine import LinearHead
from stages.scorers import get_scorer
from stages.scorers.inputs import ScoreInputs
from tests.test_parity.digits import digits_rows

TOLERANCE = {"gmm": 1e-5}
# Differences of two large numbers, which cross 0: the tolerance is a share of the largest score, not of each.
DIFFERENCES = ("relative-mahalanobis", "relative-mahalanobis-pp", "vim")


@pytest.fixture(scope="module")
def digits():
    return digits_rows()


@pytest.fixture(scope="module")
def cached(caches):
    """EfficientNet's features of digits 0 to 3 as stage one cached them, 7 and 8 as OOD: fewer rows than features."""
    read = {name: cache.read("cls").astype(np.float32) for name, cache in caches.items()}
    labels = np.asarray(caches["train"].labels, dtype=np.int64)
    model = LogisticRegression(max_iter=200, C=0.01).fit(read["train"], labels)
    head = LinearHead(model.coef_.astype(np.float32), model.intercept_.astype(np.float32))
    train = ScoreInputs(read["train"], head.logits(read["train"]), labels, head=head)
    return {"train": train} | {part: ScoreInputs(read[part], head.logits(read[part])) for part in ("test", "near")}


def linear(head):
    layer = torch.nn.Linear(head.weight.shape[1], head.weight.shape[0])
    layer.weight.data, layer.bias.data = torch.from_numpy(head.weight), torch.from_numpy(head.bias)
    return layer.requires_grad_(False)


def pytorch_ood(name, train):
    """A detector of pytorch-ood, and what its scores have to be multiplied by to be ours."""
    head = linear(train.head)
    return {
        "mahalanobis": (
            detector.Mahalanobis(None),
            2 * len(train),
        ),  # ½ of the scatter, which is n times the covariance
        "mahalanobis-pp": (detector.Mahalanobis(None), 2 * len(train)),
        "relative-mahalanobis": (detector.RMD(None), len(train)),
        "relative-mahalanobis-pp": (detector.RMD(None), len(train)),
        "gmm": (detector.GMM(None), 1),
        "vim": (detector.ViM(None, d=10, w=head.weight, b=head.bias), 1),
        "she": (detector.SHE(None, head), 1),
        "fdbd": (detector.fDBD(None, head), 1),
        "nci": (detector.NCI(None, head), 1),
        "pnml": (detector.PNML(None, head), 1),
        "nnguide": (detector.NNGuide(None, head), 1),
    }[name]


THEIRS = ("mahalanobis", "mahalanobis-pp", "relative-mahalanobis", "relative-mahalanobis-pp", "gmm", "vim", "she",
          "fdbd", "nci", "pnml", "nnguide")  # fmt: skip


@pytest.mark.parametrize("name", THEIRS)
def test_pytorch_ood(digits, name):
    compare_with_pytorch_ood(name, digits)


@pytest.mark.parametrize("name", ["gmm", "vim", "she", "fdbd", "nci", "nnguide"])
def test_pytorch_ood_on_cached_features(cached, name):
    """Those scores that do not invert a singular matrix."""
    compare_with_pytorch_ood(name, cached)


def compare_with_pytorch_ood(name, rows):
    train = rows["train"]
    theirs, factor = pytorch_ood(name, train)
    params = {"dim": 10} if name == "vim" else {}
    scorer = get_scorer(name, "pytorch-ood", **params).fit(train)

    def tensor(x):
        features = torch.from_numpy(x.features)
        return torch_normalize(features) if name.endswith("-pp") else features

    theirs.fit_features(tensor(train), torch.from_numpy(train.labels))
    for part in rows.keys() - {"train"}:
        expected = factor * theirs.predict_features(tensor(rows[part])).numpy().astype(np.float64)
        expected = np.log(expected) if name == "pnml" else expected
        assert_same(name, scorer.score(rows[part]), expected)


def assert_same(name, scores, expected):
    """Equal values, and equal ranks wherever the reference's own precision can tell two rows apart."""
    size = np.abs(expected).max()
    if name in DIFFERENCES:
        np.testing.assert_allclose(scores, expected, atol=1e-5 * size)
    else:
        np.testing.assert_allclose(scores, expected, rtol=TOLERANCE.get(name, 1e-4))
    order = np.argsort(expected)
    apart = np.diff(expected[order]) > 2 * np.abs(scores - expected).max() + 1e-6 * size
    assert apart.sum() > 0.9 * len(scores)
    assert (np.diff(scores[order])[apart] > 0).all()


@pytest.mark.parametrize("size", [1, 1000])
def test_a_singular_covariance_is_another_matter(size):
    """Not compared above: a minimal example.

    Directions without variance are left out here and by scikit-learn (so OpenOOD). pytorch-ood inverts the scatter
    with 1e-6 on its diagonal, and what leaves the ID rows' plane by 1 scores half a million.
    """
    rng = np.random.default_rng(0)
    train = np.c_[size * rng.normal(size=(50, 2)), np.zeros(50)].astype(np.float32)
    off = np.float32([[0, 0, 1]])
    plain, ridge = (get_scorer("mahalanobis", profile).fit(ScoreInputs(train, labels=np.zeros(50, int))).score(
        ScoreInputs(off)) for profile in ("paper", "pytorch-ood"))  # fmt: skip
    sklearns = EmpiricalCovariance().fit(train.astype(np.float64)).mahalanobis(off)
    assert plain == pytest.approx(sklearns, rel=1e-5)
    theirs = detector.Mahalanobis(None).fit_features(torch.from_numpy(train), torch.zeros(50, dtype=int))
    expected = theirs.predict_features(torch.from_numpy(off)).item()
    assert expected == pytest.approx(0.5e6, rel=1e-3)
    assert ridge == pytest.approx(2 * 50 * expected, rel=1e-3)


# ---------------------------------------------------------------------------------- what pytorch-ood has not, by parts


def openood_mahalanobis(train, x, relative=False):
    """As OpenOOD's postprocessors do it: the precision of scikit-learn, of float32 rows."""
    means = np.stack([train.features[train.labels == c].mean(axis=0) for c in range(7)])
    precision = EmpiricalCovariance().fit(train.features - means[train.labels]).precision_
    apart = x.features[:, None] - means
    nearest = np.einsum("ncd,de,nce->nc", apart, precision, apart).min(axis=1)
    if not relative:
        return nearest
    whole = EmpiricalCovariance().fit(train.features)
    return nearest - whole.mahalanobis(x.features)


def residual(train, x):
    """OpenOOD's and ViM's: numpy's eig, and a null space."""
    u = -np.linalg.pinv(train.head.weight.astype(np.float64), rcond=1e-5) @ train.head.bias
    values, vectors = np.linalg.eig(EmpiricalCovariance(assume_centered=True).fit(train.features - u).covariance_)
    return np.linalg.norm((x.features - u) @ vectors.T[np.argsort(-values)[10:]].T, axis=1)


def neco(train, x):
    """The code of NECO's authors: scikit-learn's scaler and components."""
    scaler = StandardScaler().fit(train.features)
    components = PCA(24, svd_solver="full").fit(scaler.transform(train.features))
    rows = scaler.transform(x.features)
    share = np.linalg.norm(components.transform(rows)[:, :10], axis=1) / np.linalg.norm(rows, axis=1)
    return -share * x.logits.max(axis=1)


def relation(train, x):
    probability = [torch.softmax(torch.from_numpy(each.logits), 1).numpy() for each in (x, train)]
    relations = np.maximum(cosine_similarity(x.features, train.features), 0) * (probability[0] @ probability[1].T)
    return -np.where(relations > 0.03, relations, 0).sum(axis=1)


def cosine(train, x):
    means = np.stack([train.features[train.labels == c].mean(axis=0) for c in range(7)])
    return -cosine_similarity(x.features, means).max(axis=1)


def shared_mixture(train, x):
    means = np.stack([train.features[train.labels == c].mean(axis=0) for c in range(7)])
    covariance = EmpiricalCovariance().fit((train.features - means[train.labels]).astype(np.float64)).covariance_
    shares = np.bincount(train.labels) / len(train)
    parts = [multivariate_normal(mean, covariance).logpdf(x.features) for mean in means]
    return -np.logaddexp.reduce(np.log(shares)[:, None] + parts, axis=0)


def ssd(train, x):
    return EmpiricalCovariance().fit(normalize(train.features.astype(np.float64))).mahalanobis(normalize(x.features))


OTHERS = {
    "mahalanobis": ("openood", {}, openood_mahalanobis),
    "relative-mahalanobis": ("openood", {}, lambda train, x: openood_mahalanobis(train, x, relative=True)),
    "residual": ("openood", {"dim": 10}, residual),
    "neco": ("paper", {"dim": 10}, neco),
    "relation": ("openood", {}, relation),
    "cosine": ("paper", {}, cosine),
    "gmm": ("paper", {"covariance": "shared"}, shared_mixture),
    "ssd": ("paper", {}, ssd),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_implementations(digits, name):
    profile, params, reference = OTHERS[name]
    scorer = get_scorer(name, profile, **params).fit(digits["train"])
    for part in ("test", "ood"):
        assert_same(name, scorer.score(digits[part]), np.float64(reference(digits["train"], digits[part])))
