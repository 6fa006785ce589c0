"""Every tensor of a file is used, or is known to change nothing, or the file is refused; as is one that lacks any."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stages.config import BackboneConfig
from stages.errors import InputError
from stages.networks.weights.loading import LoadedModel, load_model
from tests.test_stages.drawn import DINOV2, DINOV2_REGISTERS, as_dinov3s_files, create

SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 3}
DINOV3 = "vit_small_patch16_dinov3"


@cache
def state_of(name: str, **kwargs) -> dict[str, Tensor]:
    return create(name, **kwargs).state_dict()


def load(state: dict, folder, name: str = "test_vit", size: int = 160, **kwargs) -> LoadedModel:
    torch.save(state, folder / "model.pth")
    return load_model(BackboneConfig(name=name, weights=str(folder / "model.pth"), image_size=size), **kwargs)


def refused(state: dict, folder, name: str = "test_vit", size: int = 160, **kwargs) -> str:
    with pytest.raises(InputError) as refusal:
        load(state, folder, name, size, **kwargs)
    message = str(refusal.value)
    assert message.startswith(f"backbone.weights: model.pth does not hold weights of {name}: ")
    assert "\n" not in message
    assert len(message) <= 300
    return message.split(": ", 2)[2]


def same(model: torch.nn.Module, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(x, state[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize(
    "name",
    [
        "head.weight",
        "head_dist.weight",
        "fc.weight",
        "classifier.weight",
        "pooler.dense.weight",
        "mask_token",
        "decoder_embed.weight",
        "decoder_blocks.0.norm1.weight",
        "decoder_pos_embed",
        "dino_head.mlp.0.weight",
        "ibot_head.last_layer.weight_g",
        "projection_head.0.weight",
        "prototypes.weight",
        "blocks.0.attn.relative_position_index",
        "blocks.0.attn.extra_bias",  # all zero, see below
    ],
)
def test_what_changes_no_feature_is_left_out_and_said(tmp_path, name):
    extra = torch.zeros(3) if name.endswith("extra_bias") else torch.ones(3)
    loaded = load(state_of("test_vit") | {name: extra}, tmp_path)
    assert same(loaded.model, state_of("test_vit"))
    assert loaded.notes == (f"backbone.weights: not used of model.pth: {name}",)


@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.attn.q_bias",  # BEiT, EVA
        "blocks.0.attn.v_bias",
        "blocks.0.ls1.gamma",
        "blocks.6.norm1.weight",  # a deeper network
        "norm_pre.weight",
        "fc_norm.weight",
        "reg_token",
        "blocks.0.attn.relative_position_bias_table",
        "blocks.0.attn.q_norm.weight",
    ],
)
def test_what_would_change_features_is_refused(tmp_path, name):
    assert refused(state_of("test_vit") | {name: torch.ones(3)}, tmp_path) == f"unexpected tensors {name}"


PARTS = st.sampled_from(["blocks", "0", "attn", "mlp", "norm", "gamma", "adapter", "weight", "embed", "extra", "bias"])


@settings(max_examples=8)
@given(parts=st.lists(PARTS, min_size=1, max_size=4), value=st.floats(0.5, 2))
def test_unknown_tensors_that_are_not_zero_are_refused(tmp_path_factory, parts, value):
    name = ".".join([*parts, "unknown"])
    state = state_of("test_vit") | {name: torch.full((2,), value)}
    assert refused(state, tmp_path_factory.getbasetemp()) == f"unexpected tensors {name}"


@settings(max_examples=6)
@given(st.data())
def test_file_that_lacks_any_tensor_is_refused(tmp_path_factory, data):
    missing = data.draw(st.lists(st.sampled_from(sorted(state_of("test_vit"))), min_size=1, max_size=5, unique=True))
    state = {name: x for name, x in state_of("test_vit").items() if name not in missing}
    assert refused(state, tmp_path_factory.getbasetemp()).startswith("missing tensors ")


@pytest.mark.parametrize("registers", ["reg_token", "register_tokens"])
def test_registers_under_a_name_without_them_name_the_one_that_has_them(tmp_path, registers):
    """Under timm's name of them and the official one."""
    state = dict(state_of(DINOV2_REGISTERS, img_size=56, **SMALL))
    state[registers] = state.pop("reg_token")
    said = refused(state, tmp_path, DINOV2, 56, **SMALL)
    assert said == f"unexpected tensors {registers}: {DINOV2_REGISTERS} has them"


# ------------------------------------------------------------------------------------------- DINOv3's biases of q, k, v


def official_dinov3(scale: float) -> dict[str, Tensor]:
    periods = 100 ** (torch.arange(4) / 4)  # of rotary embeddings: 16 numbers a head, 4 of them different
    return as_dinov3s_files(state_of(f"{DINOV3}_qkvb", **SMALL), scale) | {"rope_embed.periods": periods}


def test_biases_of_dinov3_are_used_where_the_name_has_them(tmp_path):
    model = load(official_dinov3(1.0), tmp_path, f"{DINOV3}_qkvb", 64, **SMALL).model
    assert (model.blocks[1].attn.q_bias == 1).all()
    assert (model.blocks[1].attn.v_bias == 2).all()


def test_biases_of_dinov3_that_are_not_zero_are_refused_under_a_name_without(tmp_path):
    said = refused(official_dinov3(1.0), tmp_path, DINOV3, 64, **SMALL)
    assert said == f"unexpected tensors blocks.0.attn.qkv.bias, blocks.1.attn.qkv.bias: {DINOV3}_qkvb has them"


def test_biases_of_dinov3_that_are_zero_change_nothing(tmp_path, capfd):
    loaded = load(official_dinov3(0.0), tmp_path, DINOV3, 64, **SMALL)
    assert "blocks.0.attn.qkv.bias" in loaded.notes[0]
    assert capfd.readouterr().out == ""  # timm prints a line for each block


def test_other_rotary_periods_than_the_network_computes_are_refused(tmp_path):
    state = official_dinov3(0.0) | {"rope_embed.periods": 200 ** (torch.arange(4) / 4)}
    assert refused(state, tmp_path, DINOV3, 64, **SMALL) == "unexpected tensors rope_embed.periods"
