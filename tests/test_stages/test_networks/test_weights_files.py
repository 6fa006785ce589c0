"""Files of weights: what is in them by name, and what is no file of weights."""

import argparse
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from stages.config import BackboneConfig
from stages.errors import InputError
from stages.networks.weights.files import read_weights
from stages.networks.weights.loading import build_model


def test_nested_tensors_have_dotted_names(tmp_path):
    one, two = torch.ones(2), torch.zeros(1)
    content = {"model": {"fc.bias": one}, "optimizer": {"state": {0: {"step": two}}}, "epoch": 3}
    torch.save(content | {"args": argparse.Namespace(lr=0.1)}, tmp_path / "checkpoint.pth.tar")
    found = read_weights(tmp_path / "checkpoint.pth.tar")
    assert {name: x.tolist() for name, x in found.items()} == {"model.fc.bias": [1, 1], "optimizer.state.0.step": [0]}


def test_what_a_file_is_is_seen_in_its_bytes(tmp_path):
    save_file({"fc.bias": torch.ones(2)}, tmp_path / "weights.bin")
    assert read_weights(tmp_path / "weights.bin")["fc.bias"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("tf_model.h5", b"\x89HDF\r\n\x1a\n" + bytes(100), "weights of TensorFlow (HDF5)"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        ("model.pth", b"<!DOCTYPE html><html>404", "a web page"),
        ("model.pth", b"no weights", "neither of safetensors nor of torch.save"),
        ("empty.pth", b"", "neither of safetensors nor of torch.save"),
    ],
)
def test_another_programs_file_is_named(tmp_path, name, content, what):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name} .* test_vit: .*{re.escape(what)}") as refusal:
        build_model(BackboneConfig(name="test_vit", weights=str(tmp_path / name), image_size=160))
    assert len(str(refusal.value)) < 300


def test_weights_of_jax_are_named(tmp_path):
    np.savez(tmp_path / "B_16.npz", **{"Transformer/encoder_norm/bias": np.zeros(4)})
    with pytest.raises(InputError, match=r"JAX; .* \.safetensors or \.pth"):
        build_model(BackboneConfig(name="test_vit", weights=str(tmp_path / "B_16.npz"), image_size=160))


def test_file_without_tensors_is_said_so(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "model.pth")
    with pytest.raises(InputError, match="it holds no tensors"):
        read_weights(tmp_path / "model.pth")
