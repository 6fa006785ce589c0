"""A mixture that starts as the linear probe: it says the same before it learns, and is never worse on held-out ID."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp

from stages.config import TrainConfig
from stages.context import Context
from stages.heads.affine import LinearHead, Standardisation
from stages.id_data.tokens import read_tokens
from stages.mixture.config import MixtureConfig
from stages.mixture.model import build_mixture
from stages.mixture.storage import load_mixture
from stages.networks.tokens import Tokens
from stages.train import train_mofe, train_probe
from stages.training.identity import mixture_identity, mixture_is_fresh
from stages.training.recipes import resolve_settings
from stages.training.started import start_heads, start_router
from tests.test_stages.stops import StopsIn

GROUPS = (0, 0, 1, 2, 1, 2, 2)
STARTED = TrainConfig(experts=2, epochs=2, expert="adapter", batch_size=32)


@pytest.fixture
def rows():
    """Seven classes in twenty features, one of which hardly varies."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 7, 400)
    features = rng.normal(size=(400, 20)) + 2 * rng.normal(size=(7, 20))[labels] + 5
    features[:, 3] = 1 + 1e-6 * features[:, 3]
    return features.astype(np.float32)


@pytest.fixture
def probe(rows):
    rng = np.random.default_rng(1)
    own = Standardisation(rows.mean(0), np.full(1, rows.std(), np.float32))
    return LinearHead(rng.normal(size=(7, 20)).astype(np.float32), rng.normal(size=7).astype(np.float32), own)


def started(probe, rows, groups=GROUPS):
    mixture = build_mixture(MixtureConfig(20, 0, groups, "frozen", "cls"), lambda: None)
    mixture.router.standardise([torch.from_numpy(rows)])
    start_heads(mixture, probe, rows)
    start_router(mixture.router, probe)
    return mixture


@torch.inference_mode()
def outputs(mixture, rows):
    none = torch.zeros(len(rows), 0)
    return mixture(Tokens(torch.from_numpy(rows), none, none, none))


def test_router_and_classes_say_what_the_probe_says(rows, probe):
    out, logits = outputs(started(probe, rows), rows), probe.logits(rows)
    np.testing.assert_allclose(out.class_probability.log(), log_softmax(logits, axis=1), atol=1e-4)
    group = np.asarray(GROUPS)
    gate = np.exp(log_softmax(logits, axis=1)) @ np.eye(3)[group]
    np.testing.assert_array_equal(out.expert, gate.argmax(1))
    inside = group == out.expert.numpy()[:, None]
    np.testing.assert_allclose(out.logits.numpy()[inside], logits[inside], atol=1e-4)


def test_other_is_the_closest_affine_map_to_all_classes_outside(rows, probe):
    """Solved anew, with numpy's least squares."""
    out, logits = outputs(started(probe, rows), rows), probe.logits(rows).astype(np.float64)
    design = np.column_stack([logits, np.ones(len(rows))])
    for expert in range(3):
        wanted = logsumexp(logits[:, np.asarray(GROUPS) != expert], axis=1)
        closest = design @ np.linalg.lstsq(design, wanted, rcond=None)[0]
        mine = out.expert.numpy() == expert
        np.testing.assert_allclose(out.other.numpy()[mine], closest[mine], atol=0.02 * wanted.std())


def test_one_expert_is_the_probe(rows, probe):
    out = outputs(started(probe, rows, (0,) * 7), rows)
    np.testing.assert_allclose(out.logits, probe.logits(rows), atol=1e-4)
    assert torch.isneginf(out.other).all()


def test_a_class_without_rows_starts_with_no_probability(rows, probe):
    probe = replace(probe, bias=np.where(np.arange(7) == 2, -np.inf, probe.bias), weight=probe.weight * 0.1)
    out = outputs(started(probe, rows), rows)
    assert torch.isfinite(out.class_probability).all()
    assert out.class_probability[:, 2].max() < 1e-6


# ------------------------------------------------------------------------------------------------- a training


@pytest.fixture(scope="module")
def trained(data, backbone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("started")
    train_probe(data, folder / "probe")
    assert train_mofe(data, STARTED, backbone.end, seed=0, folder=folder / "mofe", probe=folder / "probe")
    return folder


def history(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_start_is_judged_and_the_best_of_all_is_kept(trained, data):
    lines, about = history(trained / "mofe"), json.loads((trained / "mofe/mofe.json").read_text())
    assert [line["epoch"] for line in lines] == [-1, 0, 1]
    assert lines[0]["loss"] is None
    assert lines[0]["select_accuracy"] > 0.8
    losses = [line["select_loss"] for line in lines]
    assert about["best_epoch"] == lines[int(np.argmin(losses))]["epoch"]
    # α of the first epoch is made of what the start got right.
    spread = np.ptp(lines[0]["accuracy"])
    assert (np.ptp(lines[1]["alpha"]) > 0) == (spread > 0)


def test_where_nothing_gets_better_it_stays_the_probe(data, backbone, tmp_path):
    """A rate that ruins it: the epoch that is kept is none, and the router says what the probe says."""
    ruins = {"lr": 1.0, "head_lr": 1.0, "router_lr": 1.0, "ema": 0.0, "patience": 1}
    config = TrainConfig(**STARTED.model_dump(exclude_unset=True) | ruins)
    assert train_mofe(data, config, backbone.end, seed=0, folder=tmp_path)
    lines, about = history(tmp_path), json.loads((tmp_path / "mofe.json").read_text())
    assert about["best_epoch"] == -1
    assert [line["epoch"] for line in lines] in ([-1, 0], [-1, 0, 1])
    mixture = load_mixture(tmp_path, backbone.end, backbone.dim, backbone.tap_dim)
    select = data.split.folds[0].select
    tokens = read_tokens(data.train, select, reads=("cls", "tap_cls"))
    expected = train_probe(data, tmp_path / "probe").final.logits(tokens.cls.numpy())
    with torch.inference_mode():
        np.testing.assert_allclose(mixture.class_logits(tokens).log_softmax(1), log_softmax(expected, 1), atol=1e-3)


def test_interrupted_after_the_start_it_goes_on_to_the_same_bits(trained, data, backbone, tmp_path):
    for epoch in (0, 1):
        with pytest.raises(KeyboardInterrupt):
            train_mofe(data, STARTED, backbone.end, 0, tmp_path / "mofe", Context(StopsIn(epoch)), trained / "probe")
    assert train_mofe(data, STARTED, backbone.end, 0, tmp_path / "mofe", probe=trained / "probe")
    for name in ("mofe.safetensors", "metrics.jsonl", "heads.safetensors", "mofe.json"):
        assert (tmp_path / "mofe" / name).read_bytes() == (trained / "mofe" / name).read_bytes()


def test_it_is_made_of_the_probes_bytes(trained, data, tmp_path):
    settings = resolve_settings(STARTED, data.n_classes, data.train.spec)
    identity = mixture_identity(data, settings, 0, trained / "probe")
    assert mixture_is_fresh(trained / "mofe", identity, data)
    about = json.loads((trained / "probe/probe.json").read_text())
    about["files"]["probe.safetensors"] = "0" * 64
    (tmp_path / "probe.json").write_text(json.dumps(about))
    assert mixture_identity(data, settings, 0, tmp_path) != identity


def test_a_router_at_the_tap_starts_from_a_probe_of_what_it_reads(data, backbone, tmp_path):
    config = TrainConfig(**STARTED.model_dump(exclude_unset=True) | {"router_input": "tap_cls", "epochs": 1})
    assert train_mofe(data, config, backbone.end, seed=0, folder=tmp_path)
    assert history(tmp_path)[0]["router_accuracy"] > 0.8
