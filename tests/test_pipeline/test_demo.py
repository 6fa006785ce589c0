"""The demo as its page has it, once, from nothing to the report; then everything that it left behind."""

import csv
import io
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
import timm
from sklearn.metrics import roc_auc_score

from cache import FeatureCache
from pipeline.config import RunOptions, load_config
from pipeline.sources import sources_to_score
from pipeline.workspace import Workspace
from stages.detection.factory import DetectorFactory
from stages.detection.refined import RefinedFeatures
from stages.inputs.images import decode_image, list_images
from stages.metrics.ranking import auroc
from stages.mixture.refine import refine
from stages.mixture.refined import Routes
from stages.results.table import compact, read_summary
from tests.test_docs import pages
from tests.test_pipeline.command import done, pipeline, refused, settings, snapshot

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "pipeline" / "experiments" / "demo.toml"
SETS = {"digits-train": 759, "digits-test": 505, "digits-7-9": 533, "photos": 154}
COLUMNS = [
    "backbone",
    "features",
    "head",
    "variant",
    "seed",
    "routing",
    "score",
    "params",
    "profile",
    "calibrated",
    "ood",
    "group",
    "n_id",
    "n_ood",
    "auroc",
    "fpr95",
    "fpr95_ood",
    "aupr_in",
    "aupr_out",
    "auroc_lo",
    "auroc_hi",
    "fpr95_lo",
    "fpr95_hi",
    "aurc",
    "augrc",
    "fsood_n_id",
    "fsood_auroc",
    "fsood_fpr95",
    "fsood_fpr95_ood",
    "fsood_aupr_in",
    "fsood_aupr_out",
    "fsood_aurc",
    "fsood_augrc",
    "labels",
]
INTERVALS = ("auroc_lo", "auroc_hi", "fpr95_lo", "fpr95_hi")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """``work`` of the demo after its one run, with what it printed in ``stdout`` and ``stderr`` beside it."""
    work = tmp_path_factory.mktemp("demo") / "work"
    command = [sys.executable, "-m", "pipeline", "run", str(DEMO), "--set", f"work={work}"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (work.parent / "stdout").write_text(run.stdout)
    (work.parent / "stderr").write_text(run.stderr)
    return work


@pytest.fixture
def verb(demo):
    """Arguments that name the demo's finished study: ``pipeline("info", *verb)``."""
    return [DEMO, *settings(f"work={demo}")]


@pytest.fixture
def copied(demo, tmp_path):
    """The finished study in another place, to be changed at will."""
    return Path(shutil.copytree(demo, tmp_path / "elsewhere"))


@pytest.fixture(scope="module")
def table(demo):
    return csv_lines(demo / "scores" / "table.csv")


def csv_lines(path):
    return list(csv.DictReader(io.StringIO(path.read_text())))


def json_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows_of(table, **columns):
    return [row for row in table if all(row[name] == value for name, value in columns.items())]


def row_of(table, **columns):
    (row,) = rows_of(table, **columns)
    return row


def samples(demo, name):
    return pq.read_table(demo / "scores" / "samples" / f"{name}.parquet").to_pydict()


# -------------------------------------------------------------------------------------------------- what comes out


def test_prints_the_table_and_where_the_report_is(demo):
    out = (demo.parent / "stdout").read_text()
    body = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert body[0][:6] == ["pretrained", "cls", "none", "", "none", "knn"]
    assert {"pretrained", "finetuned"} == {line[0] for line in body}
    assert not any("oracle" in line for line in body)
    assert out.rstrip().endswith(str(demo / "report" / "index.html"))
    err = (demo.parent / "stderr").read_text()
    assert "extract digits-train: 759/759" in err
    assert "Traceback" not in err
    assert [line for line in err.splitlines() if ": " not in line] == []  # progress and notes, no library's chatter


def test_every_path_of_the_contract(demo):
    caches = sorted(path.name.rsplit("-", 1)[0] for path in (demo / "cache").iterdir())
    assert caches == sorted([*SETS, *SETS])  # of the pre-trained and of the fine-tuned backbone
    for path in (demo / "cache").iterdir():
        assert {file.name for file in path.iterdir()} == {
            "manifest.json",
            "manifest.copy.json",
            "inputs.parquet",
            "failures.jsonl",
            "shard-00000.h5",
        }
    for path in [
        *(f"model/{backbone}/probe" for backbone in ("pretrained", "finetuned")),
        *(
            f"model/{backbone}/default/seed-0/{file}"
            for backbone in ("pretrained", "finetuned")
            for file in ("mofe.safetensors", "mofe.json", "metrics.jsonl")
        ),
        *(f"finetune/seed-0/{file}" for file in ("backbone.safetensors", "finetune.json", "metrics.jsonl")),
        *(f"scores/{file}" for file in ("table.csv", "table.json", "summary.csv", "summary.md", "summary.tex")),
        "scores/id.json",
        "scores/thresholds.json",
        "report/index.html",
        "record.json",
    ]:
        assert (demo / path).exists(), path
    left_over = [path for path in demo.rglob("*") if path.suffix in (".tmp", ".checkpoint", ".lock")]
    assert left_over == []


def test_rows_of_the_caches(demo):
    for path in (demo / "cache").iterdir():
        cache = FeatureCache.open(path)
        assert cache.n_rows == SETS[cache.manifest.dataset]
        assert cache.manifest.n_failures == 0
        assert cache.read("patches", slice(1)).shape == (1, 16, 192)
        assert cache.dim == 1280


def test_model_says_what_it_is(demo):
    about = json.loads((demo / "model/pretrained/default/seed-0/mofe.json").read_text())
    assert about["classes"] == list("0123456")
    assert sorted(np.bincount(list(about["groups"].values())).tolist()) == [3, 4]
    assert about["settings"]["epochs"] == 5
    cache = next((demo / "cache").glob(f"digits-train-{about['features'][:8]}"))
    assert about["features"] == FeatureCache.open(cache).fingerprint
    epochs = json_lines(demo / "model/pretrained/default/seed-0/metrics.jsonl")
    started, *trained = epochs
    assert (started["epoch"], started["loss"]) == (-1, None)  # heads and router as the probe, judged before any step
    assert [line["epoch"] for line in trained] == [0, 1, 2, 3, 4]
    assert trained[-1]["loss"] < trained[0]["loss"]
    assert about["best_epoch"] == min(epochs, key=lambda line: line["select_loss"])["epoch"]
    assert min(epochs[-1]["alpha"]) < max(epochs[-1]["alpha"])  # Dynamic-β: harder classes are mixed more strongly


def test_finetuned_backbone_has_features_of_its_own(demo, table):
    of_set = {}
    for path in (demo / "cache").glob("digits-test-*"):
        cache = FeatureCache.open(path)
        of_set[cache.spec.weights_sha] = cache
    assert len(of_set) == 2
    one, other = of_set.values()
    assert one.fingerprint != other.fingerprint
    assert np.abs(one.read("cls").astype(np.float32) - other.read("cls")).max() > 0.01
    assert np.array_equal(one.image_hashes, other.image_hashes)
    for features, head in [("cls", "finetune"), ("cls", "none"), ("mofe", "refit")]:
        assert rows_of(table, backbone="finetuned", features=features, head=head, seed="0")
    epochs = json_lines(demo / "finetune/seed-0/metrics.jsonl")
    assert len(epochs) == load_config(DEMO).finetune.epochs
    assert epochs[-1]["select_accuracy"] > 0.5  # of seven classes


def test_record(demo):
    record = json.loads((demo / "record.json").read_text())
    assert record["seeds"] == [0]
    assert record["config"]["train"]["experts"] == 2
    assert list(record["stages"]) == [
        "extract pretrained",
        "train pretrained",
        "finetune seed 0",
        "extract finetuned-seed-0",
        "train finetuned-seed-0",
        "score",
        "report",
    ]
    assert {stage["status"] for stage in record["stages"].values()} == {"done"}
    assert all(stage["duration_s"] > 0 for stage in record["stages"].values())
    assert {"versions", "git", "hardware"} <= record.keys()


# ------------------------------------------------------------------------------------------------------- the table


def test_columns_and_values_of_the_table(table):
    assert list(table[0]) == COLUMNS
    expected = {
        "backbone": {"pretrained", "finetuned"},
        "features": {"cls", "mofe"},
        "head": {"none", "probe", "trained", "refit", "refit-group", "finetune"},
        "variant": {"", "default"},
        "seed": {"", "0"},
        "routing": {"none", "predicted", "oracle"},
        "score": {"msp", "energy", "knn", "knn+energy"},
        "profile": {"paper"},
        "calibrated": {"true", "false"},
        "ood": {"digits-7-9", "photos", "average"},
        "group": {"near", "far", "all"},
        "n_id": {"505"},
        "n_ood": {"533", "154", "687"},
        "labels": {"given"},
    }
    assert {name: {row[name] for row in table} for name in expected} == expected
    for row in table:
        assert json.loads(row["params"])
        assert 0 <= float(row["auroc_lo"]) <= float(row["auroc"]) <= float(row["auroc_hi"]) <= 1
        assert 0 <= float(row["fpr95_lo"]) <= float(row["fpr95_hi"]) <= 1
        assert all(0 <= float(row[name]) <= 1 for name in ("fpr95", "fpr95_ood", "aupr_in", "aupr_out"))
        assert {row["aurc"] == "", row["augrc"] == ""} == {row["head"] == "none"}
        assert {value for name, value in row.items() if name.startswith("fsood")} == {""}  # no set is cs-id


def test_frozen_knn_stands_first(table):
    names = ("backbone", "features", "head", "variant", "seed", "routing", "score", "ood")
    assert [table[0][name] for name in names] == ["pretrained", "cls", "none", "", "", "none", "knn", "digits-7-9"]


def test_json_says_the_same(demo, table):
    as_json = json.loads((demo / "scores" / "table.json").read_text())
    assert len(as_json) == len(table)
    for row, line in zip(as_json, table, strict=True):
        assert list(row) == COLUMNS
        assert row["calibrated"] == (line["calibrated"] == "true")
        assert row["auroc"] == float(line["auroc"])
        assert (row["seed"] is None) == (line["seed"] == "")


def test_averages_are_over_sets_and_never_of_oracle_routing(table):
    assert not rows_of(table, routing="oracle", ood="average")
    for row in rows_of(table, ood="average", group="all"):
        method = {name: row[name] for name in COLUMNS[:10]}
        parts = [row_of(table, **method, ood=ood) for ood in ("digits-7-9", "photos")]
        for metric in ("auroc", "fpr95", "fpr95_ood", "aupr_in", "aupr_out"):
            assert float(row[metric]) == pytest.approx(np.mean([float(part[metric]) for part in parts]), abs=1e-9)


def test_summary_compares_with_the_baselines(demo, table):
    summary = csv_lines(demo / "scores" / "summary.csv")
    assert {line["n_seeds"] for line in summary} == {"1"}
    assert {line["auroc_std"] for line in summary} == {""}  # one seed has no spread
    baseline, line = (
        row_of(summary, backbone="pretrained", **method, calibrated="false", ood="digits-7-9")
        for method in (
            {"features": "cls", "score": "knn"},
            {"features": "mofe", "score": "knn+energy", "head": "refit", "routing": "predicted"},
        )
    )
    gain = float(line["auroc_mean"]) - float(baseline["auroc_mean"])
    assert float(line["auroc_minus_knn"]) == pytest.approx(gain)
    assert float(line["auroc_minus_knn_lo"]) < gain < float(line["auroc_minus_knn_hi"])
    assert baseline["auroc_minus_knn"] == ""
    markdown = (demo / "scores" / "summary.md").read_text().splitlines()
    assert markdown[2].startswith("| pretrained | cls | none |  | none | knn | ")
    assert (demo / "scores" / "summary.tex").read_text().startswith(r"\begin{tabular}")


def test_scores_of_every_image_give_the_table(demo, table):
    """A row of the table, from the scores that were written for each image, by scikit-learn."""
    found = samples(demo, "pretrained-mofe-refit-default-0-predicted")
    assert list(found)[:6] == ["set", "id", "label", "prediction", "expert", "confidence"]
    assert {name: found["set"].count(name) for name in list(SETS)[1:]} == dict(list(SETS.items())[1:])
    ood = np.array([name != "digits-test" for name in found["set"]])
    for score, calibrated in [("knn+energy", "false"), ("energy", "true")]:
        scores = np.array(found[score + (" (calibrated)" if calibrated == "true" else "")])
        row = row_of(
            table,
            backbone="pretrained",
            features="mofe",
            head="refit",
            routing="predicted",
            score=score,
            calibrated=calibrated,
            ood="digits-7-9",
        )
        near = np.array([name != "photos" for name in found["set"]])
        assert float(row["auroc"]) == pytest.approx(roc_auc_score(ood[near], scores[near]), abs=1e-6)


def test_id_accuracy(demo):
    record = json.loads((demo / "scores" / "id.json").read_text())
    accuracy = {(line["backbone"], line["features"], line["head"]): line["accuracy"] for line in record["accuracy"]}
    assert accuracy["pretrained", "cls", "probe"] > 0.93
    assert accuracy["pretrained", "mofe", "refit"] > 0.93
    assert accuracy["finetuned", "cls", "probe"] > 0.93
    assert accuracy["finetuned", "cls", "finetune"] > 0.6  # after a few epochs
    found = samples(demo, "pretrained-mofe-refit-default-0-predicted")
    right = [
        label == prediction for label, prediction in zip(found["label"], found["prediction"], strict=True) if label
    ]
    assert len(right) == 505
    assert np.mean(right) == pytest.approx(accuracy["pretrained", "mofe", "refit"])


def test_router(demo):
    groups = json.loads((demo / "model/pretrained/default/seed-0/mofe.json").read_text())["groups"]
    found = samples(demo, "pretrained-mofe-refit-default-0-predicted")
    experts = [(groups[label], expert) for label, expert in zip(found["label"], found["expert"], strict=True) if label]
    accuracy = np.mean([group == expert for group, expert in experts])
    record = json.loads((demo / "scores" / "id.json").read_text())["router"][0]
    assert record["accuracy"] == pytest.approx(accuracy)
    assert accuracy > 0.9
    assert {name: sum(load) for name, load in record["load"].items()} == {"id": 505, "digits-7-9": 533, "photos": 154}
    assert min(record["load"]["id"]) > 150  # both experts work


def test_ood_is_found_and_a_broken_router_would_not_find_it(demo, table):
    """Near-OOD digits by kNN + energy in the routed expert's subspace; the same with routes that are wrong."""
    columns = {"backbone": "pretrained", "features": "mofe", "routing": "predicted", "calibrated": "false"}
    shown = float(row_of(table, **columns, score="knn+energy", head="refit", ood="digits-7-9")["auroc"])
    assert shown > 0.92

    config = load_config(DEMO, [f"work={demo}"])
    source = sources_to_score(Workspace(config, RunOptions()), "pretrained")[0]
    refined = RefinedFeatures(source, source.mixtures[0])
    detector = DetectorFactory(refined.subject(), config.score).detector("refit", "knn+energy")
    caches = [next(test.cache for test in source.tests if test.name == name) for name in ("digits-test", "digits-7-9")]

    def near_auroc(route):
        scores = []
        for cache in caches:
            routed = refined.refined("final", cache.manifest.dataset, cache).expert
            rows = refine(refined.mixture(), cache, Routes(route(routed).astype(np.int64)))
            scores.append(
                detector.score_rows(refined._rows(rows, np.full(cache.n_rows, -1, np.int32), lambda heads: heads.final))
            )
        return auroc(*scores)

    assert near_auroc(lambda expert: expert) == pytest.approx(shown, abs=1e-6)
    draw = np.random.default_rng(0)
    for broken in [
        lambda expert: 0 * expert,  # all to the first expert
        lambda expert: 1 - expert,  # the experts' names mixed up
        lambda expert: draw.permutation(expert),  # the right loads, the wrong images
    ]:
        assert near_auroc(broken) < 0.9


def test_photographs_are_far_away(table):
    for row in rows_of(table, score="knn", ood="photos", routing="none") + rows_of(
        table, score="knn", ood="photos", routing="predicted"
    ):
        assert float(row["auroc"]) > 0.99
    assert float(table[0]["auroc"]) > 0.85  # near-OOD, frozen kNN


def test_thresholds_admit_what_they_say(demo):
    """Chosen on calibration rows; on test rows, which they never saw, they admit about as many."""
    lines = json.loads((demo / "scores" / "thresholds.json").read_text())
    assert {line["admit"] for line in lines} == {0.95, 0.99}
    found = samples(demo, "pretrained-cls-none-none-none-none")
    scores = np.array([score for score, name in zip(found["knn"], found["set"], strict=True) if name == "digits-test"])
    for line in lines:
        if (line["backbone"], line["features"], line["score"], line["admit"]) == ("pretrained", "cls", "knn", 0.95):
            assert line["lo"] <= line["threshold"] <= line["hi"]
            assert 50 < line["n"] < 100
            assert 0.9 < (scores <= line["threshold"]).mean() <= 1


# ---------------------------------------------------------------------------------------------------- running again


def fail(*_, **__):
    raise AssertionError("this must not be opened")


def test_second_run_does_nothing(demo, verb, monkeypatch):
    monkeypatch.setattr(timm, "create_model", fail)
    folders = [demo / name for name in ("cache", "extract", "model", "finetune", "scores")]
    before = snapshot(*folders)
    durations = json.loads((demo / "record.json").read_text())["stages"]
    answer = done("run", *verb)
    assert "extract pretrained: fresh; 1951 rows" in answer.out
    assert "train finetuned-seed-0 default seed 0: fresh" in answer.out
    assert "finetune seed 0: fresh" in answer.out
    assert snapshot(*folders) == before
    after = json.loads((demo / "record.json").read_text())["stages"]
    assert all(after[name] == durations[name] for name in after if name != "report")  # how long the work took


def test_of_what_is_fresh_nothing_is_loaded_that_computes(verb):
    """Which takes longer than to see that nothing is left to do."""
    code = "import sys; from pipeline.cli import main; assert not main(sys.argv[1:]); print(*sys.modules)"
    command = [sys.executable, "-c", code, "run", *map(str, verb)]
    for _ in range(2):  # the first may write the report anew, which shows the record of the run before
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "report: fresh" in run.stdout
    assert not {"torch", "timm", "torchvision", "faiss", "matplotlib"} & set(run.stdout.split())


def test_dry_run_says_that_all_is_fresh(demo, verb, monkeypatch):
    monkeypatch.setattr(timm, "create_model", fail)
    before = snapshot(demo)
    answer = done("run", *verb, "--dry-run")
    lines = answer.out.splitlines()
    assert len(lines) == 2 * 4 + 2 + 1 + 2
    assert all("fresh" in line for line in lines)
    assert snapshot(demo) == before


def test_another_k_rescores_without_image_or_backbone(copied, table, monkeypatch):
    monkeypatch.setattr(timm, "create_model", fail)
    monkeypatch.setattr(PIL.Image, "open", fail)
    monkeypatch.setattr("pipeline.sets.list_images", fail)
    others = [copied / name for name in ("cache", "extract", "model", "finetune", "report")]
    before = {path: path.read_bytes() for other in others for path in other.rglob("*") if path.is_file()}
    done("score", DEMO, *settings(f"work={copied}", "score.k=3"))
    assert {path: path.read_bytes() for other in others for path in other.rglob("*") if path.is_file()} == before
    again = csv_lines(copied / "scores" / "table.csv")
    assert len(again) == len(table)
    for old, new in zip(table, again, strict=True):
        assert all(new[name] == old[name] for name in ("features", "head", "score", "ood"))
        if "knn" not in old["score"]:
            assert new == old
    assert json.loads(again[0]["params"]) == {"k": 3}
    assert again[0]["auroc"] != table[0]["auroc"]


def test_one_backbone_of_two(copied, table):
    done("score", DEMO, *settings(f"work={copied}", "score.bootstrap=100"), "--backbone", "finetuned")
    again = csv_lines(copied / "scores" / "table.csv")
    assert {row["backbone"] for row in again} == {"pretrained", "finetuned"}
    assert again[0] == {**table[0], **{n: again[0][n] for n in INTERVALS}}  # still compared with the frozen kNN
    done("score", DEMO, *settings(f"work={copied}", "score.bootstrap=100"), "--backbone", "pretrained")
    assert {row["backbone"] for row in csv_lines(copied / "scores" / "table.csv")} == {"pretrained"}
    assert not list((copied / "scores" / "samples").glob("finetuned-*"))


# ------------------------------------------------------------------------------------------------------ new images


@pytest.fixture
def new_images(tmp_path):
    """A digit of the test set, its very bytes and as PNG; a crop of a photograph; a file that is no image."""
    digits, photos = list_images("sklearn:digits[0-6]/test"), list_images("sklearn:photos")
    row = digits.ids.index(next(id_ for id_ in digits.ids if id_.startswith("5/")))
    data = digits.reader().read(row)
    (tmp_path / "digit.pgm").write_bytes(data)
    decode_image(data).save(tmp_path / "digit.png")
    decode_image(photos.reader().read(40)).save(tmp_path / "crop.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    return tmp_path, digits.ids[row]


def test_predict(demo, verb, new_images):
    folder, id_ = new_images
    paths = [folder / name for name in ("digit.pgm", "broken.png", "digit.png", "crop.png")]
    answer = done("predict", *verb, *paths)
    lines = list(csv.DictReader(io.StringIO(answer.out)))
    naming = ["path", "score", "threshold", "threshold_lo", "threshold_hi", "decision", "prediction", "expert"]
    nearest = ["nearest_1", "distance_1", "nearest_2", "distance_2", "nearest_3", "distance_3"]
    assert list(lines[0]) == [*naming, *nearest, "p_value"]
    assert all(line["nearest_1"].startswith("5/") for line in lines[:2])
    assert all(float(line["distance_1"]) <= float(line["distance_2"]) <= float(line["distance_3"]) for line in lines)
    assert float(lines[2]["distance_1"]) > float(lines[0]["distance_3"])
    assert [line["path"] for line in lines] == [str(paths[0]), str(paths[2]), str(paths[3])]
    assert [line["decision"] for line in lines] == ["ID", "ID", "OOD"]
    assert [line["prediction"] for line in lines[:2]] == ["5", "5"]
    unusable, promise = answer.err.splitlines()
    assert unusable.startswith(f"{paths[1]}: cannot be used: ")
    assert promise.startswith("the threshold: of 100 ID images about ")
    # What the table was made of: the same image, the same score.
    found = samples(demo, "pretrained-mofe-refit-default-0-predicted")
    row = next(i for i, name in enumerate(found["id"]) if name == id_ and found["set"][i] == "digits-test")
    assert float(lines[0]["score"]) == pytest.approx(found["knn+energy"][row], abs=1e-5)
    assert int(lines[0]["expert"]) == found["expert"][row]
    assert lines[1]["score"] == lines[0]["score"]  # the same pixels in another file


@pytest.mark.parametrize("score", ["knn", "msp", "energy"])
def test_predict_with_a_score(demo, verb, new_images, score):
    folder, id_ = new_images
    answer = done("predict", *verb, folder / "digit.pgm", folder / "crop.png", "--score", score)
    digit, crop = csv.DictReader(io.StringIO(answer.out))
    assert digit["decision"] == "ID"
    assert float(crop["score"]) > float(digit["score"])
    found = samples(demo, "pretrained-mofe-refit-default-0-predicted")
    row = next(i for i, name in enumerate(found["id"]) if name == id_ and found["set"][i] == "digits-test")
    assert float(digit["score"]) == pytest.approx(found[score][row], abs=1e-5)
    thresholds = json.loads((demo / "scores" / "thresholds.json").read_text())
    at = {"backbone": "pretrained", "features": "mofe", "score": score, "calibrated": False, "admit": 0.95}
    (line,) = (
        line
        for line in thresholds
        if line["head"] in ("none", "refit") and all(line[name] == value for name, value in at.items())
    )
    assert float(digit["threshold"]) == pytest.approx(line["threshold"], abs=1e-6)


def test_predict_by_the_fine_tuned_backbone(demo, verb, new_images):
    folder, id_ = new_images
    path = folder / "digit.pgm"
    (digit,) = csv.DictReader(io.StringIO(done("predict", *verb, path, "--backbone", "finetuned").out))
    found = samples(demo, "finetuned-mofe-refit-default-0-predicted")
    row = next(i for i, name in enumerate(found["id"]) if name == id_ and found["set"][i] == "digits-test")
    assert float(digit["score"]) == pytest.approx(found["knn+energy"][row], abs=1e-5)
    about = json.loads(done("predict", *verb, path, "--backbone", "finetuned", "--format", "json").out)["detector"]
    assert (about["backbone"], about["seed"]) == ("finetuned", 0)


def test_predict_a_folder(verb, new_images):
    folder, _ = new_images
    answer = done("predict", *verb, folder)
    assert [line["path"] for line in csv.DictReader(io.StringIO(answer.out))] == [
        f"{folder}/{name}" for name in ("crop.png", "digit.pgm", "digit.png")
    ]
    assert answer.err.startswith(f"{folder}/broken.png: cannot be used: ")


def test_predict_as_json(verb, new_images):
    folder, _ = new_images
    answer = json.loads(done("predict", *verb, folder, "--format", "json").out)
    lines = list(csv.DictReader(io.StringIO(done("predict", *verb, folder).out)))
    assert len(lines) == len(answer["images"]) == 3
    for line, image in zip(lines, answer["images"], strict=True):
        assert [str(image[name]) for name in ("path", "score", "decision")] == [
            line[name] for name in ("path", "score", "decision")
        ]
        assert [near["id"] for near in image["nearest"]] == [line[f"nearest_{rank}"] for rank in (1, 2, 3)]
    assert answer["threshold"]["threshold"] == answer["images"][0]["threshold"]
    assert answer["threshold"]["admit"] == 0.95
    assert (answer["detector"]["features"], answer["detector"]["score"]) == ("mofe", "knn+energy")
    (unusable,) = answer["unusable"]
    assert unusable["path"] == f"{folder}/broken.png"
    assert unusable["reason"]


def test_predict_nothing_usable(verb, new_images, monkeypatch):
    folder, _ = new_images
    answer = pipeline("predict", *verb, folder / "broken.png")
    assert answer.status == 2
    assert answer.out == ""
    assert answer.err.splitlines()[-1] == "error: none of the given images can be used"
    monkeypatch.setattr(timm, "create_model", fail)  # a missing path is said before any work
    assert "no such file" in refused("predict", *verb, folder / "digit.png", folder / "nowhere.png")


# ---------------------------------------------------------------------------------------------- verify, repair, info


def test_verify_and_repair(demo, verb):
    assert done("verify", *verb).out.count(": whole, ") == 8
    cache = sorted((demo / "cache").glob("photos-*"))[0]
    shard = cache / "shard-00000.h5"
    whole = {file: file.read_bytes() for file in cache.iterdir()}
    damaged = bytearray(whole[shard])
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(damaged)
    for argument in (verb, [cache]):
        answer = pipeline("verify", *argument)
        assert answer.status == 1
        assert f"{shard.name}: its bytes are not those that were sealed" in answer.out
        assert answer.err.startswith("error: ")
        assert "--repair" in answer.err
    answer = done("verify", *verb, "--repair")
    assert f"{cache}: repaired" in answer.out
    assert {file: file.read_bytes() for file in cache.iterdir()} == whole
    assert done("verify", cache).out == f"{cache}: whole, 154 rows in 1 shards\n"


def test_info(demo, verb):
    study = done("info", *verb).out
    assert study.startswith(f"study      demo, work in {demo}\n")
    assert study.count("\ncache      ") == 8
    assert "model      pretrained default seed 0: 2 experts, " in study
    assert "model      finetuned-seed-0 default seed 0: 2 experts, " in study
    cache = sorted((demo / "cache").glob("photos-*"))[0]
    one = done("info", cache).out
    assert one in study
    assert "photos: 154 rows + 0 failures = 154 inputs, 2 classes" in one
    assert "tf_efficientnet_lite0 at 112 px" in one
    assert "cls [n, 1280], tap_cls [n, 192], patches [n, 16, 192] as float16" in one


@pytest.fixture
def checkout(demo, tmp_path):
    """The project with the finished demo, in an environment of its own by make's lights: it is the one of now."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy2(ROOT / name, tmp_path)
    for name in (".ci", "cache", "pipeline", "stages"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copytree(demo, tmp_path / "runs" / "demo")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    for kind in ("cpu", "gpu"):
        (tmp_path / ".venv" / f".installed-{kind}").touch()
    return tmp_path


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_it_is_shipped_in_the_five_commands_of_the_readme(checkout):
    """The very lines, by a shell. What is not the reader's is the environment, and that the demo has run before."""
    with socket.socket() as port:
        port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            port.bind(("127.0.0.1", 8000))
        except OSError:
            pytest.skip("another program has port 8000 here")
    inherited = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "ARGS", "EXPERIMENT", "PYTHONPATH")
    here = {"cwd": checkout, "env": {name: own for name, own in os.environ.items() if name not in inherited}}
    demo, export, info, serve, ask = pages.page_with("ship it").code("ship it").splitlines()
    said = [subprocess.run(line, shell=True, capture_output=True, text=True, **here) for line in (demo, export, info)]
    assert [each.returncode for each in said] == [0, 0, 0], said
    assert "export: demo.ood, " in said[1].stdout
    assert "study      demo: knn+energy by head refit, " in said[2].stdout
    serving = subprocess.Popen(serve, shell=True, stderr=subprocess.PIPE, text=True, start_new_session=True, **here)
    try:
        assert " at http://127.0.0.1:8000: " in serving.stderr.readline()
        answered = subprocess.run(f"{ask} --silent", shell=True, capture_output=True, text=True, check=True, **here)
        answer = json.loads(answered.stdout)
        assert answer["decision"] in ("ID", "OOD")
        assert len(answer["nearest"]) == 3
    finally:
        os.killpg(serving.pid, signal.SIGINT)  # Ctrl-C
        with serving:
            assert "Traceback" not in serving.stderr.read()


# ----------------------------------------------------------------------------------------------------- the documents


def test_the_demos_page_shows_what_the_demo_gives(demo):
    """The page's rows are the demo's; other processors may move an AUROC a little, and FPR95 of 505 images more."""
    header, *body = pages.table(pages.PAGES["pipeline/experiments/README.md"].between("demo table"))
    columns, rows = compact(read_summary(demo / "scores"))
    given = {
        tuple(row[columns.index(name)] for name in header[:4]): dict(zip(columns, row, strict=True)) for row in rows
    }
    assert len(body) > 10
    for row in body:
        for column, cell in list(zip(header, row, strict=True))[4:]:
            allowed = 2.0 if "AUROC" in column else 8.0
            assert float(cell) == pytest.approx(float(given[tuple(row[:4])][column]), abs=allowed)
