"""``auto``: a score that is planted as the best is chosen, by ID rows alone, and stands for the score that it chose."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from stages.config import ScoreConfig, TrainConfig
from stages.detection import Detector
from stages.detection.auto import AutoScore, family_of, is_candidate, judge_candidates
from stages.detection.deciding import DecidingDetector
from stages.detection.factory import DetectorFactory
from stages.detection.frozen import FrozenFeatures
from stages.detection.pseudo import pseudo_folds
from stages.detection.sources import ScoredSet
from stages.detection.subject import FoldRows, SetRows, Subject, SubjectKey
from stages.export import GoldenSamples, export_detector
from stages.predict import Predictor
from stages.score import score
from stages.scorers import SCORERS, needs_of
from tests.test_stages.drawn_studies import World, make_study
from tests.test_stages.tallies import Tallies

CONFIG = ScoreConfig(scores=["auto", "energy", "knn", "knn+energy"], k=3, bootstrap=100)
DIM = 16


def subject(classes=8, per_class=12, select=4, spread=0.3, seed=0):
    """Frozen features of classes with a mean each; whoever looks at them separates the more, the smaller the spread."""
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(classes, DIM))

    def rows(n):
        labels = np.repeat(np.arange(classes, dtype=np.int32), n)
        return SetRows(np.float32(means[labels] + rng.normal(scale=spread, size=(len(labels), DIM))), labels)

    run = FoldRows(rows(per_class), rows(select), rows(4))
    key = SubjectKey("pretrained", "cls", "", None)
    return Subject(key, ("probe",), (run,), run.bank, run.select, strengths={"probe": 0.1})


def chosen(own, source=None, **config):
    factory = DetectorFactory(own, ScoreConfig(**{"k": 3} | config))
    return AutoScore(source or NO_MODELS).choice(factory, factory)


NO_MODELS = SimpleNamespace(models={})
KINDS = ("near", "shuffled", "far")


# --------------------------------------------------------------------------------------------------------- the folds


def test_folds_leave_classes_out_of_all_that_is_fitted():
    own = subject(classes=11)
    pairs = list(pseudo_folds(own, own.strengths))
    assert len(pairs) == 10  # five groups, in two divisions of either way
    for place, kind in enumerate(("near", "far")):
        left_out = []
        for fold in (pair[place] for pair in pairs):
            known, out = (set(np.unique(rows.labels)) for rows in (fold.bank, fold.ood[kind]))
            assert known == set(np.unique(fold.id.labels)) >= set(np.unique(fold.select.labels))
            assert not known & out
            assert set(fold.bank.heads["probe"].classes) == known
            left_out += out
        assert sorted(left_out) == sorted([*range(11), *range(11)])
    assert all((*dealt.ood, *far.ood) == KINDS for dealt, far in pairs)


def test_far_ones_are_of_classes_that_are_alike():
    """Of two worlds far from each other one is left out at a time."""
    own = subject(classes=4, select=6)
    moved = np.where(np.arange(4) < 2, 20.0, 0.0)  # classes 0 and 1; 0 and 2 are dealt together

    def shifted(rows):
        return replace(rows, features=np.float32(rows.features + moved[rows.labels][:, None]))

    (run,) = own.runs
    run = FoldRows(*map(shifted, (run.bank, run.select, run.calibrate)))
    own = replace(own, runs=(run,), bank=run.bank, select_rows=run.select)
    assert {frozenset(np.unique(far.ood["far"].labels).tolist()) for _, far in pseudo_folds(own, {})} == {
        frozenset({0, 1}), frozenset({2, 3}),
    }  # fmt: skip


def test_shuffled_rows_have_the_features_of_id_rows_and_none_goes_with_another():
    fold, _ = next(pseudo_folds(own := subject(), own.strengths))
    shuffled = fold.ood["shuffled"].features
    np.testing.assert_array_equal(np.sort(shuffled, 0), np.sort(fold.id.features, 0))
    assert (shuffled == fold.id.features).mean() < 0.2


def drawn(n, at=0.0, seed=5):
    """Rows of no class, around one place."""
    return SetRows(np.float32(np.random.default_rng(seed).normal(at, 1, (n, DIM))), np.full(n, -1, np.int32))


def test_images_that_play_ood_take_the_place_of_shuffled_rows_with_the_logits_of_the_folds_heads():
    own = replace(subject(), pseudo={"blurred": drawn(20), "few": drawn(9), "tiles": drawn(30)})
    for fold, far in pseudo_folds(own, own.strengths):
        assert (*fold.ood, *far.ood) == ("near", "blurred", "tiles", "far")
        np.testing.assert_array_equal(fold.ood["tiles"].features, own.pseudo["tiles"].features)
        expected = fold.judging["probe"].logits(own.pseudo["tiles"].features)
        np.testing.assert_allclose(fold.ood["tiles"].logits["probe"], expected, rtol=1e-6)


def test_what_is_chosen_depends_on_the_images_and_both_sides_count_alike():
    own = subject(classes=4, select=8, spread=1.0)
    near, apart = ({kind: drawn(40, at) for kind in ("blurred", "tiles")} for at in (0.0, 9.0))
    first, second = (chosen(replace(own, pseudo=pseudo)).record for pseudo in (near, apart))
    assert second["loss"] < first["loss"]
    loss = first["loss_by_kind"]
    left_out, images = (loss["near"] + loss["far"]) / 2, (loss["blurred"] + loss["tiles"]) / 2
    assert first["loss"] == pytest.approx((left_out + images) / 2, abs=1e-5)
    assert chosen(own).record["rule"] != first["rule"]


def test_what_calibrates_is_never_looked_at():
    """Where a row is held out to calibrate, no other value of it moves a choice."""
    own = subject()
    other = replace(own, runs=(replace(own.runs[0], calibrate=own.runs[0].calibrate.take(np.arange(0))),))
    assert chosen(own) == chosen(other)


# --------------------------------------------------------------------------------------------------------- the choice


def test_a_planted_best_score_is_chosen(monkeypatch):
    """A score that knows which rows play OOD, whatever it is called and wherever it stands."""
    from stages.scorers.features.cosine import CosineScorer

    own = subject(spread=1.5)  # so that no honest score is near it
    known = {features.tobytes() for features in np.asarray(own.runs[0].select.features)}

    def judged(self, x, memory):
        labels = np.asarray(x.labels)
        kept = np.array([row.tobytes() in known for row in np.asarray(x.features)])
        return np.float32(~(kept & np.isin(labels, memory)))

    monkeypatch.setattr(CosineScorer, "learn", lambda self, train, select: np.unique(train.labels))
    monkeypatch.setattr(CosineScorer, "judge", judged)
    found = chosen(own)
    assert (found.score.split("+")[0], found.frozen) == ("cosine", True)
    assert found.record["loss"] < 0.2 < found.record["recommended"]["loss"]
    assert found.record["folds"] == 8


def test_the_same_rows_give_the_same_choice_and_other_rows_may_not():
    assert chosen(subject(spread=1.0)) == (first := chosen(subject(spread=1.0)))
    assert first.record != chosen(subject(spread=1.0, seed=1)).record


def test_candidates_follow_from_what_scores_need():
    names = [name for name in SCORERS if is_candidate(name)]
    assert {"gmm", "nnguide", "relation", "patch-knn", "other", "mos"} & set(names) == set()
    assert {"knn", "energy", "ncm", "mahalanobis-pp", "vim"} <= set(names)
    assert all(needs_of(name) <= {"features", "logits", "head", "bank", "select", "labels"} for name in names)
    assert [family_of(name) for name in ("knn", "energy", "vim")] == [(True, False), (False, True), (True, True)]


def test_candidates_and_sums_of_different_families_are_judged():
    factory = DetectorFactory(subject(), ScoreConfig(k=3))
    names = [name for name in SCORERS if is_candidate(name)]
    judged = judge_candidates(factory, names)
    assert set(judged.scores) >= {"knn", "energy", "ncm", "mahalanobis-pp", "vim"}  # others may want more rows
    assert judged.losses.shape == (len(judged.scores), 8, len(KINDS))
    assert all(len({family_of(part) for part in each.split("+")}) == each.count("+") + 1 for each in judged.scores)


@pytest.mark.parametrize(
    ("little", "heads", "score", "why"),
    [
        ({"classes": 1}, True, "knn+energy", "1 classes"),
        ({"classes": 2}, True, "knn+energy", "2 classes"),
        ({"classes": 3}, False, "knn", "3 classes"),
        ({"classes": 5, "per_class": 2, "select": 1}, True, "knn+energy", "too few held-out ID rows"),
    ],
)
def test_with_too_little_to_judge_by_it_is_what_is_recommended_beforehand(little, heads, score, why):
    own = subject(**little)
    if not heads:
        own = replace(own, heads=(), strengths={})
    found = chosen(own)
    assert (found.score, found.frozen) == (score, True)
    assert why in found.record["rule"]


@pytest.mark.parametrize("classes", [4, 5])
def test_few_classes_and_no_head_are_enough(classes):
    assert chosen(subject(classes=classes, select=8)).record["folds"] == 4
    found = chosen(replace(subject(classes=classes, select=8), heads=(), strengths={}))
    assert family_of(found.score) == (True, False)


# ---------------------------------------------------------------------------------------------------------- a study


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study with test sets, its mixture trained: ID rows of one world and OOD rows of another."""
    folder = tmp_path_factory.mktemp("auto")
    own = make_study(World(0), 60, folder / "own", fresh=10)
    others = make_study(World(1), 20, folder / "others", fresh=10)
    refined = own.refined(TrainConfig(expert="frozen", experts=2, epochs=1), 0, folder / "mixture")
    tests = (ScoredSet("test", "id", own.fresh), ScoredSet("far", "far", others.fresh))
    models = {"model/pretrained/probe/probe.json": "a", "model/pretrained/default/seed-0/mofe.json": "b"}
    return replace(own.source, tests=tests, mixtures=(refined.folder,), models=models)


@pytest.fixture(scope="module")
def scored(study, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scores")
    return folder, score([study], CONFIG, folder)


def test_the_row_of_auto_is_the_row_of_what_it_chose(scored, study, tmp_path):
    rows = [row for row in scored[1].rows if row["score"] == "auto"]
    assert [(row["features"], row["head"], row["routing"], row["ood"]) for row in rows[:1]] == [
        ("cls", "probe", "none", "far")
    ]
    assert {(row["features"], row["routing"], row["variant"]) for row in rows} == {
        ("cls", "none", ""), ("mofe", "predicted", "default"),
    }  # fmt: skip
    params = [json.loads(row["params"]) for row in rows]
    asked = CONFIG.model_copy(update={"scores": [own["chosen"] for own in params if own["features"] == "cls"][:1]})
    again = score([study], asked, tmp_path / "again").rows
    numbers = ("auroc", "fpr95", "aupr_in", "fpr95_lo", "fpr95_hi")
    for row, own in zip(rows, params, strict=True):
        assert own["auto"]["loss"] >= 0
        if own["features"] == "cls":
            (same,) = (
                other for other in again
                if (other["score"], other["features"], other["ood"], other["group"])
                == (own["chosen"], "cls", row["ood"], row["group"])
            )  # fmt: skip
            assert [row[name] for name in numbers] == [same[name] for name in numbers]


def test_it_is_said_what_was_chosen_and_what_that_cost(scored):
    folder, result = scored
    assert any(note.startswith("auto is ") for note in result.notes)
    lines = [line for line in result.summary if line["score"] == "auto"]
    others = [line for line in result.summary if line["score"] != "auto" and line["routing"] != "oracle"]
    for line in lines:
        best = min(o["fpr95_mean"] for o in others if (o["ood"], o["group"]) == (line["ood"], line["group"]))
        assert line["fpr95_regret"] == pytest.approx(line["fpr95_mean"] - best)
    assert all(line["fpr95_regret"] is None for line in others)
    assert {line["score"] for line in json.loads((folder / "thresholds.json").read_text())} >= {"auto"}


def test_no_test_image_has_a_say(study, scored, tmp_path):
    """Of other ID test and OOD sets the choice is the same, its numbers too. All that takes long says how far it is."""
    own, listens = study.tests, Tallies()
    changed = (ScoredSet("test", "id", own[0].cache), ScoredSet("far", "far", own[0].cache))
    found = score([replace(study, tests=changed)], CONFIG, tmp_path / "scores", listens).rows
    told = {tuple(description.rsplit(" ", 1)) for description, *_ in listens.told}
    for name in ("pretrained-cls-none-none", "pretrained-mofe-default-0"):
        assert {(task, name) for task in ("fit", "score rows of", "choose for", "score")} <= told
    assert [task for task in listens.told if task[1] != task[2]] == []
    first, second = ({row["params"] for row in rows if row["score"] == "auto"} for rows in (scored[1].rows, found))
    assert first == second


def test_what_was_chosen_is_kept_by_what_it_was_chosen_from(study, scored, monkeypatch):
    kept = sorted((scored[0] / "auto").iterdir())
    assert len(kept) == 2  # of the frozen features, and of the mixture
    monkeypatch.setattr("stages.detection.auto._chosen", lambda factory, frozen: pytest.fail("chosen again"))
    factory = DetectorFactory(FrozenFeatures(study).subject(), CONFIG)
    found = AutoScore(study, scored[0] / "auto").choice(factory, factory)
    assert json.loads(next(row["params"] for row in scored[1].rows if row["score"] == "auto"))["chosen"] == found.score
    monkeypatch.undo()
    other = DetectorFactory(factory.subject, CONFIG.model_copy(update={"k": 4}))
    AutoScore(study, scored[0] / "auto").choice(other, other)
    assert len(list((scored[0] / "auto").iterdir())) == 3


def test_predict_and_export_are_the_row_of_the_table(study, scored, tmp_path):
    alone = replace(study, mixtures=())
    predictor = Predictor(alone, CONFIG, choices=scored[0] / "auto")
    table = DetectorFactory(FrozenFeatures(alone).subject(), CONFIG)
    expected = table.detector("probe", predictor.fitted.choice["chosen"])
    rows = study.tests[0].cache.read("cls")
    labels = np.full(len(rows), -1, np.int32)
    expected = expected.score_rows(FrozenFeatures(alone).rows(study.tests[0].cache, labels))
    np.testing.assert_allclose(predictor.detector.score(rows).score, expected, rtol=1e-5, atol=1e-5)
    assert predictor.fitted.score == "auto"
    line = next(line for line in json.loads((scored[0] / "thresholds.json").read_text()) if line["score"] == "auto")
    assert predictor.threshold.threshold == pytest.approx(line["threshold"])
    deciding = DecidingDetector(alone, CONFIG, "auto", "probe", choices=scored[0] / "auto")
    some = GoldenSamples([("test", str(row)) for row in range(40)], None, {"cls": rows[:40]})
    export_detector(tmp_path / "auto.ood", deciding, some, {})
    np.testing.assert_array_equal(
        Detector.load(tmp_path / "auto.ood").score(rows).score, predictor.detector.score(rows).score
    )


@pytest.mark.parametrize("name", ["frozen:knn+energy", "frozen:energy+knn", "frozen:knn+frozen:energy+knn"])
def test_a_sum_of_two_subjects_leaves_the_laboratory(study, tmp_path, name):
    deciding = DecidingDetector(study, CONFIG, name, "refit")
    rows = study.tests[1].cache.read("cls")
    some = GoldenSamples([("far", str(row)) for row in range(40)], None, {"cls": rows[:40]})
    export_detector(tmp_path / "it.ood", deciding, some, {})
    found = Detector.load(tmp_path / "it.ood").score(rows).score
    np.testing.assert_array_equal(found, deciding.detector().score(rows).score)
