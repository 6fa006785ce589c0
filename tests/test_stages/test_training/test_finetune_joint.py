"""Experts and router trained together with the blocks before them, from images."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stages.context import Context
from stages.errors import InputError
from stages.extract import extract_set
from stages.files.documents import read_document, write_document
from stages.heads.choose import load_heads
from stages.id_data.tokens import read_tokens
from stages.mixture.config import MixtureConfig
from stages.mixture.model import build_mixture
from stages.mixture.refined import refined_path
from stages.mixture.storage import load_mixture
from stages.networks.backbone import Backbone, build_architecture, load_backbone
from stages.networks.weights.loading import build_model
from stages.train import finish_joint
from stages.training import finish as finish_module
from stages.training.identity import (
    finetune_identity,
    finetune_is_fresh,
    joint_identity,
    mixture_is_fresh,
    read_finetuned_head,
)
from stages.training.objectives import JointObjective, Mixed
from tests.test_parity.test_distributed import together
from tests.test_stages.small_vit import PLAN, SMALL, cached, metrics, tune

GROUPS = (0, 1, 0, 1)


@pytest.fixture(scope="module")
def joint(vit, vit_data, few_images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("joint")
    assert tune(vit, vit_data, few_images, folder, mixture=PLAN, joint=2, epochs=3, mixup=0.8)
    return folder


def objective_of(vit):
    backbone = Backbone(build_model(vit), vit, 1, detach_end=True)
    mixture = build_mixture(MixtureConfig(backbone.dim, backbone.tap_dim, GROUPS), backbone.end)
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


def test_what_is_cached_of_its_backbone_is_what_its_experts_were_trained_on(vit, joint, few_images, vit_data, tmp_path):
    """From the cache the stored experts reach the held-out loss and accuracy that training from images wrote down."""
    backbone = load_backbone(tuned(vit, joint))
    cache = extract_set("few", few_images, backbone.feature_spec("float32", "full"), tmp_path, lambda: backbone)
    assert json.loads((joint / "finetune.json").read_text())["weights_sha"] == cache.spec.weights_sha
    assert cache.spec.weights_sha != vit_data.train.spec.weights_sha
    mixture = load_mixture(joint, backbone.end, backbone.dim, backbone.tap_dim)
    rows = vit_data.split.folds[0].select
    tokens, truth = read_tokens(cache, rows), torch.from_numpy(vit_data.train_labels[rows]).long()
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


def test_the_backbones_own_head_teaches_nothing_before_the_tap(vit, vit_data):
    objective = objective_of(vit)
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tokens = objective._backbone.tokens(images)
    objective.model.get_classifier()(tokens.cls).sum().backward()
    grads = {name: parameter.grad is not None for name, parameter in objective.model.named_parameters()}
    assert {name for name, has in grads.items() if has} == {
        name for name in grads if name.startswith(("blocks.5.", "norm.", "head."))
    }


@pytest.mark.parametrize("checkpointing", [False, True])
def test_experts_and_router_teach_the_blocks_before_them(vit, vit_data, checkpointing):
    objective = objective_of(vit)
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


def test_other_rows_are_as_many_as_an_expert_has_and_none_of_its_own(vit, vit_data):
    objective = objective_of(vit)
    labels = np.array([0, 0, 1, 2, 3, 1, 1])  # groups 0, 0, 1, 0, 1, 1, 1
    chosen = objective.draw(labels, np.random.default_rng(0)).chosen
    own = np.array(GROUPS)[labels] == np.arange(2)[:, None]
    assert not (chosen & own).any()
    assert chosen.sum(1).tolist() == [3, 3]


def test_two_processes_train_the_mixture_of_one(vit, vit_data, few_images, tmp_path):
    settings = {"mixture": PLAN, "joint": 1, "mixup": 0.8, "accumulate": 2, "drop_path": 0.0, "head_epochs": 1}

    def work(ranks):
        return [tune(vit, vit_data, few_images, tmp_path / "two", context=Context(ranks=ranks), **settings)]

    assert together(work) == [[True]] * 2
    assert tune(vit, vit_data, few_images, tmp_path / "one", **settings)
    for ours, alone in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        for name, value in alone.items():
            assert ours[name] == pytest.approx(value, abs=1e-4), name


@pytest.fixture(scope="module")
def tuned_data(vit, joint, few_images, tmp_path_factory):
    return cached(tuned(vit, joint), few_images, tmp_path_factory.mktemp("tuned"))


def test_finished_it_is_a_variant_like_those_trained_on_cached_features(vit, joint, tuned_data, tmp_path):
    end = build_architecture(vit).end
    assert finish_joint(tuned_data, joint, end, tmp_path)
    assert mixture_is_fresh(tmp_path, joint_identity(tuned_data, joint), tuned_data)
    assert not finish_joint(tuned_data, joint, end, tmp_path)
    assert load_file(tmp_path / "mofe.safetensors").keys() == load_file(joint / "mofe.safetensors").keys()
    for name, tensor in load_file(joint / "mofe.safetensors").items():
        assert torch.equal(load_file(tmp_path / "mofe.safetensors")[name], tensor), name
    about, said = (json.loads((folder / "mofe.json").read_text()) for folder in (tmp_path, joint))
    assert (about["groups"], about["settings"], about["seed"]) == (said["groups"], said["settings"], 0)
    assert about["settings"]["joint"] == 2
    assert about["features"] == tuned_data.train.spec.fingerprint
    assert metrics(tmp_path) == [{"run": "final", **record} for record in metrics(joint)]
    rows = tuned_data.split.folds[0].train
    mixture = load_mixture(joint, end, tuned_data.train.spec.cls_dim, tuned_data.train.spec.tap_dim)
    with torch.inference_mode():
        own = mixture.group[torch.from_numpy(tuned_data.train_labels[rows]).long()]
        features = mixture(read_tokens(tuned_data.train, rows), own).features
    bank = load_file(refined_path(tmp_path, "final", "id-train"))["features"]
    torch.testing.assert_close(bank[rows], features)
    assert load_heads(tmp_path, "heads", about["heads"]).keys() == {"refit", "refit-group-0", "refit-group-1"}


def test_of_another_fine_tune_it_is_not_fresh(vit, joint, tuned_data, tmp_path):
    source, folder = tmp_path / "source", tmp_path / "finished"
    shutil.copytree(joint, source)
    assert finish_joint(tuned_data, source, build_architecture(vit).end, folder)
    for name in ("finetune.json", "mofe.json"):
        write_document(source / name, read_document(source / name) | {"identity": "another"})
        if name == "finetune.json":  # the experts are not those that came with this backbone
            with pytest.raises(InputError, match="no backbone with experts"):
                finish_joint(tuned_data, source, build_architecture(vit).end, folder)
    assert not mixture_is_fresh(folder, joint_identity(tuned_data, source), tuned_data)
    assert finish_joint(tuned_data, source, build_architecture(vit).end, folder)


def test_killed_while_it_is_finished_it_is_not_fresh_and_goes_on(vit, joint, tuned_data, tmp_path, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    end = build_architecture(vit).end
    assert finish_joint(tuned_data, joint, end, tmp_path)
    whole = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    (tmp_path / "heads.safetensors").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(finish_module, "save_heads", killed)
        with pytest.raises(KeyboardInterrupt):
            finish_joint(tuned_data, joint, end, tmp_path)
    assert not mixture_is_fresh(tmp_path, joint_identity(tuned_data, joint), tuned_data)
    assert finish_joint(tuned_data, joint, end, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == whole


def test_a_later_fine_tune_without_experts_leaves_none(vit, vit_data, few_images, joint, tmp_path):
    shutil.copytree(joint, tmp_path / "tuned")
    assert tune(vit, vit_data, few_images, tmp_path / "tuned", epochs=1)
    with pytest.raises(InputError, match="no backbone with experts"):
        joint_identity(vit_data, tmp_path / "tuned")


def test_what_it_is_made_of(vit_data, joint, tmp_path):
    config = SMALL.model_copy(update={"joint": 2, "epochs": 3, "mixup": 0.8})
    assert finetune_is_fresh(joint, finetune_identity(vit_data, config, 0, PLAN))
    grouping = {str(name): number % 2 for number, name in enumerate(vit_data.class_names)}
    (tmp_path / "groups.json").write_text(json.dumps(grouping))
    by_file = replace(PLAN, grouping=str(tmp_path / "groups.json"))
    before = finetune_identity(vit_data, config, 0, by_file)
    (tmp_path / "groups.json").write_text(json.dumps(grouping | {vit_data.class_names[0]: 1}))
    others = [replace(PLAN, router_lr=1e-3), replace(PLAN, experts=1), by_file]
    identities = [before, *(finetune_identity(vit_data, config, 0, plan) for plan in others)]
    assert len(set(identities)) == 4
    assert not any(finetune_is_fresh(joint, identity) for identity in identities)


def test_what_it_cannot_be_made_of(vit, vit_data, few_images, tmp_path):
    with pytest.raises(InputError, match=r"finetune\.joint: 6 .* test_vit .* 5 blocks"):
        tune(vit, vit_data, few_images, tmp_path, mixture=PLAN, joint=6)
    pooled = cached(vit, few_images, tmp_path / "pooled", patches="none")
    with pytest.raises(InputError, match='patches = "full", not "none"'):
        tune(vit, pooled, few_images, tmp_path, mixture=PLAN, joint=1)
