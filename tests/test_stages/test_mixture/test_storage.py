"""A stored mixture comes back bit for bit; what is damaged, or none, is refused."""

import pytest
import torch
from torch import nn

from cache import file_sha256
from stages.errors import InputError
from stages.files.documents import read_document, write_document
from stages.mixture.storage import load_mixture, load_trained_heads, save_mixture
from tests.test_stages.small_mixture import (
    GROUPS,
    MeanEnd,
    encoded,
    kinds,
    lite0,
    mixture_of,
    small_mixture,
    small_tokens,
)

NAMES = {f"class {index}": group for index, group in enumerate(GROUPS)}


def saved(folder):
    mixture = small_mixture()
    mixture.router.standardise([small_tokens(20).tap_cls])
    save_mixture(folder, mixture, {"groups": NAMES, "seed": 3})
    return mixture


def test_saved_mixture_comes_back_bit_for_bit(tmp_path):
    mixture, tokens = saved(tmp_path), small_tokens(10)
    loaded = load_mixture(tmp_path, MeanEnd, 5, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mofe.json", "mofe.safetensors"]
    about = read_document(tmp_path / "mofe.json")
    assert about.pop("files") == {"mofe.safetensors": file_sha256(tmp_path / "mofe.safetensors")}
    assert about == {"groups": NAMES, "seed": 3}
    assert not loaded.training
    for ours, theirs in zip(vars(mixture(tokens)).values(), vars(loaded(tokens)).values(), strict=True):
        assert torch.equal(ours, theirs)


def test_saved_mixture_of_a_real_backbone_comes_back(tmp_path):
    backbone, tokens = lite0(), encoded(lite0)
    save_mixture(tmp_path, mixture_of(backbone), {"groups": NAMES})
    with torch.inference_mode():
        features = load_mixture(tmp_path, backbone.end, backbone.dim, backbone.tap_dim)(tokens).features
    assert (features - tokens.cls).abs().max() <= 1e-5


@pytest.mark.parametrize("router_input", ["tap_cls", "cls"])
@kinds
def test_the_stored_model_says_its_kind(tmp_path, kind, router_input):
    mixture, tokens = small_mixture(**kind, router_input=router_input), small_tokens(10)
    settings = {"expert": mixture.config.kind, "router_input": router_input, "experts": kind.get("copies", 3)}
    groups = {name: int(group) for name, group in zip(NAMES, mixture.group, strict=True)}
    save_mixture(tmp_path, mixture, {"groups": groups, "settings": settings})
    loaded = load_mixture(tmp_path, MeanEnd, 5, 3)
    assert (loaded.config.kind, loaded.config.router_input) == (mixture.config.kind, router_input)
    for ours, theirs in zip(vars(mixture(tokens)).values(), vars(loaded(tokens)).values(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "settings", [[], {"expert": "none"}, {"expert": ["end"]}, {"router_input": 3}, {"experts": 0}, {"experts": 10**9}]
)
def test_kinds_that_there_are_not_are_refused(tmp_path, settings):
    save_mixture(tmp_path, small_mixture(), {"groups": NAMES, "settings": settings})
    with pytest.raises(InputError, match=r"mofe\.json"):
        load_mixture(tmp_path, MeanEnd, 5, 3)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("mofe.safetensors", None),
        ("mofe.safetensors", lambda content: content[:-1]),
        ("mofe.safetensors", lambda content: content[:20]),
        ("mofe.safetensors", lambda content: b""),
        ("mofe.json", None),
        ("mofe.json", lambda content: content[:-5]),
        ("mofe.json", lambda content: b"[1, 2]"),
        ("mofe.json", lambda content: b"\xff\xfe"),
        ("mofe.json", lambda content: b"[" * 100_000),
        ("mofe.json", lambda content: b"{}"),
    ],
)
def test_damaged_files_are_refused(tmp_path, file, damage):
    saved(tmp_path)
    if damage is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(damage((tmp_path / file).read_bytes()))
    with pytest.raises(InputError, match=r"mofe\.json and mofe\.safetensors: run make train"):
        load_mixture(tmp_path, MeanEnd, 5, 3)


@pytest.mark.parametrize(
    "groups", [None, [0, 1], {}, {"a": "b"}, {"a": -1, "b": 0}, {"a": 0.5, "b": 1}, {"a": 10**12, "b": 0}]
)
def test_groups_that_are_none_are_refused(tmp_path, groups):
    save_mixture(tmp_path, small_mixture(), {"groups": groups})
    for load in (lambda: load_mixture(tmp_path, MeanEnd, 5, 3), lambda: load_trained_heads(tmp_path)):
        with pytest.raises(InputError, match=r"mofe\.json and mofe\.safetensors: run make train"):
            load()


def test_mixture_of_another_architecture_is_refused(tmp_path):
    saved(tmp_path)
    for arguments in ((lambda: nn.Linear(1, 1), 5, 3), (MeanEnd, 6, 3), (MeanEnd, 5, 4)):
        with pytest.raises(InputError, match="architecture: run make train"):
            load_mixture(tmp_path, *arguments)
    description = read_document(tmp_path / "mofe.json")
    description["groups"]["class 0"] = 0
    write_document(tmp_path / "mofe.json", description)
    with pytest.raises(InputError, match="architecture: run make train"):
        load_mixture(tmp_path, MeanEnd, 5, 3)
