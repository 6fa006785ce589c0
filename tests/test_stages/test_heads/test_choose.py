"""Linear heads against scikit-learn, their strength against the rule written out, and what a damaged file gives."""

import json

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from stages.heads import logistic
from stages.heads.affine import LinearHead
from stages.heads.choose import (
    FITS,
    STRENGTHS,
    FittedHeads,
    HeadRows,
    choose_head,
    fit_head,
    fit_heads,
    load_heads,
    save_heads,
)
from stages.heads.logistic import HEAD_TOLERANCE, ROUGH
from stages.heads.summing import HERE
from tests.test_stages.tallies import Tallies


def digits(*classes: int, start: int = 0, stop: int = 600) -> tuple[np.ndarray, np.ndarray]:
    """Rows of real digits, one channel in two shifted far off."""
    data = load_digits()
    rows = np.flatnonzero(np.isin(data.target, classes or range(10)))[start:stop]
    return data.data[rows].astype(np.float32) + np.arange(64) % 2 * 50, data.target[rows].astype(np.int32)


def plainly_scaled(features, of) -> np.ndarray:
    """Centred, and divided by one number for all features."""
    return (features - of.mean(0)) / np.sqrt(of.var(0).mean())


def fold() -> HeadRows:
    return HeadRows(*digits(stop=400), *digits(start=400, stop=600))


def likely(head: LinearHead, features, labels) -> float:
    """Mean log-likelihood, with nothing clever."""
    probability = softmax(head.logits(features).astype(np.float64), axis=1)
    return float(np.mean([np.log(probability[row, label]) for row, label in enumerate(labels)]))


def exactly(features, labels) -> LogisticRegression:
    """At the minimum: where scikit-learn's default stops, logits of these rows are 0.04 off."""
    scaled = plainly_scaled(features, features).astype(float)
    return LogisticRegression(C=0.1, solver="newton-cg", tol=1e-10, max_iter=1000).fit(scaled, labels)


# ------------------------------------------------------------------------------------------------------ the fit


def test_logits_are_scikit_learns_decision_function():
    features, labels = digits()
    head = fit_head(features, labels, 10, strength=0.1)
    reference = exactly(features, labels)
    test, _ = digits(start=600, stop=900)
    assert head.logits(test) == pytest.approx(reference.decision_function(plainly_scaled(test, features)), abs=2e-3)
    assert head.logits(test).dtype == np.float32
    assert head.standardise.scale.shape == (1,)


def test_heads_to_be_compared_are_near_enough_in_float32():
    features, labels = digits()
    exact, near = (fit_head(features, labels, 10, 0.1, tolerance) for tolerance in (HEAD_TOLERANCE, ROUGH))
    test, truth = digits(start=600, stop=900)
    assert near.logits(test) != pytest.approx(exact.logits(test), abs=2e-3)
    assert likely(near, test, truth) == pytest.approx(likely(exact, test, truth), abs=0.01)


def test_two_classes_have_scikit_learns_probabilities():
    """It fits one difference of logits; ours are one per class."""
    features, labels = digits(3, 8)
    head = fit_head(features, labels, 10, strength=0.1)
    reference = exactly(features, labels)
    test, _ = digits(3, 8, start=200)
    ours = softmax(head.logits(test).astype(float), axis=1)
    assert ours[:, [3, 8]] == pytest.approx(reference.predict_proba(plainly_scaled(test, features)), abs=1e-4)


@pytest.mark.parametrize("classes", [(0, 4, 9), (3, 8), (5,)])
def test_absent_classes_have_no_logit(classes):
    features, labels = digits(*classes)
    logits = fit_head(features, labels, 10, strength=0.1).logits(features)
    finite = np.isfinite(logits)
    assert (finite.all(0) == np.isin(range(10), classes)).all()
    assert (logits[~finite] == -np.inf).all()
    assert (logits.argmax(1) == labels).mean() > 0.97


def test_one_class_is_certain():
    features, labels = digits(5)
    head = fit_head(features, labels, 10, strength=1.0)
    assert (head.logits(features)[:, 5] == 0).all()
    assert (HERE.log_likelihood(head, features, labels) == 0).all()


def test_features_that_do_not_vary_are_no_reason_to_fail():
    features, labels = digits(1, 2)
    constant = fit_head(np.ones_like(features), labels, 10, strength=0.1)
    assert np.isfinite(constant.logits(features)[:, 1:3]).all()
    features[:, :32] = 7
    assert np.isfinite(fit_head(features, labels, 10, strength=0.1).logits(features)[:, 1:3]).all()


def test_one_common_scale_keeps_a_quiet_feature_quiet():
    """A feature that hardly varies on ID rows must not make an enormous logit of an OOD row that moves it."""
    features, labels = digits(1, 2)
    features[:, 0] = np.random.default_rng(0).normal(0, 1e-4, len(features))
    head = fit_head(features, labels, 10, strength=0.1)
    moved = features.copy()
    moved[:, 0] += 1
    assert head.logits(moved)[:, 1:3] == pytest.approx(head.logits(features)[:, 1:3], abs=0.1)


def unlearnable() -> tuple[np.ndarray, np.ndarray]:
    """Labels that features do not tell, and features of very different sizes."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((300, 60), np.float32) * np.logspace(0, -4, 60, dtype=np.float32)
    return features, rng.integers(0, 4, 300).astype(np.int32)


def test_weak_penalty_warns_nobody():
    """The steps are enough all the same."""
    features, labels = unlearnable()
    assert np.isfinite(fit_head(features, labels, 4, strength=1e6).logits(features)).all()


def test_a_fit_that_stopped_before_its_minimum_is_said_then_and_when_it_is_read_again(tmp_path, monkeypatch):
    rows = HeadRows(*unlearnable(), *unlearnable())
    strong = choose_head(rows, 4, [1e-3]).head
    monkeypatch.setattr(logistic, "MAX_STEPS", 3)
    weak, again = (choose_head(rows, 4, [1e6]).head for _ in range(2))
    fitted = FittedHeads((strong, weak), again, 1e6, {"1e+06": -1.0})
    expected = ["head probe: 2 of 3 fits stopped before the minimum"]
    assert fitted.notes("probe") == expected
    save_heads(tmp_path, "probe", {"probe": fitted}, "of this test")
    assert load_heads(tmp_path, "probe", "of this test")["probe"].notes("probe") == expected
    monkeypatch.undo()
    assert fit_heads([fold()], 10).notes("probe") == []


def test_rows_of_a_class_that_the_model_never_saw_have_no_say_in_the_strength():
    """Every head gives them p = 0; and where there are no others, the strongest penalty is taken and said."""
    features, labels = digits(0, 1, 2)
    select, select_labels = digits(0, 1, 2, 3, start=300, stop=500)
    some = select_labels < 3
    of_all = choose_head(HeadRows(features, labels, select, select_labels), 10)
    of_known = choose_head(HeadRows(features, labels, select[some], select_labels[some]), 10)
    assert (of_all.strength, of_all.judged) == (of_known.strength, of_known.judged)
    none = fit_heads([HeadRows(features, labels, select[~some], select_labels[~some])], 10)
    assert none.strength == min(STRENGTHS)
    assert none.notes("probe") == ["head probe: strength 0.001, for no held-out row is there to choose it by"]


def test_log_likelihood_is_that_of_the_label():
    features, labels = digits()
    head = fit_head(features, labels, 10, strength=0.1)
    assert HERE.log_likelihood(head, features, labels).mean() == pytest.approx(likely(head, features, labels))
    unseen = fit_head(*digits(0, 1), 10, strength=0.1)
    assert (HERE.log_likelihood(unseen, *digits(7)) == -np.inf).all()


# ------------------------------------------------------------------------------------------------- the strength


def test_one_standard_error_rule_written_out():
    own = fold()
    head, chosen, judged = choose_head(own, 10)
    rows = {}
    for strength in STRENGTHS:
        logits = fit_head(own.features, own.labels, 10, strength).logits(own.select_features)
        probability = softmax(logits.astype(np.float64), axis=1)
        rows[strength] = np.log(probability[np.arange(len(logits)), own.select_labels])
    best = max(STRENGTHS, key=lambda strength: rows[strength].mean())
    standard_error = rows[best].std() / np.sqrt(len(rows[best]))
    enough = [strength for strength in STRENGTHS if rows[strength].mean() >= rows[best].mean() - standard_error]
    assert chosen == min(enough)
    assert chosen < best  # the rule does something here
    # Weaker penalties than the best one's are not taken, and are known less well; the last are not fitted at all.
    of_candidates = {strength: judged[f"{strength:g}"] for strength in STRENGTHS if strength <= best}
    assert of_candidates == {s: pytest.approx(rows[s].mean(), abs=standard_error / 5) for s in of_candidates}
    again = fit_head(own.features, own.labels, 10, chosen)  # from zero, and not from where stronger penalties led
    assert head.logits(own.select_features) == pytest.approx(again.logits(own.select_features), abs=2e-3)
    assert choose_head(own, 10, STRENGTHS[::-1]).strength == chosen


def test_a_strength_that_is_given_needs_no_rows_to_judge_by():
    features, labels = digits()
    chosen = choose_head(HeadRows(features, labels, features[:0], labels[:0]), 10, [0.1])
    assert (chosen.strength, chosen.judged) == (0.1, {})
    assert same(chosen.head, fit_head(features, labels, 10, 0.1))


@pytest.mark.parametrize("judged", [100, 0], ids=["chosen", "nothing to choose by"])
def test_progress_counts_every_fit_to_the_end(judged):
    """Strengths that need no fit are counted, too; a part is one fit."""
    listens = Tallies()
    own = fold()
    rows = HeadRows(own.features, own.labels, own.select_features[:judged], own.select_labels[:judged])
    fit_heads([rows, rows], 10, [(own.features[:300], own.labels[:300])], progress=listens)
    assert listens.told == [["heads probe", 2 * FITS + 1, 2 * FITS + 1]]


def test_every_model_has_the_head_and_the_strength_of_its_own_rows():
    """What another fold's rows are, or the final model's, changes nothing in a fold's head."""
    folds = [fold(), HeadRows(*digits(start=600, stop=900), *digits(start=900, stop=1000))]
    final = HeadRows(*digits(stop=900), *digits(start=900, stop=1000))
    fitted = fit_heads([*folds, final], 10)
    for head, rows in zip((*fitted.folds, fitted.final), (*folds, final), strict=True):
        assert same(head, choose_head(rows, 10).head)
    assert (fitted.strength, fitted.judged) == choose_head(final, 10)[1:]
    alone = fit_heads(folds[:1], 10)
    assert alone.final is alone.folds[0]


# ---------------------------------------------------------------------------------------------------- save, load


def same(one: LinearHead, other: LinearHead) -> bool:
    return all(np.array_equal(array, other.tensors()[name]) for name, array in one.tensors().items())


@pytest.fixture(scope="module")
def fitted() -> FittedHeads:
    heads = tuple(fit_head(*digits(0, 1, start=start), 3, 0.1) for start in (0, 10, 20))
    return FittedHeads(heads[:2], heads[2], 0.1, {"0.1": -0.25})


def test_heads_come_back(tmp_path, fitted):
    save_heads(tmp_path, "heads", {"refit": fitted, "refit-group": fitted}, "identity")
    loaded = load_heads(tmp_path, "heads", "identity")
    assert list(loaded) == ["refit", "refit-group"]
    for heads in loaded.values():
        assert (heads.strength, heads.judged, len(heads.folds)) == (0.1, {"0.1": -0.25}, 2)
        assert all(same(*pair) for pair in zip((*heads.folds, heads.final), (*fitted.folds, fitted.final), strict=True))
    assert (loaded["refit"].final.bias[2], loaded["refit"].final.weight[2].any()) == (-np.inf, False)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("heads.json", None),
        ("heads.json", lambda content: content[:-3]),
        ("heads.json", lambda content: b"[]"),
        ("heads.json", lambda content: b"{}"),
        ("heads.json", lambda content: content.replace(b'"identity": "identity"', b'"identity": "of other rows"')),
        ("heads.json", lambda content: content.replace(b'"folds": 2', b'"folds": 3')),
        ("heads.safetensors", None),
        ("heads.safetensors", lambda content: content[:-3]),
        ("heads.safetensors", lambda content: b""),
    ],
)
def test_what_is_not_whole_or_of_other_rows_does_not_count(tmp_path, fitted, file, damage):
    """It is fitted again."""
    save_heads(tmp_path, "heads", {"probe": fitted}, "identity")
    assert load_heads(tmp_path, "heads", "identity") is not None
    path = tmp_path / file
    if damage is None:
        path.unlink()
    else:
        changed = damage(path.read_bytes())
        assert changed != path.read_bytes()
        path.write_bytes(changed)
    assert load_heads(tmp_path, "heads", "identity") is None


def test_the_record_says_how_the_strength_was_chosen(tmp_path, fitted):
    save_heads(tmp_path, "probe", {"probe": fitted}, "identity")
    about = json.loads((tmp_path / "probe.json").read_text())
    chosen = {"folds": 2, "parts": 0, "strength": 0.1, "log_likelihood": {"0.1": -0.25}}
    assert about["heads"] == {"probe": chosen | {"converged": [True, True, True]}}
