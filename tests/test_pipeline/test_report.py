"""The report page, made from work folders that the real functions wrote."""

import base64
import json
import re
import shutil
from dataclasses import asdict, replace
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib.figure import Figure

from pipeline.config import load_config
from pipeline.record import RunRecord
from pipeline.report.figures import (
    Points,
    Series,
    admitted,
    epoch_panel,
    histogram_panel,
    line_panel,
    scatter_panel,
)
from pipeline.report.gallery import MOST_PICTURES, galleries
from pipeline.report.maps import _pca, feature_maps
from pipeline.report.mixtures import _accuracy_before
from pipeline.report.page import write_report
from pipeline.report.study import Evidence, ReportedStudy
from pipeline.report.wording import SHOWN_METRICS, duration, percent, points, size, verdict
from stages.detection.conformal import FalseAlarms, threshold_at
from stages.detection.refined import RefinedFeatures
from stages.detection.sources import BackboneSource, MixtureFolder
from stages.errors import InputError
from stages.extract import import_set
from stages.files.documents import digest_of, read_document, write_contents, write_document, write_json, write_text
from stages.inputs.arrays import list_arrays
from stages.inputs.images import decode_image, list_images
from stages.metrics.ranking import auroc
from stages.mixture.mixup import class_alpha
from stages.progress import NullProgress
from stages.results.method import ROUTINGS, Method, samples_path
from stages.results.table import Evaluator, MethodRun, read_summary, summarise, write_table
from stages.training.cached import EpochRecord
from tests.conftest import SOURCES
from tests.test_pipeline.browser import CHROMIUM, opened
from tests.test_pipeline.command import done, refused, settings

OODS = [("near-birds", "near"), ("far-noise", "far")]
N_ID, N_OOD = 80, 60
SIZES = {"animals": N_ID} | {name: N_OOD for name, _ in OODS}
# What is kept of these sets, and where their images are.
CACHED = {"train": "train", "animals": "test", "near-birds": "near", "far-noise": "far"}
IMAGES = {name: SOURCES[cache] for name, cache in CACHED.items()}
CLASSES = ["<b>cat</b> & $dog$", "fox", "owl", "<img src=http://x.test/y>"]
RUNNING = [0.9, 0.5, 0.7, 0.9]  # accuracy of each class
STUDY = "a <script>alert(1)</script> study"
EXPERIMENT = f"""
name = "{STUDY}"
seeds = [0]
sets = [
  {{ name = "train", role = "id-train", images = "sklearn:digits[0-6]/train" }},
  {{ name = "animals", role = "id-test", images = "sklearn:digits[0-6]/test" }},
  {{ name = "near-birds", role = "near-ood", images = "sklearn:digits[7-9]" }},
  {{ name = "far-noise", role = "far-ood", images = "sklearn:photos" }},
]
"""


VARIANTS = {"four": ("train.experts", 4, 2.2), "still": ("train.mixup", "static", 1.5)}


def run(backbone, features, head, variant, seed, routing, score, calibrated=False):
    return MethodRun(Method(backbone, features, head, variant, routing, score, calibrated), seed, "{}", "paper")


FROZEN = [
    (run("pretrained", "cls", "probe", "", None, "none", "energy"), 0.6),
    (run("pretrained", "cls", "none", "", None, "none", "knn"), 1.0),
    (run("pretrained", "cls", "probe", "", None, "none", "knn+energy"), 1.2),
]


def mixture(seed):
    """Methods of one seed, with how far their OOD scores lie above the ID scores."""
    return [
        (run("pretrained", "mofe", "none", "default", seed, "predicted", "knn"), 1.4),
        (run("pretrained", "mofe", "refit", "default", seed, "predicted", "knn+energy"), 2.0),
        (run("pretrained", "mofe", "refit", "default", seed, "predicted", "knn+energy", calibrated=True), 1.9),
        (run("pretrained", "mofe", "none", "default", seed, "top2", "knn"), 1.5),
        (run("pretrained", "mofe", "none", "default", seed, "oracle", "knn"), 5.0),
    ]


def make_study(work, seeds=(0,), experts=2, variants=()):
    """A scored study with well-separated answers: the mixture's raw sum is best, the oracle would be better still."""
    rng = np.random.default_rng(7)
    methods = FROZEN + [pair for seed in seeds for pair in mixture(seed)]
    for variant, (_, _, distance) in dict(variants).items():
        first = mixture(0)[1][0]
        methods.append((replace(first, method=replace(first.method, variant=variant)), distance))
    evaluator = Evaluator(OODS, {"id": N_ID, **{name: N_OOD for name, _ in OODS}}, replicates=100)
    rows, thresholds = [], []
    samples = {}
    for own, distance in methods:
        id_scores = rng.normal(size=N_ID).astype(np.float32)
        ood_scores = {ood: rng.normal(distance, size=N_OOD).astype(np.float32) for ood, _ in OODS}
        rows += evaluator.rows(own, id_scores, ood_scores)
        if own.method.routing != "oracle":
            thresholds += [own.columns | asdict(threshold_at(id_scores, admit)) for admit in (0.95, 0.99)]
        file = samples_path(work / "scores", own.method, own.seed)
        samples.setdefault(file, {})[own.method.column] = np.concatenate([id_scores, *ood_scores.values()])
    scores = work / "scores"
    write_table(scores, [row.columns for row, _ in rows], summarise(rows))
    write_json(scores / "thresholds.json", thresholds)
    (scores / "samples").mkdir()
    sets = ["animals"] * N_ID + [name for name, _ in OODS for _ in range(N_OOD)]
    n_all = len(sets)
    label = [CLASSES[row % 4] for row in range(N_ID)] + [""] * (n_all - N_ID)
    about = {
        "set": sets,
        "id": [id_ for name, n in SIZES.items() for id_ in list_images(IMAGES[name]).ids[:n]],
        "label": label,
        # Every eighth ID image is taken for the next class, of the other group, whose expert got it.
        "prediction": [CLASSES[(row + (row % 8 == 0)) % 4] for row in range(n_all)],
        "expert": [(row + (row % 8 == 0)) % experts for row in range(n_all)],
    }
    for file, columns in samples.items():
        own = about if "-mofe-" in file.name else about | {"expert": pa.nulls(n_all)}
        pq.write_table(pa.table({**own, **columns}), file)

    frozen = {"backbone": "pretrained", "features": "cls", "variant": "", "seed": None}
    mofe = [frozen | {"features": "mofe", "variant": "default", "seed": seed} for seed in seeds]
    load = {"id": [30, 50], "near-birds": [10, 50], "far-noise": [60, 0]}
    if experts == 1:
        load = {name: [sum(own)] for name, own in load.items()}
    record = {
        "accuracy": [frozen | {"head": "probe", "accuracy": 0.9, "n": N_ID}]
        + [key | {"head": "refit", "accuracy": 0.95, "n": N_ID} for key in mofe],
        "router": [
            key
            | {"kind": "end", "parameters": 1234567, "experts": experts, "accuracy": 0.875, "load": load}
            | {"id_accuracy": {name: {"refit": 0.9 + seed / 100 + i / 100} for i, name in enumerate(ROUTINGS)}}
            for key, seed in zip(mofe, seeds, strict=True)
        ],
        "k": [key | {"rule": "given", "k": 5} for key in (frozen, *mofe)],
        "split": {"pretrained": "held-out split"},
        "overlap": [{"sets": ["train", "near-birds"], "ids": [["a", "x"], ["b", "y"], ["c", "z"]]}],
    }
    for variant, (key, value, _) in dict(variants).items():
        n_experts = value if key == "train.experts" else experts
        other = {"variant": variant, "experts": n_experts, "load": {"id": [1] * n_experts}}
        record["router"].append(record["router"][0] | other)
    write_json(scores / "id.json", record)
    names = (str(path.relative_to(scores)) for path in scores.rglob("*") if path.is_file())
    write_contents(scores, "what they are made of", names)

    for seed in seeds:
        folder = work / "model" / "pretrained" / "default" / f"seed-{seed}"
        lines = [
            {"run": "final"}
            | asdict(
                EpochRecord(
                    epoch, 2.0 - epoch, 1.0, 1.0, 1e-4, [30, 50], 1.5 - epoch, 0.8, 0.9, RUNNING, [0.1, 0.8, 0.45, 0.1]
                )
            )
            for epoch in range(2)
        ]
        write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        groups = {name: index % experts for index, name in enumerate(CLASSES)}
        about = {"groups": groups, "best_epoch": 1, "classes": CLASSES}
        write_document(folder / "mofe.json", about | {"files": {"metrics.jsonl": digest_of(folder / "metrics.jsonl")}})

    more = "".join(
        f"[[variants]]\nname = '{variant}'\nset = {{ '{key}' = {json.dumps(value)} }}\n"
        for variant, (key, value, _) in dict(variants).items()
    )
    (work / "study.toml").write_text(EXPERIMENT + more)
    config = load_config(str(work / "study.toml"), [f"work={work}"])
    with RunRecord(work / "record.json", config).running("score", "fingerprint"):
        pass
    return work


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return make_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def page(work):
    return page_of(work)


class Page(HTMLParser):
    """Elements with their attributes, text, and table rows by the id of their section."""

    VOID = ("meta", "br", "img", "input", "link", "hr")

    def __init__(self, html):
        super().__init__()
        self.html = html
        self.elements, self.open, self.rows, self.text, self.section = [], [], {}, "", None
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.elements.append((tag, found))
        if tag == "section" and "id" in found:
            self.section = found["id"]
            self.rows[self.section] = []
        if tag == "tr" and self.section:
            self.rows[self.section].append({"class": found.get("class", ""), "name": "", "cells": [], "bold": []})
        if tag == "td":
            row = self.rows[self.section][-1]
            row["cells"].append("")
            row["bold"].append(False)
        if tag == "b":
            self.rows[self.section][-1]["bold"][-1] = True
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if "tr" in self.open:
            row = self.rows[self.section][-1]
            if "th" in self.open:
                row["name"] += data.strip()
            elif "td" in self.open:
                row["cells"][-1] += data.strip()

    def body(self, section):
        return [row for row in self.rows[section] if row["cells"]]


def page_of(work):
    """The page of a study, written anew."""
    return Page(write_report(ReportedStudy.of(work)).read_text("utf-8"))


def test_the_page_opens_from_disk_and_asks_for_nothing(page, work):
    assert (work / "report" / "index.html").is_file()
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href", "xlink:href", "srcset"):
            assert attributes.get(name, "#").startswith("#"), (tag, attributes)
    assert all(address.startswith("#") for address in re.findall(r"url\(([^)]*)\)", page.html))
    assert "@import" not in page.html
    assert "default-src 'none'" in page.html  # and the browser would refuse
    linked = {attributes["href"][1:] for _, attributes in page.elements if "href" in attributes}
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert linked <= set(ids)
    assert len(ids) == len(set(ids))


def test_it_names_the_study_and_what_was_compared(page):
    head = page.text[: page.text.index("Per cent, averaged")]
    for said in (STUDY, "80", "near-birds", "near, 60", "far-noise", "far, 60", "vit_small_patch14_dinov2.lvd142m"):
        assert said in head
    assert "3 images of near-birds stand in train as well" in " ".join(page.text.split())


def test_names_are_escaped(page):
    assert "<script" not in page.html
    assert "<b>cat" not in page.html
    assert "<img" not in page.html
    for name in CLASSES:
        assert name in page.text


def test_the_frozen_knn_stands_first_wherever_it_was_scored(page):
    for section in ("table", "sets", "thresholds"):
        assert page.body(section)[0]["class"] == "baseline"
    first = page.body("table")[0]
    assert first["name"] == "kNNbaseline"
    assert first["cells"][-2:] == ["–", "–"]  # it is not compared with itself


def test_a_threshold_that_so_few_rows_cannot_give_is_none(page):
    """80 rows give one that admits 95 % of ID, and none for 99 %."""
    for row in page.body("thresholds"):
        assert "none: needs 99 rows" in " ".join(row["cells"])
        assert "none: needs 19 rows" not in " ".join(row["cells"])


def test_the_page_says_what_80_rows_promise(page):
    promises = page.text[page.text.index("Promises") :]
    said = " ".join(promises.split())
    assert FalseAlarms.of(80, 0.95).words(80) in said
    assert "none: it needs 99 calibration rows, there are 80" in said
    assert "to flag 1 of 100 images, with 80 it flags 25 or more or none" in said


def test_bold_is_the_best_of_each_column_and_nothing_else(page, work):
    averages = [line for line in read_summary(work / "scores") if line["ood"] == "average"]
    rows = page.body("table")
    columns = [(group, metric) for group in ("near", "far", "all") for metric in SHOWN_METRICS]
    for index, (group, metric) in enumerate(columns, start=1):
        values = [line[f"{metric.name}_mean"] for line in averages if line["group"] == group]
        best = percent(max(values) if metric.name == "auroc" else min(values))
        assert [row["cells"][index] for row in rows if row["bold"][index]] == [best] * sum(
            percent(value) == best for value in values
        )
    assert not any(any(row["bold"][len(columns) + 1 :]) for row in rows)


def test_routing_by_the_true_label_is_shown_apart_and_never_best(page, work):
    lines = read_summary(work / "scores")
    oracle = [line for line in lines if line["routing"] == "oracle"]
    assert min(line["auroc_mean"] for line in oracle) > max(
        line["auroc_mean"] for line in lines if line["routing"] != "oracle" and line["ood"] != "average"
    )
    shown = [row for row in page.rows["routing"] if row["class"] == "oracle"]
    assert [row["name"] for row in shown] == ["kNN"]
    routed = [
        next(line for line in lines if (line["features"], line["head"], line["routing"]) == ("mofe", "none", routing))
        for routing in ROUTINGS
    ]
    predicted, two, with_label = (percent(line["auroc_mean"]) for line in routed)
    assert shown[0]["cells"][1] == f"{with_label}({predicted}, {two})"
    assert not any(shown[0]["bold"])
    naming = ("head", "features", "score", "calibrated", "routing")
    methods = {tuple(line[name] for name in naming) for line in lines if line["routing"] != "oracle"}
    assert len(page.body("table")) == len(methods)


def test_routing_says_what_the_mixtures_are_and_what_a_wrong_route_costs(page, tmp_path):
    first = page.body("routing")[0]
    assert first["name"] == "MoFE · default · 2 experts"
    assert first["cells"] == ["end", "1,234,567", "87.5", "90.0", "91.0", "92.0"]  # predicted, top2, oracle
    seeds = page_of(make_study(tmp_path, seeds=(3, 5))).body("routing")[0]
    assert seeds["cells"][3:] == ["94.0", "95.0", "96.0"]  # means over seeds
    assert "Each expert is a copy of the backbone's own end." in page.text
    assert "kNNtop2" in [row["name"] for row in page.body("table")]


def test_one_expert_has_neither_a_load_nor_wrong_routes(tmp_path):
    page = page_of(make_study(tmp_path, experts=1))
    (row,) = page.body("routing")
    assert (row["name"], row["cells"][:3]) == ("MoFE · default · 1 expert", ["end", "1,234,567", "–"])
    assert "What a wrong route costs" not in page.text


def test_differences_come_with_their_interval_and_whether_it_excludes_0(page, work):
    averages = [line for line in read_summary(work / "scores") if (line["ood"], line["group"]) == ("average", "all")]
    sum_of_mixture = next(line for line in averages if line["features"] == "mofe" and line["score"] == "knn+energy")
    row = next(row for row in page.body("table") if row["class"] == "recommended")
    lo, hi = sum_of_mixture["auroc_minus_knn_lo"], sum_of_mixture["auroc_minus_knn_hi"]
    assert row["cells"][-2] == f"▲ {points(sum_of_mixture['auroc_minus_knn'])}[{points(lo)}, {points(hi)}]"
    assert row["cells"][-1].startswith("▼" if verdict(sum_of_mixture, SHOWN_METRICS[1]) == "worse" else "▲")


@pytest.mark.parametrize(
    ("says", "expected"),
    [
        ("gain", "better"),
        ("loss", "worse"),
        ("gain for this seed", "better"),
        ("no difference", "open"),
        ("too few images", "open"),
    ],
)
def test_verdict_is_what_the_difference_says(says, expected):
    assert verdict({"fpr95_minus_knn_says": says}, SHOWN_METRICS[1]) == expected


def test_every_set_has_histograms_and_a_roc_of_both_methods(page):
    labels = [attributes["aria-label"] for tag, attributes in page.elements if "aria-label" in attributes]
    for ood, _ in OODS:
        assert f"Frozen kNN: scores of ID and {ood}" in labels
        assert f"MoFE kNN+energy (refit): scores of ID and {ood}" in labels
        assert f"ROC of ID against {ood}" in labels
    assert "MoFE · default · pretrained backbone: Mixup α" in labels


def test_the_drawn_roc_has_the_area_of_the_table():
    rng = np.random.default_rng(0)
    id_scores, ood_scores = rng.integers(0, 9, 200).astype(np.float32), rng.integers(3, 12, 90).astype(np.float32)
    x, y = admitted(id_scores, ood_scores)
    assert np.trapezoid(y, x) == pytest.approx(auroc(id_scores, ood_scores))  # ties, too
    many = rng.normal(size=5000).astype(np.float32), rng.normal(1, size=5000).astype(np.float32)
    x, y = admitted(*many)
    assert len(x) <= 301
    assert np.trapezoid(y, x) == pytest.approx(auroc(*many), abs=1e-4)


@pytest.mark.parametrize("largest", [3e-7, 0.04, 1.0, 98.6, 123456.0, 4e9])
def test_what_stands_beside_the_axes_of_a_panel_lies_within_it(monkeypatch, largest):
    """By matplotlib's own measure of numbers, names and a common factor."""
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *to, **how: (drawn.append(figure), save(figure, *to, **how)))
    runs = [[largest / 3, -largest, largest]]
    epoch_panel("loss", [Series("id", [[largest, largest / 3]])])  # begins at 0
    line_panel("FPR95 by experts", [1, 16, largest], [Series("id", runs)], ("number of experts", "FPR95, %"))
    histogram_panel("scores", np.array(runs[0]), np.array(runs[0]) * 2, threshold=largest)
    scatter_panel("α", [Points("id", np.array([[0, -largest], [largest, largest]]))], ("difficulty", "α"))
    scatter_panel("map", [Points("id", np.array([[0, -largest], [largest, largest]]))])
    for figure in drawn:
        box, own = figure.axes[0].get_tightbbox(), figure.bbox
        assert own.x0 <= box.x0 <= box.x1 <= own.x1
        assert own.y0 <= box.y0 <= box.y1 <= own.y1
    assert len(drawn) == 5


def test_the_same_files_give_the_same_bytes(work, tmp_path):
    copy = shutil.copytree(work, tmp_path / "elsewhere")
    assert write_report(ReportedStudy.of(copy)).read_bytes() == write_report(ReportedStudy.of(work)).read_bytes()


def test_several_seeds_give_deviations(tmp_path):
    page = page_of(make_study(tmp_path, seeds=(3, 5)))
    row = next(row for row in page.body("table") if row["class"] == "recommended")
    assert all("±" in cell for cell in row["cells"][1:10])
    assert "±" not in page.body("table")[0]["cells"][1]  # nothing of the frozen kNN is random
    assert "Seed 3." in page.text


def test_what_a_study_does_not_have_is_left_out(tmp_path):
    work = make_study(tmp_path, seeds=())
    page = page_of(work)
    assert "routing" not in page.rows
    assert "training" not in page.rows
    assert page.body("table")[0]["class"] == "baseline"


# -------------------------------------------------------------------------------------- experts, classes, variants


def test_where_the_router_sent_each_group_and_how_each_expert_did(page):
    """Of 80 ID images each eighth, the first of its class's group, went to the other expert as the next class."""
    confusion = [row for row in page.body("routing") if row["name"].startswith("group")]
    assert [row["cells"] for row in confusion] == [["30", "10"], ["0", "40"]]
    assert [row["bold"] for row in confusion] == [[True, False], [False, True]]
    experts = [row for row in page.body("routing") if row["name"] in ("0", "1")]
    assert [row["cells"] for row in experts] == [
        ["2", "30", "100.0", "100.0", "100.0", "75.0"],
        ["2", "50", "80.0", "80.0", "100.0", "100.0"],
    ]


def test_classes_have_their_difficulty_and_alpha_the_hardest_first(page):
    rows = page.body("classes")
    assert [row["name"] for row in rows] == [CLASSES[index] for index in (1, 2, 0, 3)]
    assert [row["cells"][1:4] for row in rows] == [
        ["1.00", "0.800", "50.0"],
        ["0.50", "0.450", "70.0"],
        ["0.00", "0.100", "90.0"],
        ["0.00", "0.100", "90.0"],
    ]
    assert [row["cells"][4:] for row in rows] == [["100.0", "20"], ["100.0", "20"], ["50.0", "20"], ["100.0", "20"]]


def test_variants_stand_beside_each_other_with_what_they_change(tmp_path):
    page = page_of(make_study(tmp_path, variants=VARIANTS))
    rows = page.body("variants")
    assert [row["name"] for row in rows] == ["default", "fourexperts = 4", "stillmixup = static"]
    assert [row["cells"][0] for row in rows] == ["2", "4", "2"]
    labels = [attributes["aria-label"] for tag, attributes in page.elements if "aria-label" in attributes]
    assert "AUROC by number of experts" in labels
    assert "FPR95 by number of experts" in labels
    best = max(row["cells"][3] for row in rows)  # near AUROC
    assert [row["bold"][3] for row in rows] == [row["cells"][3] == best for row in rows]


def test_one_variant_has_no_others_beside_it(page):
    assert "variants" not in page.rows


def test_what_the_run_cost(full_page, evidence):
    rows = {row["name"]: row["cells"] for row in full_page.body("cost")}
    assert rows["score"][1] == "done"
    assert rows["score"][3].endswith("iB")  # peak memory
    for name, cache in evidence.caches.items():
        n_bytes = sum(file.stat().st_size for file in cache.path.glob("shard-*.h5"))
        assert rows[name] == [f"{cache.n_rows:,}", size(n_bytes), size(n_bytes / cache.n_rows)]


# --------------------------------------------------------------------------------------------------- map and gallery


@pytest.fixture(scope="module")
def evidence(work, caches, data, probe, mixture, backbone):
    """Real features of the study's sets, refined by a real mixture, and their images."""
    folder = work / "model" / "pretrained" / "default" / "seed-0"
    kept = {name: (folder / name).read_bytes() for name in ("mofe.json", "metrics.jsonl")}
    shutil.copytree(mixture, folder, dirs_exist_ok=True)
    trained = MixtureFolder("default", 0, folder)
    source = BackboneSource("pretrained", None, data, probe, None, (trained,), (), lambda: backbone)
    refined = RefinedFeatures(source, trained)
    for name in SIZES:
        cache = caches[CACHED[name]]
        refined.rows(name, cache, np.full(cache.n_rows, -1, np.int32))
    for name, content in kept.items():
        (folder / name).write_bytes(content)
    files = {name: digest_of(folder / name) for name in ("mofe.safetensors", "metrics.jsonl")}
    write_document(folder / "mofe.json", read_document(folder / "mofe.json") | {"files": files})
    return Evidence("train", {name: caches[cache] for name, cache in CACHED.items()}, images_of)


def images_of(name):
    return list_images(IMAGES[name])


@pytest.fixture(scope="module")
def full_path(work, evidence, tmp_path_factory):
    copy = shutil.copytree(work, tmp_path_factory.mktemp("full") / "work")
    return write_report(ReportedStudy.of(copy, evidence))


@pytest.fixture(scope="module")
def full_page(full_path):
    return Page(full_path.read_text("utf-8"))


def test_features_are_on_maps_before_and_after_the_experts(full_page):
    labels = [attributes["aria-label"] for tag, attributes in full_page.elements if "aria-label" in attributes]
    for title in ("Before the experts", "After the experts"):
        for way in ("PCA fitted on ID", "t-SNE"):
            assert f"{title}, {way}" in labels
    assert "Left out" not in full_page.text


def test_what_a_map_needs_and_is_gone_is_said(page, work, evidence, tmp_path):
    assert "Left out: no cached features of animals, near-birds, far-noise." in page.text
    copy = shutil.copytree(work, tmp_path / "work")
    shutil.rmtree(copy / "model" / "pretrained" / "default" / "seed-0" / "refined" / "final" / "sets")
    told = feature_maps(ReportedStudy.of(copy, evidence), NullProgress())
    assert told["why"] == "after the experts, the refined features are not kept any more"
    assert [panel["title"] for panel in told["panels"]] == [
        "Before the experts, PCA fitted on ID",
        "Before the experts, t-SNE",
    ]


def test_one_value_a_row_needs_no_map(evidence, work, tmp_path):
    np.savez(tmp_path / "rows.npz", cls=np.float32([[1], [2]]))
    arrays = list_arrays(str(tmp_path / "rows.npz"))
    narrow = import_set("rows", arrays, arrays.spec("one value", "float32"), tmp_path)
    told = feature_maps(
        ReportedStudy.of(work, replace(evidence, caches=dict.fromkeys(evidence.caches, narrow))), NullProgress()
    )
    assert told == {"panels": [], "why": "one value a row needs no plane"}


def test_ood_images_have_no_say_in_the_plane_of_pca():
    rng = np.random.default_rng(0)
    fitted, ood = rng.normal(size=(50, 8)).astype(np.float32), rng.normal(9, 5, size=(30, 8)).astype(np.float32)
    alone, beside = _pca(fitted, {"id": fitted}), _pca(fitted, {"id": fitted, "ood": ood})
    np.testing.assert_array_equal(alone["id"], beside["id"])
    spread = alone["id"].var(axis=0, ddof=1)
    assert spread == pytest.approx(np.linalg.eigvalsh(np.cov(fitted.T.astype(float)))[-1:-3:-1], rel=1e-4)


class Counted:
    """An image that counts how often any is read."""

    reads = 0

    def __init__(self, content):
        self.content = content

    def read(self):
        Counted.reads += 1
        return self.content if isinstance(self.content, bytes) else self.content.read()


def test_the_gallery_shows_what_looks_least_like_what_it_is(full_page, work):
    pictures = [found for tag, found in full_page.elements if tag == "img"]
    assert len(pictures) == 36
    (file,) = (work / "scores" / "samples").glob("pretrained-mofe-refit-*-predicted.parquet")
    table = pq.read_table(file)
    sets, ids, scores = (np.asarray(table[name].to_pylist()) for name in ("set", "id", "knn+energy"))
    expected = []
    for name in SIZES:
        own = np.flatnonzero(sets == name)
        order = np.argsort(-scores[own] if name == "animals" else scores[own], kind="stable")[:12]
        expected += [(name, ids[row]) for row in own[order]]
    assert [found["alt"] for found in pictures] == [id_ for _, id_ in expected]
    for found, (name, id_) in zip(pictures, expected, strict=True):
        shown = decode_image(base64.b64decode(found["src"].partition(",")[2]))
        images = images_of(name)
        image = decode_image(images.reader().read(images.ids.index(id_)))
        assert max(shown.size) == min(112, max(image.size))
        image.thumbnail(shown.size)
        assert np.abs(np.asarray(shown, float) - np.asarray(image, float)).mean() < 12  # a JPEG of it


def test_at_most_200_images_are_read_in_all(tmp_path):
    def counted(name):
        images = images_of(name)
        return replace(images, contents=tuple(map(Counted, images.contents)))

    Counted.reads = 0
    study = ReportedStudy.of(make_study(tmp_path), Evidence("train", {}, counted))
    galleries(study, 20)
    assert Counted.reads == 18  # six of each of three sets
    Counted.reads = 0
    galleries(study)
    assert Counted.reads == 36
    assert MOST_PICTURES == 200


def test_images_that_are_gone_or_others_are_listed_with_the_reason(page, work, evidence):
    gallery = page.html[page.html.index('id="gallery"') :]
    assert gallery.count("No pictures: nobody says where its images are.") == 3
    assert "<img" not in gallery
    scores = pq.read_table(next((work / "scores" / "samples").glob("*-mofe-refit-*-predicted.parquet")))
    worst = int(np.argmax(scores["knn+energy"].to_numpy()[:N_ID]))
    assert scores["id"][worst].as_py() in gallery
    assert f"{scores['knn+energy'][worst].as_py():.3f}" in gallery

    def other(name):
        if name == "far-noise":
            raise InputError("far-noise: no such file or folder")
        images = images_of(name)
        return replace(images, contents=images.contents[1:] + images.contents[:1])

    *others, gone = galleries(ReportedStudy.of(work, replace(evidence, images=other)))
    reasons = [picture.reason for found in others for picture in found["pictures"]]
    assert reasons == ["another image now than the one that was scored"] * 24
    assert gone["reason"] == "far-noise: no such file or folder"
    assert [picture.uri for picture in gone["pictures"]] == [None] * 12


@pytest.mark.parametrize(
    "name",
    [
        "scores/table.json",
        "scores/summary.csv",
        "scores/id.json",
        "scores/thresholds.json",
        "scores/samples/pretrained-cls-none-none-none-none.parquet",
        "record.json",
    ],
)
def test_a_missing_or_damaged_file_is_named(work, tmp_path, name):
    copy = shutil.copytree(work, tmp_path / "copy")
    whole = (copy / name).read_bytes()
    for content in (b"", b"{}", b'[{"ood": "a"}]', whole[:99] + bytes([whole[99] ^ 1]) + whole[100:]):
        (copy / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{re.escape(name)} .*run make score"):
            ReportedStudy.of(copy)
    (copy / name).unlink()
    with pytest.raises(InputError, match=f"{re.escape(name)} is missing: run make score"):
        ReportedStudy.of(copy)


def test_an_empty_folder_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="run make score"):
        ReportedStudy.of(tmp_path / "nothing")


def test_numbers_are_written_for_people():
    assert [percent(0.9312), percent(None), percent(float("nan"))] == ["93.1", "–", "–"]
    assert [points(0.012), points(-0.5), points(-0.0001)] == ["+1.2", "−50.0", "0.0"]
    assert [duration(5.42), duration(59.99), duration(192), duration(7290)] == [
        "5.4 s",
        "1 min 0 s",
        "3 min 12 s",
        "2 h 2 min",
    ]


# ---------------------------------------------------------------------------------------------------- several studies


@pytest.fixture(scope="module")
def joint(work, tmp_path_factory):
    """The page of two studies with the same test sets, and what the command line says."""
    root = tmp_path_factory.mktemp("joint")
    shutil.copytree(work, root / "a" / "work")
    make_study(root / "b", seeds=())
    record = read_document(root / "b" / "record.json")
    write_document(root / "b" / "record.json", record | {"name": "frozen alone"})
    files = []
    for name, folder in (("a.toml", "a/work"), ("b.toml", "b")):
        (root / name).write_text(f"work = {json.dumps(folder)}\n" + EXPERIMENT)
        files.append(root / name)
    said = done("report", *files, "--output", root / "joint").out
    return root, files, said


def test_several_studies_stand_side_by_side_in_one_page(joint):
    root, _, said = joint
    assert said.rstrip().endswith(str(root / "joint" / "index.html"))
    page = Page((root / "joint" / "index.html").read_text("utf-8"))
    rows = page.body("studies")
    assert [row["name"] for row in rows] == [
        *("Frozen kNN", "Frozen kNN+energy", "MoFE kNN+energy (refit)"),
        *("Frozen kNN", "Frozen kNN+energy"),
    ]
    for index in range(1, 10):  # bold is the best of both
        values = [float(row["cells"][index - 1]) for row in rows]
        better = max if index % 3 == 1 else min
        assert [row["bold"][index - 1] for row in rows] == [value == better(values) for value in values]
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {"study-0-top", "study-0-table", "study-1-top", "study-1-table"} <= set(ids)
    linked = {attributes["href"][1:] for _, attributes in page.elements if "href" in attributes}
    assert linked <= set(ids)
    assert "study-0-routing" in ids
    assert "study-1-routing" not in ids  # it has no mixture


def test_the_joint_summary_says_which_study(joint):
    root, _, said = joint
    lines = read_summary(root / "joint")
    assert {line["study"] for line in lines} == {STUDY, "frozen alone"}
    own = [{k: v for k, v in line.items() if k != "study"} for line in lines if line["study"] == STUDY]
    alone = read_summary(root / "a" / "work" / "scores")
    assert sorted(map(str, own)) == sorted(map(str, alone))
    assert json.loads((root / "joint" / "summary.json").read_text())[0]["study"] == STUDY
    assert (root / "joint" / "summary.md").read_text().startswith("| study | backbone |")
    assert r"\begin{tabular}{lllllll" in (root / "joint" / "summary.tex").read_text()
    assert said.count("frozen alone") == 2  # a row of the table for each of its two methods


def test_studies_that_are_called_alike_are_told_apart(joint, tmp_path):
    root, *_ = joint
    shutil.copytree(root / "a", tmp_path / "first")
    shutil.copytree(root / "a", tmp_path / "second")
    for name in ("first", "second"):
        (tmp_path / f"{name}.toml").write_text(f"work = '{name}/work'\n" + EXPERIMENT)
    done("report", *sorted(tmp_path.glob("*.toml")), "--output", tmp_path / "joint")
    lines = json.loads((tmp_path / "joint" / "summary.json").read_text())
    assert {line["study"] for line in lines} == {f"{STUDY} (first/work)", f"{STUDY} (second/work)"}


def test_where_the_page_of_several_studies_goes(joint, tmp_path):
    root, files, _ = joint
    said = done("report", *files, "--dry-run").out
    assert said == f"report: would write {root / 'report' / 'index.html'}\n"
    assert "--output is for several studies" in refused("report", files[0], "--output", tmp_path)
    lost = settings(f"work={tmp_path}")
    assert refused("report", *files, *lost).endswith("contents.json is missing or damaged: run make score")


# ---------------------------------------------------------------------------------------------------------- a browser

PHONE, DESKTOP = 390, 1280
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian's package is chromium)")


@pytest.fixture(scope="module")
def tab():
    with opened() as tab:
        yield tab


@in_browser
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
@pytest.mark.parametrize("pages", ["one study", "several studies"])
def test_the_page_in_a_browser(tab, full_path, joint, width, pages):
    path = full_path if pages == "one study" else joint[0] / "joint" / "index.html"
    tab.errors.clear()
    tab.requests.clear()
    tab.show(path, width)
    assert tab.look() == []
    assert tab.errors == []
    assert [url.partition(":")[0] for url in tab.requests if not url.startswith("data:")] == ["file"]
    html = path.read_text("utf-8")
    assert tab.evaluate("document.images.length") == html.count("<img ") == (36 if pages == "one study" else 72)
    assert tab.evaluate("document.querySelectorAll('table').length") == html.count("<table>") > 8
    assert tab.evaluate("document.querySelectorAll('figure > svg').length") == html.count('<svg role="img"') > 8
    shown = np.asarray(decode_image(tab.picture()))
    assert shown.shape[1] == width
    assert shown.std() > 10  # not blank


@in_browser
def test_the_browser_finds_what_is_wrong_with_a_page(tab, tmp_path):
    page = tmp_path / "bad.html"
    wide = "<div style='width:2000px;height:1px'></div>"
    bad = "<img src='gone.png' alt='gone'><script>console.error('oh'); fail()</script>"
    page.write_text(f"<!doctype html><meta name=viewport content='width=device-width'>{wide}{bad}<table></table>")
    tab.show(page, DESKTOP)
    layout = " ".join(tab.look())
    assert "wider than 1280" in layout
    assert "no picture: gone" in layout
    assert "nothing to see: <table>" in layout
    said = " ".join(tab.errors)
    assert "oh" in said
    assert "Uncaught" in said
    assert any(url.endswith("gone.png") for url in tab.requests)


def test_difficulty_is_that_which_alpha_was_made_of():
    """The line before says it; at first there is none, and all classes are alike."""
    alpha = class_alpha(np.array([0.9, 0.5]), 0.1, 0.8, 1.0).tolist()
    first = {"alpha": [0.1, 0.1]}
    judged = [first | {"accuracy": [0.9, 0.5], "select_loss": 1.0}]
    judged.append({"accuracy": [0.7, 0.8], "alpha": alpha, "select_loss": 0.9})
    assert class_alpha(_accuracy_before(judged, 1), 0.1, 0.8, 1.0).tolist() == alpha
    assert class_alpha(_accuracy_before(judged, 0), 0.1, 0.8, 1.0).tolist() == [0.1, 0.1]
