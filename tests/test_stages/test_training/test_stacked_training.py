"""Trainings whose experts are stacked, as on a GPU: they learn what they learn one after another."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from stages.config import TrainConfig
from stages.mixture.config import MixtureConfig
from stages.mixture.model import build_mixture
from stages.networks.backbone import Backbone
from stages.networks.batch import filled
from stages.networks.weights.loading import build_model
from stages.train import start_mixture, train_mixture
from stages.training.checkpoint import Checkpoints
from stages.training.objectives import JointObjective, Mixed
from stages.training.recipes import resolve_settings
from tests.test_stages.small_vit import PLAN


def test_on_cached_features(data, backbone, tmp_path):
    rows, histories, weights = data.split.folds[0].train, [], []
    settings = resolve_settings(
        TrainConfig(preset="zero", experts=3, epochs=2, label_smoothing=0.1, expert="adapter"), data.n_classes
    )
    for stacked in (False, True):
        mixture = start_mixture(data, rows, (0, 2, 1, 2), settings, backbone.end, 0)
        mixture.stacked.forced = stacked
        trained = train_mixture(mixture, data, rows, settings, 0, Checkpoints(tmp_path / f"{stacked}.checkpoint"))
        histories.append([asdict(record) for record in trained.history])
        weights.append(trained.mixture.state_dict())
    for alone, ours in zip(*histories, strict=True):
        assert ours["load"] == alone["load"]
        assert ours["mixing"] == alone["mixing"]
        assert ours["loss"] == pytest.approx(alone["loss"], rel=1e-4)
        assert ours["select_loss"] == pytest.approx(alone["select_loss"], rel=1e-4)
    for name, alone in weights[0].items():
        # AdamW's first steps are the learning rate times a sign: where a gradient is rounding they differ by that.
        assert torch.allclose(weights[1][name], alone, atol=5 * settings.lr, rtol=1e-3), name


def test_from_images(vit):
    groups, labels = (0, 1, 0, 2, 2, 0, 1), torch.arange(24) % 7
    generator = torch.Generator().manual_seed(0)
    backbone = Backbone(build_model(vit), vit, 1, detach_end=True)
    mixture = build_mixture(MixtureConfig(backbone.dim, backbone.tap_dim, groups), backbone.end)
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    backbone.model.reset_classifier(7)
    backbone.model.requires_grad_(True)
    objective = JointObjective(backbone, mixture, replace(PLAN, label_smoothing=0.1), 0.1).train()
    drawn = objective.draw(labels.numpy(), np.random.default_rng(0))
    place = torch.arange(4, 20)  # of another process the others
    images = torch.rand(len(place), 3, 32, 32, generator=generator)
    mixed = Mixed(images, torch.nn.functional.one_hot(labels[place], 7).float(), labels[place], place)
    found = []
    for stacked, given in ((False, mixed), (True, mixed._replace(images=filled(images, [20])))):  # as a pass of a GPU
        objective.zero_grad()
        mixture.stacked.forced = stacked
        loss, right = objective.loss(given, drawn)
        loss.backward()
        found.append((loss.item(), int(right), [parameter.grad for parameter in objective.parameters()]))
    (loss, right, alone), (our_loss, our_right, ours) = found
    assert our_loss == pytest.approx(loss, rel=1e-5)
    assert our_right == right
    for one, other in zip(ours, alone, strict=True):
        assert torch.allclose(one, other, atol=1e-4 * float(other.abs().max()) + 1e-7)
