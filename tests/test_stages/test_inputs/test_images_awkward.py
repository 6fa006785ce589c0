"""A folder made to be awkward: each kind of file that people's folders hold, and the counts that a person expects.

They are listed by what must become of each: a row, a failure (with its reason), left out (by extension), or hidden.
"""

import os
import subprocess

import pytest

from stages.extract import ExtractOptions, extract_set
from stages.inputs.images import describe_left_out, list_images
from tests.test_stages.awkward import (
    FAILURES,
    LINKED_FAILURES,
    LINKED_ROWS,
    PNG,
    ROWS,
    make_folder,
    png_with,
    write,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("folder")
    make_folder(root, tmp_path_factory.mktemp("elsewhere"))
    return root


def test_a_person_finds_each_file_where_it_belongs(folder):
    table = list_images(str(folder))
    assert set(table.ids) == {*ROWS, *FAILURES, *LINKED_ROWS, *LINKED_FAILURES}
    assert table.left_out == {
        ".txt": 2,
        "": 3,  # Makefile, empty, and the link called text
        ".md": 2,
        ".json": 1,
        ".mp4": 1,
        ".db": 1,
        "special file": 2,
    }
    assert describe_left_out(table.left_out) == (
        "left out: 12 files: 3 without extension, 2 .md, 2 .txt, 2 special file, 1 .db, 1 .json, 1 .mp4"
    )
    assert table.class_names == ("cat", "dog", "linked")


def test_every_image_is_a_row_or_a_failure_with_its_reason(folder, backbone, tmp_path):
    spec = backbone.feature_spec("float16", "none")
    cache = extract_set(
        "awkward", list_images(str(folder)), spec, tmp_path, lambda: backbone, options=ExtractOptions(max_failures=1.0)
    )
    assert set(cache.ids.tolist()) == {*ROWS, *LINKED_ROWS}
    reasons = {failure.id: failure.reason for failure in cache.failures()}
    expected = {name: reason for name, (_, reason) in FAILURES.items()} | LINKED_FAILURES
    assert reasons.keys() == expected.keys()
    assert {name: reasons[name] for name in expected if not reasons[name].startswith(expected[name])} == {}
    assert cache.n_rows + len(reasons) == cache.manifest.n_inputs
    assert sum(cache.manifest.left_out.values()) == 12


def test_a_note_added_beside_the_images_leaves_the_cache_fresh(backbone, tmp_path):
    for n in range(3):
        write(tmp_path / "images" / f"{n}.png", png_with(b"tEXt", b"n\0%d" % n))

    def extract():
        spec = backbone.feature_spec("float16", "none")
        return extract_set("pets", list_images(str(tmp_path / "images")), spec, tmp_path, lambda: backbone)

    cache = extract()
    write(tmp_path / "images" / "README.txt", b"three pets")
    again = extract()
    assert again.path == cache.path
    assert again.manifest.left_out == {}  # as it was sealed
    write(tmp_path / "images" / "3.png", PNG)
    newer = extract()
    assert newer.manifest.left_out == {".txt": 1}
    assert newer.fingerprint == cache.fingerprint


def test_one_file_is_an_image_by_its_name_or_by_its_first_bytes(folder):
    for name in ("cat/stereo.MPO", "cat/no-extension", "cat/downloaded.jpg.1", "cat/phone", "dog/half-without-name"):
        (only,) = list_images(str(folder / name)).ids
        assert only == os.path.basename(name)


def test_folders_that_link_to_one_another_end(tmp_path):
    for name in "abc":
        write(tmp_path / name / f"{name}.png", PNG)
    for name, other in ("ab", "bc", "ca"):
        (tmp_path / name / other).symlink_to(tmp_path / other)
    ids = list_images(str(tmp_path)).ids
    assert {os.path.basename(i) for i in ids} == {"a.png", "b.png", "c.png"}
    assert "a/b/c/c.png" in ids
    assert len(ids) == 9  # each of the three from each of the three


def test_a_tree_deeper_than_python_recurses(tmp_path):
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1100):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.symlink("gone.png", "1.png", dir_fd=here)
    os.close(here)
    try:
        assert list_images(str(tmp_path)).ids == ("d/" * 1100 + "1.png",)
    finally:
        subprocess.run(["rm", "-r", tmp_path / "d"], check=True)  # what cleans up after tests recurses
