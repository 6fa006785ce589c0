"""Detectors against their formulas written out plainly, on small drawn features."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.config import ScoreConfig
from stages.detection.conformal import threshold_at
from stages.detection.detectors import Scales, score_together
from stages.detection.factory import DetectorFactory
from stages.detection.selection import SearchFold, choose_k
from stages.detection.subject import FoldRows, SetRows, Subject, SubjectKey
from stages.errors import InputError
from stages.heads.affine import LinearHead
from stages.scorers import SCORERS, get_scorer, reads_head
from stages.scorers.logits.energy import EnergyScorer

CLASSES, DIM = 4, 6
GROUP = np.array([0, 1, 0, 1])


def draw(n: int, seed: int, experts: int = 0, ood: bool = False, second: bool = False) -> SetRows:
    """Rows of four classes; a routed row has logits for its expert's classes only, and the experts' scales differ.

    `second` draws the same rows through the other expert.
    """
    rng = np.random.default_rng(seed)
    labels = (np.arange(n) % CLASSES).astype(np.int32)
    features = rng.normal(scale=0.4, size=(n, DIM)) + (0 if ood else np.eye(CLASSES, DIM)[labels])
    logits = rng.normal(size=(n, CLASSES)) + (0 if ood else 5 * np.eye(CLASSES)[labels])
    if not experts:
        return SetRows(np.float32(features), labels, {"probe": np.float32(logits)})
    gate = rng.uniform(0.5, 1, n).astype(np.float32)
    others = rng.uniform(size=(n, experts)).astype(np.float32)
    expert = GROUP[labels].astype(np.int64)
    if second:
        expert, gate, features = 1 - expert, 1 - gate, features + 0.1
    logits *= 1 + 3 * expert[:, None]
    logits[expert[:, None] != GROUP] = -np.inf
    heads = {"trained": np.float32(logits), "refit": np.float32(logits / 2)}
    other = np.float32(-features.max(axis=1))
    return SetRows(np.float32(features), labels, heads, expert, gate, others, other)


def subject(experts: int = 0, folds: int = 1, has_others: bool = False) -> Subject:
    runs = tuple(
        FoldRows(
            draw(80, 10 * fold, experts),
            draw(24, 10 * fold + 1, experts),
            draw(40, 10 * fold + 2, experts),
            draw(40, 10 * fold + 2, experts, second=True) if experts else None,
        )
        for fold in range(folds)
    )
    bank = runs[0].bank if folds == 1 else draw(120, 99, experts)
    key = SubjectKey("pretrained", "mofe" if experts else "cls", "", None)
    select = runs[0].select if folds == 1 else draw(24, 98, experts)
    return Subject(key, ("trained", "refit") if experts else ("probe",), runs, bank, select, experts, has_others)


def plain_knn(x: SetRows, bank: SetRows, k: int) -> np.ndarray:
    unit = [rows.features / np.linalg.norm(rows.features, axis=1, keepdims=True) for rows in (x, bank)]
    distances = np.sqrt(np.maximum(0, 2 - 2 * unit[0].astype(np.float64) @ unit[1].T.astype(np.float64)))
    if x.expert is not None:
        distances[x.expert[:, None] != bank.expert] = np.inf
    return np.sort(distances, axis=1)[:, k - 1]


def plain_energy(x: SetRows, head: str) -> np.ndarray:
    return -np.log(np.exp(x.logits[head].astype(np.float64)).sum(1))


def make(subject: Subject, **config) -> DetectorFactory:
    return DetectorFactory(subject, ScoreConfig(**{"k": 3} | config))


@pytest.fixture(params=[1, 3], ids=["held out", "cross-fitted"])
def folds(request):
    return request.param


def test_single_scores_are_the_scorers_own(folds):
    frozen, test = subject(folds=folds), draw(30, 7)
    factory = make(frozen)
    knn = factory.detector("none", "knn").score_rows(test)
    np.testing.assert_allclose(knn, plain_knn(test, frozen.bank, 3), atol=1e-5)
    energy = factory.detector("probe", "energy").score_rows(test)
    np.testing.assert_allclose(energy, plain_energy(test, "probe"), atol=1e-5)


def test_calibration_rows_are_scored_by_the_model_that_did_not_see_them(folds):
    frozen = subject(folds=folds)
    expected = np.concatenate([plain_knn(run.calibrate, run.bank, 3) for run in frozen.runs])
    np.testing.assert_allclose(make(frozen).detector("none", "knn").calibration_scores, expected, atol=1e-5)


def test_a_sum_adds_z_scores_on_the_calibration_rows(folds):
    frozen, test = subject(folds=folds), draw(30, 7, ood=True)
    detector = make(frozen).detector("probe", "knn+energy")
    knn = np.concatenate([plain_knn(run.calibrate, run.bank, 3) for run in frozen.runs])
    energy = np.concatenate([plain_energy(run.calibrate, "probe") for run in frozen.runs])

    def sum_of(k, e):
        return (k - knn.mean()) / knn.std() + (e - energy.mean()) / energy.std()

    expected = sum_of(plain_knn(test, frozen.bank, 3), plain_energy(test, "probe"))
    np.testing.assert_allclose(detector.score_rows(test), expected, atol=1e-4)
    assert detector.params == {"knn": {"k": 3}, "energy": {"temperature": 1.0}}


def left_out_together(frozen: Subject) -> np.ndarray:
    """The rows of each run, or 21 times some of one run's."""
    sizes = [len(run.calibrate) for run in frozen.runs]
    return np.repeat(np.arange(len(sizes)), sizes) if len(sizes) > 1 else np.arange(sizes[0]) % 21


def test_no_calibration_row_sets_the_scale_that_it_is_measured_by(folds):
    """Else it would lie nearer to the others than a new row does."""
    frozen = subject(folds=folds)
    detector = make(frozen).detector("probe", "knn+energy")
    knn, energy = (part.calibration.astype(np.float64) for part in detector.parts)
    part, expected = left_out_together(frozen), np.empty(len(knn))
    for row in range(len(knn)):
        others = part != part[row]
        expected[row] = sum((x[row] - x[others].mean()) / x[others].std() for x in (knn, energy))
    np.testing.assert_allclose(detector.calibration_scores, expected, atol=1e-4)


def on_the_experts_scale(scores, expert, calibration, calibration_expert):
    """Median and 1.4826 MAD of the expert's calibration rows, drawn towards everybody's with the weight of 10 rows."""

    def centre_and_scale(values):
        centre = np.median(values)
        return np.array([centre, 1.4826 * np.median(np.abs(values - centre))])

    scaled = np.empty(len(scores))
    for e in range(2):
        own = calibration[calibration_expert == e]
        weight = len(own) / (len(own) + 10)
        centre, scale = weight * centre_and_scale(own) + (1 - weight) * centre_and_scale(calibration)
        scaled[expert == e] = (scores[expert == e] - centre) / scale
    return scaled


@pytest.mark.parametrize("score", ["knn", "energy", "knn+energy"])
def test_calibrated_scores_stand_on_their_experts_scale(score, folds):
    routed, test = subject(experts=2, folds=folds), draw(30, 7, experts=2)
    detector = make(routed).detector("refit", score, calibrated=True)
    calibration_expert = np.concatenate([run.calibrate.expert for run in routed.runs])
    parts = []
    for name in score.split("+"):
        plain = plain_knn if name == "knn" else lambda x, bank, k: plain_energy(x, "refit")
        calibration = np.concatenate([plain(run.calibrate, run.bank, 3) for run in routed.runs])
        raw = plain(test, routed.bank, 3)
        scaled = on_the_experts_scale(raw, test.expert, calibration, calibration_expert)
        if "+" in score:  # z-scores come after the experts' scales
            own = on_the_experts_scale(calibration, calibration_expert, calibration, calibration_expert)
            scaled = (scaled - own.mean()) / own.std()
        parts.append(scaled)
    np.testing.assert_allclose(detector.score_rows(test), np.sum(parts, axis=0), atol=1e-4)
    if "+" not in score:
        part, expected = left_out_together(routed), np.empty(len(calibration))
        for number in np.unique(part):
            own, rest = part == number, part != number
            expected[own] = on_the_experts_scale(
                calibration[own], calibration_expert[own], calibration[rest], calibration_expert[rest]
            )
        np.testing.assert_allclose(detector.calibration_scores, expected, atol=1e-4)


@pytest.mark.parametrize("score", ["knn", "energy", "knn+energy", "ncm"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_two_experts_calibrate_by_the_mean_of_their_scores(score, calibrated, folds):
    """What the detector learnt (experts' scales, z-scores) comes from routed rows and is applied to both."""
    routed = subject(experts=2, folds=folds)
    detector = make(routed).detector("refit", score, calibrated)
    twins = []  # raw scores of the rows through the second choice
    for run in routed.runs:
        scorers = [get_scorer(p.scorer.name, **p.scorer.params()).fit(run.bank.inputs("refit")) for p in detector.parts]
        twins.append([scorer.score(run.second.inputs("refit")) for scorer in scorers])
    raw = [np.concatenate(own) for own in zip(*twins, strict=True)]
    routes, seconds = ([getattr(run, name) for run in routed.runs] for name in ("calibrate", "second"))
    expert, other = (np.concatenate([rows.expert for rows in side]) for side in (routes, seconds))
    gate, second_gate = (np.concatenate([rows.confidence for rows in side]) for side in (routes, seconds))
    part, first, second = left_out_together(routed), detector.calibration_scores, np.empty(len(gate))
    for number in np.unique(part):
        own, rest = part == number, part != number
        known = [p.calibration[rest] for p in detector.parts]
        scales = Scales.fit(known, expert[rest] if calibrated else None, 2)
        second[own] = scales.apply([values[own] for values in raw], other[own])
    weight = gate / (gate + second_gate)
    expected = weight * first + (1 - weight) * second
    np.testing.assert_allclose(detector.top2_calibration_scores, expected, rtol=1e-4, atol=1e-4)
    assert not np.allclose(expected, first)


def test_mos_reads_what_every_group_says_and_no_route():
    groups, test = subject(experts=2, has_others=True), draw(30, 7, experts=2)
    (detector,) = make(groups, scores=["mos"]).detectors()
    assert (detector.head, detector.calibrated, detector.is_routed, detector.params) == ("trained", False, False, {})
    np.testing.assert_array_equal(detector.score_rows(test), test.others.min(1))
    expected = np.concatenate([run.calibrate.others.min(1) for run in groups.runs])
    np.testing.assert_array_equal(detector.calibration_scores, expected)
    for without in (subject(), subject(experts=2)):
        assert make(without, scores=["mos"]).detectors() == []


def test_other_is_what_the_routed_expert_says():
    routed, test = subject(experts=2), draw(30, 7, experts=2)
    plain, calibrated = make(routed, scores=["other"]).detectors()
    assert [(d.head, d.calibrated, d.is_routed) for d in (plain, calibrated)] == [
        ("trained", False, True), ("trained", True, True),
    ]  # fmt: skip
    sums = np.exp(test.logits["trained"].astype(np.float64)).sum(axis=1)
    np.testing.assert_allclose(plain.score_rows(test), test.other - np.log(sums), rtol=1e-5)
    assert make(subject(), scores=["other"]).detectors() == []
    assert make(subject(), scores=["other"]).left_out() == [("other", "a mixture of two experts or more", "")]


def test_what_a_score_needs_and_rows_do_not_have_is_said():
    """Logits that came with the features have no weights: scores that need them run on the other heads."""
    plain = subject()
    probe = LinearHead(np.ones((CLASSES, DIM)), np.zeros(CLASSES))
    given = replace(plain, heads=("given", "probe"), bank=replace(plain.bank, heads={"probe": probe}))
    weights = "the weights of a linear head"
    both = make(given, scores=["react", "energy", "patch-knn"])
    assert (both.heads_of("react"), both.heads_of("energy")) == (("probe",), ("given", "probe"))
    assert both.left_out() == [("react", weights, "given"), ("patch-knn", "patch tokens", "")]
    assert make(plain, scores=["dice"]).left_out() == [("dice", weights, "")]
    without = make(replace(plain, heads=()), scores=["msp", "knn+energy", "knn"])
    assert without.left_out() == [("msp", "logits", ""), ("knn+energy", "logits", "")]
    assert [detector.score for detector in without.detectors()] == ["knn"]


def test_routed_are_scores_of_an_expert():
    frozen, routed = make(subject()), make(subject(experts=2))
    assert not frozen.detector("none", "knn").is_routed
    assert routed.detector("none", "knn").is_routed
    assert routed.detector("refit", "knn+energy").is_routed


def test_rows_without_experts_cannot_be_calibrated_over_them():
    with pytest.raises(InputError, match="these rows were not routed"):
        make(subject()).detector("probe", "energy", calibrated=True)


def test_every_score_on_every_head_that_it_reads():
    def listed(subject, **config):
        return [(d.score, d.head, d.calibrated) for d in make(subject, **config).detectors()]

    assert listed(subject()) == [
        ("msp", "probe", False),
        ("energy", "probe", False),
        ("knn", "none", False),
        ("knn+energy", "probe", False),
        ("mahalanobis-pp", "none", False),
        ("ncm+energy", "probe", False),
    ]  # but for auto, which is chosen from outside
    assert listed(subject(experts=2), scores=["knn", "energy"]) == [
        ("knn", "none", False),
        ("knn", "none", True),
        ("energy", "trained", False),
        ("energy", "trained", True),
        ("energy", "refit", False),
        ("energy", "refit", True),
    ]
    assert listed(subject(experts=1), scores=["knn"]) == [("knn", "none", False)]  # one scale: nothing to calibrate
    assert listed(subject(), scores=["ncm"]) == [("ncm", "none", False)]
    assert listed(subject(experts=2), scores=["ncm"]) == [("ncm", "none", False), ("ncm", "none", True)]


def test_what_reads_a_head():
    gaussian = {"mahalanobis", "mahalanobis-pp", "relative-mahalanobis", "relative-mahalanobis-pp", "ssd", "gmm"}
    gaussian |= {"mahalanobis-radial", "wdiscood", "vmf"}
    of_features = {"knn", "knn-mean", "ncm", "cosine", "cop", "corp", "mos", "patch-knn", *gaussian}
    of_features |= {"mm-pp", "knn-layers"}
    assert {name for name in (*SCORERS, "knn+energy", "knn+gmm") if not reads_head(name)} == of_features | {"knn+gmm"}
    with pytest.raises(InputError, match="'energy'"):
        reads_head("knn+enrgy")


def test_k_is_given_or_chosen_from_bank_and_select_rows_alone(folds):
    given = make(subject(folds=folds), k=7)
    assert given.detector("none", "knn").params == {"k": 7}
    assert given.k_record == {"rule": "given"}
    frozen = subject(folds=folds)
    auto = make(frozen, k="auto")
    expected, record = choose_k([SearchFold(run.bank.inputs("none"), run.select.inputs("none")) for run in frozen.runs])
    assert auto.detector("none", "knn").params == {"k": expected}
    assert (auto.k, auto.k_record) == (expected, record)


def test_k_is_chosen_where_neighbours_are_searched():
    frozen = subject(folds=2)
    folds = [SearchFold(run.bank.inputs("none"), run.select.inputs("none")) for run in frozen.runs]
    expected = {space: choose_k(folds, space=space) for space in ("raw", "whitened")}
    assert expected["raw"][1]["auroc"] != expected["whitened"][1]["auroc"]
    auto = make(frozen, k="auto", params={"knn": {"space": "whitened"}})
    assert auto.detector("none", "knn").params["k"] == expected["whitened"][0]
    assert auto.detector("none", "knn-mean").params == {"k": expected["raw"][0]}
    assert auto.k_in("whitened") == expected["whitened"]
    assert (auto.k, auto.k_record) == expected["raw"]


def test_temperature_reaches_the_scorer():
    frozen, test = subject(), draw(30, 7)
    warm = make(frozen, temperature=10.0).detector("probe", "energy")
    expected = -10 * np.log(np.exp(test.logits["probe"].astype(np.float64) / 10).sum(1))
    np.testing.assert_allclose(warm.score_rows(test), expected, rtol=1e-5)
    assert warm.params == {"temperature": 10.0}


def test_a_score_is_computed_once_for_all_detectors_that_it_is_part_of(monkeypatch):
    """Alone, calibrated and in a sum."""
    judged = []
    judge = EnergyScorer.judge
    monkeypatch.setattr(EnergyScorer, "judge", lambda self, x, memory: judged.append(len(x)) or judge(self, x, memory))
    routed, test = subject(experts=2), draw(30, 7, experts=2)
    detectors = make(routed, scores=["energy", "knn+energy"]).detectors()
    judged.clear()
    together = score_together(detectors, test)
    assert len(detectors) == 8
    assert judged == [30, 30]  # by each of two heads
    np.testing.assert_array_equal(together, [detector.score_rows(test) for detector in detectors])


# ------------------------------------------------------------------------------------------------- two subjects


def test_a_sum_of_two_subjects_adds_what_each_says_of_the_same_rows(folds):
    frozen, routed = subject(folds=folds), subject(experts=2, folds=folds)
    factory = make(routed.beside(frozen))
    test = replace(draw(30, 7, experts=2), frozen=draw(30, 7))
    knn = np.concatenate([plain_knn(run.calibrate, run.bank, 3) for run in frozen.runs])
    energy = np.concatenate([plain_energy(run.calibrate, "refit") for run in routed.runs])
    expected = (plain_knn(test.frozen, frozen.bank, 3) - knn.mean()) / knn.std()
    expected += (plain_energy(test, "refit") - energy.mean()) / energy.std()
    detector = factory.detector("refit", "frozen:knn+energy")
    np.testing.assert_allclose(detector.score_rows(test), expected, atol=1e-4)
    assert detector.params == {"frozen:knn": {"k": 3}, "energy": {"temperature": 1.0}}
    assert detector.is_routed
    assert factory.heads_of("frozen:knn+energy") == ("trained", "refit")
    assert factory.heads_of("frozen:energy+knn") == ("none",)


def test_k_of_each_subject_is_its_own():
    frozen, routed = subject(), subject(experts=2)
    found = make(routed.beside(frozen), k="auto").detector("none", "frozen:knn+knn").params
    assert found == {
        "frozen:knn": make(frozen, k="auto").detector("none", "knn").params,
        "knn": make(routed, k="auto").detector("none", "knn").params,
    }


@pytest.mark.parametrize(
    ("score", "why"),
    [
        ("frozen:knn", "a part that looks at what the experts make"),
        ("frozen:knn+frozen:energy", "a part that looks at what the experts make"),
        ("frozen:patch-knn+energy", "patch tokens of the backbone's own features"),
        ("frozen:vim+energy", "the weights of a linear head of the backbone's own features"),
        ("frozen:other+energy", 'heads with "other"'),
    ],
)
def test_what_is_no_sum_of_two_subjects_is_left_out_with_the_reason(score, why):
    assert why in make(subject(experts=2).beside(subject())).why_not(score)
    assert "experts, beside whose features" in make(subject()).why_not(score)


# ---------------------------------------------------------------------------------------------------- little data


def drawn(n: int, classes: int, experts: int, seed: int, routed: bool = False) -> SetRows:
    """Rows of some classes with a head each; routed rows went to any expert, others to their class's."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(n) % classes).astype(np.int32)
    features = np.float32(rng.normal(scale=0.4, size=(n, 8)) + 2 * np.eye(classes, 8)[labels])
    weight = np.float32(3 * np.eye(classes, 8) + rng.normal(scale=0.1, size=(classes, 8)))
    group = np.arange(classes) % max(experts, 1)
    heads = tuple(
        LinearHead(weight, np.where(group == expert, 0, -np.inf).astype(np.float32))
        for expert in range(max(experts, 1))
    )
    if not experts:
        return SetRows(features, labels, {"probe": heads[0].logits(features)}, heads={"probe": heads[0]})
    expert = rng.integers(0, experts, n) if routed else group[labels].astype(np.int64)
    logits = np.where(expert[:, None] == group, features @ weight.T, -np.inf).astype(np.float32)
    gate, other = rng.uniform(0.5, 1, n).astype(np.float32), rng.normal(size=n).astype(np.float32)
    both = {"trained": logits, "refit": logits}
    return SetRows(features, labels, both, expert, gate, None, other, heads=dict.fromkeys(both, heads))


@settings(max_examples=6)
@given(
    classes=st.integers(2, 12),
    experts=st.integers(0, 8),
    per_class=st.integers(1, 13),
    held_out=st.integers(1, 4),
    folds=st.sampled_from([1, 3]),
    seed=st.integers(0, 999),
)
def test_no_score_is_stopped_by_little_data(classes, experts, per_class, held_out, folds, seed):
    """Every automatic choice has a fallback: k, dimensions, covariances, temperatures, thresholds, experts' scales."""
    experts = min(experts, classes)
    run = [
        FoldRows(
            drawn(classes * per_class, classes, experts, seed + fold),
            drawn(held_out * (classes - fold), classes, experts, seed + fold + 10, routed=True),
            drawn(held_out * classes, classes, experts, seed + fold + 20, routed=True),
        )
        for fold in range(folds)
    ]
    key, heads = SubjectKey("pretrained", "cls", "", None), ("trained", "refit") if experts else ("probe",)
    bank = drawn(classes * (per_class + 1), classes, experts, seed + 30)
    small = Subject(key, heads, tuple(run), bank, run[0].select, experts)
    scores = [name for name in SCORERS if name not in ("mos", "patch-knn")]
    factory = DetectorFactory(small, ScoreConfig(scores=[*scores, "knn+energy"], k="auto"))
    detectors, test = factory.detectors(), drawn(20, classes, experts, seed + 40, routed=True)
    for detector, found in zip(detectors, score_together(detectors, test), strict=True):
        assert np.isfinite(found).all(), detector.score
        assert np.isfinite(detector.calibration_scores).all(), detector.score
        assert threshold_at(detector.calibration_scores).n == held_out * classes * folds
    assert factory.k >= 1


def test_a_sum_of_one_calibration_row_says_that_it_is_not_standardised():
    frozen = subject()
    one = replace(frozen, runs=tuple(replace(run, calibrate=draw(1, 3)) for run in frozen.runs))
    detector = make(one).detector("probe", "knn+energy")
    said = "its parts are added in units of their own, for one row tells no deviation"
    assert detector.remarks() == [("knn+energy", "probe", said)]
    assert make(frozen).detector("probe", "knn+energy").remarks() == []
    test = draw(30, 7)
    knn, energy = plain_knn(test, frozen.bank, 3), plain_energy(test, "probe")
    moved = knn + energy - detector.score_rows(test)
    np.testing.assert_allclose(moved, moved[0], atol=1e-4)  # by what the one row scored
