"""Settings of both trainings: presets under what is given, and what documents and identities have of them."""

import json

import pytest
from pydantic import ValidationError

from stages.config import FinetuneConfig, TrainConfig
from stages.errors import InputError
from stages.training.recipes import (
    FINETUNE_PRESETS,
    TRAIN_PRESETS,
    FinetuneSettings,
    recorded_settings,
    resolve_recipe,
    resolve_settings,
)
from tests.test_cache.toy import make_spec

MIXTURE = (
    '{"experts": 2, "grouping": "balanced", "mixup": "dynamic", "epochs": 8, "expert": "end", '
    '"router_input": "tap_cls", "patience": null, "batch_size": 64, "lr": 1e-05, "head_lr": 0.01, "router_lr": 0.01, '
    '"weight_decay": 0.05, "label_smoothing": 0.0, "other_weight": 0.1, "warmup_epochs": 1.0, "alpha_min": 0.1, '
    '"alpha_max": 0.8, "alpha_power": 1.0, "gradient_clip": 1.0, "ema": 0.99, "precision": "auto"}'
)
BACKBONE = (
    '{"epochs": 10, "batch_size": 32, "accumulate": 1, "lr": 0.0003, "layer_decay": 0.75, "weight_decay": 0.05, '
    '"head_epochs": 0, "head_lr": 0.001, "warmup_epochs": 1, "label_smoothing": 0.1, "rand_augment": "", '
    '"random_erasing": 0.0, "crop_scale": 0.5, "hflip": 0.5, "beta": "static", "mixup": 0.0, "cutmix": 0.0, '
    '"alpha_min": 0.1, "alpha_max": 0.8, "alpha_power": 1.0, "drop_path": 0.0, "gradient_clip": 1.0, "ema": 0.0, '
    '"patience": null, "freeze": 0, "joint": 0, "checkpointing": false, "precision": "auto", "compile": false}'
)


@pytest.mark.parametrize(
    ("settings", "written"),
    [(resolve_settings(TrainConfig(preset="zero"), 4), MIXTURE), (resolve_recipe(FinetuneConfig(), 1), BACKBONE)],
    ids=["mixture", "backbone"],  # the former as all was before heads started as the probe: still fresh
)
def test_what_documents_have_of_settings(settings, written):
    """To the byte: identities are made of it, so a changed default, or a setting more, is another model."""
    assert json.dumps(recorded_settings(settings)) == written


@pytest.mark.parametrize("config", [TrainConfig, FinetuneConfig])
def test_what_is_left_to_the_preset_is_null_where_the_experiment_is_recorded(config):
    said = config(lr=1, weight_decay=0.05).as_given()
    assert (said["lr"], said["weight_decay"], said["batch_size"], said["patience"]) == (1.0, 0.05, None, None)
    assert (said["precision"], said["tensorboard"]) == ("auto", False)
    again = config(**said)
    assert (again, again.as_given()) == (config(lr=1), said)


@pytest.mark.parametrize(
    ("config", "presets"), [(TrainConfig, TRAIN_PRESETS), (FinetuneConfig, FINETUNE_PRESETS)], ids=["train", "finetune"]
)
def test_presets_change_what_is_recorded_as_theirs(config, presets):
    """Else a record would give a default where the preset has another value."""
    for preset in presets.values():
        assert {config().as_given()[key] for key in preset} <= {None}


# ----------------------------------------------------------------------------------------------------------- a mixture


def test_a_mixture_has_the_values_of_its_preset():
    default = resolve_settings(TrainConfig(), n_classes=100)
    assert (default.experts, default.lr, default.alpha_min, default.alpha_max) == (4, 1e-5, 0.1, 0.8)
    assert (default.start, default.router_input, default.head_lr, default.epochs) == ("probe", "cls", 1e-4, 4)
    assert (recorded_settings(default)["start"], recorded_settings(default)["rate_steps"]) == ("probe", 200)
    paper = resolve_settings(TrainConfig(preset="paper", head_lr=1e-2), n_classes=1000)
    assert (paper.start, paper.router_input, paper.rate_steps) == ("zero", "tap_cls", 0)
    assert (paper.experts, paper.lr, paper.head_lr, paper.label_smoothing) == (7, 3.5e-5, 1e-2, 0.1)
    assert paper.alpha_min < paper.alpha_max
    assert (default.ema, paper.ema, default.expert, default.patience) == (0.99, 0.0, "end", None)


@pytest.mark.parametrize("given", [-1.0, float("nan"), 1e39])
def test_the_pull_to_the_start_is_a_strength(given):
    with pytest.raises(ValidationError, match="l2_sp"):
        TrainConfig(l2_sp=given)
    with pytest.raises(ValidationError, match='expert = "frozen" has none'):
        TrainConfig(l2_sp=1.0, expert="frozen")


def test_a_default_that_is_given_is_above_the_preset():
    assert resolve_settings(TrainConfig(preset="paper", epochs=8), 4).epochs == 8
    assert resolve_settings(TrainConfig(preset="paper"), 4).epochs == 20


def test_what_is_left_open_is_as_the_features_allow():
    bare = make_spec(origin="drawn", expert_blocks=0, tap_dim=0, n_registers=0, patches="none", grid=(0, 0))
    settings = resolve_settings(TrainConfig(), 4, bare)
    assert (settings.expert, settings.router_input) == ("adapter", "cls")
    for given, key in (({"expert": "end"}, "expert"), ({"router_input": "tap_cls"}, "router_input")):
        with pytest.raises(InputError, match=rf"^train\.{key}: "):
            resolve_settings(TrainConfig(**given), 4, bare)


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.5), (0.9, None)])
def test_equal_alphas_are_not_dynamic(low, high):
    with pytest.raises(ValidationError, match=r'alpha_min: 0\.\d .* alpha_max = 0\.\d: .*mixup = "static"'):
        TrainConfig(alpha_min=low, alpha_max=high)
    with pytest.raises(ValidationError, match=r'alpha_min: 0\.\d .* alpha_max = 0\.\d: .*beta = "static"'):
        FinetuneConfig(beta="dynamic", alpha_min=low, alpha_max=high)
    static = resolve_settings(TrainConfig(mixup="static", alpha_min=low, alpha_max=high), 4)
    assert static.alpha_max == static.alpha_min == low


# ---------------------------------------------------------------------------------------------------------- a backbone


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head_epochs": 10}, r"^finetune\.head_epochs: 10 .* epochs = 10"),
        ({"accumulate": 5, "batch_size": 4}, r"^finetune\.accumulate: 5 .* 4 images"),
        ({"freeze": 1, "joint": 1}, r"^finetune\.freeze: joint "),
    ],
)
def test_settings_that_contradict_each_other(settings, message):
    with pytest.raises(InputError, match=message):
        resolve_recipe(FinetuneConfig(**settings), 100)


def test_auto_goes_by_how_many_images_there_are():
    small, paper = resolve_recipe(FinetuneConfig(), 49_999), resolve_recipe(FinetuneConfig(), 50_000)
    assert (small.mixup, small.rand_augment, small.layer_decay) == (0.0, "", 0.75)
    assert (paper.mixup, paper.cutmix, paper.warmup_epochs) == (0.8, 1.0, 10)
    assert resolve_recipe(FinetuneConfig(preset="paper"), 10) == paper
    assert resolve_recipe(FinetuneConfig(preset="small"), 10**6) == small == FinetuneSettings()
    assert resolve_recipe(FinetuneConfig(preset="paper", mixup=0.0), 10).mixup == 0.0


def test_the_papers_recipe():
    paper = resolve_recipe(FinetuneConfig(preset="paper"), 10)
    assert (paper.epochs, paper.warmup_epochs, paper.layer_decay, paper.weight_decay) == (100, 10, 0.75, 0.05)
    assert (paper.rand_augment, paper.random_erasing) == ("rand-m9-mstd0.5-inc1", 0.25)
    assert (paper.mixup, paper.cutmix, paper.label_smoothing, paper.beta) == (0.8, 1.0, 0.1, "static")


def test_dynamic_turns_mixup_on_where_nothing_mixes():
    assert not resolve_recipe(FinetuneConfig(), 10).mixes
    assert resolve_recipe(FinetuneConfig(beta="dynamic"), 10).mixup > 0
    both = resolve_recipe(FinetuneConfig(beta="dynamic", cutmix=1.0), 10)
    assert (both.mixup, both.cutmix) == (0.0, 1.0)


def test_where_it_works_is_no_part_of_what_it_makes():
    elsewhere = {"workers": 3, "seeds": [1], "variants": ["default"], "tensorboard": True, "preset": "small"}
    moved, here = (resolve_recipe(FinetuneConfig(**settings), 10) for settings in (elsewhere, {}))
    assert recorded_settings(moved) == recorded_settings(here)
