"""The table against scikit-learn and against its own definitions, on drawn scores."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from stages.detection.sources import CS_ID
from stages.metrics.ranking import METRICS
from stages.metrics.selective import augrc, aurc
from stages.results.method import FROZEN_KNN
from stages.results.table import (
    COLUMNS,
    Evaluator,
    MethodRun,
    compact,
    per_cent,
    read_summary,
    summarise,
    write_summary,
    write_table,
)

OODS = [("shapes", "near"), ("letters", "near"), ("noise", "far")]
SIZES = {"id": 300, "shapes": 200, "letters": 50, "noise": 120}
KNN = MethodRun(FROZEN_KNN, None, '{"k": 5}', "paper")
MOFE = replace(KNN, method=replace(FROZEN_KNN, features="mofe", variant="default", routing="predicted"), seed=0)


def draw(shift: float, seed: int = 0) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """ID scores around 0, OOD scores around `shift`; rounded, so that some tie."""
    rng = np.random.default_rng(seed)
    scores = {name: rng.normal(size=n).round(2).astype(np.float32) for name, n in SIZES.items()}
    return scores.pop("id"), {name: values + np.float32(shift) for name, values in scores.items()}


@pytest.fixture(scope="module")
def evaluator():
    return Evaluator(OODS, SIZES, replicates=400)


@pytest.fixture(scope="module")
def rows(evaluator):
    return evaluator.rows(KNN, *draw(1.5))


def plain_fpr95(positive: np.ndarray, negative: np.ndarray) -> float:
    """The smallest share of negatives at or below an observed threshold that admits 95 % of the positives."""
    return min(np.mean(negative <= t) for t in np.concatenate([positive, negative]) if np.mean(positive <= t) >= 0.95)


def test_a_row_for_each_ood_set_as_scikit_learn_has_it(rows):
    ids, oods = draw(1.5)
    assert [(row.ood, row.group, row.n_id, row.n_ood) for row, _ in rows[:3]] == [
        ("shapes", "near", 300, 200),
        ("letters", "near", 300, 50),
        ("noise", "far", 300, 120),
    ]
    for row, _ in rows[:3]:
        truth, scores = np.repeat([0, 1], [row.n_id, row.n_ood]), np.concatenate([ids, oods[row.ood]])
        assert row.metrics["auroc"] == pytest.approx(roc_auc_score(truth, scores))
        assert row.metrics["fpr95"] == pytest.approx(plain_fpr95(ids, oods[row.ood]))
        assert row.metrics["fpr95_ood"] == pytest.approx(plain_fpr95(-oods[row.ood], -ids))
        assert row.columns.items() >= KNN.columns.items()


def test_averages_are_unweighted_over_sets(rows):
    sets, averages = [row for row, _ in rows[:3]], [row for row, _ in rows[3:]]
    assert [(row.ood, row.group, row.n_ood) for row in averages] == [
        ("average", "near", 250),
        ("average", "far", 120),
        ("average", "all", 370),
    ]
    for average in averages:
        members = [row for row in sets if average.group in (row.group, "all")]
        for metric in METRICS:
            plain = sum(row.metrics[metric] for row in members) / len(members)
            assert average.metrics[metric] == pytest.approx(plain)


def test_a_group_without_sets_has_no_average():
    near = Evaluator(OODS[:1], SIZES, replicates=100)
    assert [(row.ood, row.group) for row, _ in near.rows(KNN, *draw(1))] == [
        ("shapes", "near"),
        ("average", "near"),
        ("average", "all"),
    ]


def test_oracle_routing_is_a_diagnostic_and_never_in_averages(evaluator):
    rows = evaluator.rows(replace(MOFE, method=replace(MOFE.method, routing="oracle")), *draw(1))
    assert [row.ood for row, _ in rows] == ["shapes", "letters", "noise"]


def test_intervals_hold_what_they_are_about(rows):
    for row, drawn in rows:
        for metric in ("auroc", "fpr95"):
            lo, hi = row.intervals[metric]
            assert lo <= row.metrics[metric] <= hi
            assert 0 < hi - lo < 0.35
            # Not far from what resampling says, where sets are large and overlap.
            assert (lo, hi) == pytest.approx(tuple(np.percentile(drawn[metric], [2.5, 97.5])), abs=0.07)
    widths = {row.ood: row.intervals["auroc"].hi - row.intervals["auroc"].lo for row, _ in rows[:3]}
    assert widths["letters"] > widths["shapes"]  # 50 images say less than 200


def test_the_same_study_draws_the_same_resamples(evaluator, rows):
    again = Evaluator(OODS, SIZES, replicates=400).rows(KNN, *draw(1.5))
    assert [row for row, _ in again] == [row for row, _ in rows]
    for (_, one), (_, other) in zip(again, rows, strict=True):
        np.testing.assert_array_equal(one["fpr95"], other["fpr95"])


# ------------------------------------------------------------------------------- the full spectrum, and what is risked

SHIFTED = {"sketches": 90, "blurred": 40}


@pytest.fixture(scope="module")
def spectrum():
    """Two covariate-shifted ID sets, which stand among the OOD sets, and failures of a head on all ID rows."""
    rng = np.random.default_rng(5)
    ids, oods = draw(1.5)
    shifted = {name: rng.normal(0.3, size=n).round(2).astype(np.float32) for name, n in SHIFTED.items()}
    oods = {"sketches": shifted.pop("sketches")} | oods | shifted
    sets = [("sketches", CS_ID), *OODS, ("blurred", CS_ID)]
    failures = {name: (rng.random(n) < 0.3).astype(np.int8) for name, n in ({"id": 300} | SHIFTED).items()}
    failures["blurred"][:7] = -1  # nobody knows
    return Evaluator(sets, SIZES | SHIFTED, replicates=400), ids, oods, failures


def test_shifted_id_stands_apart_and_moves_nothing_else(spectrum, rows):
    evaluator, ids, oods, failures = spectrum
    own = evaluator.rows(KNN, ids, oods, failures)
    of_ood = [(row, drawn) for row, drawn in own if row.group != CS_ID]
    assert [(row.ood, row.group) for row, _ in own if row.group == CS_ID] == [("sketches", CS_ID), ("blurred", CS_ID)]
    for (row, drawn), (plain, plainly_drawn) in zip(of_ood, rows, strict=True):
        assert replace(row, beside=plain.beside) == plain
        np.testing.assert_array_equal(drawn["auroc"], plainly_drawn["auroc"])


def test_the_full_spectrum_has_all_id_rows_as_one_set(spectrum):
    evaluator, ids, oods, failures = spectrum
    everything = np.concatenate([ids, oods["sketches"], oods["blurred"]])
    found = {(row.ood, row.group): row.columns for row, _ in evaluator.rows(KNN, ids, oods, failures)}
    for ood, group in OODS:
        truth = np.repeat([0, 1], [len(everything), SIZES[ood]])
        columns, scores = found[ood, group], np.concatenate([everything, oods[ood]])
        assert columns["fsood_n_id"] == 430
        assert columns["fsood_auroc"] == pytest.approx(roc_auc_score(truth, scores))
        assert columns["fsood_fpr95"] == pytest.approx(plain_fpr95(everything, oods[ood]))
        assert columns["fsood_fpr95_ood"] == pytest.approx(plain_fpr95(-oods[ood], -everything))
    near, members = found["average", "near"], [found[ood, "near"]["fsood_auroc"] for ood in ("shapes", "letters")]
    assert near["fsood_n_id"] == 430
    assert near["fsood_auroc"] == pytest.approx(np.mean(members))
    assert found["sketches", CS_ID]["fsood_auroc"] is None


def test_what_is_risked_hangs_on_id_rows_alone(spectrum):
    evaluator, ids, oods, failures = spectrum
    rows = [row.columns for row, _ in evaluator.rows(KNN, ids, oods, failures)]
    assert {row["aurc"] for row in rows} == {aurc(ids, failures["id"])}
    assert {row["augrc"] for row in rows} == {augrc(ids, failures["id"])}
    known = np.concatenate([ids, oods["sketches"], oods["blurred"][7:]])
    wrong = np.concatenate([failures["id"], failures["sketches"], failures["blurred"][7:]])
    assert {row["fsood_augrc"] for row in rows if row["group"] != CS_ID} == {augrc(known, wrong)}
    without = [row.columns for row, _ in evaluator.rows(KNN, ids, oods)]
    assert {(row["aurc"], row["fsood_aurc"]) for row in without} == {(None, None)}


def test_without_shifted_id_the_columns_are_there_and_empty(rows):
    for row, _ in rows:
        assert list(row.columns) == list(COLUMNS)
        assert {value for name, value in row.columns.items() if name.startswith("fsood")} == {None}


def test_the_summary_has_shifted_id_without_verdicts(spectrum, tmp_path):
    evaluator, ids, oods, failures = spectrum
    seeds = []
    for seed in (0, 1):
        seeds += evaluator.rows(replace(MOFE, seed=seed), ids + np.float32(seed), oods, failures)
    summary = summarise([*evaluator.rows(KNN, ids, oods), *seeds])
    (line,) = lines_of(summary, features="mofe", ood="sketches")
    assert {line[f"auroc_minus_knn{end}"] for end in ("", "_lo", "_hi", "_says")} == {None}
    (near,) = lines_of(summary, features="mofe", ood="average", group="near")
    values = [row.columns["fsood_auroc"] for row, _ in seeds if (row.ood, row.group) == ("average", "near")]
    assert near["fsood_auroc_mean"] == pytest.approx(np.mean(values))
    assert near["fsood_auroc_std"] == pytest.approx(np.std(values, ddof=1))
    (plain,) = lines_of(summary, features="cls", ood="average", group="near")
    assert (plain["aurc_mean"], plain["fsood_aurc_mean"]) == (None, None)
    write_table(tmp_path, [row.columns for row, _ in seeds], summary)
    assert read_summary(tmp_path) == summary


# --------------------------------------------------------------------------------------------------------- summary


@pytest.fixture(scope="module")
def study(evaluator, rows):
    """The baseline, the same scores under another name, and a better method with three seeds."""
    same = evaluator.rows(replace(KNN, method=replace(FROZEN_KNN, head="probe", score="energy")), *draw(1.5))
    better = [pair for seed in range(3) for pair in evaluator.rows(replace(MOFE, seed=seed), *draw(2 + seed / 10))]
    return [*rows, *same, *better]


def lines_of(summary, **wanted):
    return [line for line in summary if wanted.items() <= line.items()]


def test_mean_deviation_and_count_over_seeds(study):
    summary = summarise(study)
    assert len(summary) == 3 * 6  # three methods; three sets and three averages
    (line,) = lines_of(summary, features="mofe", ood="noise")
    values = [row.metrics["auroc"] for row, _ in study if row.run.method.features == "mofe" and row.ood == "noise"]
    assert line["n_seeds"] == len(values) == 3
    assert line["auroc_mean"] == pytest.approx(np.mean(values))
    assert line["auroc_std"] == pytest.approx(np.std(values, ddof=1))
    (single,) = lines_of(summary, features="cls", head="none", ood="noise")
    assert (single["n_seeds"], single["auroc_std"]) == (1, None)


def test_differences_are_paired(study):
    summary = summarise(study)
    for line in lines_of(summary, score="energy"):  # the same scores: no difference in any resample
        for metric in ("auroc", "fpr95"):
            assert [line[f"{metric}_minus_knn{end}"] for end in ("", "_lo", "_hi")] == [0, 0, 0]
    for line in lines_of(summary, features="mofe"):
        (baseline,) = lines_of(summary, features="cls", head="none", ood=line["ood"], group=line["group"])
        for metric in ("auroc", "fpr95"):
            difference = line[f"{metric}_mean"] - baseline[f"{metric}_mean"]
            assert line[f"{metric}_minus_knn"] == pytest.approx(difference)
            assert line[f"{metric}_minus_knn_lo"] <= difference <= line[f"{metric}_minus_knn_hi"]
        assert line["auroc_minus_knn_lo"] > 0
        assert line["auroc_minus_knn+energy"] is None  # that baseline is not in this study
    for line in lines_of(summary, features="cls", head="none"):
        assert line["auroc_minus_knn"] is None


def test_the_interval_of_a_difference_resamples_both_methods_alike_and_seeds_as_well(study):
    average = [(row, drawn) for row, drawn in study if (row.ood, row.group) == ("average", "all")]
    own = [drawn["fpr95"] for row, drawn in average if row.run.method.features == "mofe"]
    (theirs,) = (drawn["fpr95"] for row, drawn in average if row.run.method == FROZEN_KNN)
    (line,) = lines_of(summarise(study), features="mofe", ood="average", group="all")
    paired = np.diff(np.percentile(np.mean(own, axis=0) - theirs, [2.5, 97.5]))
    width = line["fpr95_minus_knn_hi"] - line["fpr95_minus_knn_lo"]
    apart = np.diff(np.percentile(np.mean(own, axis=0) - np.random.default_rng(0).permutation(theirs), [2.5, 97.5]))
    assert paired < width < apart


def test_what_a_difference_says(study):
    summary = summarise(study)
    (line,) = lines_of(summary, features="mofe", ood="average", group="all")
    assert (line["auroc_minus_knn_says"], line["fpr95_minus_knn_says"]) == ("gain", "gain")
    (same,) = lines_of(summary, score="energy", ood="average", group="all")
    assert same["auroc_minus_knn_says"] == "no difference"
    one_seed = [pair for pair in study if pair[0].run.seed in (None, 0)]
    (line,) = lines_of(summarise(one_seed), features="mofe", ood="average", group="all")
    assert line["auroc_minus_knn_says"] == "gain for this seed"
    (itself,) = lines_of(summary, features="cls", head="none", ood="average", group="all")
    assert itself["auroc_minus_knn_says"] is None


# --------------------------------------------------------------------------------------------------------- exports


@pytest.fixture
def written(study, tmp_path):
    write_table(tmp_path, [row.columns for row, _ in study], summarise(study))
    return tmp_path


def test_table_files_hold_every_row(study, written):
    rows = [row for row, _ in study]
    assert json.loads((written / "table.json").read_text()) == [row.columns for row in rows]
    with (written / "table.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        assert line["seed"] == ("" if row.run.seed is None else str(row.run.seed))
        assert line["calibrated"] == "false"
        assert float(line["fpr95_hi"]) == row.intervals["fpr95"].hi
        assert json.loads(line["params"]) == {"k": 5}


def test_the_summary_is_read_back_as_it_was(study, written):
    assert read_summary(written) == summarise(study)


def test_writing_twice_gives_the_same_bytes(study, written, tmp_path):
    again = tmp_path / "again"
    write_table(again, [row.columns for row, _ in study], summarise(study))
    for file in again.iterdir():
        assert file.read_bytes() == (written / file.name).read_bytes()


def test_the_compact_table_is_for_people(study):
    header, body = compact(summarise(study))
    assert header[6:8] == ["near AUROC ↑", "near FPR95 ↓"]
    assert [line[:6] for line in body] == [
        ["pretrained", "cls", "none", "", "none", "knn"],
        ["pretrained", "cls", "probe", "", "none", "energy"],
        ["pretrained", "mofe", "none", "default", "predicted", "knn"],
    ]
    (near,) = lines_of(summarise(study), features="mofe", ood="average", group="near")
    assert body[2][6] == f"{100 * near['auroc_mean']:.1f} ± {100 * near['auroc_std']:.1f}"
    assert "±" not in body[0][6]
    assert per_cent(None, "auroc") == "–"


def test_calibrated_is_said(study):
    marked = [
        (replace(row, run=replace(row.run, method=replace(row.run.method, calibrated=True))), drawn)
        for row, drawn in study
    ]
    assert {line[5] for line in compact(summarise(marked))[1]} == {"knn (calibrated)", "energy (calibrated)"}


def test_whose_classes_a_line_depends_on_is_said_where_they_were_not_given(study, tmp_path):
    assert "labels" not in compact(summarise(study))[0]
    marked = [
        (replace(row, run=replace(row.run, labels="none" if row.run.method.score == "knn" else "clusters")), drawn)
        for row, drawn in study
    ]
    of_before = [{name: value for name, value in line.items() if name != "labels"} for line in summarise(study)]
    write_summary(tmp_path, [*of_before, *summarise(marked)])
    summary = read_summary(tmp_path)
    assert [line["labels"] for line in lines_of(summary, ood="noise")] == ["", "", "", "none", "clusters", "none"]
    header, body = compact(summary)
    assert header[5:7] == ["labels", "score"]
    assert [line[5:7] for line in body[3:]] == [["none", "knn"], ["clusters", "energy"], ["none", "knn"]]
    assert {line[5] for line in body[:3]} == {"given"}
    assert (tmp_path / "summary.tex").read_text().startswith(r"\begin{tabular}{lllllllrrrrrr}")


def test_markdown_and_latex(study, written):
    markdown = (written / "summary.md").read_text().splitlines()
    assert len(markdown) == 2 + 3
    assert {line.count("|") for line in markdown} == {13}
    latex = (written / "summary.tex").read_text().splitlines()
    assert latex[0] == r"\begin{tabular}{llllllrrrrrr}"
    assert latex[2].startswith(r"backbone & features & head & variant & routing & score & near AUROC $\uparrow$ &")
    assert {line.count("&") for line in (latex[2], *latex[4:7])} == {11}
    assert r" $\pm$ " in latex[6]


def test_names_that_programs_would_read_otherwise_come_back_as_they_are(study, tmp_path):
    name = "=HYPERLINK(1) #1 {a}_^~ \\ | `b`\nnext"
    summary = [{"study": name} | line for line in summarise(study)]
    write_summary(tmp_path, summary)
    assert read_summary(tmp_path) == summary
    assert "\n=HYPERLINK" not in (tmp_path / "summary.csv").read_text()


def test_a_table_of_oracle_rows_alone_has_no_compact_form(evaluator, tmp_path):
    rows = evaluator.rows(replace(MOFE, method=replace(MOFE.method, routing="oracle")), *draw(1))
    write_table(tmp_path, [row.columns for row, _ in rows], summarise(rows))
    assert compact(read_summary(tmp_path))[1] == []
