"""Listing of tars: the same table as a folder, links and holes followed, WebDataset pairs, damaged archives."""

import os
import pickle
import random
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stages.errors import InputError
from stages.inputs.images import ImageError, list_images
from stages.inputs.images.members import _Header
from tests.test_stages.tars import classes, contents, png, write_folder, write_tar

BLOCK = tarfile.BLOCKSIZE


def gnu_tar(folder, path, *options):
    """Tar of a folder as GNU tar writes it."""
    program = shutil.which("tar")
    if program is None or b"GNU" not in subprocess.run([program, "--version"], capture_output=True).stdout:
        pytest.skip("GNU tar is not installed")
    subprocess.run([program, *options, "-cf", path, "-C", folder, "."], check=True, capture_output=True)
    return str(path)


def header(name, kind=tarfile.REGTYPE, link="", size=0):
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, link, size
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_of_a_folder_gives_the_folders_table(tmp_path, form):
    names = [
        "dog/1.png",
        "cat/é/2.png",
        "cat/" + "long" * 20 + "/3.png",
        "top.png",
        "cat/notes.md",
        ".git/4.png",
        "cat/.5.png",
    ]
    for gray, name in enumerate(names):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(b"no image" if name.endswith(".md") else png(gray))
    with tarfile.open(tmp_path / "set.tar", "w", format=form) as tar:
        tar.add(tmp_path / "set", ".")

    folder, tar = list_images(str(tmp_path / "set")), list_images(str(tmp_path / "set.tar"))

    assert tar.ids == folder.ids
    assert len(tar) == 4
    assert tar.class_names == folder.class_names == ("cat", "dog")
    assert tar.labels.tolist() == folder.labels.tolist()
    assert tar.sizes.tolist() == folder.sizes.tolist()
    assert tar.left_out == folder.left_out == {".md": 1}
    assert [tar.reader().read(i) for i in range(4)] == [folder.reader().read(i) for i in range(4)]


@pytest.mark.parametrize("form", ["v7", "ustar", "oldgnu", "gnu", "posix"])
def test_every_format_of_gnu_tar(tmp_path, form):
    long = {} if form == "v7" else {f"cat/{'long' * 20}/3.png": png(3)}  # v7 has names of at most 99 bytes
    write_folder(tmp_path / "set", {"cat/1.png": png(1), "dög/2.png": png(2)} | long)
    table = list_images(gnu_tar(tmp_path / "set", tmp_path / "set.tar", f"--format={form}"))
    assert contents(table) == contents(list_images(str(tmp_path / "set")))


def test_gnu_tars_of_incremental_backups_keep_their_names(tmp_path):
    write_folder(tmp_path / "set", {"cat/1.png": png(1), "dog/2.png": png(2)})
    table = list_images(gnu_tar(tmp_path / "set", tmp_path / "s.tar", "--incremental", "--format=gnu"))
    assert classes(table) == {"cat/1.png": "cat", "dog/2.png": "dog"}


def test_first_bytes_tell_an_image_in_a_tar_as_well(tmp_path):
    files = {"cat/IMG_1": png(1), "cat/notes.txt": b"no image", "cat/2.png.1": png(2), "__MACOSX/3.png": png(3)}
    table = list_images(write_tar(tmp_path / "s.tar", files))
    assert classes(table) == {"cat/IMG_1": "cat", "cat/2.png.1": "cat"}
    assert table.left_out == {".txt": 1}


@given(st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=4), st.integers(0, 40))
@settings(max_examples=30, deadline=None)
def test_tars_joined_by_cat_are_one(tmp_path_factory, parts, more_zeros):
    folder = tmp_path_factory.mktemp("joined")
    expected, joined = {}, b""
    for number, grays in enumerate(parts):
        files = {f"{number}/{place}.png": png(gray) for place, gray in enumerate(grays)}
        joined += Path(write_tar(folder / "part.tar", files)).read_bytes() + bytes(BLOCK * more_zeros)
        expected |= files
    (folder / "all.tar").write_bytes(joined)
    if expected:
        assert contents(list_images(str(folder / "all.tar"))) == expected
    else:
        with pytest.raises(InputError, match="no images found"):
            list_images(str(folder / "all.tar"))


# ------------------------------------------------------------------------------------------------------------- damage


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_a_tar_that_stops_early_is_refused_and_says_where(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cut")
    whole = Path(write_tar(folder / "s.tar", {f"{i}.png": png(i) for i in range(4)})).read_bytes()
    n_bytes = data.draw(st.integers(BLOCK, 4 * 2 * BLOCK))  # a block of header and one of data each, then the end mark
    (folder / "cut.tar").write_bytes(whole[:n_bytes])
    with pytest.raises(InputError) as caught:
        list_images(str(folder / "cut.tar"))
    last, rest = divmod(n_bytes, 2 * BLOCK)
    if rest == 0:
        assert f"damaged: it has no end mark, so more may be missing after '{last - 1}.png'" in str(caught.value)
    elif rest < BLOCK:
        assert f"damaged: it ends within the header, after '{last - 1}.png'" in str(caught.value)
    else:
        assert f"damaged: it ends within '{last}.png'" in str(caught.value)


def test_one_block_of_zeros_is_an_end_mark(tmp_path):
    whole = Path(write_tar(tmp_path / "s.tar", {"1.png": png()})).read_bytes()
    (tmp_path / "t.tar").write_bytes(whole[: 3 * BLOCK])
    assert list_images(str(tmp_path / "t.tar")).ids == ("1.png",)


def test_what_is_no_tar_is_refused(tmp_path):
    whole = Path(write_tar(tmp_path / "s.tar", {f"{c}/{i}.png": png(i) for c in "ab" for i in range(3)})).read_bytes()
    for name, data, message in [
        ("empty.tar", b"", "not a tar"),
        ("text.tar", b"not a tar " * 100, "not a tar"),
        (
            "bad-header.tar",
            whole[:2048] + b"\x01" * 512 + whole[2560:],
            "at byte 2048 is no header of a member, after 'a/1",
        ),
        ("more.tar", whole + b"signature", "ends within the header, after the end mark behind 'b/2.png'"),
        (
            "more-blocks.tar",
            whole + b"\x01" * 1024,
            f"at byte {len(whole)} is no header of a member, after the end mark",
        ),
    ]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError) as caught:
            list_images(str(tmp_path / name))
        assert message in str(caught.value)


def test_a_tar_that_shrank_gives_image_errors(tmp_path):
    path = write_tar(tmp_path / "s.tar", {"1.png": png(), "2.png": png()})
    reader = list_images(path).reader()
    with open(path, "r+b") as file:
        file.truncate(1540)
    assert reader.read(0) == png()
    with pytest.raises(ImageError, match="truncated"):
        reader.read(1)


def test_flipped_bits_never_raise_anything_else(tmp_path):
    files = {"a/1.png": png(), "a/1.cls": b"3", "ü" * 90 + "/2.png": png(), "b.json": b"{}"}
    whole = Path(write_tar(tmp_path / "s.tar", files)).read_bytes()
    random.seed(0)
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(random.randint(1, 8)):
            data[random.randrange(len(data) // 2)] ^= 1 << random.randrange(8)
        (tmp_path / "t.tar").write_bytes(data)
        try:
            table = list_images(str(tmp_path / "t.tar"))
            for i in range(len(table)):
                table.reader().read(i)
        except InputError:
            pass


def test_hostile_sizes_are_refused(tmp_path):
    header = bytearray(tarfile.TarInfo("a.png").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (-512 + (1 << 96)).to_bytes(12, "big")  # size -512: the next header would be this one
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "s.tar").write_bytes(bytes(header) + bytes(1024))
    with pytest.raises(InputError, match="damaged"):
        list_images(str(tmp_path / "s.tar"))


# -------------------------------------------------------------------------------------------------------------- names


def test_names_are_names_and_nothing_more(tmp_path):
    Image.new("L", (4, 3), 200).save(tmp_path / "a.png")  # what ../a.png would be on disk
    names = ["./cat/1.png", "../a.png", "../../cat/2.png", "/etc/3.png", "dog//4.png", "dog\\5.png", "dog/../cat/6.png"]
    (tmp_path / "set").mkdir()
    table = list_images(write_tar(tmp_path / "set" / "s.tar", {name: png(i) for i, name in enumerate(names)}))
    assert contents(table) == {
        "cat/1.png": png(0),
        "../a.png": png(1),
        "../../cat/2.png": png(2),
        "etc/3.png": png(3),
        "dog/4.png": png(4),
        "dog\\5.png": png(5),
        "cat/6.png": png(6),
    }
    assert classes(table)["../../cat/2.png"] == "cat"
    assert classes(table)["../a.png"] is None


def test_names_that_are_not_utf_8_can_be_stored(tmp_path):
    names = [os.fsdecode(name) for name in (b"caf\xe9.png", b"caf\xe8.png")]
    ids = list_images(write_tar(tmp_path / "s.tar", dict.fromkeys(names, png()))).ids
    assert ids == ("caf\\udce8.png", "caf\\udce9.png")


def test_members_whose_names_become_one_are_said(tmp_path):
    table = list_images(write_tar(tmp_path / "s.tar", {"a/1.png": png(1), "./a//1.png": png(2), "/a/1.png": png(3)}))
    assert contents(table) == {"a/1.png": png(3)}
    (note,) = table.notes
    assert note.endswith("members that stand there twice, the later counts: 1 ('a/1.png')")


# -------------------------------------------------------------------------------------------------- links and holes


def test_a_tree_with_links_gives_what_the_tree_on_disk_gives(tmp_path):
    root = tmp_path / "set"
    write_folder(root, {"cat/1.png": png(1), "cat/2.png": png(2)})
    os.link(root / "cat/1.png", root / "cat/hard.png")
    (root / "cat/soft.png").symlink_to("2.png")
    (root / "cat/twice.png").symlink_to("soft.png")
    (root / "tiger").symlink_to("cat")
    (root / "cat/loop").symlink_to("..")
    table = list_images(gnu_tar(root, tmp_path / "s.tar"))
    assert contents(table) == contents(list_images(str(root)))
    assert len(table) == 10  # five in the folder, five behind the link to it


link_targets = st.lists(st.sampled_from(["..", "a", "b", "c.png"]), min_size=1, max_size=3).map("/".join)
nodes = st.recursive(
    st.one_of(st.integers(0, 9), link_targets),
    lambda inner: st.dictionaries(st.sampled_from(["a", "b", "c.png", ".d"]), inner, max_size=4),
    max_leaves=10,
)


def build(path, node):
    """A file of an integer, a link of a string, a folder of a dict."""
    if isinstance(node, dict):
        path.mkdir()
        for name, child in node.items():
            build(path / name, child)
    elif isinstance(node, str):
        path.symlink_to(node)
    else:
        path.write_bytes(png(node))


@given(st.dictionaries(st.sampled_from(["a", "b", "c.png", ".d"]), nodes, min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_any_tree_in_a_tar_gives_what_it_gives_on_disk(tmp_path_factory, tree):
    root = tmp_path_factory.mktemp("tree") / "set"
    build(root, tree)
    for path in root.rglob("*"):  # on disk a link may lead outside, in a tar it may not
        if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(root):
            path.unlink()
    try:
        expected = contents(list_images(str(root)))
    except InputError:
        return  # no image
    with tarfile.open(root.parent / "s.tar", "w") as tar:
        tar.add(root, "")
    found = contents(list_images(str(root.parent / "s.tar")))
    assert found.keys() == expected.keys()
    for name, data in found.items():
        assert data == expected[name] or isinstance(data, str) is isinstance(expected[name], str)


def test_links_may_stand_before_what_they_lead_to(tmp_path):
    data = png(7)
    blocks = [
        header("soft.png", tarfile.SYMTYPE, "cat/1.png"),
        header("hard.png", tarfile.LNKTYPE, "cat/1.png"),
        header("hard-to-soft.png", tarfile.LNKTYPE, "soft.png"),
        header("cat/1.png", size=len(data)),
        data.ljust(BLOCK, b"\0"),
        header("cat/1.png", tarfile.LNKTYPE, "cat/1.png"),  # GNU tar's, of a file that it was given twice
        bytes(2 * BLOCK),
    ]
    (tmp_path / "s.tar").write_bytes(b"".join(blocks))
    table = list_images(str(tmp_path / "s.tar"))
    assert contents(table) == dict.fromkeys(["soft.png", "hard.png", "hard-to-soft.png", "cat/1.png"], data)
    assert table.notes == ()


def test_links_that_lead_nowhere_or_outside_are_failures_with_a_reason(tmp_path):
    outside = tmp_path / "outside.png"
    outside.write_bytes(png(9))
    (tmp_path / "set").mkdir()
    blocks = [
        header("absolute.png", tarfile.SYMTYPE, str(outside)),
        header("cat/above.png", tarfile.SYMTYPE, "../../outside.png"),
        header("gone", tarfile.SYMTYPE, "no/such.png"),
        header("hard-gone.png", tarfile.LNKTYPE, "../outside.png"),
        header("round-1.png", tarfile.SYMTYPE, "round-2.png"),
        header("round-2.png", tarfile.SYMTYPE, "round-1.png"),
        header("hard-1.png", tarfile.LNKTYPE, "hard-2.png"),
        header("hard-2.png", tarfile.LNKTYPE, "hard-1.png"),
        header("rest.png", b"M"),
        bytes(2 * BLOCK),
    ]
    (tmp_path / "set" / "s.tar").write_bytes(b"".join(blocks))
    found = contents(list_images(str(tmp_path / "set" / "s.tar")))
    absolute = found.pop("absolute.png")  # a long path is cut
    assert absolute.startswith("a link to '/")
    assert absolute.endswith(", outside of the tar")
    assert found == {
        "cat/above.png": "a link to '../../outside.png', outside of the tar",
        "gone": "a link to 'no/such.png', which the tar does not hold",
        "hard-gone.png": "a link to '../outside.png', which the tar does not hold",
        "round-1.png": "a link that leads round in a circle",
        "round-2.png": "a link that leads round in a circle",
        "hard-1.png": "a link that leads round in a circle",
        "hard-2.png": "a link that leads round in a circle",
        "rest.png": "begins in another volume of the tar",
    }


def write_with_holes(path, data, size=4096):
    with open(path, "wb") as file:
        for start in range(0, len(data), size):
            if any(data[start : start + size]):
                file.seek(start)
                file.write(data[start : start + size])
        file.truncate(len(data))


@pytest.mark.parametrize(
    "options", [["--format=gnu"], *(["--format=posix", f"--sparse-version={v}"] for v in ("0.0", "0.1", "1.0"))]
)
def test_sparse_members_are_read_with_their_holes(tmp_path, options):
    image = Image.new("L", (1024, 1024))
    for row in range(0, 1024, 32):  # more pieces than the header itself has room for
        image.putpixel((row, row), 255)
    image.save(tmp_path / "whole.bmp")
    (tmp_path / "set").mkdir()
    write_with_holes(tmp_path / "set" / "1.bmp", (tmp_path / "whole.bmp").read_bytes())
    (tmp_path / "set" / "2.png").write_bytes(png(2))
    path = gnu_tar(tmp_path / "set", tmp_path / "s.tar", "--sparse", "--hole-detection=raw", *options)
    assert os.path.getsize(path) < os.path.getsize(tmp_path / "set" / "1.bmp")
    table = pickle.loads(pickle.dumps(list_images(path)))  # as it travels to a worker
    assert contents(table) == contents(list_images(str(tmp_path / "set")))
    assert table.sizes.tolist() == [os.path.getsize(tmp_path / "set" / name) for name in table.ids]


@given(
    st.text(min_size=1, max_size=200).filter(lambda name: "\0" not in name),
    st.integers(0, 8**12),
    st.sampled_from([tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.CONTTYPE, b"M"]),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT]),
    st.none() | st.tuples(st.integers(0, BLOCK - 1), st.integers(0, 255)),
)
@settings(max_examples=200, deadline=None)
def test_a_header_is_read_as_the_library_reads_it(name, size, kind, form, damage):
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    try:
        block = bytearray(member.tobuf(form, "utf-8", "surrogateescape")[-BLOCK:])
    except ValueError:  # too long for this format
        return
    if damage is not None:
        block[damage[0]] = damage[1]

    def read(header):
        try:
            found = header.frombuf(bytes(block), "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            return str(error)
        return found.name, found.size, found.type

    assert read(_Header) == read(tarfile.TarInfo)
