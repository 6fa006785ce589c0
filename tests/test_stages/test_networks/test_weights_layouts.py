"""Layouts: transformers' own forward passes from their files under timm's names, and a network under any prefix."""

from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer

from stages.config import BackboneConfig
from stages.errors import InputError
from stages.networks.weights.layouts import find_network
from stages.networks.weights.loading import build_model, load_model
from tests.test_stages.drawn import create


@pytest.fixture(scope="module")
def hf():
    """The library, which takes seconds to import: of the worker that runs this file, not of all that collect tests."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
TIMM = {"embed_dim": 48, "depth": 2, "num_heads": 3}
VISION = SMALL | {"patch_size": 16, "intermediate_size": 192}


def siglip(size: int) -> dict:
    return VISION | {"image_size": size, "hidden_act": "gelu"}  # as timm's


# transformers' (hf) model at an image size, the same network's name, and two sizes on its grid of patches.
NETWORKS = {
    "dinov2": (
        lambda hf, n: hf.Dinov2Model(hf.Dinov2Config(**SMALL, image_size=n)),
        "vit_small_patch14_dinov2",
        (56, 84),
    ),
    "dinov2 with classifier": (
        lambda hf, n: hf.Dinov2ForImageClassification(hf.Dinov2Config(**SMALL, image_size=n)),
        "vit_small_patch14_dinov2",
        (56, 84),
    ),
    "dinov2-giant": (
        lambda hf, n: hf.Dinov2Model(hf.Dinov2Config(**SMALL, image_size=n, use_swiglu_ffn=True)),
        "vit_giant_patch14_dinov2",
        (56, 84),
    ),
    "dinov2-with-registers": (
        lambda hf, n: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**SMALL, patch_size=14, image_size=n)),
        "vit_small_patch14_reg4_dinov2",
        (56, 84),
    ),
    "dinov3": (
        lambda hf, n: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**VISION, image_size=n, num_register_tokens=4)),
        "vit_small_patch16_dinov3_qkvb",
        (64, 96),
    ),
    "dinov3 plus": (
        lambda hf, n: hf.DINOv3ViTModel(
            hf.DINOv3ViTConfig(**VISION, image_size=n, num_register_tokens=4, use_gated_mlp=True, hidden_act="silu")
        ),
        "vit_small_plus_patch16_dinov3_qkvb",
        (64, 96),
    ),
    "vit": (
        lambda hf, n: hf.ViTModel(hf.ViTConfig(**VISION, image_size=n, layer_norm_eps=1e-6)),
        "vit_base_patch16_224",
        (64, 96),
    ),
    "vit with classifier": (
        lambda hf, n: hf.ViTForImageClassification(hf.ViTConfig(**VISION, image_size=n, layer_norm_eps=1e-6)),
        "vit_base_patch16_224",
        (64, 96),
    ),
    "siglip's vision tower": (
        lambda hf, n: hf.SiglipVisionModel(hf.SiglipVisionConfig(**siglip(n))),
        "vit_base_patch16_siglip_224",
        (64, 96),
    ),
    "siglip": (
        lambda hf, n: hf.SiglipModel(hf.SiglipConfig(text_config=SMALL | {"vocab_size": 32}, vision_config=siglip(n))),
        "vit_base_patch16_siglip_224",
        (64, 96),
    ),
}


def draw(model: nn.Module) -> nn.Module:
    """Every parameter away from 0 and 1, where a lost one would not show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.2, generator=generator)
            if "lambda" in name or ("norm" in name and name.endswith("weight")):
                parameter.uniform_(0.3, 1, generator=generator)
    return model.eval()


def save(model: nn.Module, path: Path, as_downloaded: bool) -> None:
    """As files on the hub are, or with the names that transformers 5 has in memory."""
    model.save_pretrained(path, save_original_format=as_downloaded)


def at_size(stored: Tensor, model: nn.Module, name: str) -> Tensor:
    """Position embeddings on the larger grid: as DINOv2's official code gives them, and as timm does elsewhere."""
    is_table = stored.ndim == 2  # SigLIP's, without class token
    grid = stored if is_table else stored[0, 1:]
    side = round(len(grid) ** 0.5)
    grid = grid.reshape(side, side, -1).permute(2, 0, 1)[None]
    new = side * 3 // 2
    if name == "vit_small_patch14_dinov2" or name == "vit_giant_patch14_dinov2":
        grid = F.interpolate(grid, scale_factor=(new + 0.1) / side, mode="bicubic")
    else:
        grid = F.interpolate(grid, size=(new, new), mode="bicubic", antialias=True)
    rows = grid[0].flatten(1).T
    return rows if is_table else torch.cat([stored[:, :1], rows[None]], 1)


@pytest.mark.parametrize("as_downloaded", [True, False], ids=["as downloaded", "as in memory"])
@pytest.mark.parametrize("network", NETWORKS)
def test_transformers_file_gives_their_own_features(hf, tmp_path, network, as_downloaded):
    build, name, sizes = NETWORKS[network]
    model = draw(build(hf, sizes[0]))
    save(model, tmp_path, as_downloaded)
    for size in sizes:
        config = BackboneConfig(name=name, weights=str(tmp_path / "model.safetensors"), image_size=size)
        ours = build_model(config, **TIMM)
        theirs = model if size == sizes[0] else build(hf, size).eval()
        if size != sizes[0]:
            state = model.state_dict()
            for key in state:
                if "position_embedding" in key and "text_model" not in key:
                    state[key] = at_size(state[key], ours, name)
            theirs.load_state_dict(state)
        for part in ("dinov2", "vit", "vision_model"):
            theirs = getattr(theirs, part, theirs)
        images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            wanted, given_ = theirs(images), ours.forward_features(images)
            torch.testing.assert_close(given_, wanted.last_hidden_state, rtol=0, atol=3e-5)
            cls = wanted.pooler_output if "siglip" in network else wanted.last_hidden_state[:, 0]
            torch.testing.assert_close(ours.forward_head(given_, pre_logits=True), cls, rtol=0, atol=3e-5)


def test_pytorch_model_bin_is_read(hf, tmp_path):
    """As Hugging Face's older repositories have it."""
    model = draw(hf.Dinov2Model(hf.Dinov2Config(**SMALL, image_size=56)))
    save(model, tmp_path, True)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    configs = [
        BackboneConfig(name="vit_small_patch14_dinov2", weights=str(tmp_path / file), image_size=56)
        for file in ("model.safetensors", "pytorch_model.bin")
    ]
    one, two = (build_model(config, **TIMM).state_dict() for config in configs)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_is_not_of_the_features_is_said(hf, tmp_path):
    save(draw(hf.ViTForImageClassification(hf.ViTConfig(**VISION, image_size=64))), tmp_path, True)
    config = BackboneConfig(name="vit_base_patch16_224", weights=str(tmp_path / "model.safetensors"), image_size=64)
    assert load_model(config, **TIMM).notes == (
        "backbone.weights: not used of model.safetensors: classifier.bias, classifier.weight",
    )


def test_torchvisions_file_gives_its_own_features(tmp_path):
    model = draw(VisionTransformer(32, 16, num_layers=2, num_heads=3, hidden_dim=48, mlp_dim=192, num_classes=5))
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    config = BackboneConfig(name="vit_base_patch16_224", weights=str(tmp_path / "vit.pth"), image_size=32)
    model.heads = nn.Identity()
    images = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        ours, theirs = build_model(config, **TIMM).eval()(images), model.eval()(images)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (lambda hf: hf.CLIPVisionModel(hf.CLIPVisionConfig(**VISION, image_size=64)), "transformers' layout of CLIP"),
        (lambda hf: hf.BeitModel(hf.BeitConfig(**VISION, image_size=64)), "transformers' layout of BEiT"),
        (
            lambda hf: hf.ResNetModel(hf.ResNetConfig(hidden_sizes=[8, 8], depths=[1, 1])),
            "a layout of transformers that is not",
        ),
    ],
    ids=["CLIP", "BEiT", "ResNet"],
)
def test_other_layouts_of_transformers_are_named(hf, tmp_path, model, what):
    save(model(hf), tmp_path, True)
    assert f"it has {what}" in refusal(tmp_path / "model.safetensors")


# ------------------------------------------------------------------------------------------------------- any prefix


@cache
def tiny() -> dict[str, Tensor]:
    return {name: x.contiguous() for name, x in create("test_vit").state_dict().items()}


def refusal(path: Path, name: str = "test_vit") -> str:
    with pytest.raises(InputError) as refused:
        build_model(BackboneConfig(name=name, weights=str(path), image_size=160))
    message = str(refused.value)
    assert message.startswith(f"backbone.weights: {path.name} does not hold weights of {name}: ")
    assert "\n" not in message
    assert len(message) <= 300
    return message


PARTS = st.sampled_from(["state_dict", "model", "module", "_orig_mod", "backbone", "teacher", "encoder", "net.0", "x"])


@settings(max_examples=30)
@given(st.lists(PARTS, max_size=4))
def test_network_is_found_below_any_prefix(parts):
    """Lightning's ``state_dict`` and ``model.``, DDP's ``module.``, torch.compile's ``_orig_mod.``, DINO's others."""
    prefix = "".join(f"{part}." for part in parts)
    others = {"optimizer.state.0.exp_avg": torch.ones(2), "epoch": torch.tensor(3)}
    found = find_network({f"{prefix}{name}": x for name, x in tiny().items()} | others, tiny())
    assert found.prefix == prefix
    assert found.state.keys() - others.keys() == tiny().keys()


def test_checkpoint_of_lightning_is_loaded(tmp_path):
    state = {f"model.backbone.{name}": x for name, x in tiny().items()} | {"model.neck.weight": torch.ones(2, 2)}
    torch.save({"state_dict": state, "optimizer_states": [{"state": {0: torch.ones(3)}}]}, tmp_path / "last.ckpt")
    loaded = load_model(BackboneConfig(name="test_vit", weights=str(tmp_path / "last.ckpt"), image_size=160))
    assert all(torch.equal(x, tiny()[name]) for name, x in loaded.model.state_dict().items())
    assert loaded.notes == (
        "backbone.weights: not used of last.ckpt: state_dict.model.neck.weight, optimizer_states.0.state.0",
    )


def test_of_timms_checkpoint_the_moving_average_is_taken(tmp_path):
    average = {name: x + 1 for name, x in tiny().items()}
    torch.save({"state_dict": tiny(), "state_dict_ema": average, "epoch": 3}, tmp_path / "last.pth.tar")
    loaded = load_model(BackboneConfig(name="test_vit", weights=str(tmp_path / "last.pth.tar"), image_size=160))
    assert torch.equal(loaded.model.norm.bias, average["norm.bias"])
    assert "of last.pth.tar the moving average is taken, state_dict_ema" in loaded.notes[-1]


def test_dinos_teacher_and_student_are_told_apart_by_the_user_alone(tmp_path):
    networks = {
        who: {f"module.backbone.{name}": x for name, x in tiny().items()} | {"module.head.mlp.0.bias": torch.ones(2)}
        for who in ("student", "teacher")
    }
    torch.save(networks, tmp_path / "checkpoint.pth")
    assert "it holds several networks, 'student.module.backbone' and 'teacher.module.backbone': give" in refusal(
        tmp_path / "checkpoint.pth"
    )
    torch.save({"teacher": networks["teacher"]}, tmp_path / "teacher.pth")
    build_model(BackboneConfig(name="test_vit", weights=str(tmp_path / "teacher.pth"), image_size=160))


def test_blocks_in_the_chunks_of_dinov2s_training_are_read():
    """Their second number counts through: blocks.0.0, blocks.0.1, blocks.1.2, …"""
    state = {name.replace("blocks.", f"blocks.{int(name.split('.')[1]) // 2}.") if "blocks." in name else name: x
             for name, x in tiny().items()}  # fmt: skip
    found = find_network({f"teacher.backbone.{name}": x for name, x in state.items()}, tiny())
    assert found.state.keys() == tiny().keys()


def test_clip_of_openai_is_read_under_a_name_of_clip(tmp_path):
    """timm's own conversion does it; the text tower is another network."""
    name, small = "vit_base_patch32_clip_224", {"embed_dim": 64, "depth": 1, "num_heads": 1}
    state = create(name, **small).state_dict()
    clip = {
        "visual.class_embedding": state["cls_token"][0, 0],
        "visual.positional_embedding": state["pos_embed"][0],
        "visual.conv1.weight": state["patch_embed.proj.weight"],
        "visual.proj": torch.ones(64, 8),
        "transformer.resblocks.0.ln_1.bias": torch.ones(4),
        "text_projection": torch.ones(4, 8),
        "logit_scale": torch.tensor(4.6),
    }
    names = {"norm_pre": "ln_pre", "norm": "ln_post", "norm1": "ln_1", "norm2": "ln_2", "fc1": "c_fc", "fc2": "c_proj"}
    for key, x in state.items():
        if key.startswith(("blocks.", "norm")):
            parts = [names.get(part, part) for part in key.split(".")]
            new = ".".join(parts).replace("blocks.", "transformer.resblocks.").replace("attn.proj.", "attn.out_proj.")
            clip[f"visual.{new.replace('attn.qkv.', 'attn.in_proj_')}"] = x
    save_file({key: x.contiguous() for key, x in clip.items()}, tmp_path / "clip.safetensors")
    config = BackboneConfig(name=name, weights=str(tmp_path / "clip.safetensors"), image_size=224)
    loaded = build_model(config, **small).state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in state)
    assert "it is of CLIP (visual.…): give a name of CLIP" in refusal(tmp_path / "clip.safetensors")


def test_file_without_a_network_shows_what_its_tensors_are_called(tmp_path):
    save_file({f"tokens.{i}": torch.ones(2) for i in range(9)}, tmp_path / "text.safetensors")
    assert "its tensors are tokens.0, tokens.1, tokens.2 and 6 more" in refusal(tmp_path / "text.safetensors")


def test_adapter_of_lora_is_named(tmp_path):
    save_file({"base_model.model.blocks.0.attn.qkv.lora_A.weight": torch.ones(2, 2)}, tmp_path / "adapter.safetensors")
    assert "it is a LoRA adapter: merge it" in refusal(tmp_path / "adapter.safetensors")
