"""What every score keeps, whoever writes it: entering it in `SCORERS` is enough to be held to this."""

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load, save

from stages.errors import InputError, StageError
from stages.heads.affine import LinearHead
from stages.id_data.taps import TapRows
from stages.scorers import SCORERS, get_scorer, restored
from stages.scorers.inputs import ScoreInputs
from stages.scorers.scorer import FITTED_ON, ScorerState

LAYERS = (3, 6, 9)
pytestmark = pytest.mark.parametrize("name", SCORERS)


def rows(n: int, seed: int, experts: int | None = None) -> ScoreInputs:
    """Rows of five classes around five directions, with logits that know them; an expert owns every second class.

    Each of two groups says "other" of most rows that are not of its classes.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, n)
    features = (np.eye(5, 12)[labels] + rng.normal(scale=0.2, size=(n, 12))).astype(np.float32)
    others = np.clip((labels[:, None] % 2 != [0, 1]) + rng.normal(scale=0.2, size=(n, 2)), 0, 1).astype(np.float32)
    other = (3 - 6 * features[:, :5].max(axis=1)).astype(np.float32)
    patches = np.stack([features, features[:, ::-1], features / 2 + 0.1], axis=1)
    taps = TapRows.of(taps_of(features), LAYERS)
    if experts is None:
        logits = head_over().logits(features)
        return ScoreInputs(features, logits, labels, None, others, other, patches, head_over(), taps)
    heads = tuple(head_over(np.arange(5) % experts == e) for e in range(experts))
    routed = ScoreInputs(features, None, labels, labels % experts, others, other, patches, heads, taps)
    return replace(routed, logits=routed.need("logits", "a test"))


def taps_of(features: np.ndarray) -> np.ndarray:
    """[n, 3, 2, D]: after the second block half of the directions are gone."""
    mean = np.roll(features, 1, axis=1)
    return np.stack([np.stack([x, mean], 1) for x in (features + 0.1, features * (np.arange(12) < 6), features)], 1)


def head_over(classes: np.ndarray | slice = slice(None)) -> LinearHead:
    bias = np.full(5, -np.inf, np.float32)
    bias[classes] = 0
    return LinearHead(np.eye(5, 12, dtype=np.float32) * 6, bias)


@pytest.fixture(params=[None, 2], ids=["one model", "two experts"])
def experts(request):
    return request.param


@pytest.fixture
def fitted(name, experts):
    return get_scorer(name).fit(rows(80, 0, experts), rows(40, 3, experts))


def test_a_score_a_row_finite_float32(fitted, experts):
    scores = fitted.score(rows(17, 1, experts))
    assert scores.shape == (17,)
    assert scores.dtype == np.float32
    assert np.isfinite(scores).all()


def test_it_names_itself_and_what_it_reads(name, fitted):
    assert fitted.name == name
    assert fitted.needs
    known = {"logits", "features", "others", "other", "patches", "taps", "head", "bank", "select", "labels"}
    assert fitted.needs <= known


def test_the_score_of_a_row_is_its_own(fitted, experts):
    """Neither the order of the rows nor the other rows of the call matter."""
    x = rows(30, 1, experts)
    scores = fitted.score(x)
    some = np.array([7, 2, 2, 29])
    np.testing.assert_allclose(fitted.score(x.take(some)), scores[some], atol=1e-6)
    np.testing.assert_array_equal(fitted.score(x), scores)
    assert fitted.score(x.take(np.zeros(0, dtype=int))).shape == (0,)


def test_higher_is_more_ood(fitted, experts):
    inside, noise = rows(200, 1, experts), np.random.default_rng(2)
    features = noise.normal(scale=[0.05] * 5 + [0.6] * 7, size=(200, 12)).astype(np.float32)
    outside = ScoreInputs(  # away from every class's direction
        features=features,
        expert=inside.expert,
        others=noise.uniform(0.6, 1, size=(200, 2)),
        other=np.full(200, 2.0),
        patches=noise.normal(size=(200, 3, 12)),
        head=inside.head,
        taps=TapRows.of(taps_of(features - np.eye(5, 12).sum(axis=0, dtype=np.float32)), LAYERS),
    )
    assert np.median(fitted.score(outside)) > np.median(fitted.score(inside))


def test_fitting_returns_itself_and_again_gives_the_same(name, experts):
    train, select, x = rows(80, 0, experts), rows(40, 3, experts), rows(9, 1, experts)
    scorer = get_scorer(name)
    assert scorer.fit(train, select) is scorer
    np.testing.assert_array_equal(scorer.fit(train, select).score(x), get_scorer(name).fit(train, select).score(x))


def test_it_needs_no_more_than_it_says(name, experts):
    def only(x: ScoreInputs, *wanted: str) -> ScoreInputs:
        return ScoreInputs(**{field: getattr(x, field) for field in wanted}, expert=x.expert)

    scorer, train, select, x = get_scorer(name), rows(80, 0, experts), rows(40, 3, experts), rows(9, 1, experts)
    read = sorted(scorer.needs - FITTED_ON)
    expected = get_scorer(name).fit(train, select).score(x)
    fitted_on = [*read, *(scorer.needs & {"labels"}), *({"features", "head"} if "head" in scorer.needs else ())]
    scorer.fit(only(train, *dict.fromkeys(fitted_on)), only(select, *dict.fromkeys(fitted_on)))
    np.testing.assert_array_equal(scorer.score(only(x, *read)), expected)


def test_who_reads_classes_says_so(name, experts):
    """ID training images may have no labels: whatever says that it needs none is scored all the same."""
    train, select = (replace(rows(n, seed, experts), labels=None) for n, seed in ((80, 0), (40, 3)))
    scorer = get_scorer(name)
    if "labels" not in scorer.needs:
        assert np.isfinite(scorer.fit(train, select).score(rows(9, 1, experts))).all()
        return
    with pytest.raises(InputError, match="labels"):
        scorer.fit(train, select)


def test_rows_to_fit_on_may_be_a_file(name, experts, tmp_path):
    """Memory-mapped float16 rows, logits left to the head: what a million rows come as."""
    train, select, x = rows(80, 0, experts), rows(40, 3, experts), rows(9, 1, experts)
    np.save(tmp_path / "features.npy", train.features.astype(np.float16))
    mapped = replace(train, features=np.load(tmp_path / "features.npy", mmap_mode="r"), logits=None)
    half = replace(train, features=train.features.astype(np.float16).astype(np.float32), logits=None)
    expected = get_scorer(name).fit(half, select).score(x)
    np.testing.assert_allclose(get_scorer(name).fit(mapped, select).score(x), expected, rtol=1e-5, atol=1e-5)


def test_what_it_needs_and_does_not_get_is_named(name, fitted):
    read = sorted(fitted.needs - FITTED_ON)
    with pytest.raises(StageError, match=f"{read[0]}"):
        fitted.score(ScoreInputs(labels=np.zeros(3, dtype=int)))


def test_inputs_are_left_as_they_are(fitted, experts):
    x = rows(9, 1, experts)
    before = rows(9, 1, experts)
    fitted.score(x)
    for array in ("features", "logits", "others", "other", "patches"):
        np.testing.assert_array_equal(getattr(x, array), getattr(before, array))
    np.testing.assert_array_equal(x.taps.read(LAYERS), before.taps.read(LAYERS))


def test_half_precision_is_near_single(fitted, experts):
    x = rows(40, 1, experts)
    half = replace(
        x,
        **{name: getattr(x, name).astype(np.float16) for name in ("features", "logits", "others", "other", "patches")},
        taps=TapRows.of(taps_of(x.features).astype(np.float16), LAYERS),
    )
    scores = fitted.score(x)
    np.testing.assert_allclose(fitted.score(half), scores, atol=1e-2 * max(1, scores.std()))


def test_its_settings_can_be_written_into_the_table(fitted):
    assert json.loads(json.dumps(fitted.params())) == fitted.params()


def test_what_it_learnt_is_stored_and_read_again_to_the_bit(name, fitted, experts):
    """As JSON and arrays, in a process that has no ID row."""
    state, x = fitted.state(), rows(40, 1, experts)
    document = json.loads(json.dumps({"settings": state.settings, "learnt": state.learnt}, allow_nan=False))
    arrays = load(save(state.arrays))
    again = restored(ScorerState(name, document["settings"], document["learnt"], arrays))
    np.testing.assert_array_equal(again.score(x), fitted.score(x))
    assert again.params() == fitted.params()
    assert again.remarks() == fitted.remarks()


def never_right(x: ScoreInputs, classes: list[int]) -> ScoreInputs:
    logits = x.need("logits", "a test").copy()
    own = np.flatnonzero(np.isin(x.labels, classes))
    logits[own, x.labels[own]] = -50
    return replace(x, logits=logits)


def with_features(x: ScoreInputs, features: np.ndarray) -> ScoreInputs:
    taps = TapRows.of(np.repeat(features[:, None, None], 3, axis=1).repeat(2, axis=2), LAYERS)
    return replace(x, features=features, logits=None, patches=np.repeat(features[:, None], 3, axis=1), taps=taps)


def with_zero_head(x: ScoreInputs) -> ScoreInputs:
    def zero(head: LinearHead) -> LinearHead:
        return LinearHead(np.zeros_like(head.weight), head.bias)

    return replace(x, logits=None, head=tuple(map(zero, x.head)) if isinstance(x.head, tuple) else zero(x.head))


POOR = {
    "a class without a right row": lambda x: never_right(x, [1]),
    "no right row at all": lambda x: never_right(x, [0, 1, 2, 3, 4]),
    "a class with one row": lambda x: x.take((x.labels != 2) | (np.cumsum(x.labels == 2) == 1)),
    "a class without rows": lambda x: x.take(x.labels != 2),
    "one class": lambda x: x.take(x.labels == 2),
    "one row a class": lambda x: x.take(np.unique(x.labels, return_index=True)[1]),
    "one row": lambda x: x.take(np.array([0])),
    "two rows": lambda x: x.take(np.array([0, 1])),
    "one row twice": lambda x: x.take(np.array([0, 0])),
    "constant features": lambda x: with_features(x, np.full_like(x.features, 1.5)),
    "zero features": lambda x: with_features(x, np.zeros_like(x.features)),
    "a dead channel": lambda x: with_features(x, x.features * (np.arange(12) != 3)),
    "huge features": lambda x: with_features(x, x.features * np.float32(1e6)),
    "tiny features": lambda x: with_features(x, x.features * np.float32(1e-6)),
    "a head of zeros": with_zero_head,
}


@pytest.mark.filterwarnings("error")  # nothing is divided by 0 on the way
def test_poor_rows_to_fit_on_still_give_scores(name, experts):
    """Held-out rows may be as poor, or none; rows to score as poor, or as ever."""
    train, select, x = rows(80, 0, experts), rows(40, 3, experts), rows(17, 1, experts)
    for poor, made in POOR.items():
        try:
            gives_scores(name, made(train), (select, made(select), select.take(np.zeros(0, dtype=int))), x)
        except Exception as error:
            error.add_note(f"of {poor}")
            raise


def gives_scores(name, train, held_out, x):
    if x.expert is not None:
        x = x.take(np.isin(x.expert, train.expert))
    for select in held_out:
        scorer = get_scorer(name).fit(train, select)
        assert np.isfinite(scorer.score(x)).all()
        assert np.isfinite(scorer.score(train)).all()
        assert all("\n" not in remark for remark in scorer.remarks())


def test_labels_beyond_the_logits_are_refused_in_one_line(name):
    train = rows(80, 0)
    few = replace(train, logits=train.need("logits", "a test")[:, :4], head=None)
    beyond = replace(few, head=LinearHead(train.head.weight[:4], train.head.bias[:4]))
    scorer = get_scorer(name)
    if not scorer.needs & {"bank", "select", "head"} or not scorer.needs & {"logits", "head"}:
        return  # reads no labels, or no logits
    with pytest.raises(InputError, match=r"class 4, .* 4 classes, 0 to 3$"):
        scorer.fit(beyond, beyond)
