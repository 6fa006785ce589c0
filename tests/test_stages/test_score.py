"""Stage three on real caches and a trained mixture: the table follows from the samples, and costs no image."""

import csv
import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from scipy.special import softmax
from sklearn.metrics import roc_auc_score

from cache import CacheMismatchError, FeatureCache, file_sha256
from stages.config import ScoreConfig, TrainConfig
from stages.detection.conformal import FalseAlarms
from stages.detection.frozen import FrozenFeatures
from stages.detection.refined import RefinedFeatures
from stages.detection.sources import CS_ID, BackboneSource, MixtureFolder, ScoredSet
from stages.errors import InputError
from stages.extract import ExtractOptions, extract_set
from stages.files.documents import read_document
from stages.heads.choose import load_heads
from stages.id_data.rows import id_data
from stages.id_data.tokens import read_tokens
from stages.inputs.images import ImageReader, list_images
from stages.inputs.images.table import FileRange
from stages.metrics.selective import augrc, aurc
from stages.mixture.refine import refine
from stages.mixture.refined import Routes, load_refined, refined_path
from stages.mixture.storage import load_mixture
from stages.networks import backbone as backbone_module
from stages.networks.backbone import load_backbone
from stages.predict import Predictor
from stages.progress import NullProgress
from stages.results import table as table_module
from stages.score import score
from stages.scorers import SCORERS
from stages.scorers.neighbours.bank import FeatureBank
from stages.train import train_mofe, train_probe
from tests.conftest import SOURCES
from tests.test_stages.answers import answers_of

CONFIG = ScoreConfig(scores=["msp", "energy", "knn", "knn+energy"], k=5, bootstrap=100)
GROUP_OF = {"test": "id", "near": "near", "far": "far"}
SET_COLUMNS = ["set", "id", "label", "prediction", "expert", "confidence"]


@pytest.fixture(scope="module")
def source(caches, data, probe, mixture, backbone, tmp_path_factory):
    folder = shutil.copytree(mixture, tmp_path_factory.mktemp("score") / "seed-0")
    return BackboneSource(
        name="pretrained",
        seed=None,
        data=data,
        probe=probe,
        finetuned_head=None,
        mixtures=(MixtureFolder("default", 0, folder),),
        tests=tuple(ScoredSet(name, group, caches[name]) for name, group in GROUP_OF.items()),
        architecture=lambda: backbone,
        network=lambda: backbone,
    )


@pytest.fixture(scope="module")
def small_source(vit, vit_data, tmp_path_factory):
    """Sets of the same images by a small ViT of 64 dimensions, and a probe: what is quick to fit. No mixture."""
    caches, network = tmp_path_factory.mktemp("small"), load_backbone(vit)
    tests = tuple(
        ScoredSet(
            name, group, extract_set(name, list_images(SOURCES[name]), vit_data.train.spec, caches, lambda: network)
        )
        for name, group in GROUP_OF.items()
    )
    probe = train_probe(vit_data, caches / "probe")
    return BackboneSource("pretrained", None, vit_data, probe, None, (), tests, lambda: network, lambda: network)


def mixed(source, folder, **settings):
    """A source with a mixture of copies of its network's end, and the probe of its data."""
    config, end = TrainConfig(**{"experts": 2, "epochs": 1} | settings), source.architecture().end
    assert train_mofe(source.data, config, end, seed=0, folder=folder / "seed-0")
    mixtures = (MixtureFolder("default", 0, folder / "seed-0"),)
    return replace(source, probe=train_probe(source.data, folder / "probe"), mixtures=mixtures)


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("work") / "scores"
    score([source], CONFIG, folder)
    return folder


@pytest.fixture(scope="module")
def table(folder):
    return json.loads((folder / "table.json").read_text())


@pytest.fixture(scope="module")
def frozen(source):
    """Frozen features as float64, each row of length 1: all that kNN looks at."""

    def unit(cache: FeatureCache) -> np.ndarray:
        features = cache.read("cls").astype(np.float64)
        return features / np.linalg.norm(features, axis=1, keepdims=True)

    return {"train": unit(source.data.train)} | {test.name: unit(test.cache) for test in source.tests}


def samples_of(folder: Path, row: dict) -> dict[str, np.ndarray]:
    """Columns of the file that a row of the table was made from."""
    variant, seed = row["variant"] or "none", "none" if row["seed"] is None else row["seed"]
    name = f"{row['backbone']}-{row['features']}-{row['head']}-{variant}-{seed}-{row['routing']}.parquet"
    read = pq.read_table(folder / "samples" / name)
    return {column: read[column].to_numpy(zero_copy_only=False) for column in read.column_names}


def column_of(row: dict) -> str:
    return row["score"] + (" (calibrated)" if row["calibrated"] else "")


def plain_fpr95(positive: np.ndarray, negative: np.ndarray) -> float:
    threshold = min(t for t in positive if np.mean(positive <= t) >= 0.95)
    return float(np.mean(negative <= threshold))


# -------------------------------------------------------------------------------------------------------- the table


def test_the_baseline_stands_first(table):
    names = ("backbone", "features", "head", "routing", "score", "ood")
    assert [table[0][name] for name in names] == ["pretrained", "cls", "none", "none", "knn", "near"]


def test_the_baseline_is_the_distance_to_the_fifth_neighbour(source, frozen, folder, table):
    bank = frozen["train"][source.data.split.final_train]
    samples = samples_of(folder, table[0])
    for name in GROUP_OF:
        plain = np.sort(np.sqrt(np.maximum(0, 2 - 2 * frozen[name] @ bank.T)), axis=1)[:, 4]
        np.testing.assert_allclose(samples["knn"][samples["set"] == name], plain, atol=1e-5)


def test_every_method_is_there(table):
    methods = {(row["features"], row["head"], row["routing"], column_of(row)) for row in table}
    frozen = {("cls", "none", "none", "knn")} | {
        ("cls", "probe", "none", name) for name in ("msp", "energy", "knn+energy")
    }
    mofe = {
        ("mofe", head, routing, name + calibrated)
        for head, names in (
            ("none", ["knn"]),
            *((head, ["msp", "energy", "knn+energy"]) for head in ("trained", "refit", "refit-group")),
        )
        for name in names
        for routing in ("predicted", "oracle")
        for calibrated in ("", " (calibrated)")
    }
    assert methods == frozen | mofe
    assert len({json.dumps(row, sort_keys=True) for row in table}) == len(table)


def test_every_row_can_be_recomputed_from_the_samples(folder, table):
    for row in (row for row in table if row["ood"] != "average"):
        samples = samples_of(folder, row)
        scores = samples[column_of(row)].astype(np.float64)
        ids, oods = scores[samples["set"] == "test"], scores[samples["set"] == row["ood"]]
        assert (row["n_id"], row["n_ood"]) == (len(ids), len(oods))
        truth = np.repeat([0, 1], [len(ids), len(oods)])
        assert row["auroc"] == pytest.approx(roc_auc_score(truth, np.concatenate([ids, oods])), abs=1e-9)
        assert row["fpr95"] == pytest.approx(plain_fpr95(ids, oods), abs=1e-9)
        assert row["fpr95_ood"] == pytest.approx(plain_fpr95(-oods, -ids), abs=1e-9)
        assert row["auroc_lo"] <= row["auroc"] <= row["auroc_hi"]


def test_the_first_row_is_said_before_anything_is_resampled(source, table, tmp_path, monkeypatch):
    events = []

    class Listener(NullProgress):
        def note(self, line):
            events.append(line)

    draw = table_module.resample_counts
    monkeypatch.setattr(table_module, "resample_counts", lambda *given: events.append("drawn") or draw(*given))
    score([replace(source, mixtures=())], CONFIG.model_copy(update={"scores": ["energy"]}), tmp_path, Listener())
    near, far = (next(row for row in table if row["ood"] == "average" and row["group"] == g) for g in ("near", "far"))
    values = [f"{100 * row[metric]:.1f}" for row in (near, far) for metric in ("auroc", "fpr95")]
    said = "frozen knn, k = 5: near AUROC {}, FPR95 {}; far AUROC {}, FPR95 {}"
    assert events[:2] == [said.format(*values), "drawn"]


def test_averages_are_means_of_sets_and_never_of_oracle_rows(table):
    for average in (row for row in table if row["ood"] == "average"):
        assert average["routing"] in ("none", "predicted")
        same = {name: average[name] for name in ("features", "head", "routing", "score", "calibrated")}
        members = [row for row in table if row["ood"] != "average" and same.items() <= row.items()]
        members = [row for row in members if average["group"] in (row["group"], "all")]
        assert average["fpr95"] == pytest.approx(np.mean([row["fpr95"] for row in members]))
        assert average["auroc"] == pytest.approx(np.mean([row["auroc"] for row in members]))


def test_real_features_tell_digits_from_photographs(table):
    for row in table:
        if row["ood"] == "far" and row["score"] == "knn" and row["routing"] != "oracle":
            assert row["auroc"] > 0.95


def test_the_same_again_gives_the_same_bytes(source, folder, tmp_path):
    score([source], CONFIG, tmp_path)
    for name in ("table.csv", "table.json", "summary.csv", "thresholds.json", "id.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name
    for file in (folder / "samples").iterdir():
        assert pq.read_table(tmp_path / "samples" / file.name).equals(pq.read_table(file))


# ------------------------------------------------------------------------- covariate-shifted ID, and what is risked


@pytest.fixture(scope="module")
def shifted(source, tmp_path_factory):
    """Scores of the frozen features with other images of the ID classes beside: those that trained, for want of any."""
    folder = tmp_path_factory.mktemp("shifted") / "scores"
    tests = (ScoredSet("sketches", CS_ID, source.data.train), *source.tests)
    return folder, score([replace(source, tests=tests, mixtures=())], CONFIG, folder)


def test_shifted_id_is_scored_apart(shifted, table, folder):
    own, result = shifted
    of_ood = [row for row in result.rows if row["group"] != CS_ID]
    plain = [row for row in table if row["features"] == "cls"]
    assert [{k: v for k, v in row.items() if not k.startswith("fsood")} for row in of_ood] == [
        {k: v for k, v in row.items() if not k.startswith("fsood")} for row in plain
    ]
    for row in of_ood:
        samples = samples_of(own, row)
        scores = samples[column_of(row)].astype(np.float64)
        ids = scores[np.isin(samples["set"], ["test", "sketches"])]
        assert row["fsood_n_id"] == len(ids)
        if row["ood"] != "average":
            oods = scores[samples["set"] == row["ood"]]
            truth = np.repeat([0, 1], [len(ids), len(oods)])
            assert row["fsood_auroc"] == pytest.approx(roc_auc_score(truth, np.concatenate([ids, oods])), abs=1e-9)
    assert {row["ood"] for row in result.rows if row["group"] == CS_ID} == {"sketches"}


def test_accuracy_on_shifted_id_is_that_of_its_labelled_images(shifted):
    own, result = shifted
    (entry,) = json.loads((own / "id.json").read_text())["shifted_accuracy"]
    samples = samples_of(own, next(row for row in result.rows if row["head"] == "probe"))
    rows = samples["set"] == "sketches"
    assert (entry["set"], entry["head"], entry["n"]) == ("sketches", "probe", rows.sum())
    assert entry["accuracy"] == np.mean(samples["label"][rows] == samples["prediction"][rows])


def test_images_of_shifted_id_that_stand_in_another_set_are_named(shifted, source):
    _, result = shifted
    assert any(f"{source.data.train.n_rows} of sketches in train" in note for note in result.notes)


def test_shifted_id_is_no_ood_set(source, tmp_path):
    tests = (source.tests[0], ScoredSet("sketches", CS_ID, source.data.train))
    with pytest.raises(InputError, match="at least one with role near-ood or far-ood"):
        score([replace(source, tests=tests)], CONFIG, tmp_path)


def test_what_is_risked_follows_from_the_samples(table, folder):
    for row in table:
        if row["head"] == "none":
            assert (row["aurc"], row["augrc"]) == (None, None)
            continue
        samples = samples_of(folder, row)
        ids = samples["set"] == "test"
        wrong = samples["label"][ids] != samples["prediction"][ids]
        assert row["aurc"] == pytest.approx(aurc(samples[column_of(row)][ids], wrong), abs=1e-12)
        assert row["augrc"] == pytest.approx(augrc(samples[column_of(row)][ids], wrong), abs=1e-12)


# -------------------------------------------------------------------------------------------------------- routing


@pytest.fixture(scope="module")
def network(source):
    spec = source.data.train.spec
    return load_mixture(source.mixtures[0].path, source.architecture().end, spec.cls_dim, spec.tap_dim)


def test_the_router_decides_for_id_and_ood_alike(source, folder, table, network):
    row = next(row for row in table if row["routing"] == "predicted" and row["head"] == "refit")
    samples = samples_of(folder, row)
    for test in source.tests:
        gate, _ = network.route(read_tokens(test.cache, slice(None)))
        own = samples["set"] == test.name
        np.testing.assert_array_equal(samples["expert"][own], gate.argmax(1).numpy())
        np.testing.assert_allclose(samples["confidence"][own], gate.amax(1).detach().numpy(), rtol=1e-5)


def test_only_oracle_rows_know_the_true_group_and_only_of_id(source, folder, table, network):
    row = next(row for row in table if row["routing"] == "oracle" and row["head"] == "refit")
    oracle, routed = samples_of(folder, row), samples_of(folder, row | {"routing": "predicted"})
    ids = oracle["set"] == "test"
    truth = network.group.numpy()[np.array([int(label) for label in oracle["label"][ids]])]
    np.testing.assert_array_equal(oracle["expert"][ids], truth)
    assert (routed["expert"][ids] != truth).any()
    for column in ("expert", *(name for name in oracle if name not in SET_COLUMNS)):
        np.testing.assert_array_equal(oracle[column][~ids], routed[column][~ids])


def test_a_row_is_searched_in_its_experts_bank_and_judged_by_its_experts_head(source, folder, table, network):
    row = next(row for row in table if row["routing"] == "predicted" and row["head"] == "refit-group")
    samples = samples_of(folder, row)
    train, labels = source.data.split.final_train, source.data.train_labels
    group = network.group.numpy()
    with torch.inference_mode():
        bank = [
            network.experts[expert](read_tokens(source.data.train, train[group[labels[train]] == expert]))[0].double()
            for expert in range(2)
        ]
        tokens = read_tokens(source.tests[1].cache, slice(None))  # "near"
        own = samples["set"] == "near"
        for expert in range(2):
            rows = samples["expert"][own] == expert
            refined = network.experts[expert](tokens[torch.from_numpy(np.flatnonzero(rows))])[0].double()
            unit = [x / x.norm(dim=1, keepdim=True) for x in (refined, bank[expert])]
            plain = (2 - 2 * unit[0] @ unit[1].T).clamp_min(0).sqrt().sort(dim=1).values[:, 4]
            np.testing.assert_allclose(samples["knn"][own][rows], plain, atol=1e-4)
    predicted = np.array([int(name) for name in samples["prediction"]])
    np.testing.assert_array_equal(group[predicted], samples["expert"])


def test_a_set_may_have_the_name_of_the_bank(source, tmp_path):
    """ "id-train" names the bank's file as well; a test set of that name must not stand in for it."""
    tests = (*source.tests[:1], replace(source.tests[1], name="id-train"), source.tests[2])
    config = CONFIG.model_copy(update={"scores": ["knn"]})
    mixtures = (replace(source.mixtures[0], path=shutil.copytree(source.mixtures[0].path, tmp_path / "seed-0")),)
    bank = (tmp_path / "seed-0" / "refined" / "final" / "id-train.safetensors").read_bytes()
    named = score([replace(source, tests=tests, mixtures=mixtures)], config, tmp_path / "scores").rows
    plain = score([source], config, tmp_path / "plain").rows
    assert [row["auroc"] for row in named] == [row["auroc"] for row in plain]
    assert (tmp_path / "seed-0" / "refined" / "final" / "id-train.safetensors").read_bytes() == bank


# ---------------------------------------------------------------------------------------------------- top-2 routing


@pytest.fixture(scope="module")
def both(source, tmp_path_factory):
    """Scores with top-2 rows."""
    folder = tmp_path_factory.mktemp("top2") / "scores"
    config = CONFIG.model_copy(update={"scores": ["energy", "knn", "knn+energy", "ncm"], "top2": True})
    score([source], config, folder)
    return folder


@pytest.fixture(scope="module")
def table_of_both(both):
    return json.loads((both / "table.json").read_text())


def test_top2_rows_stand_beside_the_routed_ones_and_have_averages(both, table_of_both):
    def methods(routing):
        naming = ("features", "head", "score", "calibrated", "ood", "group")
        return [[row[name] for name in naming] for row in table_of_both if row["routing"] == routing]

    assert methods("top2") == methods("predicted")
    assert ["mofe", "refit", "knn+energy", True, "average", "all"] in methods("top2")
    routings = [entry["routing"] for entry in json.loads((both / "thresholds.json").read_text())]
    assert routings.count("top2") == routings.count("predicted") > 0


def test_two_experts_score_a_row_and_the_gate_weighs_them(source, both, table_of_both, network):
    """Once more by two forced passes: each row in the bank and by the head of its likeliest, then its second expert."""
    path, train, labels = source.mixtures[0].path, source.data.split.final_train, source.data.train_labels
    group = network.group.numpy()
    head = load_heads(path, "heads", read_document(path / "mofe.json")["heads"])["refit"].final

    def unit(features):
        return np.float64(features) / np.linalg.norm(np.float64(features), axis=1, keepdims=True)

    bank = unit(refine(network, source.data.train, Routes(group[labels].astype(np.int64))).features[train])
    far = source.tests[2].cache
    gate = refine(network, far).gate
    order = np.argsort(-gate, axis=1)
    scores = {"knn": [], "energy": []}
    for expert in order.T:
        refined = refine(network, far, Routes(expert))
        distances = np.sqrt(np.maximum(0, 2 - 2 * unit(refined.features) @ bank.T))
        distances[expert[:, None] != group[labels[train]]] = np.inf
        scores["knn"].append(np.sort(distances, axis=1)[:, 4])
        scores["energy"].append(-np.log(np.exp(np.float64(head.logits(refined.features))).sum(1)))
    weight = np.take_along_axis(gate, order, axis=1)
    weight /= weight.sum(1, keepdims=True)
    naming = ("routing", "head", "calibrated")
    row = next(row for row in table_of_both if [row[name] for name in naming] == ["top2", "refit", False])
    samples = samples_of(both, row)
    own = samples["set"] == "far"
    for name, (first, second) in scores.items():
        np.testing.assert_allclose(samples[name][own], weight[:, 0] * first + weight[:, 1] * second, atol=1e-3)
    assert (weight[:, 0] < 0.9).any()
    np.testing.assert_array_equal(samples["expert"][own], order[:, 0])


def test_scoring_by_two_experts_again_runs_no_network(source, both, table_of_both, tmp_path, monkeypatch):
    def forbidden(*arguments, **options):
        raise AssertionError("scoring again must not need this")

    monkeypatch.setattr(torch.nn.Module, "__call__", forbidden)
    rows = score([source], CONFIG.model_copy(update={"scores": ["knn"], "top2": True}), tmp_path).rows
    assert rows == [row for row in table_of_both if row["score"] == "knn"]


def test_what_a_wrong_route_costs_stands_in_id_json(both, folder):
    (router,) = json.loads((both / "id.json").read_text())["router"]
    accuracy = router["id_accuracy"]
    assert list(accuracy) == ["predicted", "top2", "oracle"]
    assert accuracy["oracle"]["trained"] > accuracy["predicted"]["trained"]
    for routing, own in accuracy.items():
        samples = pq.read_table(both / "samples" / f"pretrained-mofe-refit-default-0-{routing}.parquet")
        columns = [np.array(samples[name].to_pylist()) for name in ("set", "label", "prediction")]
        ids = columns[0] == "test"
        assert own["refit"] == pytest.approx(np.mean(columns[1][ids] == columns[2][ids]))
    (plain,) = json.loads((folder / "id.json").read_text())["router"]
    assert plain["id_accuracy"] == {name: accuracy[name] for name in ("predicted", "oracle")}
    assert (router["kind"], router["experts"]) == ("end", 2)
    assert router["parameters"] > 1000


def test_one_expert_has_no_second(source, data, backbone, tmp_path):
    path = tmp_path / "seed-0"
    train_mofe(data, TrainConfig(experts=1, epochs=1, expert="adapter"), backbone.end, seed=0, folder=path)
    one = replace(source, mixtures=(MixtureFolder("dense", 0, path),))
    rows = score([one], CONFIG.model_copy(update={"scores": ["knn"], "top2": True}), tmp_path / "scores").rows
    assert {row["routing"] for row in rows} == {"none", "predicted", "oracle"}


def test_a_mixture_may_have_fewer_scores(small_source, tmp_path):
    """A control that is compared by one score alone: neither others nor ``auto`` are made of its features."""
    source = mixed(small_source, tmp_path)
    default = source.mixtures[0]
    control = replace(default, variant="control", scores=("knn+energy",))
    both, config = (
        replace(source, mixtures=(default, control)),
        CONFIG.model_copy(update={"scores": ["auto", "knn+energy"]}),
    )
    found = score([both], config, tmp_path / "scores")
    names = {
        name: {row["score"] for row in found.rows if row["variant"] == name} for name in ("", "default", "control")
    }
    assert names == {"": {"knn", "knn+energy", "auto"}, "default": {"auto", "knn+energy"}, "control": {"knn+energy"}}
    own, other = (
        [row for row in found.rows if (row["variant"], row["score"]) == (name, "knn+energy")]
        for name in ("default", "control")
    )
    assert [row | {"variant": "default"} for row in other] == own


# -------------------------------------------------------------------------------------------------- further scores


@pytest.fixture(scope="module")
def groups_alone(source, data, backbone, tmp_path_factory):
    """The MOS control beside the mixture: no experts, group heads with "other" on the frozen features."""
    path = tmp_path_factory.mktemp("mos") / "seed-0"
    train_mofe(data, TrainConfig(experts=2, epochs=3, expert="frozen"), backbone.end, seed=0, folder=path)
    return replace(source, mixtures=(*source.mixtures, MixtureFolder("mos", 0, path)))


def test_other_is_the_probability_that_the_routed_expert_gives(source, tmp_path):
    result = score([source], CONFIG.model_copy(update={"scores": ["other", "vim"]}), tmp_path)
    assert {row["features"] for row in result.rows if row["score"] == "other"} == {"mofe"}
    heads = {row["head"] for row in result.rows if row["score"] == "vim" and row["features"] == "mofe"}
    assert heads == {"trained", "refit", "refit-group"}
    trained = load_refined(
        refined_path(source.mixtures[0].path, "final", "sets/far"),
        {"weights": file_sha256(source.mixtures[0].path / "mofe.safetensors"),
         "features": source.tests[2].cache.digest},
    )  # fmt: skip
    samples = samples_of(tmp_path, next(row for row in result.rows if row["score"] == "other"))
    expected = softmax(np.c_[trained.logits, trained.other].astype(np.float64), axis=1)[:, -1]
    found = 1 / (1 + np.exp(-samples["other"][samples["set"] == "far"]))  # from log odds
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def plain_patches(backbone, cache):
    """Patches after the final norm, one image at a time, each of length 1."""
    end = backbone.end()
    with torch.inference_mode():
        tokens = [end.patch_tokens(read_tokens(cache, slice(i, i + 1)))[0] for i in range(cache.n_rows)]
    return [(each / each.norm(dim=1, keepdim=True)).double().numpy() for each in tokens]


def test_patch_knn_is_the_mean_of_the_farthest_patches(small_source, tmp_path):
    source, backbone = small_source, small_source.network()
    config = CONFIG.model_copy(update={"scores": ["patch-knn"], "params": {"patch-knn": {"share": 0.5}}})
    result = score([source], config, tmp_path)
    row = next(row for row in result.rows if row["score"] == "patch-knn")
    known = source.data.split.final_train
    assert (row["features"], row["head"], json.loads(row["params"])["bank_images"]) == ("cls", "none", len(known))
    train = plain_patches(backbone, source.data.train)
    bank = np.concatenate([train[i] for i in known])
    samples = samples_of(tmp_path, row)
    for test in source.tests:
        nearest = [np.sort((1 - each @ bank.T).min(axis=1)) for each in plain_patches(backbone, test.cache)]
        expected = [each[-(len(each) // 2) :].mean() for each in nearest]
        np.testing.assert_allclose(samples["patch-knn"][samples["set"] == test.name], expected, atol=1e-5)


def test_patches_are_read_for_patch_knn_alone(small_source, tmp_path, monkeypatch):
    read = []
    original = FeatureCache.read

    def watched(self, name, *how):
        read.append(name)
        return original(self, name, *how)

    monkeypatch.setattr(FeatureCache, "read", watched)

    def network():
        raise AssertionError("no network is needed")

    frozen = replace(small_source, network=network)
    names = [name for name in SCORERS if name not in ("patch-knn", "mos", "other")]
    score([frozen], CONFIG.model_copy(update={"scores": names}), tmp_path)
    assert set(read) == {"cls"}
    score([small_source], CONFIG.model_copy(update={"scores": ["patch-knn"]}), tmp_path)
    assert "patches" in read


def test_mos_is_of_groups_without_experts_and_the_notes_say_so(groups_alone, tmp_path):
    config = CONFIG.model_copy(update={"scores": ["knn", "mos"], "top2": True})
    result = score([groups_alone], config, tmp_path)
    rows = [row for row in result.rows if row["score"] == "mos"]
    naming = {(row["variant"], row["head"], row["routing"], row["calibrated"]) for row in rows}
    assert naming == {("mos", "trained", "none", False)}  # every group is asked, nothing is routed
    assert [note for note in result.notes if "threshold" not in note] == [
        'mos: not of variant default: it needs a mixture trained with train.expert = "frozen" and two experts or more'
    ]
    spec, path = groups_alone.data.train.spec, groups_alone.mixtures[1].path
    network = load_mixture(path, groups_alone.architecture().end, spec.cls_dim, spec.tap_dim)
    samples = samples_of(tmp_path, rows[0])
    for test in groups_alone.tests:
        features = torch.from_numpy(np.float32(test.cache.read("cls")))
        with torch.inference_mode():
            others = torch.stack([expert.head(features).softmax(1)[:, -1] for expert in network.experts])
        found = 1 / (1 + np.exp(-samples["mos"][samples["set"] == test.name]))  # from log odds
        np.testing.assert_allclose(found, others.amin(0), rtol=1e-4)
    assert next(row["auroc"] for row in rows if row["ood"] == "far") > 0.7


def test_predict_by_mos_needs_groups_without_experts(source, groups_alone):
    with pytest.raises(InputError, match=r'mos .* train\.expert = "frozen"'):
        Predictor(source, CONFIG, "mos")
    cache = source.tests[0].cache
    predictor = Predictor(replace(groups_alone, mixtures=groups_alone.mixtures[1:]), CONFIG, "mos")
    found = answers_of(predictor, cache)
    assert all(np.isfinite(one.score) for one in found)
    assert np.mean([one.decision == "ID" for one in found]) > 0.8


def test_ncm_of_frozen_features_and_of_the_routed_experts_classes(source, frozen, both, table_of_both):
    methods = {(row["features"], row["head"], row["routing"]) for row in table_of_both if row["score"] == "ncm"}
    mofe = {("mofe", "none", routing) for routing in ("predicted", "top2", "oracle")}
    assert methods == {("cls", "none", "none")} | mofe
    train = source.data.split.final_train
    bank, labels = frozen["train"][train], source.data.train_labels[train]
    means = np.stack([bank[labels == c].mean(0) for c in range(4)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    samples = samples_of(both, next(row for row in table_of_both if row["score"] == "ncm"))
    plain = np.sqrt(2 - 2 * frozen["far"] @ means.T).min(1)
    np.testing.assert_allclose(samples["ncm"][samples["set"] == "far"], plain, atol=1e-5)


# ------------------------------------------------------------------------------------------- thresholds and id.json


def ranked(scores, admit):
    """The calibration score that admits a share of new rows; None where there are too few."""
    rank = math.ceil(round((len(scores) + 1) * admit, 9))
    return np.sort(scores)[rank - 1] if rank <= len(scores) else None


def test_thresholds_are_ranks_among_the_calibration_rows(source, frozen, folder):
    thresholds = json.loads((folder / "thresholds.json").read_text())
    data, fold = source.data, source.data.split.folds[0]
    assert {entry["n"] for entry in thresholds} == {len(fold.calibrate)}
    assert all(entry["routing"] != "oracle" for entry in thresholds)
    bank, queries = frozen["train"][fold.train], frozen["train"][fold.calibrate]
    knn = np.sort(np.sqrt(np.maximum(0, 2 - 2 * queries @ bank.T)), axis=1)[:, 4]
    logits = source.probe.final.logits(np.float32(data.train.read("cls", fold.calibrate))).astype(np.float64)
    energy = -np.log(np.exp(logits).sum(1))
    part, z = np.arange(len(knn)) % 21, np.empty(len(knn))
    for row in range(len(z)):  # on scales that the rows of its part had no say in
        others = part != part[row]
        z[row] = sum((each[row] - each[others].mean()) / each[others].std() for each in (knn, energy))
    for name, scores in (("knn", knn), ("energy", energy), ("knn+energy", z)):
        for admit in (0.95, 0.99):
            (entry,) = (
                entry
                for entry in thresholds
                if (entry["features"], entry["score"], entry["admit"]) == ("cls", name, admit)
            )
            assert entry["n_needed"] == {0.95: 19, 0.99: 99}[admit]
            expected = ranked(scores, admit)
            assert entry["threshold"] == (None if expected is None else pytest.approx(expected, abs=1e-4))
            alarms = FalseAlarms.of(len(scores), admit)
            assert entry["false_alarms"] == (None if alarms is None else asdict(alarms))


def test_thresholds_of_the_mixture_are_of_routed_calibration_rows(source, folder):
    fold, path = source.data.split.folds[0], source.mixtures[0].path
    made_of = {"weights": file_sha256(path / "mofe.safetensors"), "features": source.data.train.digest}
    refined = load_refined(refined_path(path, "final", "id-train"), made_of)
    unit = refined.features.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    distances = np.sqrt(np.maximum(0, 2 - 2 * unit[fold.calibrate] @ unit[fold.train].T))
    distances[refined.expert[fold.calibrate][:, None] != refined.expert[fold.train]] = np.inf
    knn = np.sort(distances, axis=1)[:, 4]
    (entry,) = (
        entry
        for entry in json.loads((folder / "thresholds.json").read_text())
        if (entry["features"], entry["score"], entry["calibrated"], entry["admit"]) == ("mofe", "knn", False, 0.95)
    )
    assert entry["threshold"] == pytest.approx(ranked(knn, 0.95), abs=1e-4)


def test_under_cross_fitting_parts_calibrate_and_the_final_model_scores(small_source, tmp_path):
    few = id_data(small_source.data.train, None, val_share=0.2)
    source = mixed(replace(small_source, data=few), tmp_path, batch_size=16)
    crossed = replace(source, tests=(source.tests[0], source.tests[2]))
    result = score([crossed], CONFIG.model_copy(update={"top2": True}), tmp_path / "scores")
    assert {row["routing"] for row in result.rows} == {"none", "predicted", "top2", "oracle"}
    thresholds = json.loads((tmp_path / "scores" / "thresholds.json").read_text())
    assert {entry["n"] for entry in thresholds} == {36}  # every row but the select ones, by a model that did not see it

    def fifth(queries, bank):
        unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, bank)]
        return np.sort(np.sqrt(np.maximum(0, 2 - 2 * unit[0] @ unit[1].T)), axis=1)[:, 4]

    train = few.train.read("cls").astype(np.float64)
    split = few.split
    calibration = np.concatenate([fifth(train[part.rows], train[split.without(part)]) for part in split.parts])
    assert (thresholds[0]["score"], thresholds[0]["admit"]) == ("knn", 0.95)
    assert thresholds[0]["threshold"] == pytest.approx(ranked(calibration, 0.95), abs=1e-4)
    none = [entry for entry in thresholds if entry["threshold"] is None]
    assert {(entry["admit"], entry["n_needed"], entry["hi"]) for entry in none} == {(0.99, 99, None)}
    without = "no threshold for the backbone's own features, variant default"
    assert result.notes == [f"{without}: 99% of ID needs 99 calibration rows, there are 36"]
    samples = pq.read_table(tmp_path / "scores" / "samples" / "pretrained-cls-none-none-none-none.parquet")
    test = source.tests[0].cache.read("cls").astype(np.float64)
    np.testing.assert_allclose(
        samples["knn"].to_numpy()[: len(test)], fifth(test, train[few.split.final_train]), atol=1e-5
    )
    cache = source.tests[0].cache
    assert len(answers_of(Predictor(crossed, CONFIG), cache)) == len(cache.ids)


def test_id_json_counts_what_the_samples_hold(source, folder, table):
    record = json.loads((folder / "id.json").read_text())
    assert record["split"] == {"pretrained": source.data.split.rule}
    for entry in record["accuracy"]:
        row = next(row for row in table if (row["features"], row["head"]) == (entry["features"], entry["head"]))
        samples = samples_of(folder, row | {"routing": "none" if entry["features"] == "cls" else "predicted"})
        ids = samples["set"] == "test"
        assert entry["n"] == ids.sum()
        assert entry["accuracy"] == pytest.approx(np.mean(samples["label"][ids] == samples["prediction"][ids]))
        assert entry["accuracy"] > 0.7  # chance is a quarter
    (router,) = record["router"]
    assert router["accuracy"] > 0.8
    loads = {"id" if name == "test" else name: len(test.cache) for test in source.tests for name in [test.name]}
    assert {name: sum(load) for name, load in router["load"].items()} == loads
    assert [(entry["features"], entry["k"], entry["rule"]) for entry in record["k"]] == [
        ("cls", 5, "given"),
        ("mofe", 5, "given"),
    ]


def test_rows_that_a_score_cannot_tell_apart_are_said(source, tmp_path):
    """Relations up to the threshold are none: a row without any scores 0, as others do."""
    config = CONFIG.model_copy(update={"scores": ["knn", "relation"], "params": {"relation": {"threshold": 0.95}}})
    result = score([replace(source, mixtures=())], config, tmp_path)
    row = next(row for row in result.rows if row["score"] == "relation")
    counts = np.unique(samples_of(tmp_path, row)["relation"], return_counts=True)[1]
    tied = counts[counts > 1].sum()
    assert tied > 0.01 * counts.sum()
    assert [note for note in result.notes if "threshold" not in note] == [
        "relation: rows that have another row's score, and count half in AUROC: "
        f"{tied} of {counts.sum()} (head probe of the backbone's own features)"
    ]


def test_rows_of_one_image_are_no_ties(source, caches, tmp_path):
    """The images of a set once more: each image counts once."""
    twice = (*source.tests, ScoredSet("again", "far", caches["near"]))
    config = CONFIG.model_copy(update={"scores": ["knn", "msp", "energy"]})
    notes = score([replace(source, tests=twice, mixtures=())], config, tmp_path).notes
    assert not any("have another row's score" in note for note in notes)


def test_images_in_two_sets_are_named(source, caches, folder, tmp_path):
    """In id-train and an OOD set, in id-test and an OOD set, in two OOD sets."""
    assert json.loads((folder / "id.json").read_text())["overlap"] == []
    tests = (*source.tests, ScoredSet("leak", "far", caches["train"]), ScoredSet("twin", "far", caches["test"]))
    result = score([replace(source, tests=tests, mixtures=())], CONFIG, tmp_path)
    found = {tuple(one["sets"]): one["ids"] for one in json.loads((tmp_path / "id.json").read_text())["overlap"]}
    everything = {name: [[id_, id_] for id_ in caches[name].ids] for name in ("train", "test")}
    assert found == {("train", "leak"): everything["train"], ("test", "twin"): everything["test"]}
    note = result.notes[0]
    assert f"{len(caches['train'])} of leak in train ({caches['train'].ids[0]}, " in note
    assert f"{len(caches['test'])} of twin in test" in note


def test_images_of_id_train_in_the_other_id_sets_are_named(source, caches, tmp_path):
    """A held-out image that trained the model calibrates nothing, and a test image that did proves nothing."""
    leaked = id_data(caches["train"], caches["test"], val_share=0.2)
    tests = (ScoredSet("again", "id", caches["train"]), *source.tests[1:])
    score([replace(source, data=leaked, tests=tests, mixtures=())], CONFIG, tmp_path)
    found = json.loads((tmp_path / "id.json").read_text())["overlap"]
    assert [(one["sets"], len(one["ids"])) for one in found] == [(["train", "again"], len(caches["train"]))]


def test_a_fine_tuned_backbone_adds_its_own_head(source, probe, tmp_path):
    head = (probe.final.weight / probe.final.standardise.scale, np.zeros(4, np.float32))
    finetuned = replace(source, name="finetuned", seed=3, finetuned_head=head, mixtures=())
    result = score([replace(source, mixtures=()), finetuned], CONFIG, tmp_path)
    first = result.rows[0]
    assert (first["backbone"], first["features"], first["head"]) == ("pretrained", "cls", "none")
    heads = {(row["backbone"], row["head"], row["seed"]) for row in result.rows if row["score"] == "energy"}
    assert heads == {("pretrained", "probe", None), ("finetuned", "probe", 3), ("finetuned", "finetune", 3)}
    samples = pq.read_table(tmp_path / "samples" / "finetuned-cls-finetune-none-3-none.parquet")
    logits = np.float64(source.tests[0].cache.read("cls")) @ head[0].T
    energy = samples["energy"].to_numpy()[: len(logits)]
    np.testing.assert_allclose(energy, -np.log(np.exp(logits).sum(1)), rtol=1e-3, atol=1e-3)


# -------------------------------------------------------------------------------------------------- scoring again


def test_another_k_opens_no_image_and_no_backbone(source, folder, table, tmp_path, monkeypatch):
    def forbidden(*arguments, **options):
        raise AssertionError("scoring again must not need this")

    for owner, name in (
        (ImageReader, "read"),
        (FileRange, "read"),
        (timm, "create_model"),
        (backbone_module, "load_backbone"),
        (backbone_module.Backbone, "encode"),
        (torch.nn.Module, "__call__"),
    ):
        monkeypatch.setattr(owner, name, forbidden)
    again = replace(source, architecture=forbidden)
    rows = score([again], CONFIG.model_copy(update={"k": 1, "temperature": 2.0}), tmp_path).rows
    assert len(rows) == len(table)
    assert rows[0]["params"] == '{"k": 1}'
    changed = [
        row["auroc"] != before["auroc"] for row, before in zip(rows, table, strict=True) if row["score"] == "knn"
    ]
    assert np.mean(changed) > 0.5


def test_another_k_costs_no_search(source, folder, table, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as closed:
        closed.setattr(FeatureBank, "search", lambda *_: pytest.fail("a bank was searched again"))
        rows = score([source], CONFIG.model_copy(update={"k": 3}), tmp_path).rows
    plain = score([source], CONFIG.model_copy(update={"k": 3}), tmp_path / "anew").rows
    assert rows == plain
    assert any(
        row["auroc"] != before["auroc"] for row, before in zip(rows, table, strict=True) if row["score"] == "knn"
    )


def test_distances_of_features_that_are_no_more_go(source, folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "neighbours" / "of another bank").mkdir()
    (tmp_path / "neighbours" / "of another bank" / "queries.safetensors").touch()
    score([source], CONFIG, tmp_path)
    kept = {path.relative_to(tmp_path) for path in (tmp_path / "neighbours").rglob("*")}
    assert kept == {path.relative_to(folder) for path in (folder / "neighbours").rglob("*")}
    assert kept


def test_the_baseline_is_scored_where_nobody_asks_for_it(source, tmp_path):
    rows = score([source], CONFIG.model_copy(update={"scores": ["energy"], "k": "auto"}), tmp_path).rows
    assert (rows[0]["features"], rows[0]["score"]) == ("cls", "knn")
    assert {row["score"] for row in rows if row["features"] == "mofe"} == {"energy"}
    record = json.loads((tmp_path / "id.json").read_text())["k"]
    assert [entry["features"] for entry in record] == ["cls"]  # no k where no neighbour was sought
    assert record[0]["rule"].startswith("best mean AUROC")


def test_samples_of_methods_that_are_no_more_go(source, tmp_path):
    config = CONFIG.model_copy(update={"scores": ["knn"]})
    score([source], config, tmp_path)
    assert len(list((tmp_path / "samples").iterdir())) == 3
    score([replace(source, mixtures=())], config, tmp_path)
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["pretrained-cls-none-none-none-none.parquet"]


# ------------------------------------------------------------------------------------------------------- bad input


def test_sets_of_other_features_are_refused_by_the_field_that_differs(source, backbone, few_images, tmp_path):
    spec = backbone.feature_spec("float32", "full")
    other = extract_set("other", few_images, spec, tmp_path, lambda: backbone)
    tests = (*source.tests[:2], ScoredSet("other", "far", other))
    with pytest.raises(CacheMismatchError, match='dtype: "float32" in the cache, "float16" asked'):
        score([replace(source, tests=tests)], CONFIG, tmp_path / "scores")
    mixed = replace(source.data, held_out=other)
    with pytest.raises(CacheMismatchError, match="dtype"):
        score([replace(source, data=mixed)], CONFIG, tmp_path / "scores")
    assert not (tmp_path / "scores").exists()


def test_a_mixture_of_another_split_is_refused(source, tmp_path):
    other = replace(source.data, split=replace(source.data.split, rule="another"))
    with pytest.raises(CacheMismatchError, match=r"features .* split: run make train"):
        score([replace(source, data=other)], CONFIG, tmp_path)


def test_an_empty_ood_set_is_refused(source, backbone, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    spec, samples = source.data.train.spec, list_images(str(tmp_path / "images"))
    empty = extract_set("empty", samples, spec, tmp_path, lambda: backbone, options=ExtractOptions(max_failures=1.0))
    tests = (*source.tests[:2], ScoredSet("empty", "far", empty))
    with pytest.raises(InputError, match=r"'empty' .*failures\.jsonl"):
        score([replace(source, tests=tests)], CONFIG, tmp_path / "scores")


def test_id_labels_outside_the_classes_are_refused(source, caches, tmp_path):
    tests = (ScoredSet("near", "id", caches["near"]), *source.tests[2:])
    with pytest.raises(
        InputError,
        match=r"'near': 142 of 142 images .* id-train .*: '7', '8'",
    ):
        score([replace(source, tests=tests)], CONFIG, tmp_path)


@pytest.mark.parametrize("kept", [slice(0, 1), slice(1, 3), slice(0, 0)])
def test_an_id_and_an_ood_set_are_needed(source, tmp_path, kept):
    with pytest.raises(InputError, match=r"id-test .* near-ood or far-ood"):
        score([replace(source, tests=source.tests[kept])], CONFIG, tmp_path)


@pytest.mark.parametrize("name", ["id", "average"])
def test_an_ood_set_with_a_word_of_the_table_is_refused(source, tmp_path, name):
    tests = (source.tests[0], replace(source.tests[1], name=name))
    with pytest.raises(InputError, match=f"'{name}', a word of the table"):
        score([replace(source, tests=tests)], CONFIG, tmp_path)


@pytest.mark.parametrize("lost", ["mofe.json", "heads.safetensors", "refined/final/id-train.safetensors"])
def test_a_mixture_without_one_of_its_files_says_what_to_do(source, tmp_path, lost):
    path = shutil.copytree(source.mixtures[0].path, tmp_path / "seed-0")
    (path / lost).unlink()
    broken = replace(source, mixtures=(MixtureFolder("default", 0, path),))
    with pytest.raises(InputError, match="run make train"):
        score([broken], CONFIG, tmp_path / "scores")


# --------------------------------------------------------------------------------------------------------- predict


@pytest.mark.parametrize("name", [None, "knn", "energy"])
def test_predict_says_of_an_image_what_the_table_was_made_of(source, folder, table, name):
    head, score_name = "refit", name or "knn+energy"
    predictor = Predictor(source, CONFIG, name)
    samples = samples_of(folder, next(row for row in table if row["head"] == head and row["routing"] == "predicted"))
    for test in source.tests:
        own, cache = samples["set"] == test.name, test.cache
        found = answers_of(predictor, cache)
        assert [one.path for one in found] == samples["id"][own].tolist()
        np.testing.assert_allclose([one.score for one in found], samples[score_name][own], rtol=1e-4, atol=1e-4)
        assert [one.prediction for one in found] == samples["prediction"][own].tolist()
        assert [one.expert for one in found] == samples["expert"][own].tolist()
        admitted = [one.decision == "ID" for one in found]
        assert admitted == [one.score <= one.threshold for one in found]
        if test.name == "test":
            assert np.mean(admitted) > 0.8
        if test.name == "far":
            assert np.mean(admitted) < 0.5
    thresholds = json.loads((folder / "thresholds.json").read_text())
    (entry,) = (
        entry
        for entry in thresholds
        if (entry["features"], entry["score"], entry["admit"], entry["calibrated"]) == ("mofe", score_name, 0.95, False)
        and entry["head"] == ("none" if score_name == "knn" else head)
    )
    assert predictor.threshold.threshold == pytest.approx(entry["threshold"])
    ends = {(one.threshold, one.threshold_lo, one.threshold_hi) for one in found}
    assert ends == {(predictor.threshold.threshold, predictor.threshold.lo, predictor.threshold.hi)}
    assert [predictor.threshold.lo, predictor.threshold.hi] == [pytest.approx(entry["lo"]), pytest.approx(entry["hi"])]


def test_predict_without_a_mixture_uses_the_frozen_features(source, folder, table):
    predictor = Predictor(replace(source, mixtures=()), CONFIG)
    samples = samples_of(folder, next(row for row in table if row["head"] == "probe"))
    found = answers_of(predictor, source.tests[0].cache)
    ids = samples["set"] == "test"
    np.testing.assert_allclose([one.score for one in found], samples["knn+energy"][ids], rtol=1e-5)
    assert {one.expert for one in found} == {None}


@pytest.mark.parametrize("frozen_alone", [True, False])
def test_predict_names_the_nearest_training_images(source, frozen_alone):
    predictor = Predictor(replace(source, mixtures=()) if frozen_alone else source, CONFIG)
    bank, cache = predictor.fitted.subject.bank, source.tests[0].cache
    ids = source.data.train.ids[source.data.split.final_train]
    labels = np.full(cache.n_rows, -1, np.int32)
    if frozen_alone:
        rows = FrozenFeatures(source).rows(cache, labels)
    else:
        rows = RefinedFeatures(source, source.mixtures[0]).passing_rows(cache, labels)

    def unit(features):
        return features.astype(np.float64) / np.linalg.norm(features, axis=1, keepdims=True)

    away = np.sqrt(np.maximum(0, 2 - 2 * unit(np.asarray(rows.features)) @ unit(np.asarray(bank.features)).T))
    if not frozen_alone:  # the routed expert's images alone
        away[rows.expert[:, None] != bank.expert] = np.inf
    for one, own in zip(answers_of(predictor, cache), away, strict=True):
        np.testing.assert_allclose([near.distance for near in one.nearest], np.sort(own)[:3], atol=1e-5)
        named = [np.flatnonzero(ids == near.id)[0] for near in one.nearest]
        np.testing.assert_allclose(own[named], np.sort(own)[:3], atol=1e-5)


def test_predict_of_nothing_usable_is_empty(source, backbone, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    spec, samples = source.data.train.spec, list_images(str(tmp_path / "images"))
    empty = extract_set("empty", samples, spec, tmp_path, lambda: backbone, options=ExtractOptions(max_failures=1.0))
    assert answers_of(Predictor(source, CONFIG), empty) == []


def test_predict_takes_the_recommended_score_where_nothing_is_asked(source):
    refined, frozen = (Predictor(replace(source, mixtures=mixtures), CONFIG) for mixtures in (source.mixtures, ()))
    assert (refined.fitted.head, refined.fitted.score) == ("refit", "knn+energy")
    assert (frozen.fitted.head, frozen.fitted.score) == ("probe", "knn+energy")


def test_predict_with_an_unknown_score_names_the_nearest(source):
    with pytest.raises(InputError, match="'energy'"):
        Predictor(source, CONFIG, "enrgy")


def test_table_csv_has_the_columns_that_users_script_against(folder):
    with (folder / "table.csv").open(newline="") as file:
        header = next(csv.reader(file))
    naming = ["backbone", "features", "head", "variant", "seed", "routing", "score", "params", "profile", "calibrated"]
    metrics = ["n_id", "n_ood", "auroc", "fpr95", "fpr95_ood", "aupr_in", "aupr_out"]
    intervals = ["auroc_lo", "auroc_hi", "fpr95_lo", "fpr95_hi"]
    areas = ["aurc", "augrc"]  # of selective classification
    spectrum = [f"fsood_{name}" for name in ("n_id", *metrics[2:], *areas)]
    assert header == [*naming, "ood", "group", *metrics, *intervals, *areas, *spectrum, "labels"]


def test_every_score_runs_on_features_frozen_and_routed(small_source, tmp_path):
    """Each by every head that it reads: finite, and the record says what came of which ID rows, by expert."""
    source, data = mixed(small_source, tmp_path, experts=3), small_source.data  # of 2, 1 and 1 classes
    result = score([source], CONFIG.model_copy(update={"scores": list(SCORERS)}), tmp_path)
    ran = {name: {row["score"] for row in result.rows if row["features"] == name} for name in ("cls", "mofe")}
    of_taps = {"mm-pp", "knn-layers"}  # which these caches do not have
    assert set(SCORERS) - ran["cls"] == {"mos", "other", *of_taps}  # of a mixture alone
    assert set(SCORERS) - ran["mofe"] == {"mos", "patch-knn", *of_taps}
    noted = {note.split(":")[0] for note in result.notes if ": it needs" in note}
    assert {"mos", "patch-knn", *of_taps} <= noted
    shrunk = "ssd: the covariance is shrunk, for there are fewer than 10 rows a feature"
    assert f"{shrunk}: the backbone's own features, variant default" in result.notes
    assert np.isfinite([row["auroc"] for row in result.rows]).all()

    params = {(row["head"], row["routing"], row["score"]): json.loads(row["params"]) for row in result.rows}
    frozen, routed = params["probe", "none", "react"], params["refit-group", "predicted", "react"]
    fold = data.split.folds[0]
    activations = np.float32(data.train.read("cls"))[fold.train]
    assert frozen["threshold"] == pytest.approx(np.percentile(activations, 90), rel=1e-6)
    assert frozen["fitted_rows"] == len(fold.train) == sum(routed["fitted_rows"].values())
    assert params["probe", "none", "temperature-scaling"]["fitted_rows"] == len(fold.select)
    assert params["probe", "none", "energy"] == {"temperature": 1.0}


def test_settings_and_profiles_reach_the_scores(source, tmp_path):
    alone = replace(source, mixtures=())
    settings = {"gen": {"gamma": 0.5}, "energy": {"temperature": 2.0}}
    config = {"scores": ["knn", "gen", "energy", "kl-matching"], "profile": "pytorch-ood", "params": settings}
    rows = score([alone], CONFIG.model_copy(update=config), tmp_path).rows
    params = {row["score"]: json.loads(row["params"]) for row in rows}
    assert params["gen"] == {"gamma": 0.5, "top": None, "floor": 1e-7}
    assert params["energy"] == {"temperature": 2.0}
    assert params["kl-matching"]["rows"] == "train"
    assert {row["profile"] for row in rows} == {"pytorch-ood"}
