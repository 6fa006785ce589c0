"""What every score gets from `Scorer`: routing over experts and their classes, settings, profiles, the record."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import pytest
from pydantic import Field

from stages.errors import InputError, StageError
from stages.heads.affine import LinearHead
from stages.scorers import SCORERS, get_scorer
from stages.scorers.inputs import ScoreInputs
from stages.scorers.scorer import Scorer


@dataclass(eq=False)
class Farthest(Scorer):
    """Distance to the mean of the own rows of class 0, and what it saw of them: all that the base class hands on."""

    name: ClassVar[str] = "farthest"
    needs: ClassVar[frozenset[str]] = frozenset({"features", "logits", "head", "bank", "select"})
    profiles: ClassVar = {"openood": {"power": 2.0}}

    power: Annotated[float, Field(gt=0)] = 1.0
    rows: str = "train"

    def learn(self, train, select):
        assert train.expert is None
        own = train.features[train.labels == 0].mean(axis=0)
        return own, {"classes": len(train.need_head(self.name).bias), "select_labels": select.labels.tolist()}

    def judge(self, x, memory):
        return (np.linalg.norm(x.features - memory[0], axis=1) ** self.power).astype(np.float32)

    def facts(self, memory):
        return memory[1]


def routed(n: int, seed: int) -> ScoreInputs:
    """Expert 0 has classes 0 and 2, expert 1 class 1; each has a head of its own over three classes."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    heads = [LinearHead(rng.normal(size=(3, 4)), np.where(own, 0.0, -np.inf)) for own in ([1, 0, 1], [0, 1, 0])]
    return ScoreInputs(rng.normal(size=(n, 4)), labels=labels, expert=labels % 2, head=tuple(heads))


def test_each_expert_learns_of_its_own_rows_and_classes():
    train, x = routed(30, 0), routed(9, 1)
    select = ScoreInputs(np.zeros((4, 4)), np.zeros((4, 3)), np.array([0, 1, 2, 2]), np.array([0, 0, 0, 1]))
    scorer = Farthest().fit(train, select)
    # Of expert 0's held-out rows one is of class 1, which is none of its classes; its class 2 is its second one.
    assert scorer.params() == {
        "power": 1.0,
        "rows": "train",
        "classes": {"0": 2, "1": 1},
        "select_labels": {"0": [0, -1, 1], "1": [-1]},
    }
    for expert, first in ((0, 0), (1, 1)):
        mean = train.features[train.labels == first].mean(axis=0)
        own = x.expert == expert
        expected = np.linalg.norm(x.features[own] - mean, axis=1)
        np.testing.assert_allclose(scorer.score(x)[own], expected, rtol=1e-6)


def test_many_rows_are_scored_block_by_block():
    train, many = routed(30, 0), routed(9001, 2)
    scorer = Farthest().fit(train, train)
    some = np.arange(4000, 4200)
    np.testing.assert_allclose(scorer.score(many)[some], scorer.score(many.take(some)), rtol=1e-6)


def test_logits_that_were_not_given_are_those_of_the_head():
    x = routed(12, 0)
    for expert in (0, 1):
        head = x.head[expert]
        expected = x.features[x.expert == expert] @ head.weight.T + head.bias
        np.testing.assert_allclose(x.need("logits", "a test")[x.expert == expert], expected, rtol=1e-5)
    assert x.has("logits")
    assert not ScoreInputs(x.features).has("logits")
    blocks = list(x.blocks(5))
    assert [len(block) for block in blocks] == [5, 5, 2]
    np.testing.assert_allclose(np.concatenate([b.need("logits", "a test") for b in blocks]), x.need("logits", "a test"))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"power": 0}, r"farthest\.power: 0 given, must be greater than 0"),
        ({"power": "2"}, r"farthest\.power: '2' given, must be a valid number"),
        ({"power": float("nan")}, r"farthest\.power: nan given, must be"),
    ],
)
def test_impossible_settings_are_refused(settings, says):
    with pytest.raises(InputError, match=says):
        Farthest(**settings)


def test_an_unknown_setting_is_refused_with_the_nearest():
    with pytest.raises(InputError, match=r"^energy\.temprature: .*'temperature'"):
        get_scorer("energy", temprature=2.0)
    with pytest.raises(InputError, match=r"^mos\.k: .*none"):
        get_scorer("mos", k=2)


@pytest.mark.parametrize("name", SCORERS)
@pytest.mark.parametrize("profile", ["paper", "openood", "pytorch-ood"])
def test_the_settings_of_every_profile_are_possible(name, profile):
    assert get_scorer(name, profile).settings() == SCORERS[name]().settings() | SCORERS[name].profiles.get(profile, {})


def test_what_cannot_be_fitted_or_scored_is_named():
    train = routed(30, 0)
    with pytest.raises(StageError, match=r"^farthest .*fit"):
        Farthest().score(train)
    with pytest.raises(InputError, match=r"^farthest .* training rows"):
        Farthest().fit(train.take(np.zeros(30, bool)))
    scorer = Farthest().fit(train, train)
    with pytest.raises(InputError, match="farthest needs features"):
        scorer.score(ScoreInputs(labels=np.zeros(2, int)))
    with pytest.raises(InputError, match=r"farthest .* experts"):
        scorer.score(ScoreInputs(np.ones((2, 4)), np.ones((2, 3))))
    with pytest.raises(InputError, match=r"experts \[5\]"):
        scorer.score(ScoreInputs(np.ones((2, 4)), np.ones((2, 3)), expert=np.array([0, 5])))
    with pytest.raises(InputError, match=r"^farthest .* weights"):
        Farthest().fit(ScoreInputs(np.ones((2, 4)), labels=np.zeros(2, int)))
    with pytest.raises(InputError, match=r"^2 heads"):
        ScoreInputs(np.ones((2, 4)), head=train.head)


@pytest.mark.parametrize("name", ["energy", "react", "mahalanobis"])
def test_the_number_of_cores_changes_no_score(name, monkeypatch):
    """Blocks of rows are scored side by side where there are cores for it."""
    rng = np.random.default_rng(0)
    head = LinearHead(rng.normal(size=(3, 20)), np.zeros(3))
    train, many = (
        ScoreInputs(rng.normal(size=(n, 20)).astype(np.float32), labels=np.arange(n) % 3, head=head)
        for n in (300, 9001)
    )
    scorer = get_scorer(name).fit(train)
    scores = []
    for cores in (1, 2, 3):
        monkeypatch.setattr("os.sched_getaffinity", lambda _process, cores=cores: set(range(cores)))
        scores.append(scorer.score(many))
    np.testing.assert_array_equal(scores[1], scores[0])
    np.testing.assert_array_equal(scores[2], scores[0])


@pytest.mark.parametrize("name", ["energy", "knn", "react"])
def test_a_row_that_is_no_number_is_named_by_its_place_in_the_set(name):
    """Not by its place in the block of rows in which it was found."""
    rng = np.random.default_rng(0)
    head = LinearHead(np.eye(2, 3), np.zeros(2))
    train = ScoreInputs(rng.normal(size=(20, 3)), labels=np.arange(20) % 2, head=head)
    features = rng.normal(size=(6000, 3))
    features[5000, 1] = features[5001, 0] = np.nan
    scorer = get_scorer(name).fit(train, train)
    with pytest.raises(InputError, match=r"^2 of 6000 scored features .* row 5000 "):
        scorer.score(ScoreInputs(features, head=head))
    scorer.score(ScoreInputs(features[:5000], head=head))
    broken = ScoreInputs(features, labels=np.arange(6000) % 2, head=head)
    if name != "energy":  # which learns of no row
        with pytest.raises(InputError, match=r"^2 of 6000 ID training features .* row 5000 "):
            get_scorer(name).fit(broken, train)
