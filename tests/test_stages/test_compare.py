"""One's own arrays, scored from Python: the same scores as fitting by hand, the same metrics as from them."""

from dataclasses import asdict

import numpy as np
import pytest
import torch

from stages.compare import compare_scores
from stages.detection.calibration import Standardiser
from stages.errors import InputError
from stages.heads.affine import LinearHead
from stages.metrics.ranking import ood_metrics
from stages.scorers import SCORERS, get_scorer
from stages.scorers.inputs import ScoreInputs
from stages.scorers.logits.energy import energy_score


@pytest.fixture(scope="module")
def mine():
    """Features of 3 classes, and of two OOD sets; a linear head."""
    rng = np.random.default_rng(0)
    means = 4 * rng.normal(size=(5, 12))

    def rows(n, classes):
        labels = rng.choice(classes, n)
        return {"features": np.float32(means[labels] + rng.normal(size=(n, 12))), "labels": labels}

    sets = {name: rows(n, [0, 1, 2]) for name, n in (("train", 300), ("held_out", 80), ("test", 90))}
    ood = {"near": rows(60, [3])["features"], "far": rows(70, [4])["features"] * 2}
    return sets | {"ood": ood, "head": (means[:3], -0.5 * (means[:3] ** 2).sum(1))}


def test_scores_are_those_of_the_fitted_objects(mine):
    scores = {name: {} for name in ("knn", "mahalanobis", "energy", "vim", "react")} | {"knn": {"k": 3}}
    found = compare_scores(**mine, scores=scores | {"knn+energy": {"knn": {"k": 3}}})
    assert {row["score"]: row["params"] for row in found.rows}["knn+energy"]["knn"] == {"k": 3}
    head = LinearHead(*mine["head"])
    train, test, held_out = (ScoreInputs(**mine[name], head=head) for name in ("train", "test", "held_out"))
    near = ScoreInputs(features=mine["ood"]["near"], head=head)
    for name, settings in scores.items():
        scorer = get_scorer(name, **settings).fit(train, held_out)
        np.testing.assert_array_equal(found.scores[name]["id"], scorer.score(test))
        np.testing.assert_array_equal(found.scores[name]["near"], scorer.score(near))
    energy = energy_score(head.logits(mine["test"]["features"]))
    np.testing.assert_allclose(found.scores["energy"]["id"], energy, rtol=1e-6)
    knn = get_scorer("knn", k=3).fit(train)
    parts = [(knn.score(x), get_scorer("energy").score(x)) for x in (held_out, test)]
    scales = [Standardiser.fit(part) for part in parts[0]]
    total = sum(scale.apply(part) for scale, part in zip(scales, parts[1], strict=True))
    np.testing.assert_allclose(found.scores["knn+energy"]["id"], total, rtol=1e-5, atol=1e-6)


def test_one_score_may_be_asked_for_with_two_settings(mine):
    found = compare_scores(**mine, scores={"knn": {"k": 1}, "knn+energy": {"knn": {"k": 9}}})
    assert {row["score"]: row["params"] for row in found.rows} == {
        "knn": {"k": 1},
        "knn+energy": {"knn": {"k": 9}, "energy": {"temperature": 1.0}},
    }


def test_rows_are_the_metrics_of_the_scores(mine):
    found = compare_scores(**mine, scores=["knn", "msp"])
    assert [(row["score"], row["ood"]) for row in found.rows] == [
        (score, ood) for score in ("knn", "msp") for ood in ("near", "far", "average")
    ]
    for row in found.rows:
        if row["ood"] == "average":
            own = [other for other in found.rows if other["score"] == row["score"] and other["ood"] != "average"]
            assert row["fpr95"] == pytest.approx(np.mean([other["fpr95"] for other in own]))
            assert (row["n_id"], row["n_ood"]) == (90, 130)
        else:
            metrics = asdict(ood_metrics(found.scores[row["score"]]["id"], found.scores[row["score"]][row["ood"]]))
            assert {name: row[name] for name in metrics} == metrics
    assert found.rows[0]["params"] == {"k": 50}
    shown = str(found).splitlines()
    assert shown[0] == "| score | ood | auroc | fpr95 | fpr95_ood | aupr_in | aupr_out |"
    assert shown[2].startswith(f"| knn | near | {100 * found.rows[0]['auroc']:.2f} |")
    assert len(shown) == 2 + 6


def test_plain_arrays_are_enough_for_knn(mine):
    arrays = {name: mine[name]["features"] for name in ("train", "test")}
    plain = compare_scores(**arrays, ood=mine["ood"])
    np.testing.assert_array_equal(plain.scores["knn"]["far"], compare_scores(**mine).scores["knn"]["far"])


def test_clusters_stand_for_classes_where_there_are_none(mine):
    """Three classes that are apart: found again, and numbered otherwise."""
    plain = {name: mine[name]["features"] for name in ("train", "test", "held_out")}
    found = compare_scores(**plain, ood=mine["ood"], scores=["knn", "ncm", "knn+ncm"])
    known = compare_scores(**mine | {"head": None}, scores=["knn", "ncm", "knn+ncm"])
    for score in ("knn", "ncm", "knn+ncm"):
        np.testing.assert_allclose(found.scores[score]["near"], known.scores[score]["near"], rtol=1e-5)
    assert found.notes == ["train has no labels: 3 clusters of it stand for classes"]
    assert compare_scores(**plain, ood=mine["ood"], scores=["knn", "ssd"]).notes == []


def test_every_score_of_features_and_logits_runs(mine):
    names = [name for name, scorer in SCORERS.items() if not scorer.needs & {"others", "other", "patches", "taps"}]
    found = compare_scores(**mine, scores=names)
    assert {row["score"] for row in found.rows} == set(names)
    assert all(np.isfinite(scores).all() for sets in found.scores.values() for scores in sets.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ood": {}}, "needs an OOD set"),
        ({"ood": {"id": np.ones((2, 12))}}, "OOD set .*'id'"),
        ({"scores": ["knnn"]}, "no score is called 'knnn'; did you mean 'knn'"),
        ({"scores": {"knn": {"q": 1}}}, r"knn\.q: unknown setting"),
        ({"scores": {"knn+msp": {"energy": {"temperature": 1.0}}}}, r"knn\+msp: .*'energy'"),
        ({"scores": ["knn+energy"], "held_out": None}, r"^knn\+energy: .* give held_out"),
        ({"scores": ["energy"], "head": None}, "energy needs logits, which these rows do not have"),
        (
            {"test": {"features": np.ones((2, 12)), "label": [1, 2]}},
            "^test: .*'label'; .*features, logits and labels",
        ),
        ({"test": {"features": np.ones((2, 12)), "labels": [1]}}, "score inputs need one number of rows"),
        ({"test": np.full((2, 12), np.nan)}, "^2 of 2 scored features .* row 0 "),
        ({"ood": None}, "needs an OOD set"),
        ({"scores": []}, "^scores: none is asked for"),
        ({"ood": {3: np.ones((2, 12))}}, "an OOD set is called 3, which is no text"),
        (
            {"ood": "near.npy"},
            "^ood 'ood': features .*<U8.* numpy.load",
        ),
        ({"ood": [np.ones((2, 12)), np.ones((3, 12))]}, "ood 'ood': features is no array: "),
        ({"ood": np.ones((2, 9))}, "^ood 'ood': features .* 9 .* train 12"),
        ({"test": np.ones(12)}, r"test: features has shape \(12,\), must be \[n, values\]"),
        ({"test": np.ones((0, 12))}, r"test: features has shape \(0, 12\), must be"),
        ({"test": {}}, "test: no rows given: give features"),
        ({"test": {"labels": [1, 2]}}, "^test: labels .* features or logits"),
        ({"test": {"features": np.ones((1, 12)), "labels": [0.5]}}, "test: label of row 0 is 0.5, must be a name"),
        (
            {"test": {"features": np.ones((2, 12)), "labels": [1, 5]}},
            "^test: .*row 1 is 5, .* 0 to 2",
        ),
        (
            {"test": {"features": np.ones((2, 12)), "labels": [1, 3]}},
            "1 to 3 for 3 classes",
        ),
        (
            {"test": {"features": np.ones((1, 12)), "labels": ["a"]}},
            "^test: labels are names, .*train",
        ),
        ({"head": np.ones((3, 12))}, "head is a ndarray, must be a pair: weight"),
        ({"head": (np.ones((3, 12)), np.ones(4))}, r"head has weight \[3, 12\] and bias \[4\], must be \[C, D\] and"),
    ],
)
def test_refused(mine, change, message):
    with pytest.raises(InputError, match=message):
        compare_scores(**mine | change)


NAMES = ["dog", "Ameise", "café"]


def named(rows):
    return rows | {"labels": [NAMES[label] for label in rows["labels"]]}


def test_labels_may_be_names(mine):
    scores = ["mahalanobis", "ssd", "kl-matching"]
    numbers = compare_scores(**mine, scores=scores)
    of_id = {name: named(mine[name]) for name in ("train", "held_out", "test")}
    knowing = mine | of_id | {"train": of_id["train"] | {"class_names": NAMES}}
    names = compare_scores(**knowing, scores=scores)
    for score in scores:
        for part, values in numbers.scores[score].items():
            np.testing.assert_array_equal(names.scores[score][part], values)
    alone = compare_scores(of_id["train"], of_id["test"], mine["ood"], "mahalanobis")  # no head: any order will do
    np.testing.assert_allclose(alone.scores["mahalanobis"]["far"], numbers.scores["mahalanobis"]["far"], rtol=1e-4)
    with pytest.raises(InputError, match=r"^train: labels are names: .*class_names, .* 3 classes"):
        compare_scores(**mine | of_id)
    with pytest.raises(InputError, match="class_names has 2 names for 3 classes"):
        compare_scores(**mine | {"train": mine["train"] | {"class_names": ["a", "b"]}})
    wrong = of_id["test"] | {"labels": ["Dog"] * 90}
    with pytest.raises(InputError, match=r"^test: labels .*class_names.*'Dog' .*'dog'"):
        compare_scores(**knowing | {"test": wrong})


@pytest.mark.parametrize("as_rows", [lambda x: x, lambda x: {"features": x}, lambda x: ScoreInputs(features=x)])
def test_one_ood_set_needs_no_name(mine, as_rows):
    found = compare_scores(mine["train"], mine["test"], as_rows(mine["ood"]["far"]), "knn")
    assert [row["ood"] for row in found.rows] == ["ood"]
    np.testing.assert_array_equal(found.scores["knn"]["ood"], compare_scores(**mine).scores["knn"]["far"])


def test_tensors_and_lists_are_arrays(mine):
    def as_tensors(rows):
        return {name: torch.from_numpy(np.asarray(array)) for name, array in rows.items()}

    scores = ["knn", "mahalanobis", "energy"]
    expected = compare_scores(**mine, scores=scores)
    layer = torch.nn.Linear(12, 3)
    layer.weight.data, layer.bias.data = (torch.from_numpy(part) for part in mine["head"])
    tensors = {name: as_tensors(mine[name]) for name in ("train", "held_out", "test")}
    tensors["test"]["features"].requires_grad_()
    found = compare_scores(**tensors, ood=as_tensors(mine["ood"]), head=layer, scores=scores)
    for score in scores:
        np.testing.assert_array_equal(found.scores[score]["far"], expected.scores[score]["far"])
    lists = {name: mine[name]["features"].tolist() for name in ("train", "test")}
    np.testing.assert_allclose(
        compare_scores(**lists, ood=mine["ood"]["far"].tolist()).scores["knn"]["ood"],
        expected.scores["knn"]["far"],
        rtol=1e-6,
    )
    half = torch.from_numpy(mine["ood"]["far"]).to(torch.bfloat16)
    found = compare_scores(mine["train"], mine["test"], half)
    rounded = compare_scores(mine["train"], mine["test"], half.float().numpy())
    np.testing.assert_array_equal(found.scores["knn"]["ood"], rounded.scores["knn"]["ood"])


def test_unknown_labels_of_any_kind(mine):
    labels = mine["train"]["labels"].astype(float)
    labels[:5] = np.nan
    whole = np.where(np.isnan(labels), -1, labels).astype(int)
    one, other = (
        compare_scores(mine["train"] | {"labels": each}, mine["test"], mine["ood"], "ssd").scores["ssd"]["far"]
        for each in (labels, whole)
    )
    np.testing.assert_array_equal(one, other)
