"""Scores of logits, and of the last layer's input and weights: formulas written out plainly, profiles, edges."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from scipy.stats import entropy as scipy_entropy
from sklearn.metrics import log_loss

from stages.errors import InputError
from stages.heads.affine import LinearHead
from stages.metrics.ranking import auroc
from stages.scorers import get_scorer
from stages.scorers.features.ash import ash_score
from stages.scorers.features.gradnorm import gradnorm_score
from stages.scorers.features.lts import lts_score
from stages.scorers.features.scale import scale_score
from stages.scorers.features.vra import vra_score
from stages.scorers.inputs import ScoreInputs
from stages.scorers.logits import temperature
from stages.scorers.logits.energy import energy_score
from stages.scorers.logits.entropy import entropy_score
from stages.scorers.logits.gen import gen_score
from stages.scorers.logits.klmatching import class_templates, kl_matching_score
from stages.scorers.logits.maxlogit import max_logit_score
from stages.scorers.logits.msp import msp_score
from stages.scorers.logits.other import other_score
from stages.scorers.logits.temperature import fit_temperature
from stages.scorers.shared.quantiles import column_quantiles, quantiles

OF_LOGITS = ("max-logit", "entropy", "gen")
SHAPED = ("react", "ash-s", "ash-p", "ash-b", "scale", "vra", "dice")
EVERY = (*OF_LOGITS, "temperature-scaling", "kl-matching", *SHAPED, "lts", "gradnorm")

C, D = 5, 20


def rows(n=120, seed=0, noise=0.5):
    """Rows of five classes with activations that are not negative, and a head that knows them but errs now and then."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % C
    features = np.float32(np.abs(np.eye(C, D)[labels] * 2 + rng.normal(scale=noise, size=(n, D))))
    weight = np.random.default_rng(99).normal(scale=0.3, size=(C, D)) + np.eye(C, D) * 2
    return ScoreInputs(features, labels=labels, head=LinearHead(np.float32(weight), np.linspace(-1, 1, C)))


def logits_of(x):
    return x.features.astype(np.float64) @ x.head.weight.T + x.head.bias


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def energy(z, head):
    return [-np.log(sum(np.exp(w @ row + b) for w, b in zip(head.weight, head.bias, strict=True))) for row in z]


def energy_of_each(x, shape):
    return energy([shape(np.float64(row)) for row in x.features], x.head)


# --------------------------------------------------------------------------------------- formulas of SCORES.md, plainly


def plain_gen(train, select, x):
    terms = softmax(logits_of(x)) ** 0.1 * (1 - softmax(logits_of(x))) ** 0.1
    return np.log(terms.sum(axis=1))  # five classes are fewer than 100


def plain_temperature(train, select, x):
    def nll(t):
        own = np.log(softmax(logits_of(select) / t))[np.arange(len(select)), select.labels]
        return -np.mean(own) + np.log(t) ** 2 / (2 * len(select))

    grid = np.geomspace(0.2, 5, 20_001)
    best = grid[np.argmin([nll(t) for t in grid[::100]]) * 100]
    fine = np.linspace(best * 0.98, best * 1.02, 4001)
    return np.log(1 - softmax(logits_of(x) / fine[np.argmin([nll(t) for t in fine])]).max(axis=1))


def plain_kl(train, select, x):
    p = softmax(logits_of(select))
    typical = [p[p.argmax(axis=1) == c].mean(axis=0) for c in range(C)]
    return [min(scipy_entropy(row, d) for d in typical) for row in softmax(logits_of(x))]


def plain_react(train, select, x):
    c = np.percentile(train.features, 90)
    return energy_of_each(x, lambda z: np.minimum(z, c))


def plain_ash(variant, percentile):
    def plain(train, select, x):
        def shape(z):
            k = D - round(D * percentile / 100)
            pruned = np.where(z >= np.sort(z)[-k], z, 0)
            if variant == "b":
                return np.where(pruned > 0, z.sum() / k, 0)
            return pruned * np.exp(z.sum() / pruned.sum()) if variant == "s" else pruned

        return energy_of_each(x, shape)

    return plain


def plain_scale(train, select, x):
    return energy_of_each(x, lambda z: z * np.exp(z.sum() / np.sort(z)[-3:].sum()))  # 15 % of 20


def plain_lts(train, select, x):
    ratio = [z.sum() / z.max() for z in x.features.astype(np.float64)]  # 5 % of 20
    return -np.log(np.exp(logits_of(x) * np.square(ratio)[:, None]).sum(axis=1))


def plain_vra(train, select, x):
    low, high = np.percentile(train.features, [60, 95], axis=0)
    return energy_of_each(x, lambda z: np.where(z < low, 0, np.where(z > high, high, z)))


def plain_dice(train, select, x):
    contribution = train.features.mean(axis=0) * train.head.weight
    kept = np.where(contribution > np.percentile(contribution, 90), train.head.weight, 0)
    return energy(x.features.astype(np.float64), LinearHead(kept, train.head.bias))


def plain_gradnorm(train, select, x):
    p, z = softmax(logits_of(x)), x.features.astype(np.float64)
    return [-np.abs(np.outer(C * p_row - 1, z_row)).sum() for p_row, z_row in zip(p, z, strict=True)]


PLAIN = {
    "max-logit": lambda train, select, x: -logits_of(x).max(axis=1),
    "entropy": lambda train, select, x: np.log(scipy_entropy(softmax(logits_of(x)), axis=1)),
    "gen": plain_gen,
    "temperature-scaling": plain_temperature,
    "kl-matching": plain_kl,
    "react": plain_react,
    "ash-p": plain_ash("p", 60),
    "ash-s": plain_ash("s", 90),
    "ash-b": plain_ash("b", 65),
    "scale": plain_scale,
    "lts": plain_lts,
    "vra": plain_vra,
    "dice": plain_dice,
    "gradnorm": plain_gradnorm,
}


@pytest.mark.parametrize("name", EVERY)
def test_it_is_its_formula(name):
    train, select, x = rows(), rows(60, 1, 0.9), rows(23, 2, 0.8)
    scores = get_scorer(name).fit(train, select).score(x)
    np.testing.assert_allclose(scores, PLAIN[name](train, select, x), rtol=2e-5, atol=2e-6)


logit_rows = arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(2, 6)), elements=st.floats(-40, 40, width=32))


@settings(deadline=None)
@given(logit_rows)
def test_entropy_and_gen_equal_their_formulas_however_saturated(logits):
    """In a float format with 64 bits for the mantissa: 1 − p is not rounded away."""
    p = np.exp(np.longdouble(logits) - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    first = np.arange(p.shape[1]) == p.argmax(axis=1)[:, None]
    rest = np.where(first, np.where(first, 0, p).sum(axis=1, keepdims=True), 1 - p)
    log_p = np.where(first, np.log1p(-np.where(first, rest, 0)), np.log(p))
    expected = -(p * log_p).sum(axis=1)
    np.testing.assert_allclose(entropy_score(logits), np.float64(np.log(expected)), rtol=1e-5, atol=1e-6)
    gen = np.log((p**0.1 * rest**0.1).sum(axis=1))
    np.testing.assert_allclose(gen_score(logits), np.float64(gen), rtol=1e-5, atol=1e-6)


@settings(deadline=None)
@given(logit_rows, st.floats(-5, 5), st.randoms(use_true_random=False))
def test_shifts_and_the_order_of_classes(logits, shift, random):
    columns = list(range(logits.shape[1]))
    random.shuffle(columns)
    for score in (max_logit_score, entropy_score, gen_score):
        np.testing.assert_allclose(score(logits[:, columns]), score(logits), rtol=1e-5, atol=1e-6)
    for score in (entropy_score, gen_score):
        np.testing.assert_allclose(score(np.float64(logits) + shift), score(logits), rtol=1e-4, atol=1e-6)
    assert (np.exp(entropy_score(logits)) <= np.log(logits.shape[1]) + 1e-6).all()


@settings(deadline=None)
@given(logit_rows)
def test_a_class_that_does_not_apply_changes_nothing(logits):
    padded = np.concatenate([logits, np.full((len(logits), 2), -np.inf, np.float32)], axis=1)
    z = np.ones((len(logits), 3))
    for score in (max_logit_score, entropy_score, gen_score, lambda logits: gradnorm_score(z, logits)):
        np.testing.assert_allclose(score(padded), score(logits), rtol=1e-6, atol=1e-12)


BY_MARGIN = {
    "max-logit": max_logit_score,
    "energy": energy_score,
    "msp": msp_score,
    "entropy": entropy_score,
    "gen": gen_score,
    "other": lambda logits: other_score(logits[:, 1:], -logits[:, 0]),
}


@pytest.mark.parametrize("name", BY_MARGIN)
@given(st.sets(st.integers(0, 64_000), min_size=2))
def test_margins_up_to_a_thousand_keep_their_order(name, margins):
    """Of logits m, 0 and −1, m in steps of 1/64: the surer of a class, the more ID, and no two rows tie."""
    m = np.sort(list(margins))[:, None] / 64
    scores = BY_MARGIN[name](m * [1, 0, 0] + [0, 0, -1])
    assert scores.dtype == np.float32
    assert (np.diff(scores) < 0).all()


def test_what_softmax_scores_say_of_confident_rows_is_what_their_margins_say():
    """ID rows with margins around 30, OOD rows around 22: −max p is −1 for nearly all of them, even in float64."""
    rng = np.random.default_rng(0)
    ids, oods = rng.normal(30, 3, 400), rng.normal(22, 3, 400)
    logits = [np.c_[margins, np.zeros(400)] for margins in (ids, oods)]
    exact = auroc(-ids, -oods)
    select = ScoreInputs(logits=np.float32(50 * np.eye(2)[np.arange(60) % 2]), labels=np.arange(60) % 2)
    scaled = get_scorer("temperature-scaling").fit(select, select)
    assert [auroc(*(score(each) for each in logits)) for score in (msp_score, entropy_score, gen_score)] == [exact] * 3
    assert auroc(*(scaled.score(ScoreInputs(logits=each)) for each in logits)) == exact
    saturated = [-1 / (1 + np.exp(-each)).astype(np.float32) for each in (ids, oods)]
    assert auroc(*saturated) < exact - 0.03


@pytest.mark.parametrize("name", ["msp", "entropy", "gen", "temperature-scaling", "kl-matching", "gradnorm", "energy"])
def test_one_class_alone_has_one_finite_score(name):
    """A routed expert may have one class: p = 1 and the score says nothing, but infinities would break all sums."""
    logits = np.array([[3.0, -np.inf], [-7.0, -np.inf], [300.0, -np.inf]])
    alone = ScoreInputs(np.ones((3, 2)), logits, np.zeros(3, dtype=int))
    scores = get_scorer(name).fit(alone, alone).score(alone)
    assert np.isfinite(scores).all()
    assert len(set(scores.tolist())) == (3 if name == "energy" else 1)


def test_gen_takes_the_largest_alone():
    logits = np.log([[0.5, 0.3, 0.15, 0.05]])
    p = np.array([0.5, 0.3])
    assert gen_score(logits, gamma=0.5, top=2) == pytest.approx(np.log(np.sqrt(p * (1 - p)).sum()))
    assert gen_score(logits, top=4) == gen_score(logits, top=None) == gen_score(logits, top=100)


# ------------------------------------------------------------------------------------------------------ what is fitted


def test_the_temperature_at_the_minimum_depends_on_no_start():
    select = rows(90, 1, 1.2)
    logits = logits_of(select)
    found = [fit_temperature(logits, select.labels, start=start) for start in (0.2, 1.5, 20.0)]
    np.testing.assert_allclose([each.temperature for each in found], found[0].temperature, rtol=1e-5)
    near = found[0].temperature * np.array([0.99, 1, 1.01])
    nll = [-np.mean(np.log(softmax(logits / t))[np.arange(90), select.labels]) for t in near]
    loss = nll + np.log(near) ** 2 / (2 * 90)
    assert loss[1] < min(loss[0], loss[2])
    assert nll[1] == pytest.approx(found[0].nll)


def test_the_prior_of_the_temperature_vanishes_as_rows_grow():
    """Where scikit-learn's minimum is inside, it is found; the more rows, the nearer."""
    few, many = rows(90, 1, 1.2), rows(9000, 1, 1.2)
    apart = []
    for select in (few, many):
        logits = logits_of(select)
        reference = minimize_scalar(
            lambda u, logits=logits, select=select: log_loss(select.labels, softmax(logits * np.exp(u))), (-1, 1)
        )
        apart.append(abs(fit_temperature(logits, select.labels).temperature * np.exp(reference.x) - 1))
    assert apart[0] < 0.1
    assert apart[1] < 2e-3


@pytest.mark.parametrize("margin", [0.5, 3.0, 30.0, 1000.0])
def test_a_head_that_is_always_right_or_never_gets_a_temperature_that_means_something(margin):
    """Without a prior the first wants T = 0, at which every row has p = 1, and the second T = infinity."""
    logits = margin * np.eye(2)[np.arange(40) % 2]
    always = fit_temperature(logits, np.arange(40) % 2).temperature
    never = fit_temperature(logits, np.arange(1, 41) % 2).temperature
    assert 0.1 < always <= 1 <= never
    assert never < max(100, 2 * margin)


def test_fifty_steps_stop_short_and_depend_on_the_start():
    """What OpenOOD and pytorch-ood do: 1.5 and 1 lead to different temperatures, neither at the minimum."""
    train, select = rows(), rows(90, 1, 1.2)
    minimum, *stopped = (
        get_scorer("temperature-scaling", profile).fit(train, select).params()["temperature"]
        for profile in ("paper", "openood", "pytorch-ood")
    )
    assert abs(stopped[0] - stopped[1]) > 1e-3
    assert all(abs(t - minimum) > 1e-3 for t in stopped)


def test_openood_s_temperature_is_that_of_its_code():
    """Its setup(), on the same logits: T from 1.5, L-BFGS of learning rate 0.01, at most 50 iterations."""
    select = rows(90, 1, 1.2)
    logits, labels = torch.from_numpy(logits_of(select)), torch.from_numpy(select.labels)
    temperature = torch.nn.Parameter(torch.ones(1) * 1.5)
    optimizer = torch.optim.LBFGS([temperature], lr=0.01, max_iter=50)

    def evaluate():
        optimizer.zero_grad()
        loss = torch.nn.CrossEntropyLoss()(logits / temperature, labels)
        loss.backward()
        return loss

    optimizer.step(evaluate)
    found = get_scorer("temperature-scaling", "openood").fit(rows(), select).params()["temperature"]
    assert found == pytest.approx(temperature.item(), rel=1e-5)


def test_openood_s_vra_and_react_are_their_formulas():
    train, select, x = rows(), rows(60, 1, 0.9), rows(23, 2, 0.8)
    low, high = np.percentile(select.features, [10, 90])
    for name, bottom in (("vra", low), ("react", -np.inf)):
        expected = energy_of_each(x, lambda z, bottom=bottom: np.clip(z, bottom, high))
        scores = get_scorer(name, "openood").fit(train, select).score(x)
        np.testing.assert_allclose(scores, expected, rtol=2e-5, err_msg=name)


def test_a_temperature_is_fitted_in_hardly_more_memory_than_its_logits_take():
    logits = np.random.default_rng(0).normal(size=(30_000, 50)).astype(np.float32)
    tracemalloc.start()
    fit_temperature(logits, logits.argmax(axis=1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * logits.nbytes  # in float64 they alone would be as much


def test_logits_that_are_not_held_give_the_same_temperature(monkeypatch):
    train, select = rows(), rows(90, 1, 1.2)
    held = get_scorer("temperature-scaling").fit(train, select).params()["temperature"]
    monkeypatch.setattr(temperature, "_HELD_BYTES", 0)
    found = get_scorer("temperature-scaling").fit(train, select).params()["temperature"]
    assert found == pytest.approx(held, rel=1e-6)


def test_rows_whose_class_the_head_does_not_know_fit_no_temperature():
    logits = np.array([[1.0, 0, -np.inf], [2.0, 0, -np.inf], [0, 1.0, -np.inf], [0, 3.0, -np.inf]])
    known = fit_temperature(logits[:3], np.array([0, 1, 1]))
    assert fit_temperature(logits, np.array([0, 1, 1, 2])) == known
    assert fit_temperature(np.concatenate([logits, logits[:1]]), np.array([0, 1, 1, 2, -1])) == known
    with pytest.raises(InputError, match=r"held-out .*labels"):
        fit_temperature(logits, np.array([2, 2, -1, 2]))


def test_an_expert_without_held_out_rows_keeps_temperature_1_and_the_record_says_so():
    routed = ScoreInputs(rows(6).features, logits=logits_of(rows(6)), labels=np.arange(6) % C, expert=np.arange(6) % 2)
    scorer = get_scorer("temperature-scaling").fit(routed, routed.take(routed.expert == 0))
    assert scorer.params()["fitted_rows"] == {"0": 3, "1": 0}
    assert scorer.remarks() == ["T = 1, for no held-out row is of a class that is known here"]
    assert scorer.params()["temperature"]["1"] == 1
    react = get_scorer("react", "openood").fit(replace(routed, head=rows(6).head), routed.take(routed.expert == 0))
    assert react.params()["fitted_on"] == {"0": "select", "1": "train"}
    assert react.remarks() == ["fitted on ID training rows, for no held-out row is there"]
    own = routed.take(routed.expert == 1)
    np.testing.assert_array_equal(scorer.score(own), msp_score(own.logits))
    masked = logits_of(rows(6))
    masked[:, 2] = -np.inf  # a head that lacks the one class of the held-out rows
    lacking = ScoreInputs(logits=masked, labels=np.full(6, 2))
    fitted = get_scorer("temperature-scaling").fit(lacking, lacking)
    assert fitted.params()["temperature"] == 1
    assert fitted.remarks() == scorer.remarks()


def test_a_temperature_before_its_minimum_is_said():
    train, select = rows(), rows(90, 1, 1.2)
    said = [get_scorer("temperature-scaling", profile).fit(train, select).remarks() for profile in ("paper", "openood")]
    assert said == [[], ["T is where the steps stopped, before the minimum"]]


def test_a_class_that_is_never_predicted_has_a_one_hot_template_or_none():
    seen = np.log(np.array([[0.7, 0.2, 0.1], [0.2, 0.7, 0.1]]))
    saturated = np.array([[0.0, 0.0, 800.0]])  # on the class that nobody was predicted as
    assert kl_matching_score(saturated, class_templates([seen], "one-hot")) == pytest.approx(0)
    assert kl_matching_score(saturated, class_templates([seen], "left out")) == pytest.approx(-np.log(0.1))
    scorers = [get_scorer("kl-matching", profile) for profile in ("paper", "openood", "pytorch-ood")]
    assert [scorer.unpredicted for scorer in scorers] == ["one-hot", "one-hot", "left out"]
    assert [scorer.rows for scorer in scorers] == ["select", "select", "train"]


def test_templates_of_saturated_rows_leave_every_divergence_finite():
    templates = class_templates([np.array([[2000.0, 0.0], [0.0, 2000.0]])])
    assert np.isfinite(kl_matching_score([[0.0, 0.0], [0.0, 2000.0]], templates)).all()


def test_thresholds_come_from_the_rows_that_the_profile_names():
    train, select = rows(), rows(60, 1, 0.9)
    features = {"paper": train, "openood": select, "pytorch-ood": train}
    for profile, source in features.items():
        params = get_scorer("react", profile).fit(train, select).params()
        assert params["threshold"] == pytest.approx(np.percentile(source.features, 90), rel=1e-6)
        assert (params["fitted_on"], params["fitted_rows"]) == ("train" if source is train else "select", len(source))
    vra = get_scorer("vra", "openood").fit(train, select).params()
    assert [vra["alpha"], vra["beta"]] == pytest.approx(np.percentile(select.features, [10, 90]), rel=1e-6)
    with pytest.raises(InputError, match=r"^react .*held-out"):
        get_scorer("react", "openood").fit(train)
    with pytest.raises(InputError, match=r"^temperature-scaling .*held-out"):
        get_scorer("temperature-scaling").fit(train)


def test_vra_zeroes_or_clips_what_is_low():
    head = LinearHead(np.ones((1, 2)), np.zeros(1))
    assert vra_score([[1.0, 9.0]], head, low=2.0, high=5.0).tolist() == [-5]
    assert vra_score([[1.0, 9.0]], head, low=2.0, high=5.0, below="clip").tolist() == [-7]
    with pytest.raises(InputError, match=r"vra\.low: 96 .* high = 95"):
        get_scorer("vra", low=96.0)


# ------------------------------------------------------------------------------------------------------------- edges


def test_scores_that_need_a_head_use_their_experts_own():
    """Of two experts' heads over different classes each judges its own rows; their weights are not mixed."""
    x = rows(40, 3)
    heads = tuple(
        LinearHead(x.head.weight * (e + 1), np.where(np.arange(C) % 2 == e, x.head.bias, -np.inf)) for e in (0, 1)
    )
    routed = ScoreInputs(x.features, labels=x.labels, expert=x.labels % 2, head=heads)
    for name in SHAPED:
        together = get_scorer(name).fit(routed, routed).score(routed)
        for e in (0, 1):
            own = routed.take(routed.expert == e)
            classes = np.flatnonzero(np.arange(C) % 2 == e)
            alone = ScoreInputs(own.features, labels=np.searchsorted(classes, own.labels), head=heads[e].take(classes))
            expected = get_scorer(name).fit(alone, alone).score(alone)
            np.testing.assert_allclose(together[routed.expert == e], expected, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("score", [ash_score, scale_score, lts_score])
def test_rows_of_zeros_and_of_sums_that_cancel_have_finite_scores(score):
    z = np.array([[0.0, 0.0, 0.0, 0.0], [-1.0, -2.0, -3.0, -4.0], [1.0, -1.0, 1e-30, -5.0]])
    head = LinearHead(np.ones((2, 4)), np.zeros(2))
    if score is ash_score:
        found = [ash_score(z, head, variant, 50) for variant in ("p", "s", "b")]
    else:
        found = [scale_score(z, head, 50)] if score is scale_score else [lts_score(z, np.ones((3, 2)), 50)]
    assert np.isfinite(found).all()
    assert np.float32(found)[:, 0] == pytest.approx(-logsumexp(np.full(2, float(score is lts_score))))


def test_among_equal_activations_the_first_are_kept():
    head = LinearHead(np.array([[1.0, 10.0, 100.0, 1000.0]]), np.zeros(1))
    assert ash_score([[2.0, 2.0, 2.0, 2.0]], head, "p", 50).tolist() == [-22]
    assert ash_score([[1.0, 2.0, 2.0, 2.0]], head, "p", 50).tolist() == [-220]


@pytest.mark.parametrize("name", EVERY)
def test_rows_that_hold_nan_are_refused(name):
    train = rows()
    scorer = get_scorer(name).fit(train, train)
    spoiled = rows(3)
    spoiled.features[1, 4] = np.nan
    with pytest.raises(InputError, match=r"1 of 3 .*NaN"):
        scorer.score(spoiled)


@pytest.mark.parametrize("name", ["react", "vra", "dice"])
def test_training_rows_that_hold_nan_are_refused(name):
    train = rows()
    train.features[7, 2] = np.nan
    with pytest.raises(InputError, match="NaN"):
        get_scorer(name).fit(train, train)


def test_features_of_another_length_than_the_heads_are_refused():
    scorer = get_scorer("react").fit(rows())
    with pytest.raises(InputError, match=r"\(2, 7\) .* 20 values"):
        scorer.score(ScoreInputs(np.ones((2, 7))))
    with pytest.raises(InputError, match=r"features .* logits, got 2 and 3"):
        gradnorm_score(np.ones((2, 4)), np.ones((3, 4)))


# ---------------------------------------------------------------------------------------------------------- quantiles


@settings(deadline=None)
@given(
    arrays(np.float32, st.integers(1, 60), elements=st.floats(-(2.0**90), 2.0**90, width=32)),
    st.lists(st.floats(0, 1), min_size=1, max_size=3),
    st.integers(1, 20),
)
def test_quantiles_by_blocks_are_exact(values, shares, size):
    found = quantiles(lambda: (values[start : start + size] for start in range(0, len(values), size)), shares)
    np.testing.assert_allclose(found, np.quantile(values.astype(np.float64), shares), rtol=1e-12)


def test_quantiles_of_columns_strip_by_strip():
    values = np.random.default_rng(0).normal(size=(50, 9)).astype(np.float32)
    expected = np.quantile(values, [0.1, 0.95], axis=0)
    np.testing.assert_allclose(column_quantiles(values, [0.1, 0.95]), expected, rtol=1e-6)
    np.testing.assert_allclose(column_quantiles(values, [0.1, 0.95], strip_size=100), expected, rtol=1e-6)
    for nothing in (lambda: quantiles(lambda: [], [0.5]), lambda: column_quantiles(values[:0], [0.5])):
        with pytest.raises(InputError, match="quantile"):
            nothing()


@pytest.mark.parametrize("name", ["react", "dice", "kl-matching"])
def test_a_fit_needs_no_more_memory_for_more_rows(name, tmp_path):
    """Rows in a file of 40 MB: what is allocated stays a few blocks."""
    mapped = np.lib.format.open_memmap(tmp_path / "rows.npy", "w+", np.float16, (400_000, 50))
    mapped[:] = 1
    mapped[::3, 7] = 3
    head = LinearHead(np.eye(50, dtype=np.float32), np.zeros(50, np.float32))
    train = ScoreInputs(mapped, head=head)
    tracemalloc.start()
    try:
        get_scorer(name, "pytorch-ood").fit(train)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
