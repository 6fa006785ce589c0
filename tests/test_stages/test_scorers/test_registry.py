"""The registry of scores: strings until a score is asked for, and one line each."""

import inspect
import subprocess
import sys

import pytest

from stages.errors import InputError
from stages.scorers import SCORERS, get_scorer


def test_names_are_known_before_any_score_is_imported():
    """What checks an experiment file: neither a score nor numpy is loaded for it."""
    code = (
        "import sys; from stages.scorers import SCORERS, get_scorer, unknown_part\n"
        "assert 'knn' in SCORERS and 'enrgy' not in SCORERS and unknown_part('msp+knn') is None\n"
        "print(*(name for name in sys.modules if name.startswith('stages.scorers.') or name in ('numpy', 'torch')))\n"
        "get_scorer('energy')\n"
        "print(*(name for name in sys.modules if name.startswith(('stages.scorers.logits.', 'faiss'))))\n"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert said.split("\n") == ["", "stages.scorers.logits.energy", ""]


def test_an_unknown_score_names_the_nearest_known_one():
    with pytest.raises(InputError, match=r"'enrgy'; .*'energy'.* msp, energy, knn, "):
        get_scorer("enrgy")


@pytest.mark.parametrize("name", SCORERS)
def test_a_score_says_what_it_is(name):
    scorer = SCORERS[name]
    assert scorer.name == name
    for said in (scorer.title, scorer.says, scorer.cost):
        assert said == said.strip() != ""
    author, year = scorer.paper.rsplit(" ", 1)
    documented = inspect.getsource(inspect.getmodule(scorer)).replace(scorer.paper, "")
    assert author in documented
    assert year.isdigit()


def test_titles_tell_scores_apart():
    assert len({scorer.title for scorer in SCORERS.values()}) == len(SCORERS)
    assert set(SCORERS) == {scorer.name for scorer in SCORERS.values()}
