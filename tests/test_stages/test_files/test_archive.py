"""Sealed archives: any tool reads them, the same entries give the same bytes, and no other byte is believed."""

import json
import os
import shutil
import zipfile
import zlib
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save

from cache.files import seal
from stages.errors import InputError
from stages.files import archive
from stages.files.archive import Entry, SealedArchive, is_zip, write_archive

KIND = "toy bundle"
ENTRIES = {
    "about.json": b'{"name": "toy"}\n',
    "detector.safetensors": save({"weight": np.arange(40, dtype=np.float32), "bias": np.zeros((0, 3), np.float16)}),
    "empty.json": b"",
}


@pytest.fixture
def written(tmp_path):
    write_archive(tmp_path / "toy.ood", KIND, 1, ENTRIES)
    return tmp_path / "toy.ood"


def opened(path):
    return SealedArchive(path, KIND, 1)


def test_what_is_written_is_read(written):
    found = opened(written)
    assert found.names == tuple(ENTRIES)
    assert {name: found.read(name) for name in found.names} == ENTRIES
    assert found.read_json("about.json") == {"name": "toy"}
    assert found.read_tensors("detector.safetensors")["weight"][39] == 39
    assert found.nbytes == written.stat().st_size
    assert "about.json" in found
    with pytest.raises(InputError, match=r"toy\.ood: holds no other\.json$"):
        found.read("other.json")


def test_any_tool_for_zip_reads_it(written):
    with zipfile.ZipFile(written) as file:
        assert file.testzip() is None
        assert file.namelist() == ["manifest.json", *ENTRIES]
        assert file.read("about.json") == ENTRIES["about.json"]
        assert {info.compress_type for info in file.infolist()} == {zipfile.ZIP_STORED}
        assert json.loads(file.read("manifest.json"))["format"] == KIND


def test_same_entries_same_bytes(written, tmp_path):
    write_archive(tmp_path / "again.ood", KIND, 1, dict(ENTRIES))
    assert (tmp_path / "again.ood").read_bytes() == written.read_bytes()
    assert opened(tmp_path / "again.ood").digest == opened(written).digest


def test_sizes_beyond_32_bits_are_written_as_zip_has_them(tmp_path):
    """Of a file with a hole in it: nothing is hashed."""
    large = Entry("backbone.safetensors", 5 << 30, "0" * 64, 0)
    layout = archive._Layout((large, replace(large, name="detector.safetensors", size=3, crc32=zlib.crc32(bytes(3)))))
    with open(tmp_path / "large.ood", "wb") as file:
        for entry, header in zip(layout.entries, layout.headers, strict=True):
            file.write(header)
            file.seek(entry.size, 1)
        file.write(layout.directory)
    assert (tmp_path / "large.ood").stat().st_size == layout.size
    with zipfile.ZipFile(tmp_path / "large.ood") as found:
        assert [info.file_size for info in found.infolist()] == [5 << 30, 3]
        assert found.read("detector.safetensors") == bytes(3)


def mutants(data: bytes, n: int):
    """Damaged copies, and what was done: bits flipped, bytes lost, added, moved, overwritten."""
    rng = np.random.default_rng(0)
    for index in range(n):
        at, other = sorted(rng.integers(0, len(data), 2).tolist())
        kind = ("bit", "cut", "insert", "lose", "swap", "zeros", "append")[index % 7]
        changed = bytearray(data)
        if kind == "bit":
            changed[at] ^= 1 << int(rng.integers(8))
        elif kind == "cut":
            del changed[at:]
        elif kind == "insert":
            changed[at:at] = bytes([int(rng.integers(256))])
        elif kind == "lose":
            del changed[at : at + 1 + index % 5]
        elif kind == "swap":
            changed[at : at + 8], changed[other : other + 8] = changed[other : other + 8], changed[at : at + 8]
        elif kind == "zeros":
            changed[at : at + 16] = bytes(len(changed[at : at + 16]))
        else:
            changed += b"\0"
        if bytes(changed) != data:
            yield f"{kind} at {at}", bytes(changed)


def test_every_damage_is_one_clear_error(written, pytestconfig):
    data, tried = written.read_bytes(), 0
    for what, mutant in mutants(data, pytestconfig.getoption("--mutants") + 40):
        written.write_bytes(mutant)
        with pytest.raises(InputError) as raised:
            opened(written)
        message = str(raised.value)
        assert message.startswith(f"{written}: "), what
        assert message.isprintable(), what
        assert len(message) < len(str(written)) + 120, what
        tried += 1
    assert tried >= pytestconfig.getoption("--mutants")


def test_every_bit_that_is_no_entrys_own_counts(written):
    """Headers and directory: flags, times, attributes, what most readers of zip skip."""
    data = written.read_bytes()
    spans = [data.index(payload) for payload in ENTRIES.values() if payload]
    for at in [*range(60), *range(spans[1] - 50, spans[1]), *range(len(data) - 300, len(data))]:
        written.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        with pytest.raises(InputError):
            opened(written)


def resealed(path, body, entries=ENTRIES):
    """An archive whose manifest says what it wants, sealed as it should be."""
    text = json.dumps(body, separators=(",", ":")).removeprefix("{") + "\n"
    manifest = seal(text.encode())
    about = [Entry.of("manifest.json", manifest), *(Entry.of(name, data) for name, data in entries.items())]
    layout = archive._Layout(tuple(about))
    pieces = [piece for pair in zip(layout.headers, (manifest, *entries.values()), strict=True) for piece in pair]
    path.write_bytes(b"".join([*pieces, layout.directory]))


def lines(**changed):
    said = [vars(Entry.of(name, data)) for name, data in ENTRIES.items()]
    said[0] |= changed
    return said


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"format": "other"}, "is no toy bundle"),
        ({"version": 2}, "is of version 2, 1 is read here: take the release that wrote it"),
        ({"version": "1"}, "is of version '1', 1 is read here"),
        ({"version": True}, "is of version True, 1 is read here"),
        ({"more": 1}, "its manifest says something else than what is in it"),
        ({"entries": {}}, "its manifest says something else than what is in it"),
        ({"entries": [1]}, "its manifest has a line that is no entry"),
        ({"entries": lines(name="../about.json")}, "its manifest has a line that is no entry"),
        ({"entries": lines(name="/etc/passwd")}, "its manifest has a line that is no entry"),
        ({"entries": lines(name="about.pkl")}, "its manifest has a line that is no entry"),
        ({"entries": lines(name="manifest.json")}, "its manifest names an entry twice"),
        ({"entries": lines(name="empty.json")}, "its manifest names an entry twice"),
        ({"entries": lines(size=-1)}, "about.json of -1 bytes is not in a file of "),
        ({"entries": lines(size=10**15)}, "about.json of 1000000000000000 bytes is not in a file of "),
        ({"entries": lines(size=1.0)}, "its manifest has a line that is no entry"),
        ({"entries": lines(size=15)}, "longer than it was"),
        ({"entries": lines(size=17)}, "truncated"),
        ({"entries": lines(crc32=0)}, "the header of about.json is not as it was written"),
        ({"entries": lines(sha256="0" * 64)}, "about.json is not as it was written"),
        ({"entries": lines(extra=1)}, "its manifest has a line that is no entry"),
        ({"entries": lines() * 30}, "its manifest names 90 entries"),
        ({"entries": lines()[:2]}, "longer than it was"),
    ],
)
def test_a_manifest_that_lies_is_refused(written, changed, said):
    resealed(written, {"format": KIND, "version": 1, "entries": lines()})
    opened(written)
    resealed(written, {"format": KIND, "version": 1, "entries": lines()} | changed)
    with pytest.raises(InputError) as raised:
        opened(written)
    assert said in str(raised.value)


def test_a_large_size_that_lies_allocates_nothing(written):
    """The first header promises a manifest of 4 GiB."""
    data = bytearray(written.read_bytes())
    data[18:22] = b"\xfe\xff\xff\xff"
    written.write_bytes(data)
    with pytest.raises(InputError, match="its manifest does not end"):
        opened(written)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "it is empty"),
        (b"PK", "it does not begin as one"),
        (b"PK\3\4" + bytes(90), "it is a zip file of something else"),
        (b'{"digest": "x"}', "it does not begin as one"),
        (bytes(5000), "it does not begin as one"),
    ],
)
def test_another_file_is_no_bundle(tmp_path, content, why):
    (tmp_path / "some").write_bytes(content)
    with pytest.raises(InputError, match=f"some: is no toy bundle as `export` writes it: {why}$"):
        opened(tmp_path / "some")


def test_a_glance_sees_what_is_cut_short(written):
    SealedArchive(written, KIND, 1, compared=False)
    data = written.read_bytes()
    for cut in (4, 20, 40, 200, len(data) - 1):
        written.write_bytes(data[:cut])
        with pytest.raises(InputError, match=r"toy\.ood: damaged, or changed: (truncated|its manifest does not end|a)"):
            SealedArchive(written, KIND, 1, compared=False)


def test_a_zip_file_is_known_by_either_end(written):
    data = written.read_bytes()
    for damaged, known in ((data[:50], True), (b"XXXX" + data[4:], True), (b"XXXX" + data[4:-30], False), (b"", False)):
        written.write_bytes(damaged)
        assert is_zip(written) == known
    assert not is_zip(written.parent)
    assert not is_zip(written.parent / "none.ood")


def test_a_zip_of_somebody_else_is_no_bundle(written, tmp_path):
    """The same entries, but packed by another tool: not every byte is known."""
    with zipfile.ZipFile(written) as ours, zipfile.ZipFile(tmp_path / "theirs.ood", "w") as theirs:
        for name in ours.namelist():
            theirs.writestr(name, ours.read(name))
    with pytest.raises(InputError, match="damaged, or changed"):
        opened(tmp_path / "theirs.ood")


def test_no_file_and_folders_are_said(tmp_path):
    with pytest.raises(InputError, match=r"none\.ood: cannot be read: No such file or directory$"):
        opened(tmp_path / "none.ood")
    with pytest.raises(InputError, match=r"cannot be read: Is a directory$"):
        opened(tmp_path)
    os.mkfifo(tmp_path / "pipe.ood")
    with pytest.raises(InputError, match=r"pipe\.ood: is no toy bundle as `export` writes it: it is no file$"):
        opened(tmp_path / "pipe.ood")  # and nobody waits for who would write into it


def test_json_and_tensors_that_are_none_are_refused(tmp_path):
    broken = {
        "twice.json": b'{"a": 1, "a": 2}',
        "nan.json": b"[NaN]",
        "deep.json": b"[" * 100_000,
        "long.json": b"1" * 10_000,
        "cut.safetensors": ENTRIES["detector.safetensors"][:-3],
        "lies.safetensors": (2**40).to_bytes(8, "little") + b"{}",
    }
    write_archive(tmp_path / "broken.ood", KIND, 1, broken)
    found = opened(tmp_path / "broken.ood")
    for name in broken:
        read = found.read_json if name.endswith(".json") else found.read_tensors
        with pytest.raises(InputError, match=name):
            read(name)


def test_a_file_that_changes_while_it_is_open_is_not_believed(written):
    found = opened(written)
    shutil.copy(written, written.with_suffix(".old"))
    at = written.read_bytes().index(ENTRIES["about.json"])
    with open(written, "r+b") as file:
        file.seek(at)
        file.write(b"[")
    with pytest.raises(InputError, match="was written to while it was read"):
        found.read("about.json")
