"""The README of scores is of the code: its table is generated, and a score is added as it says.

Such a score runs through a study in tests/test_pipeline/test_adding.py.
"""

import re
import subprocess
import sys
from pathlib import Path
from shutil import copy, copytree

import pytest

from stages.scorers.__main__ import README, scores_table, stated_table

ROOT = Path(__file__).parents[3]


def test_the_table_is_what_the_classes_say():
    stated = stated_table(README.read_text(encoding="utf-8"))
    assert stated == scores_table(), "python -m stages.scorers writes it"


def shown(name: str) -> str:
    """Code between two marks of the README."""
    readme = README.read_text(encoding="utf-8")
    return re.search(rf"<!-- {name}: begin -->\n```(?:python)?\n(.*?)```", readme, re.DOTALL)[1]


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the project with the README's example of a score: its file and its line, and nothing else by hand."""
    tree = tmp_path_factory.mktemp("copy") / "project"
    for package in ("cache", "stages", "pipeline", "tests"):
        copytree(ROOT / package, tree / package)
    copy(ROOT / "pyproject.toml", tree)
    scorers = tree / "stages" / "scorers"
    (scorers / "logits" / "margin.py").write_text(shown("example"), encoding="utf-8")
    registry = (scorers / "__init__.py").read_text(encoding="utf-8")
    last = '    "other": "logits.other:OtherScorer",\n'
    assert registry.count(last) == 1
    (scorers / "__init__.py").write_text(registry.replace(last, last + shown("line")), encoding="utf-8")
    run(tree, "stages.scorers")
    return tree


def run(tree: Path, *arguments: object) -> str:
    done = subprocess.run([sys.executable, "-m", *map(str, arguments)], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_an_added_score_keeps_the_contract_and_is_documented(tree):
    """The suites ask nothing of a score that is there but the file and the line."""
    suites = ("test_contracts", "test_stages/test_scorers/test_registry.py", "test_stages/test_scorers/test_readme.py")
    tests = ["stages/scorers/logits/margin.py", *(f"tests/{suite}" for suite in suites)]
    run(tree, "pytest", "-q", "-p", "no:cacheprovider", *tests, "-k", "margin or table_is or titles_tell")
    assert "| `margin` | Margin |" in (tree / "stages" / "scorers" / "README.md").read_text(encoding="utf-8")
