"""Studies of a few images: they run to their tables, and say what they had to do otherwise."""

import csv

import numpy as np
import pytest

from tests.test_pipeline.command import done, settings
from tests.test_pipeline.tiny import STUDY, draw

ONE_CLASS_EACH = (
    "k = 1: the smallest candidate, for no ID class can be left out and be told from others: variant default"
)


def small(folder, classes: int, images: int, experts: int) -> list[object]:
    """A study of real digits."""
    digits = f"sklearn:digits[0-{classes - 1}]"
    draw(folder / "images" / "train", f"{digits}/train", images)
    draw(folder / "images" / "test", f"{digits}/test", 3)
    draw(folder / "images" / "others", "sklearn:digits[9]/test", 8, nested=False)
    before, _, after = STUDY.partition('[[sets]]\nname = "threes"')
    others = '[[sets]]\nname = "others"\nrole = "near-ood"\nimages = "images/others"\n\n'
    (folder / "study.toml").write_text(before + others + after[after.index("[train]") :])
    return [folder / "study.toml", *settings(f"train.experts={experts}")]


def scored(folder) -> list[dict[str, str]]:
    with (folder / "work" / "scores" / "table.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


ADAPTERS = ["train.expert=adapter"]
FAST = ['score.scores=["knn+energy"]', *ADAPTERS]


@pytest.mark.parametrize(
    ("classes", "images", "experts", "asked"), [(4, 8, 2, ADAPTERS), (2, 3, 2, FAST), (3, 5, 1, FAST)]
)
def test_a_small_study_has_its_table_and_predicts(tmp_path, classes, images, experts, asked):
    study = [*small(tmp_path, classes, images, experts), *settings(*asked)]
    for verb in ("extract", "train"):
        done(verb, *study)
    answer = done("score", *study)
    assert (ONE_CLASS_EACH in answer.out) == (experts == classes)
    rows = scored(tmp_path)
    assert {row["features"] for row in rows} == {"cls", "mofe"}
    assert all(0 <= float(row["auroc"]) <= 1 for row in rows)
    picture = next((tmp_path / "images" / "others").iterdir())
    assert str(picture) in done("predict", *study, picture).out


def test_one_image_to_calibrate_on_is_said(tmp_path):
    """An id-val set of one image a class: one selects, the other calibrates, and no deviation is to be had of it."""
    rng = np.random.default_rng(0)
    sets = {
        "train": ("id-train", 2, 6),
        "val": ("id-val", 2, 1),
        "test": ("id-test", 2, 3),
        "other": ("near-ood", 1, 5),
    }
    toml = ['name = "one"\nwork = "work"\n\n[train]\nexpert = "adapter"\nepochs = 1\n\n[score]\nbootstrap = 100']
    for name, (role, classes, n) in sets.items():
        labels = np.repeat(np.arange(classes), n)
        features = np.float32(rng.normal(scale=0.3, size=(len(labels), 6)) + np.eye(3, 6)[labels + (name == "other")])
        np.savez(tmp_path / f"{name}.npz", cls=features, label=labels, id=np.arange(len(labels)).astype(str))
        toml.append(f'[[sets]]\nname = "{name}"\nrole = "{role}"\nfeatures = "{name}.npz"\norigin = "drawn"')
    (tmp_path / "study.toml").write_text("\n\n".join(toml) + "\n")
    for verb in ("extract", "train"):
        done(verb, tmp_path / "study.toml")
    answer = done("score", tmp_path / "study.toml")
    assert "knn+energy: its parts are added in units of their own, for one row tells no deviation" in answer.out
    assert scored(tmp_path)
