"""What the benchmark's studies are, and which of their methods are compared."""

import gzip
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.benchmark.comparison import CHOSEN, JUDGED_AGAINST, method_label, methods_of
from pipeline.benchmark.images import LISTED, listed_images
from pipeline.benchmark.run import EXPERIMENTS, STUDIES
from pipeline.config import load_config
from stages.mixture.grouping import group_classes
from stages.results.method import RECOMMENDED

CALTECH, TINY, MANY = STUDIES


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_shipped_studies_have_what_is_compared_on_listed_images(path):
    config = load_config(path)
    assert {RECOMMENDED, *JUDGED_AGAINST, *CHOSEN} <= set(methods_of(config))
    assert {Path(entry.images).stem for entry in config.sets} <= listed_images(LISTED).keys()


def test_controls_are_those_that_can_be_afforded():
    five, three, one = (0, 1, 2, 3, 4), (0, 1, 2), (0,)
    seeds = load_config(CALTECH).variant_seeds()
    assert {name for name, own in seeds.items() if own == one} == {"adapter", "router-tap", "paper"}
    assert {name: own for name, own in seeds.items() if own == five} == {"default": five}
    assert set(seeds.values()) == {five, three, one}
    alone = dict.fromkeys(("e8", "static", "no-mixup", "router-tap", "zero"), one)
    assert load_config(TINY).variant_seeds() == {"default": five, "dense-1": three, "mos": three} | alone
    alone = dict.fromkeys(("dense-1", "e4", "e8", "e16"), one)
    assert load_config(MANY).variant_seeds() == {"default": three} | alone


def test_the_third_benchmark_has_many_classes():
    train, near = (listed_images(LISTED)[name] for name in ("manyclasses-id-train", "manyclasses-near"))
    classes, others = ({id_.split("/")[0] for id_ in ids} for ids in (train, near))
    assert (len(classes), len(others), classes & others) == (157, 40, set())


def test_shipped_groups_are_of_all_classes():
    config = load_config(CALTECH)
    train = Path(config.sets_of("id-train")[0].images).stem
    classes = sorted({id_.split("/")[0] for id_ in listed_images(LISTED)[train]})
    grouping = config.variant_configs()["semantic"].grouping
    groups = group_classes(np.zeros((len(classes), 1)), 3, grouping, tuple(classes), seed=0)
    assert set(groups) == {0, 1, 2}


def test_shipped_studies_differ_by_their_images_and_by_what_can_be_afforded():
    """The same defaults and settings of controls: nothing is tuned to a benchmark."""
    one, *others = (load_config(path).to_dict() for path in STUDIES)
    controls = {variant["name"]: variant["set"] for variant in one["variants"]}
    for other in others:
        for variant in other["variants"]:
            assert variant["set"] == controls.get(variant["name"], {"train.experts": 16})  # fewer of them, and one more
    for config in (one, *others):  # what differs by the images, and by how long they take
        for key in ("name", "work", "cache", "sets", "seeds", "variants", "finetune"):
            config.pop(key, None)
        del config["backbone"]["image_size"], config["split"]["val"]
    assert all(other == one for other in others)


def test_shipped_files_name_no_folder_of_a_machine():
    for path in filter(Path.is_file, EXPERIMENTS.rglob("*")):
        if path.suffix == ".png":  # a picture is no text, but may hold some
            with Image.open(path) as picture:
                text = "\n".join(map(str, picture.info.values()))
        else:
            data = path.read_bytes()
            text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
        assert re.findall(r"""(?:^|[\s"'=`(])((?:/|[A-Z]:\\)[A-Za-z][^\s"'`]*/[^\s"'`]*)""", text, re.MULTILINE) == []


def test_labels_tell_methods_apart():
    labels = [method_label(method) for method in methods_of(load_config(STUDIES[0]))]
    assert len(set(labels)) == len(labels)
    oracle, two = (method_label(replace(RECOMMENDED, routing=routing)) for routing in ("oracle", "top2"))
    assert oracle == "MoFE default, true routes (diagnostic): knn+energy (refit)"
    assert two == "MoFE default, top 2: knn+energy (refit)"


def test_the_benchmarks_fine_tunes():
    caltech, tiny = (load_config(path) for path in (CALTECH, TINY))
    assert (caltech.finetune_seeds(), tiny.finetune_seeds()) == ((0, 1, 2), (0,))
