"""Heads whose rows torch sums on a device, here the CPU: those of this process, to rounding."""

import numpy as np
import pytest
import torch

from stages.context import Context
from stages.heads import on_device
from stages.heads.choose import HeadRows, choose_head, fit_head
from stages.heads.on_device import OnDevice
from stages.heads.places import summing_of
from stages.heads.summing import HERE
from tests.test_stages.test_heads.test_handed import rows

ALL = 1 << 30


def on_cpu(worth: int = 0, kept_bytes: int = ALL) -> OnDevice:
    return OnDevice("cpu", worth, kept_bytes)


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("kept_bytes", [0, 20_000, ALL])
def test_the_same_head_is_chosen(classes, kept_bytes, monkeypatch):
    """Whatever stays on the device: nothing, the first chunks, or all, which are turned then."""
    monkeypatch.setattr(on_device, "_CHUNK_VALUES", 1000)
    given = HeadRows(*rows(1500, classes=classes), *rows(500, classes=classes))
    ours = choose_head(given, classes, summing=on_cpu(kept_bytes=kept_bytes))
    exact = choose_head(given, classes)
    assert ours.strength == exact.strength
    assert ours.judged == pytest.approx(exact.judged, abs=1e-4)
    assert ours.head.converged
    logits = [chosen.head.logits(given.select_features) for chosen in (ours, exact)]
    assert logits[0] == pytest.approx(logits[1], abs=1e-3)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_rows_of_any_precision(dtype):
    features, labels = rows(400)
    ours, exact = (fit_head(features.astype(dtype), labels, 3, 0.1, summing=each) for each in (on_cpu(), HERE))
    assert ours.weight == pytest.approx(exact.weight, abs=1e-5)
    assert ours.bias == pytest.approx(exact.bias, abs=1e-5)


def test_fewer_rows_than_values():
    features, labels = rows(30, dim=50)
    ours, exact = (fit_head(features, labels, 3, 0.1, summing=each) for each in (on_cpu(), HERE))
    assert ours.weight == pytest.approx(exact.weight, abs=1e-5)


def test_likelihoods_are_those_of_this_process(monkeypatch):
    """Of classes without a row, and of sure rows, too."""
    monkeypatch.setattr(on_device, "_CHUNK_VALUES", 100)
    features, labels = rows(200)
    for head in (fit_head(features, labels, 5, 1e4), fit_head(features, labels, 5, 1.0).on_raw_features()):
        theirs = HERE.log_likelihood(head, features * 100, labels)
        assert on_cpu().log_likelihood(head, features * 100, labels) == pytest.approx(theirs, rel=1e-5, abs=1e-5)
        unseen = np.full(200, 4, np.int32)
        assert (on_cpu().log_likelihood(head, features, unseen) == -np.inf).all()


def test_few_rows_stay_with_this_process():
    features, labels = rows(400)
    ours, exact = (fit_head(features, labels, 3, 0.1, summing=each) for each in (on_cpu(worth=10**6), HERE))
    assert np.array_equal(ours.weight, exact.weight)
    few = on_cpu(worth=10**6).log_likelihood(exact, features, labels)
    assert np.array_equal(few, HERE.log_likelihood(exact, features, labels))


def test_a_context_says_where(tmp_path):
    assert summing_of(Context(device="cpu"), tmp_path) is HERE
    assert isinstance(summing_of(Context(device="cuda"), tmp_path), OnDevice)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_fits_the_same_head_twice():
    given = HeadRows(*rows(1500), *rows(500))
    ours, again = (choose_head(given, 3, summing=OnDevice("cuda", worth=0)) for _ in range(2))
    assert ours.strength == choose_head(given, 3).strength
    assert np.array_equal(ours.head.weight, again.head.weight)
