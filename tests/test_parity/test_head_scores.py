"""NAC, CADRef and CORE against pytorch-ood and their formulas, row by row, in float64, on real data."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from pytorch_ood.detector import NACUE

from stages.scorers import get_scorer
from tests.test_parity.digits import digits_rows


@pytest.fixture(scope="module")
def digits():
    return digits_rows()


@pytest.fixture
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def network(head):
    """Features in, logits out; its first layer, which changes nothing, is where neurons are."""
    same, last = torch.nn.Linear(head.weight.shape[1], head.weight.shape[1]), torch.nn.Linear(*head.weight.shape[::-1])
    same.weight.data, same.bias.data = torch.eye(len(same.bias)), torch.zeros(len(same.bias))
    last.weight.data, last.bias.data = (torch.from_numpy(np.float64(part)) for part in (head.weight, head.bias))
    return torch.nn.Sequential(same, last)


@pytest.mark.parametrize("params", [{}, {"bins": 40, "alpha": 30.0, "full": 200}])
def test_nac_is_that_of_pytorch_ood(digits, double, params):
    train = digits["train"]
    scorer = get_scorer("nac", "pytorch-ood", **params).fit(train)
    settings, model = scorer.settings(), network(train.head)
    theirs = NACUE(model, [model[0]], m_bins=settings["bins"], alpha=settings["alpha"], o_star=settings["full"])
    theirs.fit([torch.from_numpy(np.float64(train.features))])
    for part in ("test", "ood"):
        expected = theirs.predict(torch.from_numpy(np.float64(digits[part].features))).numpy()
        scores = scorer.score(digits[part])
        # Their logits are of float64 features and ours of float32 ones: a state at an edge may be in another bin.
        np.testing.assert_allclose(scores, expected, atol=2 / 24)
        assert np.mean(np.abs(scores - expected) < 1e-6) > 0.97
    assert len(np.unique(scores)) > 50


def authors_edges(bins):
    """Of github.com/BierOne/ood_coverage: widest at the ends, 0.5 in the middle."""
    steps = [1 + (1000**0.5 - 1) * i / (bins // 2 - 1) for i in range(bins // 2)]
    left = [np.log(step) / np.log(1000) for step in steps[:-1]]
    return [*left, 0.5, *(1 - edge for edge in left[:0:-1]), 1.01]


@pytest.mark.parametrize("params", [{}, {"bins": 10, "alpha": 3.0, "full": 9}])
def test_nac_is_that_of_its_authors(digits, params):
    scorer = get_scorer("nac", **params).fit(digits["train"])
    settings = scorer.settings()

    def states(x):
        z = torch.from_numpy(np.float64(x.features)).requires_grad_()
        logits = z @ torch.from_numpy(np.float64(x.head.weight)).T + torch.from_numpy(np.float64(x.head.bias))
        to_uniform = -torch.log_softmax(logits, dim=1).mean(dim=1)
        (gradient,) = torch.autograd.grad(to_uniform.sum(), z)
        return torch.sigmoid(settings["alpha"] * z * gradient).detach().numpy()

    edges = authors_edges(settings["bins"])
    known = states(digits["train"])
    for part in ("test", "ood"):
        found = states(digits[part])
        covered = np.zeros_like(found)
        for low, high in pairwise(edges):
            hits = ((low <= known) & (known < high)).sum(axis=0)
            covered += np.where((low <= found) & (found < high), np.minimum(hits / settings["full"], 1), 0)
        scores = scorer.score(digits[part])
        np.testing.assert_allclose(scores, -covered.mean(axis=1), atol=2 / 24)
        assert np.mean(np.abs(scores + covered.mean(axis=1)) < 1e-6) > 0.97


def energy(logits):
    return np.log(np.exp(np.float64(logits)).sum(axis=-1))


def test_cadref(digits):
    train = digits["train"]
    predicted = train.logits.argmax(axis=1)
    means = [np.float64(train.features)[predicted == c].mean(axis=0) for c in range(7)]
    usual = energy(train.logits).mean()
    scorer = get_scorer("cadref").fit(train)
    for part in ("test", "ood"):
        expected = []
        for z, logits in zip(np.float64(digits[part].features), digits[part].logits, strict=True):
            c = logits.argmax()
            toward = [(z[d] - means[c][d]) * np.sign(train.head.weight[c, d]) for d in range(24)]
            length = np.abs(z).sum()
            positive, negative = (sum(max(sign * each, 0) for each in toward) / length for sign in (1, -1))
            expected.append(positive / energy(logits) + negative / usual)
        np.testing.assert_allclose(scorer.score(digits[part]), expected, rtol=1e-6)
    assert scorer.params() == {}
    assert scorer.remarks() == []


@pytest.mark.parametrize("rows", ["select", "train"])
def test_core(digits, rows):
    train, held_out = digits["train"], digits["test"].take(slice(None, None, 2))
    weight = np.float64(train.head.weight)
    unseen = np.eye(24) - np.linalg.pinv(weight, rcond=1e-5) @ weight
    residual_means = [(np.float64(train.features)[train.labels == c] @ unseen).mean(axis=0) for c in range(7)]

    def parts(x):
        residuals = np.float64(x.features) @ unseen
        cosines = [
            max(r @ mean / np.linalg.norm(r) / np.linalg.norm(mean) for mean in residual_means) for r in residuals
        ]
        return -energy(x.logits), -np.array(cosines)

    scorer = get_scorer("core", rows=rows).fit(train, held_out)
    usual = parts(held_out if rows == "select" else train)
    for part in ("test", "ood"):
        expected = sum((each - of.mean()) / of.std() for each, of in zip(parts(digits[part]), usual, strict=True))
        np.testing.assert_allclose(scorer.score(digits[part]), expected, rtol=1e-5, atol=1e-5)
    assert scorer.params()["rank_used"] == 6  # a softmax head of seven classes, whose weights add up to 0
