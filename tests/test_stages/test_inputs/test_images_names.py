"""Names of classes: what is one class wherever it comes from, and how two that differ are told apart."""

import io
import json
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.inputs.arrays import list_arrays
from stages.inputs.images import list_dataset, list_images, only_classes
from stages.inputs.images.names import class_order, match_classes, number_classes, tidy, unlike
from stages.mixture.grouping import group_classes
from tests.test_stages.test_inputs.test_images import classes, save
from tests.test_stages.test_inputs.test_images_tar import png, write_tar

NFC, NFD = "café", unicodedata.normalize("NFD", "café")
UGLY = f"\ufeff {NFD}\xa0"


def from_folder(root, name):
    save(root, f"{name}/1.png")
    return list_images(str(root))


def from_tar(root, name):
    return list_images(write_tar(root / "s.tar", {f"{name}/1.png": png()}))


def from_side_file(root, name):
    return list_images(write_tar(root / "s.tar", {"1.png": png(), "1.cls": name.encode()}))


def from_json(root, name):
    return list_images(write_tar(root / "s.tar", {"1.png": png(), "1.json": json.dumps({"label": name}).encode()}))


def from_csv(root, name):
    save(root, "1.png")
    (root / "l.csv").write_text(f"path,label\n1.png,{name}\n", "utf-8")
    return list_images(str(root / "l.csv"))


def from_dataset(root, name):
    return list_dataset([io.BytesIO(png())], "mine", [0], [name])


def from_arrays(root, name):
    np.savez(root / "a.npz", cls=np.ones((1, 2), np.float32), label=np.array([name]))
    return list_arrays(str(root / "a.npz")).samples


SOURCES = [from_folder, from_tar, from_side_file, from_json, from_csv, from_dataset, from_arrays]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", [NFC, NFD, f"{NFC} ", UGLY])
def test_a_class_is_one_wherever_it_comes_from(tmp_path, source, name):
    assert source(tmp_path, name).class_names == (NFC,)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("number", ["7", "007", "7.0"])
def test_numbers_are_numbers(tmp_path, source, number):
    assert source(tmp_path, number).class_names == ("7",)


def test_beside_other_names_numbers_stay_text(tmp_path):
    save(tmp_path, *(f"{i}.png" for i in range(4)))
    rows = ["0.png,7", "1.png,007", "2.png,7.0", "3.png,"]
    (tmp_path / "l.csv").write_text("\n".join(["path,label", *rows]))
    assert list_images(str(tmp_path / "l.csv")).class_names == ("7",)
    (tmp_path / "l.csv").write_text("\n".join(["path,label", *rows[:2], "2.png,seven", rows[3]]))
    assert list_images(str(tmp_path / "l.csv")).class_names == ("007", "7", "seven")


def test_as_pandas_writes_numbers_beside_missing_ones(tmp_path):
    save(tmp_path, "0.png", "1.png", "2.png")
    (tmp_path / "l.csv").write_text("path,label\n0.png,10.0\n1.png,\n2.png,-1.0\n")
    assert classes(list_images(str(tmp_path / "l.csv"))) == {"0.png": "10", "1.png": None, "2.png": None}


def test_folders_that_are_taken_for_one_class_are_said(tmp_path):
    save(tmp_path, f"{NFC}/1.png", f"{NFD}/2.png", "dog/3.png")
    table = list_images(str(tmp_path))
    assert table.class_names == (NFC, "dog")
    (note,) = table.notes
    assert note == f"{tmp_path}: taken for one class each: {NFD!r} and {NFC!r}"


def test_some_classes_by_any_spelling(tmp_path):
    save(tmp_path / "data", f"{NFD}/1.png", "dog/2.png")
    (tmp_path / "some.txt").write_text(f"{UGLY}\n{NFC}\n", "utf-8")
    assert only_classes(list_images(str(tmp_path / "data")), str(tmp_path / "some.txt")).ids == (f"{NFD}/1.png",)
    save(tmp_path / "numbers", "003/1.png", "010/2.png")
    assert only_classes(list_images(str(tmp_path / "numbers")), ["3"]).ids == ("003/1.png",)


def test_groups_of_classes_by_any_spelling(tmp_path):
    path = tmp_path / "groups.json"
    path.write_text(json.dumps({UGLY: "a", "dog": "b"}))
    assert group_classes(np.eye(2), 2, str(path), (NFC, "dog"), 0) == [0, 1]
    path.write_text(json.dumps({"007": "b", "8.0": "a"}))
    assert group_classes(np.eye(2), 2, str(path), ("7", "8"), 0) == [0, 1]


def test_classes_of_two_sets_are_matched():
    assert match_classes(["007", "8"], ["8", "7"]) == [1, 0]
    assert match_classes(["7"], ["007", "abc"]) == [0]
    assert match_classes(["7", "007", "abc"], ["007", "7", "abc"]) == [1, 0, 2]
    assert match_classes(["7"], ["007", "7", "abc"]) == [-1]  # which of them, its own spelling no longer says


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Cat", "'Cat' (id-train has 'cat', in other case)"),
        ("c\u0430t", "(has U+0430 CYRILLIC SMALL LETTER A where id-train's 'cat' has U+0061 LATIN SMALL LETTER A)"),
        ("c\u200bat", "'c\\u200bat' (has U+200B ZERO WIDTH SPACE, which id-train's 'cat' lacks)"),
        ("sea\xa0lion", "'sea\\xa0lion' (has U+00A0 NO-BREAK SPACE where id-train's 'sea lion' has U+0020 SPACE)"),
        ("cafe", "'cafe' (has U+0065 LATIN SMALL LETTER E where id-train's 'café' has U+00E9"),
        ("sea_lion", "'sea_lion' (did you mean id-train's 'sea lion'?)"),
        ("sealion", "'sealion' (did you mean id-train's 'sea lion'?)"),
        ("7", "'7' (id-train has '007' and '7', one number)"),
        ("newt", "'newt'"),
        ("x" * 99, f"'{'x' * 59}…'"),
    ],
)
def test_what_differs_can_be_seen(name, message):
    text = unlike([name], ["cat", "sea lion", NFC, "007", "7", "zoo"])
    assert message in text
    assert text.isprintable()


def test_many_are_not_all_shown():
    assert unlike(list("abcdef"), ["zoo"]) == "'a', 'b', 'c', …"


TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
NUMBERS = st.integers(-5, 10**6)


@given(st.lists(st.none() | TEXT, min_size=1))
def test_labels_name_their_class(names):
    names = [name and f"k{name}" for name in names]
    labels, order, _ = number_classes("any", names)
    assert labels.dtype == np.int32
    assert [order[label] if label >= 0 else None for label in labels] == [name and tidy(name) for name in names]
    assert match_classes(order, order) == list(range(len(order)))
    assert list(number_classes("any", order).names) == list(order)  # once is enough


@given(st.lists(st.tuples(NUMBERS, st.integers(0, 3), st.sampled_from(["", ".", ".0", ".00"])), min_size=1))
def test_the_spelling_of_numbers_does_not_matter(numbers):
    spelled = [f"{'-' if n < 0 else ''}{'0' * zeros}{abs(n)}{end}" for n, zeros, end in numbers]
    labels, order, _ = number_classes("any", spelled)
    assert [int(order[label]) for label in labels] == [n for n, *_ in numbers]
    assert list(order) == [str(n) for n in sorted({n for n, *_ in numbers})] == list(class_order(order))
