"""``make map`` on a tiny benchmark: two cells of a few digits, run once from the command line's own function."""

import csv
import io
import json
import re
import shutil

import pytest

from pipeline.benchmark.cells import Cell, OrderedImages
from pipeline.benchmark.choice import MapChoice
from pipeline.benchmark.map import MAPPED, run_map
from pipeline.benchmark.map_page import MAP_SUMMARY, PROJECTS_MAP
from pipeline.benchmark.run import Benchmark
from pipeline.config import ConfigError, load_config
from stages.errors import InputError
from stages.inputs.images import list_images
from stages.results.table import read_summary
from tests.test_pipeline.command import refused
from tests.test_pipeline.test_benchmark.packed import in_tars, made_by, pack
from tests.test_pipeline.tiny import ADAPTERS, by_network

SCORES = ["knn+energy", "ncm+energy", "frozen:ncm+energy", "auto"]
CLASSES, IMAGES = (2, 3), (20,)
MORE = """
[[variants]]
name = "e1"
set = { "train.experts" = 1 }
"""


@pytest.fixture(scope="module")
def home(vit, tmp_path_factory):
    """Folder of a benchmark: tars in ``data``, the list of their images, the study that is cut into cells."""
    home = tmp_path_factory.mktemp("benchmark")
    pack(home)
    scores = 'scores = ["msp", "energy", "knn", "knn+energy"]'
    study = by_network(vit, in_tars(ADAPTERS)).replace(scores, f"scores = {json.dumps(SCORES)}")
    (home / "map.toml").write_text(study.replace("[cache]\n", "[cache]\npseudo_ood = 2\n") + MORE)
    return home


def make_map(home, work, *overrides, data=None, classes=CLASSES, images=IMAGES, **options):
    """Lines that the verb says."""
    benchmark = Benchmark([home / "map.toml"], home / "listed.csv.gz")
    choice = MapChoice(classes, images, overrides)
    lines = run_map(data or home / "data", work, choice, benchmark=benchmark, **options)
    return [line for line in lines if isinstance(line, str)]


@pytest.fixture(scope="module")
def finished(home, tmp_path_factory):
    """Work folder of the map, run once."""
    work = tmp_path_factory.mktemp("map")
    make_map(home, work)
    return work


def lines_of(work):
    return list(csv.DictReader(io.StringIO((work / "map.csv").read_text())))


def test_a_line_for_each_score_group_cell_and_number_of_experts(finished):
    named = [
        (line["score"], line["group"], int(line["classes"]), int(line["images"]), int(line["experts"]))
        for line in lines_of(finished)
    ]
    assert named == [
        (score, group, classes, images, experts)
        for score in SCORES
        for group in ("near", "far")
        for classes in CLASSES
        for images in IMAGES
        for experts in (1, 2)
    ]


def test_numbers_are_those_of_the_cells_studies(finished):
    for line in lines_of(finished):
        summary = read_summary(finished / "cells" / f"{line['classes']}x{line['images']}" / "scores")

        def mean(features, variant, score, line=line, summary=summary):
            heads = {"cls": ("probe", "none"), "mofe": ("refit", "none")}[features]
            (found,) = (
                own["fpr95_mean"]
                for own in summary
                if (own["features"], own["variant"], own["score"]) == (features, variant, score)
                and (own["ood"], own["group"]) == ("average", line["group"])
                and own["head"] in heads and not own["calibrated"]
            )  # fmt: skip
            return found

        refined = mean("mofe", {"1": "e1", "2": "default"}[line["experts"]], line["score"])
        frozen = mean("cls", "", line["score"].removeprefix("frozen:"))
        assert float(line["fpr95"]) == refined
        assert float(line["fpr95_frozen"]) == frozen
        assert float(line["fpr95_difference"]) == pytest.approx(refined - frozen, abs=1e-12)
        assert float(line["fpr95_lo"]) <= float(line["fpr95_difference"]) <= float(line["fpr95_hi"])


def test_small_cells_are_parts_of_large_ones(home, tmp_path):
    """A dry run writes their lists."""
    make_map(home, tmp_path, images=(20, 32), dry_run=True)

    def listed(cell, name, role):
        found = list_images(str(tmp_path / "cells" / cell / f"{name}.csv"), str(tmp_path / "images" / role))
        return found.class_names, set(found.ids)

    small, fewer_images, whole = (listed(cell, "train", "id-train") for cell in ("2x20", "3x20", "3x32"))
    assert (len(small[1]), len(fewer_images[1]), len(whole[1])) == (40, 60, 96)
    assert small[1] < fewer_images[1] < whole[1]
    test = listed("2x20", "test", "id-test")
    assert test[0] == small[0]
    assert len(test[1]) == 16  # of these classes, whatever there is to train on


def test_page_and_picture(finished):
    page, picture = (finished / "map.md").read_text(), (finished / "map.svg").read_text()
    assert "![the map](map.svg)" in page
    assert str(finished) not in page  # a page to be published
    summary = page.split(MAP_SUMMARY[0])[1].split(MAP_SUMMARY[1])[0].splitlines()
    assert summary[0] == "|  | E = 1 | E = 2 |"
    assert [line.split(" | ")[0] for line in summary[2:]] == [
        f"| {score}, {group}"
        for score in ("kNN+energy", "NCM+energy", "frozen NCM+energy", "auto")
        for group in ("near", "far")
    ]
    for line in lines_of(finished):
        shown = f"{100 * float(line['fpr95_difference']):+.1f}".replace("-", "−").replace("+0.0", "0.0")
        assert f"{shown} [" in page
        assert f"{100 * float(line['fpr95_frozen']):.1f} | " in page
    assert picture.startswith("<?xml")
    assert "3 × 20" in picture
    assert "E = 2" in picture


def test_a_finished_map_is_not_made_again_and_its_page_is_written_where_it_is_asked_for(home, finished, tmp_path):
    stages = [path for name in ("model", "scores", "report") for path in finished.glob(f"cells/*/{name}")]
    folders = (*stages, finished / "cache", finished / "images")
    before = made_by(*folders)
    made = {name: (finished / name).read_bytes() for name in ("map.csv", "map.md", "map.svg")}
    make_map(home, finished, page=tmp_path / "docs" / "MAP.md")
    assert len(stages) == 3 * len(CLASSES) * len(IMAGES)
    assert made_by(*folders) == before
    assert {name: (finished / name).read_bytes() for name in made} == made
    assert (tmp_path / "docs" / "MAP.svg").read_bytes() == made["map.svg"]
    assert "![the map](MAP.svg)" in (tmp_path / "docs" / "MAP.md").read_text()


def test_sets_that_cells_share_are_extracted_once(finished):
    names = [path.name for path in (finished / "cache").iterdir() if path.is_dir()]
    assert sum(name.startswith("threes-") for name in names) == 1
    assert sum(name.startswith("train-") for name in names if "pseudo" not in name) == len(CLASSES) * len(IMAGES)


def test_dry_run_trains_nothing(home, tmp_path):
    said = make_map(home, tmp_path / "work", dry_run=True)
    assert said[0].startswith("2x20: 4 sets of ")
    assert "train pretrained e1 seed 0: would run" in said
    assert not list((tmp_path / "work").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"classes": (2, 4)}, r"--classes: 2,4 given, must be one or more different numbers from 1 to 3, which"),
        ({"images": (20, 20)}, r"--images: 20,20 given, must be one or more different numbers from 1 to 32"),
        ({"images": ()}, r"--images:  given, must be"),
    ],
)
def test_cells_that_there_are_not_are_refused_before_any_work(home, tmp_path, given, message):
    with pytest.raises(ConfigError, match=message):
        make_map(home, tmp_path / "work", **given)
    assert not (tmp_path / "work" / "cells").exists()


def test_other_images_are_refused(home, tmp_path):
    data = shutil.copytree(home / "data", tmp_path / "data")
    shutil.copy(data / "test.tar", data / "photos.tar")
    with pytest.raises(InputError, match=r"16 missing \(photos/.*--unchecked"):
        make_map(home, tmp_path / "work", data=data)


def test_a_number_of_experts_that_is_chosen_is_no_row_of_a_map(home, tmp_path):
    with pytest.raises(ConfigError, match=r"needs train.experts as a number; variant default has none"):
        make_map(home, tmp_path / "work", 'train.experts="auto"')
    assert not (tmp_path / "work").exists()


def test_fewer_classes_than_experts_are_refused_before_an_image_is_unpacked(home, tmp_path):
    with pytest.raises(ConfigError, match=r"--classes: 1 given, fewer than the 2 experts of a variant"):
        make_map(home, tmp_path / "work", classes=(1,))
    assert not (tmp_path / "work").exists()


def test_unpacked_images_are_taken_again_until_they_are_others(home, tmp_path):
    source = str(home / "data" / "train.tar")
    first = OrderedImages.unpack(source, tmp_path / "images", "these")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "images").rglob("*.png")}
    assert OrderedImages.unpack(source, tmp_path / "images", "these") == first
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert OrderedImages.unpack(str(home / "data" / "test.tar"), tmp_path / "images", "others") != first


def test_the_projects_own_map():
    """20 to 157 classes × 25 to 100 images × 1 to 16 experts, of the study that `make results` runs."""
    config, results = load_config(MAPPED), load_config(MAPPED.with_name("results-manyclasses.toml"))
    assert (config.sets, config.backbone) == (results.sets, results.backbone)
    assert sorted(settings.experts for settings in config.variant_configs().values()) == [1, 4, 8, 16]
    choice = MapChoice()
    assert Cell(max(choice.classes), max(choice.images)).name == "157x100"


def test_the_projects_page_is_shown_where_it_is_explained():
    """Its summary is copied whole into the findings, from mark to mark, whenever it is written anew."""
    page = PROJECTS_MAP.read_text(encoding="utf-8")
    begin, end = MAP_SUMMARY
    summary = page.split(begin)[1].split(end)[0]
    findings = PROJECTS_MAP.with_name("FINDINGS.md").read_text(encoding="utf-8")
    assert findings.split(begin)[1].split(end)[0] == summary
    assert re.search(r"\| commit \| [0-9a-f]{40} \|", page)  # of all cells, with no change beside
    assert PROJECTS_MAP.with_suffix(".svg").read_text(encoding="utf-8").startswith("<?xml")


def test_command_line(tmp_path):
    assert refused("map", tmp_path).startswith(f"{tmp_path} does not hold the benchmark's images: ")
    assert "must be numbers with commas" in refused("map", tmp_path, "--classes", "many")
