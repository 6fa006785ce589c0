"""Named arrays as safetensors: they come back as they were, arrive whole or not at all, and damage is no exception."""

import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.files.tensors import read_tensors, write_tensors
from tests.test_stages.test_files.arrays import TENSORS, same


def test_tensors_come_back_with_their_types(tmp_path):
    path = tmp_path / "new" / "folder" / "it.safetensors"
    write_tensors(path, TENSORS)
    assert same(read_tensors(path), TENSORS)


def test_slices_and_transposes_are_written_as_they_look(tmp_path):
    weight = np.arange(24, dtype=np.float32).reshape(4, 6)
    views = {"columns": weight[:, ::2], "transposed": weight.T, "fortran": np.asfortranarray(weight)}
    write_tensors(tmp_path / "it.safetensors", views)
    assert same(read_tensors(tmp_path / "it.safetensors"), views)


def test_same_tensors_same_bytes(tmp_path):
    write_tensors(tmp_path / "one.safetensors", TENSORS)
    write_tensors(tmp_path / "two.safetensors", dict(reversed(TENSORS.items())))
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


def test_every_truncation_of_tensors_is_seen(tmp_path):
    path = tmp_path / "it.safetensors"
    write_tensors(path, TENSORS)
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        assert read_tensors(path) is None
    path.write_bytes(content + b"\0")
    assert read_tensors(path) is None


@given(start=st.binary(max_size=40))
def test_arbitrary_bytes_are_no_tensors(start, tmp_path_factory):
    path = tmp_path_factory.mktemp("bytes") / "it.safetensors"
    path.write_bytes(start + b"\xff")
    assert read_tensors(path) is None


def test_hostile_header_is_refused(tmp_path):
    """A type that numpy lacks, data far beyond the file's end, a header larger than the file."""
    for header in (
        {"x": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}},
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
    ):
        encoded = json.dumps(header).encode()
        (tmp_path / "it.safetensors").write_bytes(len(encoded).to_bytes(8, "little") + encoded + bytes(4))
        assert read_tensors(tmp_path / "it.safetensors") is None
    (tmp_path / "it.safetensors").write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    assert read_tensors(tmp_path / "it.safetensors") is None


def test_types_that_a_package_adds_to_numpy_are_still_refused(tmp_path):
    """ONNX imports one that makes numpy know bfloat16: whether a file is damaged does not depend on who ran before."""
    pytest.importorskip("ml_dtypes")
    for name, stored in (("BF16", 2), ("F8_E4M3", 1), ("F8_E5M2", 1), ("F8_E8M0", 1)):
        encoded = json.dumps({"x": {"dtype": name, "shape": [2], "data_offsets": [0, 2 * stored]}}).encode()
        content = len(encoded).to_bytes(8, "little") + encoded + bytes(2 * stored)
        (tmp_path / "it.safetensors").write_bytes(content)
        assert read_tensors(tmp_path / "it.safetensors") is None, name


def test_no_file_and_a_folder_in_its_place(tmp_path):
    assert read_tensors(tmp_path / "it") is None
    (tmp_path / "it").mkdir()
    assert read_tensors(tmp_path / "it") is None


def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    """Killed before the last step, the rename, a file is as it was."""
    write_tensors(tmp_path / "it.safetensors", TENSORS)

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        write_tensors(tmp_path / "it.safetensors", {"weight": np.zeros(1000)})
    assert same(read_tensors(tmp_path / "it.safetensors"), TENSORS)
