"""Text, JSON and documents: they come back as they were, arrive whole or not at all, and damage is no exception."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache import CacheError
from stages.files.documents import read_document, read_json, write_document, write_json, write_text


@given(
    value=st.dictionaries(
        st.text(),
        st.recursive(
            st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
            max_leaves=8,
        ),
        max_size=4,
    )
)
def test_json_comes_back(value, tmp_path_factory):
    path = tmp_path_factory.mktemp("json") / "it.json"
    write_json(path, value)
    assert read_json(path) == value


def test_json_is_made_to_be_read(tmp_path):
    write_json(tmp_path / "new" / "folder" / "it.json", {"class": "été 犬"})
    assert (tmp_path / "new" / "folder" / "it.json").read_text(encoding="utf-8") == '{\n  "class": "été 犬"\n}\n'


def test_no_file_takes_the_place_of_a_pipe(tmp_path):
    """Or of a device: whoever may write to /dev could lose /dev/null."""
    os.mkfifo(tmp_path / "it.json")
    with pytest.raises(CacheError, match="cannot be written: not a regular file"):
        write_text(tmp_path / "it.json", "{}")
    assert (tmp_path / "it.json").is_fifo()
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b'"text"', b"null", b"\xff\xfe\x00", b"[" * 100_000])
def test_what_is_no_json_object_does_not_count(tmp_path, content):
    (tmp_path / "it.json").write_bytes(content)
    assert read_json(tmp_path / "it.json") is None


def test_no_file_and_a_folder_in_its_place(tmp_path):
    assert read_json(tmp_path / "it.json") is None
    (tmp_path / "it.json").mkdir()
    assert read_json(tmp_path / "it.json") is None


def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    """Killed before the last step, the rename, a file is as it was."""
    write_json(tmp_path / "it.json", {"epoch": 1})

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        write_json(tmp_path / "it.json", {"epoch": 2})
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "new.txt", "text")
    assert read_json(tmp_path / "it.json") == {"epoch": 1}
    assert not (tmp_path / "new.txt").exists()


def test_a_document_is_made_to_be_read(tmp_path):
    write_document(tmp_path / "new" / "it.json", {"class": "été 犬", "number": float("-inf")})
    digest, *rest = (tmp_path / "new" / "it.json").read_text(encoding="utf-8").splitlines()
    assert digest.startswith('{"digest": "')
    assert rest == ['  "class": "été 犬",', '  "number": -Infinity', "}"]
    assert read_document(tmp_path / "new" / "it.json") == {"class": "été 犬", "number": float("-inf")}
    write_json(tmp_path / "plain.json", {"class": "été 犬"})
    assert read_document(tmp_path / "plain.json") is None  # nothing says that it is whole
