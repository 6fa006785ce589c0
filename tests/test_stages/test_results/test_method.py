"""What names a row of the table: no two methods share a file of samples, ordinary names stay as they are."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.results.method import BASELINES, HEADS, NO_ROUTING, RECOMMENDED, ROUTINGS, Method, samples_path
from stages.scorers import reads_head

# As `pipeline.config` allows a variant to be called; words that names are made of come often.
WORDS = st.sampled_from(["group", "refit", "none", "0", "predicted", "x", "-", ".", "_", "dense"])
VARIANTS = st.lists(WORDS, min_size=1, max_size=5).map("".join).filter(lambda name: name[0].isalnum())
METHODS = st.builds(
    Method,
    st.sampled_from(["pretrained", "finetuned"]),
    st.sampled_from(["cls", "mofe"]),
    st.sampled_from(["none", *HEADS]),
    st.just("") | VARIANTS | st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", fullmatch=True),
    st.sampled_from([NO_ROUTING, *ROUTINGS]),
    st.just("knn"),
)
SEEDS = st.none() | st.integers(0, 2**32 - 1)


@given(st.sets(st.tuples(METHODS, SEEDS), min_size=2, max_size=10))
def test_no_two_methods_share_a_file(runs):
    paths = {samples_path(Path("scores"), method, seed) for method, seed in runs}
    assert len(paths) == len(runs)
    assert {path.parent for path in paths} == {Path("scores/samples")}


@pytest.mark.parametrize(
    ("words", "seed", "name"),
    [
        (("pretrained", "cls", "none", "", "none"), None, "pretrained-cls-none-none-none-none"),
        (("pretrained", "mofe", "refit", "dense-1", "top2"), 0, "pretrained-mofe-refit-dense-1-0-top2"),
        (("pretrained", "mofe", "refit-group", "x", "predicted"), 0, "pretrained-mofe-refit-group-x-0-predicted"),
        (("pretrained", "mofe", "refit", "group-x", "predicted"), 0, "pretrained-mofe-refit-group%2Dx-0-predicted"),
        (("pretrained", "mofe", "refit", "group", "predicted"), 0, "pretrained-mofe-refit-group-0-predicted"),
        (("finetuned", "mofe", "refit", "none", "predicted"), 3, "finetuned-mofe-refit-%6Eone-3-predicted"),
    ],
)
def test_ordinary_names_are_those_of_the_contract(words, seed, name):
    assert samples_path(Path("s"), Method(*words, "knn"), seed) == Path("s/samples") / f"{name}.parquet"


def test_all_scores_of_a_head_share_a_file_with_a_column_each():
    knn, energy = BASELINES["knn+energy"], replace(BASELINES["knn+energy"], score="energy", calibrated=True)
    assert samples_path(Path(), knn, None) == samples_path(Path(), energy, None)
    assert (knn.column, energy.column) == ("knn+energy", "energy (calibrated)")


def test_baselines_are_of_frozen_features():
    assert list(BASELINES) == ["knn", "knn+energy", "mahalanobis-pp", "ncm+energy"]
    assert {method.features for method in BASELINES.values()} == {"cls"}
    assert all(method.head == ("probe" if reads_head(score) else "none") for score, method in BASELINES.items())


def test_a_line_of_a_table_names_its_method():
    line = asdict(RECOMMENDED) | {"seed": 3, "auroc": 0.5}
    assert Method.of(line) == RECOMMENDED
