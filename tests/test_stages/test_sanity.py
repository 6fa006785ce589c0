"""What an extraction says of its features: neighbours of one class, and rows that differ."""

import os

import numpy as np
import pytest
from sklearn.model_selection import LeaveOneOut, cross_val_score
from sklearn.neighbors import KNeighborsClassifier

from cache import CacheBuilder, InputSet, InputTable, commit_shard, plan_shards, sha256
from stages.errors import InputError
from stages.inputs.images import list_images
from stages.sanity import check_features, find_same_bytes, knn_accuracy, leave_one_out_accuracy, same_bytes_notes
from tests.test_cache.toy import make_spec
from tests.test_stages.test_inputs.test_images import save


def sealed(path, features, labels, samples=None):
    """A cache of these class embeddings [n, 6]; of files, with their names, classes and hashes."""
    n, spec = len(features), make_spec(patches="none", grid=(0, 0), n_registers=0)
    ids = [f"{i:05d}.png" for i in range(n)] if samples is None else samples.ids
    inputs = InputTable.listing(ids, labels, np.ones(n), np.ones(n))
    if samples is not None:
        digests = [bytes.fromhex(sha256(samples.reader().read(i))) for i in range(n)]
        inputs = inputs.with_results(np.frombuffer(b"".join(digests), np.uint8).reshape(n, 32), np.zeros(n, bool))
    plans = plan_shards(n, spec.row_bytes)
    arrays = {"cls": np.asarray(features, np.float32), "tap_cls": np.ones((n, 4), np.float32)}
    with CacheBuilder.begin(path, InputSet("pets", inputs, ("cat", "dog", "cow")), spec, plans, {}) as builder:
        for plan in plans:
            commit_shard(path, plan, arrays, inputs, [])
        return builder.seal()


def test_real_features_of_digits_know_their_neighbours(caches):
    (line,) = check_features(caches["train"], by_class=True)
    assert line.startswith("train: leave-one-out 5-NN accuracy of cls 9")
    assert line.endswith(f"on {caches['train'].n_rows} rows, chance 25.5 %")
    assert check_features(caches["train"], by_class=False) == []


def test_accuracy_is_scikit_learns(caches):
    train = caches["train"]
    features, labels = train.read("cls").astype(np.float32), train.labels
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    knn = KNeighborsClassifier(5, algorithm="brute")
    expected = cross_val_score(knn, features, labels, cv=LeaveOneOut()).mean()
    # scikit-learn gives a tie to the class of the smaller number, here the nearest neighbour decides.
    assert leave_one_out_accuracy(features, labels) == pytest.approx(expected, abs=0.005)


def test_noise_is_told_from_features(tmp_path):
    rng = np.random.default_rng(0)
    lines = check_features(sealed(tmp_path / "noise", rng.standard_normal((300, 6)), np.arange(300) % 3), by_class=True)
    assert "chance 33.3 %" in lines[0]
    assert lines[1].startswith("warning: pets: neighbours are hardly of one class more often than by chance")


def test_identical_rows_are_told(tmp_path):
    rng = np.random.default_rng(0)
    features = rng.standard_normal((300, 6))
    features[:120] = features[0]
    (line,) = check_features(sealed(tmp_path / "same", features, np.full(300, -1)), by_class=True)
    assert line.startswith("warning: pets: 40 % of the rows are identical")
    features[90:120] = rng.standard_normal((30, 6))  # under a third
    assert check_features(sealed(tmp_path / "fewer", features, np.full(300, -1)), by_class=True) == []


@pytest.mark.parametrize(
    ("copies", "others", "told"),
    [
        (1, 2, False),  # three different images: each is a third, and nothing is the matter
        (3, 3, False),  # a small folder that holds a picture three times
        (9, 0, False),
        (10, 0, True),
        (10, 20, True),
        (10, 21, False),
    ],
)
def test_a_third_of_a_few_images_says_nothing(tmp_path, copies, others, told):
    features = np.random.default_rng(0).standard_normal((others + 1, 6))[[0] * copies + [*range(1, others + 1)]]
    lines = check_features(sealed(tmp_path / "few", features, np.full(len(features), -1)), by_class=False)
    assert [line.startswith("warning: pets: ") and "% of the rows are identical" in line for line in lines] == [
        True
    ] * told


def test_of_many_rows_some_are_drawn(tmp_path):
    labels = np.arange(300) % 3
    features = np.eye(6)[labels] + np.arange(300)[:, None] * 1e-3
    (line,) = check_features(sealed(tmp_path / "pets", features, labels), by_class=True, most_rows=100)
    assert "100.0 % on 100 of 300 rows" in line


@pytest.mark.parametrize("labels", [[], [0], [0, 1], [0] * 30, [-1] * 30])
def test_where_there_is_nothing_to_say_it_is_silent(tmp_path, labels):
    rng = np.random.default_rng(0)
    assert check_features(sealed(tmp_path / "few", rng.standard_normal((len(labels), 6)), labels), by_class=True) == []


@pytest.fixture
def copies(tmp_path):
    """Links, copies, a copy without and two with another label, among pictures of their own."""
    save(tmp_path, *(f"{name}/{i}.png" for name in ("cat", "dog") for i in range(3)), "loose.png")
    for copy, of in {
        "cat/b.png": "cat/0.png",
        "dog/x.png": "cat/1.png",
        "dog/y.png": "cat/1.png",
        "z.png": "loose.png",
    }.items():
        (tmp_path / copy).write_bytes((tmp_path / of).read_bytes())
    (tmp_path / "cat" / "link.png").symlink_to(tmp_path / "cat" / "0.png")
    os.link(tmp_path / "dog" / "0.png", tmp_path / "dog" / "hard.png")
    (tmp_path / "again.png").write_bytes((tmp_path / "dog" / "2.png").read_bytes())
    (tmp_path / "list.csv").write_text(
        "path,label\n"
        + "".join(
            f"{path},{path.split('/')[0] if '/' in path else ''}\n"
            for path in sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.png"))
        )
        + f"{tmp_path}/cat/2.png,cat\n"
    )
    return tmp_path


def test_images_of_equal_bytes_are_found_and_conflicts_of_their_labels(copies):
    samples = list_images(str(copies / "list.csv"))
    cache = sealed(copies / "cache", np.arange(6 * len(samples)).reshape(-1, 6), samples.labels, samples)
    same = {row.id: row for row in find_same_bytes(cache)}
    absolute = f"{copies}/cat/2.png"
    assert {row.id: row.same_as for row in same.values()} == {
        "cat/b.png": "cat/0.png",
        "cat/link.png": "cat/0.png",
        "cat/2.png": absolute,  # sorted by name, "/" comes first
        "dog/x.png": "cat/1.png",
        "dog/y.png": "cat/1.png",
        "dog/hard.png": "dog/0.png",
        "dog/2.png": "again.png",
        "z.png": "loose.png",
    }
    assert {row.id for row in same.values() if row.in_conflict} == {"dog/x.png", "dog/y.png"}
    assert same["dog/x.png"][1:] == ("dog", "cat/1.png", "cat")
    conflicts, others = same_bytes_notes(cache, list(same.values()), "all.jsonl")
    assert conflicts == (
        "warning: pets: 2 images have the bytes of another under another label ('cat/1.png' (cat) = 'dog/x.png' (dog), "
        "'cat/1.png' (cat) = 'dog/y.png' (dog)): one of the two is wrong; all in all.jsonl"
    )
    assert others.startswith(f"pets: 6 images have the bytes of another ({absolute!r} = 'cat/2.png', ")
    assert others.endswith(", …); all in all.jsonl")


def test_images_that_differ_are_no_finding(caches):
    assert find_same_bytes(caches["train"]) == []
    assert same_bytes_notes(caches["train"], [], "all.jsonl") == []


def test_knn_accuracy_is_scikit_learns_vote_of_weighted_neighbours(tmp_path):
    """DINOv2's: 20 neighbours by cosine, exp(cos / 0.07) each; rows without a label neither vote nor count."""
    rng = np.random.default_rng(0)
    labels = rng.integers(-1, 3, size=260)
    features = np.eye(6)[labels] + rng.normal(scale=0.7, size=(260, 6))
    train, test = (
        sealed(tmp_path / name, features[own], labels[own])
        for name, own in (("train", slice(None, 160)), ("test", slice(160, None)))
    )
    voters, judged = labels[:160] >= 0, labels[160:] >= 0
    vote = KNeighborsClassifier(20, weights=lambda far: np.exp((1 - far) / 0.07), metric="cosine", algorithm="brute")
    vote.fit(features[:160][voters], labels[:160][voters])
    right = vote.score(features[160:][judged], labels[160:][judged])
    assert 0.5 < right < 1
    assert knn_accuracy(train, test) == pytest.approx(right)


def test_knn_accuracy_takes_as_many_neighbours_as_there_are(tmp_path):
    features = np.eye(6)[:3]
    train, test = (sealed(tmp_path / name, features, np.arange(3)) for name in ("train", "test"))
    assert knn_accuracy(train, test) == 1


def test_knn_accuracy_needs_labels(tmp_path):
    train = sealed(tmp_path / "train", np.eye(6)[:3], np.arange(3))
    test = sealed(tmp_path / "test", np.eye(6)[:3], np.full(3, -1))
    with pytest.raises(InputError, match="no row of pets has a label"):
        knn_accuracy(train, test)
