"""A stage, a metric and a score are each added in one place: a copy of the project to which all three were added.

The README's example of a score keeps the contract of scores, too: tests/test_stages/test_scorers/test_readme.py.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.stages_of_study import STAGES
from tests.test_docs.pages import PAGES
from tests.test_pipeline.test_report import Page

ROOT = Path(__file__).parents[2]
COUNT = '''"""How many rows the study has."""

from collections.abc import Iterable, Iterator
from typing import Self

from cache import CacheError, fingerprint
from pipeline.backbones import StudyBackbone
from pipeline.stage import Done, Stage
from pipeline.terminal import Lines
from pipeline.workspace import Workspace
from stages.context import Context
from stages.errors import InputError
from stages.files.documents import has_contents, write_contents, write_json


class Count(Stage):
    """Count the rows of all sets."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.folder = workspace.config.work / "count"

    @classmethod
    def of(cls, workspace: Workspace, backbones: Iterable[StudyBackbone], which: str) -> Iterator[Self]:
        """One for all."""
        yield cls(workspace)

    @property
    def name(self) -> str:
        """``count``."""
        return "count"

    def identity(self) -> str:
        """Of the caches."""
        return fingerprint([self.workspace.pretrained.cache(entry).digest for entry in self.workspace.config.sets])

    def is_fresh(self) -> bool:
        """Whether these were counted."""
        try:
            return has_contents(self.folder, self.identity())
        except (InputError, CacheError):
            return False

    def plan(self) -> Lines:
        """Whether they would be."""
        return ["count: fresh" if self.is_fresh() else "count: would count"]

    def run(self, context: Context) -> Done:
        """Count."""
        rows = sum(self.workspace.pretrained.cache(entry).n_rows for entry in self.workspace.config.sets)
        write_json(self.folder / "rows.json", {"rows": rows})
        write_contents(self.folder, self.identity(), ["rows.json"])
        return Done([f"count: {rows} rows"])
'''
LINE = '    Listed("count", "How many rows there are."),\n'
BEFORE = '    Listed("report", '  # the stage that it is to come before
FIELD = "    aupr_out: float\n"
METRIC = '        Metric("aupr_out", "AUPR", True, "OOD", _Curve.aupr_out),\n'
ADDED = '        Metric("best_f1", "best F1", True, "OOD", lambda curve: 0.1234),\n'
LAST_SCORE = '    "other": "logits.other:OtherScorer",\n'
# Several commands in one process of the copy, which imports torch once; what each prints follows a NUL.
COMMANDS = """
import shlex, sys
from pipeline.cli import main

for command in sys.argv[1:]:
    print(end="\\0", flush=True)
    if status := main(shlex.split(command)):
        sys.exit(status)
"""
ROLES = {"train": "id-train", "test": "id-test", "near": "near-ood", "far": "far-ood"}


def replaced(path, *pairs):
    """Replace what stands in a file once."""
    text = path.read_text("utf-8")
    for old, new in pairs:
        assert text.count(old) == 1
        text = text.replace(old, new)
    path.write_text(text, "utf-8")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the project with a module and a line for a stage, the like for a score, and a line of a metric."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("cache", "stages", "pipeline"):
        shutil.copytree(ROOT / name, tree / name)
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tree)
    for name in (".ci/constraints.txt", ".venv/.installed-cpu"):  # an environment that is ready
        (tree / name).parent.mkdir()
        (tree / name).touch()
    (tree / "pipeline" / "stages_of_study" / "count.py").write_text(COUNT)
    replaced(tree / "pipeline" / "stages_of_study" / "__init__.py", (BEFORE, LINE + BEFORE))
    metrics = ((FIELD, f"{FIELD}    best_f1: float\n"), (METRIC, METRIC + ADDED))
    replaced(tree / "stages" / "metrics" / "ranking.py", *metrics)
    scores = PAGES["stages/scorers/README.md"]
    (tree / "stages" / "scorers" / "logits" / "margin.py").write_text(scores.code("example"))
    replaced(tree / "stages" / "scorers" / "__init__.py", (LAST_SCORE, LAST_SCORE + scores.code("line")))
    return tree


@pytest.fixture(scope="module")
def run(tree):
    """Run commands of the copy's command line: what each prints."""

    def run(*commands: str) -> list[str]:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [sys.executable, "-c", COMMANDS, *commands]
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.split("\0")[1:]

    return run


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """An experiment file of a few given features."""
    drawn, folder = np.random.default_rng(0), tmp_path_factory.mktemp("study")
    for name, shift in {"train": 0.0, "test": 0.0, "near": 2.0, "far": 6.0}.items():
        label = np.arange(60, dtype=np.int32) % 3
        cls = drawn.normal(shift, 1, (60, 6)) + 3 * np.eye(3, 6)[label]
        known = {"label": label} if ROLES[name].startswith("id-") else {}
        np.savez(folder / f"{name}.npz", cls=cls.astype(np.float32), **known)
    sets = (
        f'[[sets]]\nname = "{name}"\nrole = "{role}"\nfeatures = "{name}.npz"\norigin = "drawn"\n'
        for name, role in ROLES.items()
    )
    scores = '[score]\nscores = ["msp", "knn", "margin", "knn+margin"]\nbootstrap = 100\n'
    path = folder / "study.toml"
    training = "[train]\nexperts = 2\nepochs = 1\n"
    path.write_text('name = "counted"\nwork = "work"\n' + "".join(sets) + training + scores)
    return path


@pytest.fixture(scope="module")
def printed(run, study):
    """What a dry run, a run and the added verb say of the study."""
    return run(f"run '{study}' --dry-run", f"run '{study}'", f"count '{study}'")


@pytest.fixture(scope="module")
def work(printed, study):
    return study.parent / "work"


def test_a_stage_is_added_by_a_module_and_a_line(printed, work):
    plan, ran, again = printed
    planned = plan.splitlines()
    assert [line.split()[0].rstrip(":") for line in planned] == [*["extract"] * 4, "train", "score", "count", "report"]
    assert planned[6] == "count: would count"

    assert "\ncount: 240 rows\n" in ran
    record = json.loads((work / "record.json").read_text())
    assert list(record["stages"]) == ["extract pretrained", "train pretrained", "score", "count", "report"]
    assert record["stages"]["count"]["status"] == "done"
    assert json.loads((work / "count" / "rows.json").read_text()) == {"rows": 240}

    assert again == "count: fresh\n"


def test_a_metric_is_added_by_a_line_and_its_field(work):
    """It is in the table, in the summary and in the report."""
    rows = json.loads((work / "scores" / "table.json").read_text("utf-8"))
    assert {row["best_f1"] for row in rows} == {0.1234}
    header = (work / "scores" / "table.csv").read_text("utf-8").splitlines()[0].split(",")
    assert header[header.index("aupr_out") + 1] == "best_f1"
    summary = json.loads((work / "scores" / "summary.json").read_text("utf-8"))
    assert {line["best_f1_mean"] for line in summary} == {0.1234}
    text = Page((work / "report" / "index.html").read_text("utf-8")).text
    beside = text.count("FPR95 ↓OOD positive")  # a column of every table with all metrics
    assert text.count("best F1 ↑OOD positive") == beside > 3
    assert "12.3" in text


def test_a_score_is_added_by_a_module_and_a_line(work):
    """From arrays to table and report, alone and in a sum."""
    with (work / "scores" / "table.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["head"] for row in rows if row["score"] == "margin"} >= {"probe", "refit"}
    assert "knn+margin" in {row["score"] for row in rows}
    assert "kNN+Margin" in (work / "report" / "index.html").read_text("utf-8")


def test_every_module_is_listed():
    modules = {path.stem for path in (ROOT / "pipeline" / "stages_of_study").glob("*.py")} - {"__init__"}
    assert {listed.verb for listed in STAGES} == modules
    assert all(listed.load().__module__ == f"pipeline.stages_of_study.{listed.verb}" for listed in STAGES)


def test_help_and_make_know_it(run, tree):
    whole, own = run("--help", "count --help")
    assert "\n  count     How many rows there are.\n" in whole
    assert "--dry-run" in own
    inherited = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "ARGS", "EXPERIMENT")
    environment = {name: value for name, value in os.environ.items() if name not in inherited}

    def make(*arguments: str) -> str:
        command = ["make", "FAISS=cpu", *arguments]
        return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=True).stdout

    assert "count           How many rows there are.\n" in make("help")
    assert make("--dry-run", "count", "EXPERIMENT=a.toml").strip() == ".venv/bin/python -m pipeline count 'a.toml'"
