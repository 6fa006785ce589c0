"""Experts and router trained together with the blocks before them, from images."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from stages.backbone import Backbone, build_model, load_backbone
from stages.dataset import read_tokens
from stages.errors import InputError
from stages.experts import MixtureOfFeatureExperts, load_mixture
from stages.extract import extract_set
from stages.finetune import finetune_identity, finetune_is_fresh, read_finetuned_head
from stages.objective import JointObjective, Mixed, MixturePlan
from tests.test_parity.test_distributed import together
from tests.test_stages.small_vit import SMALL, cached, small_vit, tune

PLAN = MixturePlan(
    groups=(0, 1, 0, 1),
    router_input="tap_cls",
    lr=3e-4,
    head_lr=1e-2,
    router_lr=1e-2,
    label_smoothing=0.0,
    other_weight=0.1,
)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return small_vit(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def data(vit, few_images, tmp_path_factory):
    return cached(vit, few_images, tmp_path_factory.mktemp("caches"))


@pytest.fixture(scope="module")
def joint(vit, data, few_images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("joint")
    assert tune(vit, data, few_images, folder, mixture=PLAN, joint=2, epochs=3, mixup=0.8)
    return folder


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def objective_of(vit, data):
    backbone = Backbone(build_model(vit), vit, 1, detach_end=True)
    mixture = MixtureOfFeatureExperts(backbone.end, backbone.dim, backbone.tap_dim, PLAN.groups)
    backbone.model.reset_classifier(4)
    backbone.model.requires_grad_(True)
    return JointObjective(backbone, mixture, PLAN, 0.0).train()


def test_it_learns_and_is_judged_by_the_mixture(joint):
    first, *_, last = metrics(joint)
    assert last["loss"] < first["loss"]
    assert last["select_loss"] < first["select_loss"]
    assert 0 <= last["select_accuracy"] <= last["router_accuracy"] <= 1


def test_blocks_before_the_experts_are_trained_and_none_before_them(vit, joint):
    before, after = build_model(vit).state_dict(), build_model(tuned(vit, joint)).state_dict()
    moves = ("blocks.3.", "blocks.4.", "blocks.5.", "norm.")  # block 5 is the backbone's own end
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) is not name.startswith(moves), name


def tuned(vit, folder):
    return vit.model_copy(update={"weights": str(folder / "backbone.safetensors")})


def test_what_is_cached_of_its_backbone_is_what_its_experts_were_trained_on(vit, joint, few_images, data, tmp_path):
    """From the cache the stored experts reach the held-out loss and accuracy that training from images wrote down."""
    backbone = load_backbone(tuned(vit, joint))
    cache = extract_set("few", few_images, backbone.feature_spec("float32", "full"), tmp_path, lambda: backbone)
    assert json.loads((joint / "finetune.json").read_text())["weights_sha"] == cache.spec.weights_sha
    assert cache.spec.weights_sha != data.train.spec.weights_sha
    mixture = load_mixture(joint, backbone.end, backbone.dim, backbone.tap_dim)
    rows = data.split.folds[0].select
    tokens, truth = read_tokens(cache, rows), torch.from_numpy(data.train_labels[rows]).long()
    with torch.inference_mode():
        routed, forced = mixture(tokens), mixture(tokens, mixture.group[truth])
        loss = torch.nn.functional.cross_entropy(forced.logits, truth)
        loss += torch.nn.functional.cross_entropy(mixture.class_logits(tokens), truth)
    best = metrics(joint)[json.loads((joint / "finetune.json").read_text())["best_epoch"]]
    assert float(loss) == pytest.approx(best["select_loss"], abs=1e-4)
    assert float((routed.logits.argmax(1) == truth).float().mean()) == pytest.approx(best["select_accuracy"], abs=1e-6)
    weight, bias = read_finetuned_head(joint)
    assert weight.shape == (4, backbone.dim)
    assert bias.shape == (4,)


def test_the_backbones_own_head_teaches_nothing_before_the_tap(vit, data):
    objective = objective_of(vit, data)
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tokens = objective._backbone.tokens(images)
    objective.model.get_classifier()(tokens.cls).sum().backward()
    grads = {name: parameter.grad is not None for name, parameter in objective.model.named_parameters()}
    assert {name for name, has in grads.items() if has} == {
        name for name in grads if name.startswith(("blocks.5.", "norm.", "head."))
    }


@pytest.mark.parametrize("checkpointing", [False, True])
def test_experts_and_router_teach_the_blocks_before_them(vit, data, checkpointing):
    objective = objective_of(vit, data)
    objective.model.set_grad_checkpointing(checkpointing)
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for expert in objective.mixture.experts:
        torch.nn.init.normal_(expert.head.weight)
    labels = np.arange(4)
    targets, truth = torch.eye(4), torch.arange(4)
    drawn = objective.draw(labels, np.random.default_rng(0))
    objective.loss(Mixed(images, targets, truth, torch.arange(4)), drawn)[0].backward()
    assert all(p.grad is not None for p in objective.model.parameters())
    assert all(p.grad is not None for name, p in objective.mixture.named_parameters())


def test_other_rows_are_as_many_as_an_expert_has_and_none_of_its_own(vit, data):
    objective = objective_of(vit, data)
    labels = np.array([0, 0, 1, 2, 3, 1, 1])  # groups 0, 0, 1, 0, 1, 1, 1
    chosen = objective.draw(labels, np.random.default_rng(0))
    own = np.array(PLAN.groups)[labels] == np.arange(2)[:, None]
    assert not (chosen & own).any()
    assert chosen.sum(1).tolist() == [3, 3]


def test_two_processes_train_the_mixture_of_one(vit, data, few_images, tmp_path):
    settings = {"mixture": PLAN, "joint": 1, "mixup": 0.8, "accumulate": 2, "drop_path": 0.0, "head_epochs": 1}

    def work(ranks):
        return [tune(vit, data, few_images, tmp_path / "two", **settings)]

    assert together(work) == [[True]] * 2
    assert tune(vit, data, few_images, tmp_path / "one", **settings)
    for ours, alone in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        for name, value in alone.items():
            assert ours[name] == pytest.approx(value, abs=1e-4), name


def test_what_it_is_made_of(data, joint):
    config = SMALL.model_copy(update={"joint": 2, "epochs": 3, "mixup": 0.8})
    assert finetune_is_fresh(joint, finetune_identity(data, config, 0, PLAN))
    assert not finetune_is_fresh(joint, finetune_identity(data, config, 0, replace(PLAN, router_lr=1e-3)))


def test_what_it_cannot_be_made_of(vit, data, few_images, tmp_path):
    with pytest.raises(InputError, match=r"finetune\.joint: 6 given, test_vit has 5 blocks or stages before the exp"):
        tune(vit, data, few_images, tmp_path, mixture=PLAN, joint=6)
    pooled = cached(vit, few_images, tmp_path / "pooled", patches="none")
    with pytest.raises(InputError, match=r'experts read all patches: extract with patches = "full", not "none"'):
        tune(vit, pooled, few_images, tmp_path, mixture=PLAN, joint=1)
