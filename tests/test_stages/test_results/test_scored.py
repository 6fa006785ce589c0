"""What stage three leaves: no two methods share a file, ordinary names stay as they are."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.errors import InputError
from stages.files.documents import write_contents
from stages.results.scored_study import FILES, HEADS, check_scores, samples_path

# As `pipeline.config` allows a variant to be called; words that names are made of come often.
WORDS = st.sampled_from(["group", "refit", "none", "0", "predicted", "x", "-", ".", "_", "dense"])
VARIANTS = st.lists(WORDS, min_size=1, max_size=5).map("".join).filter(lambda name: name[0].isalnum())
METHODS = st.tuples(
    st.sampled_from(["pretrained", "finetuned"]),
    st.sampled_from(["cls", "mofe"]),
    st.sampled_from(HEADS),
    st.just("") | VARIANTS | st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", fullmatch=True),
    st.none() | st.integers(0, 2**32 - 1),
    st.sampled_from(["none", "predicted", "top2", "oracle"]),
)


@given(st.sets(METHODS, min_size=2, max_size=10))
def test_no_two_methods_share_a_file(methods):
    paths = {samples_path(Path("scores"), *method) for method in methods}
    assert len(paths) == len(methods)
    assert {path.parent for path in paths} == {Path("scores/samples")}


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (("pretrained", "cls", "none", "", None, "none"), "pretrained-cls-none-none-none-none"),
        (("pretrained", "mofe", "refit", "dense-1", 0, "top2"), "pretrained-mofe-refit-dense-1-0-top2"),
        (("pretrained", "mofe", "refit-group", "x", 0, "predicted"), "pretrained-mofe-refit-group-x-0-predicted"),
        (("pretrained", "mofe", "refit", "group-x", 0, "predicted"), "pretrained-mofe-refit-group%2Dx-0-predicted"),
        (("pretrained", "mofe", "refit", "group", 0, "predicted"), "pretrained-mofe-refit-group-0-predicted"),
        (("finetuned", "mofe", "refit", "none", 3, "predicted"), "finetuned-mofe-refit-%6Eone-3-predicted"),
    ],
)
def test_ordinary_names_are_those_of_the_contract(method, name):
    assert samples_path(Path("s"), *method) == Path("s/samples") / f"{name}.parquet"


def test_scores_are_those_that_were_left(tmp_path):
    with pytest.raises(InputError, match=r"contents\.json is missing or damaged: run make score"):
        check_scores(tmp_path)
    names = [*FILES, "samples/a.parquet"]
    (tmp_path / "samples").mkdir()
    for name in names:
        (tmp_path / name).write_text(name)
    write_contents(tmp_path, "of these", names)
    assert check_scores(tmp_path)["identity"] == "of these"
    (tmp_path / "samples" / "._a.parquet").write_text("left by a Mac")
    check_scores(tmp_path)
    for name in names:
        (tmp_path / name).write_text(name.upper())
        with pytest.raises(InputError, match=f"{name} is not as it was left: run make score"):
            check_scores(tmp_path)
        (tmp_path / name).unlink()
        with pytest.raises(InputError, match=f"{name} is missing: run make score"):
            check_scores(tmp_path)
        (tmp_path / name).write_text(name)
