"""Which column is the image and which the class: given by name, or one of the usual names."""

import json

import datasets
import pytest
from datasets import ClassLabel, Value
from hypothesis import given
from hypothesis import strategies as st

from stages.errors import InputError
from stages.inputs.images import Columns, list_images
from stages.inputs.images.columns import LABEL_NAMES, PATH_NAMES
from tests.test_stages.test_inputs.test_images import classes, save
from tests.test_stages.test_inputs.test_images_huggingface import png
from tests.test_stages.test_inputs.test_images_huggingface import save as save_dataset
from tests.test_stages.test_inputs.test_images_tar import write_tar

BOM = "\ufeff"


@pytest.mark.parametrize(
    "path", ["path", "file", "filename", "image", "image_path", " File Name ", f"{BOM}Path", "PATH"]
)
@pytest.mark.parametrize("label", ["label", "class", "target", "category", "labels", " Class Name\u00a0"])
def test_the_usual_names_are_found(tmp_path, path, label):
    save(tmp_path, "1.png", "2.png")
    (tmp_path / "l.csv").write_text(f"id,{label},{path}\n8,cat,1.png\n9,,2.png\n", "utf-8")
    table = list_images(str(tmp_path / "l.csv"))
    assert classes(table) == {"1.png": "cat", "2.png": None}
    assert table.notes == ()


def test_of_several_usual_names_the_first_counts_and_a_note_says_so(tmp_path):
    save(tmp_path, "1.png")
    (tmp_path / "l.csv").write_text("category,image,label,path\nanimal,no,cat,1.png\n")
    table = list_images(source := str(tmp_path / "l.csv"))
    assert classes(table) == {"1.png": "cat"}
    assert table.notes == (
        f"{source}: 'path' is taken, not 'image': path_column says otherwise",
        f"{source}: 'label' is taken, not 'category': label_column says otherwise",
    )
    table = list_images(source, columns=Columns("path", "category"))
    assert classes(table) == {"1.png": "animal"}
    assert table.notes == ()


def test_columns_of_a_list_by_name(tmp_path):
    save(tmp_path, "1.png")
    (tmp_path / "l.csv").write_text("where, Breed \n1.png,tabby\n")
    assert classes(list_images(str(tmp_path / "l.csv"), columns=Columns("where", "Breed"))) == {"1.png": "tabby"}


@pytest.mark.parametrize(
    ("header", "columns", "message"),
    [
        (
            "path,label",
            Columns(label="lable"),
            "label_column 'lable' is not there; did you mean 'label'? (it has path, label)",
        ),
        ("path,label", Columns(path="x"), "path_column 'x' is not there; known: path, label"),
        ("a,b", Columns(), "no column of paths (path, file, filename, filepath, image, imagepath)"),
        ("path,label,label", Columns(), "'label' stands there twice"),
    ],
)
def test_a_column_that_is_not_there_is_named(tmp_path, header, columns, message):
    save(tmp_path, "1.png")
    (tmp_path / "l.csv").write_text(f"{header}\n1.png,1,2\n"[:200])
    with pytest.raises(InputError) as caught:
        list_images(str(tmp_path / "l.csv"), columns=columns)
    assert message in str(caught.value)
    assert "l.csv" in str(caught.value)


def test_columns_of_a_hugging_face_dataset(tmp_path):
    animals, sizes = ClassLabel(names=["dog", "cat"]), ClassLabel(names=["small", "big"])
    features = {
        "left": datasets.Image(),
        "right": datasets.Image(),
        "kind": animals,
        "size": sizes,
        "breed": Value("string"),
    }
    columns = {"left": [png(1)], "right": [png(2)], "kind": [1], "size": [0], "breed": ["tabby"]}
    source = save_dataset(tmp_path / "set", columns, features)
    table = list_images(source, columns=Columns("right", "size"))
    assert table.class_names == ("small",)
    assert table.reader().read(0) == png(2)
    assert list_images(source, columns=Columns("left", "breed")).class_names == ("tabby",)
    for wrong, message in (
        (Columns("breed", "kind"), "path_column 'breed' is"),
        (Columns("left", "right"), "label_column 'right' is"),
        (Columns("left", "Kind"), "label_column 'Kind' is not there; did you mean 'kind'?"),
        (Columns("left"), "several columns of classes, kind, size: label_column says which counts"),
        (
            Columns(label="kind"),
            "several columns of images, left, right (of left, right, kind, size, breed); give path_column",
        ),
    ):
        with pytest.raises(InputError) as caught:
            list_images(source, columns=wrong)
        assert message in str(caught.value)


def test_the_field_of_a_webdataset_json(tmp_path):
    files = {"1.png": png(), "1.json": json.dumps({"label": 3, "wnid": "n01"}).encode()}
    source = write_tar(tmp_path / "s.tar", files)
    assert list_images(source).class_names == ("3",)
    assert list_images(source, columns=Columns(label="wnid")).class_names == ("n01",)


@pytest.mark.parametrize(
    ("source", "columns", "message"),
    [
        ("", Columns("path"), "path_column is for"),
        ("", Columns(label="class"), "label_column is for"),
        ("a.txt", Columns(label="class"), "label_column is for"),
        ("1.png", Columns("path"), "path_column is for"),
        ("s.tar", Columns("path"), "path_column is for"),
        ("sklearn:photos", Columns(label="class"), "label_column is for"),
    ],
)
def test_where_there_are_no_columns_they_are_refused(tmp_path, source, columns, message):
    save(tmp_path, "1.png")
    (tmp_path / "a.txt").write_text("1.png 0\n")
    write_tar(tmp_path / "s.tar", {"1.png": png()})
    with pytest.raises(InputError, match=message):
        list_images(source if ":" in source else str(tmp_path / source), columns=columns)


DECORATION = st.tuples(st.sampled_from(["", " ", "\t", BOM, "\xa0"]), st.sampled_from([str, str.upper, str.title]))


@given(st.permutations(PATH_NAMES), st.permutations(LABEL_NAMES), st.lists(DECORATION, min_size=13, max_size=13))
def test_the_first_usual_name_wins_however_it_is_written(paths, labels, decorations):
    written = {
        name: f"{around}{case(name)}{around}"
        for name, (around, case) in zip([*paths, *labels], decorations, strict=True)
    }
    names = list(written.values())
    assert Columns().find_path("any", names) == written["path"]
    assert Columns().find_label("any", names) == written["label"]
    assert Columns().find_label("any", [written["cls"], "other"]) == written["cls"]
    assert Columns().find_label("any", ["other"]) is None
