"""Classes to groups: balanced k-means against random assignments, and the user's file with everything wrong in it."""

import json
import os
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits

from stages.errors import InputError
from stages.mixture import grouping
from stages.mixture.grouping import class_prototypes, experts_for, group_classes, numbers_as_in, squared_distance

PETS = ("cat", "dog", "eagle", "finch")


def names(n: int) -> tuple[str, ...]:
    return tuple(f"class {index:03d}" for index in range(n))


def points(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, 8))


def inertia(prototypes, groups) -> float:
    """Squared distance of every class to the mean of its group."""
    groups = np.asarray(groups)
    return sum(
        ((prototypes[groups == g] - prototypes[groups == g].mean(0)) ** 2).sum() for g in range(groups.max() + 1)
    )


@pytest.mark.parametrize(
    ("n_classes", "experts"), [(2, 1), (3, 1), (4, 2), (7, 2), (10, 2), (40, 3), (100, 4), (1000, 7)]
)
def test_number_of_experts(n_classes, experts):
    """The paper's 4 for 100 and 7 for 1,000 classes; never fewer than two classes an expert."""
    assert experts_for(n_classes) == experts


def test_prototypes_are_class_means():
    digits = load_digits()
    features, labels = digits.data.astype(np.float32), digits.target.astype(np.int32)
    prototypes = class_prototypes([(features[:700], labels[:700]), (features[700:], labels[700:])], 11)
    assert prototypes[:10] == pytest.approx(np.stack([features[labels == c].mean(0) for c in range(10)]))
    assert (prototypes[10] == 0).all()  # a class without rows


def test_prototypes_are_summed_row_by_row_to_the_bit():
    """As numpy.add.at adds them, whatever the blocks: groups depend on their last bits."""
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(3000, 7)).astype(np.float32), rng.integers(11, size=3000)
    sums = np.zeros((12, 7))
    np.add.at(sums, labels, features)
    counts = np.maximum(np.bincount(labels, minlength=12), 1)
    for size in (3000, 700):
        blocks = [(features[at : at + size], labels[at : at + size]) for at in range(0, 3000, size)]
        np.testing.assert_array_equal(class_prototypes(blocks, 12), sums / counts[:, None])


@settings(max_examples=25)
@given(n=st.integers(1, 30), n_groups=st.integers(1, 6), seed=st.integers(0, 3))
def test_balanced_groups_differ_by_one_class_at_most(n, n_groups, seed):
    n_groups = min(n, n_groups)
    groups = group_classes(points(n, seed), n_groups, "balanced", names(n), seed)
    sizes = np.bincount(groups, minlength=n_groups)
    assert len(groups) == n
    assert len(sizes) == n_groups
    assert np.ptp(sizes) <= 1


def test_balanced_groups_are_better_than_chance():
    """Better than 95 % of random balanced assignments of the digits' prototypes, from every start."""
    digits = load_digits()
    prototypes = class_prototypes([(digits.data, digits.target)], 10)
    rng = np.random.default_rng(0)
    chance = [inertia(prototypes, rng.permutation(np.arange(10) % 3)) for _ in range(500)]
    for seed in range(5):
        groups = group_classes(prototypes, 3, "balanced", names(10), seed)
        assert inertia(prototypes, groups) < np.quantile(chance, 0.05)


def test_balanced_groups_find_the_clusters_that_are_there():
    centers = np.repeat(np.eye(8)[:3] * 10, 5, axis=0)
    shuffle = np.random.default_rng(0).permutation(15)
    groups = group_classes((centers + 0.1 * points(15))[shuffle], 3, "balanced", names(15), 0)
    assert len({(true, found) for true, found in zip(shuffle // 5, groups, strict=True)}) == 3


def test_more_starts_are_never_worse_than_one(monkeypatch):
    better = 0
    for seed in range(20):
        prototypes = points(23, seed)
        several = group_classes(prototypes, 4, "balanced", names(23), seed)
        with monkeypatch.context() as patch:
            patch.setattr(grouping, "BALANCED_STARTS", 1)  # the first of them
            one = group_classes(prototypes, 4, "balanced", names(23), seed)
        assert inertia(prototypes, several) <= inertia(prototypes, one) * (1 + 1e-12)
        better += inertia(prototypes, several) < inertia(prototypes, one)
    assert better >= 10


@given(n=st.integers(3, 20), n_groups=st.integers(1, 5), seed=st.integers(0, 9))
def test_groups_are_numbered_as_those_that_they_share_most_classes_with(n, n_groups, seed):
    """No other numbering shares more, and one that differs by its numbers alone is the reference."""
    rng = np.random.default_rng(seed)
    n_groups = min(n, n_groups)
    groups, reference = (rng.permutation(np.arange(n) % n_groups) for _ in range(2))
    shared = [(np.array(order)[groups] == reference).sum() for order in permutations(range(n_groups))]
    assert (np.array(numbers_as_in(groups.tolist(), reference.tolist()))[groups] == reference).sum() == max(shared)
    renamed = rng.permutation(n_groups)[reference]
    assert np.array_equal(np.array(numbers_as_in(renamed.tolist(), reference.tolist()))[renamed], reference)


def test_fewer_groups_than_in_the_reference_have_the_first_numbers():
    assert sorted(numbers_as_in([0, 1, 1, 0], [0, 1, 2, 2])) == [0, 1]


def test_squared_distance_is_that_to_the_group_means():
    groups = np.arange(20) % 3
    assert squared_distance(points(20), groups) == pytest.approx(inertia(points(20), groups))


def test_kmeans_is_scikit_learns_and_may_be_unbalanced():
    far = points(9) * 0.01
    far[8] += 100
    groups = group_classes(far, 2, "kmeans", names(9), 0)
    assert groups == [0] * 8 + [1]
    ordinary = points(30)
    labels = KMeans(4, n_init=10, random_state=5).fit(ordinary).labels_
    found = group_classes(ordinary, 4, "kmeans", names(30), 5)
    assert len(set(zip(labels.tolist(), found, strict=True))) == 4


@pytest.mark.parametrize("method", ["balanced", "kmeans"])
def test_groups_follow_from_the_seed_and_are_numbered_by_first_appearance(method):
    first, again = (group_classes(points(20), 4, method, names(20), 7) for _ in range(2))
    assert first == again
    assert list(dict.fromkeys(first)) == [0, 1, 2, 3]
    assert any(group_classes(points(20), 4, method, names(20), seed) != first for seed in range(6))


def test_classes_that_look_the_same_are_no_reason_to_fail():
    same = np.ones((6, 8))
    assert sorted(group_classes(same, 2, "balanced", names(6), 0)) == [0, 0, 0, 1, 1, 1]
    assert group_classes(same, 2, "kmeans", names(6), 0) == [0] * 6  # one cluster is all there is


@pytest.mark.parametrize("method", ["balanced", "kmeans"])
def test_more_experts_than_classes_are_refused(method):
    with pytest.raises(InputError, match=r"train\.experts: 5 .* 4 classes"):
        group_classes(points(4), 5, method, PETS, 0)


# ------------------------------------------------------------------------------------------------- the user's file


def test_file_names_groups_as_it_likes(tmp_path):
    """Its own number of groups counts, not ``experts``."""
    path = tmp_path / "groups.json"
    path.write_text(json.dumps({"finch": "bird", "cat": "mammal", "dog": "mammal", "eagle": "bird"}))
    assert group_classes(points(4), 3, str(path), PETS, 0) == [0, 0, 1, 1]
    path.write_text(json.dumps({"cat": 7, "dog": 3, "eagle": 7, "finch": 7}))
    assert group_classes(points(4), 1, str(path), PETS, 0) == [0, 1, 0, 0]


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "groups.json")
    with pytest.raises(InputError, match=r"groups.json cannot be read as JSON .*not a regular file"):
        group_classes(points(4), 2, str(tmp_path / "groups.json"), PETS, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "cannot be read as JSON"),
        (b"\xff\xfe\x00", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b'["cat", "dog"]', "must hold an object {class: group}"),
        (b'{"cat": 0, "dog": 1, "eagle": 1}', "1 classes without a group: 'finch'"),
        (b"{}", "4 classes without a group: 'cat', 'dog', 'eagle', …"),
        (b'{"cat": 0, "dog": 0, "eagle": 1, "finch": 1, "newt": 2}', "1 names that are no class: 'newt'"),
        (b'{"Cat": 0, "dog": 0, "eagle": 1, "finch": 1}', "'Cat' (the study has 'cat', in other case)"),
        (b'{"cat": 0, " cat": 0, "dog": 0, "eagle": 1, "finch": 1}', "'cat', ' cat' are one class: name it once"),
        (b'{"cat": null, "dog": 0, "eagle": 1, "finch": 1}', "'cat' has the group null: give a name or a number"),
        (b'{"cat": 0, "dog": [0], "eagle": 1, "finch": 1}', "'dog' has the group [0]: give a name or a number"),
        (b'{"cat": 0, "dog": 0, "dog": 1, "eagle": 1, "finch": 1}', "'dog' is named twice"),
    ],
)
def test_file_that_does_not_fit_is_refused(tmp_path, content, message):
    path = tmp_path / "groups.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as refusal:
        group_classes(points(4), 2, str(path), PETS, 0)
    assert str(refusal.value).startswith(f"train.grouping: {path}")
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"train\.grouping: .*nothing\.json .* JSON"):
        group_classes(points(4), 2, str(tmp_path / "nothing.json"), PETS, 0)
