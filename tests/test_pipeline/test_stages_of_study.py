"""A study's stages follow from one list: to add one is a module and a line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.stages_of_study import STAGES

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


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the project with one more module and one more line."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("cache", "stages", "pipeline"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tree)
    for name in (".ci/constraints.txt", ".venv/.installed-cpu"):  # an environment that is ready
        (tree / name).parent.mkdir()
        (tree / name).touch()
    stages = tree / "pipeline" / "stages_of_study"
    (stages / "count.py").write_text(COUNT)
    listed = (stages / "__init__.py").read_text()
    assert listed.count(BEFORE) == 1
    (stages / "__init__.py").write_text(listed.replace(BEFORE, LINE + BEFORE))
    return tree


@pytest.fixture
def run(tree):
    """Run commands of the copy's command line: what each prints."""

    def run(*commands: str) -> list[str]:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [sys.executable, "-c", COMMANDS, *commands]
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.split("\0")[1:]

    return run


@pytest.fixture
def study(tmp_path):
    """An experiment file of a few given features."""
    drawn = np.random.default_rng(0)
    for name, shift in {"train": 0.0, "test": 0.0, "near": 2.0, "far": 6.0}.items():
        label = np.arange(60, dtype=np.int32) % 3
        cls = drawn.normal(shift, 1, (60, 6)) + 3 * np.eye(3, 6)[label]
        known = {"label": label} if ROLES[name].startswith("id-") else {}
        np.savez(tmp_path / f"{name}.npz", cls=cls.astype(np.float32), **known)
    sets = (
        f'[[sets]]\nname = "{name}"\nrole = "{role}"\nfeatures = "{name}.npz"\norigin = "drawn"\n'
        for name, role in ROLES.items()
    )
    more = '[train]\nexperts = 2\nepochs = 1\n[score]\nscores = ["msp", "knn"]\nbootstrap = 100\n'
    path = tmp_path / "study.toml"
    path.write_text('name = "counted"\nwork = "work"\n' + "".join(sets) + more)
    return path


def test_a_stage_is_added_by_a_module_and_a_line(run, study):
    plan, ran, again = run(f"run '{study}' --dry-run", f"run '{study}'", f"count '{study}'")
    planned = plan.splitlines()
    assert [line.split()[0].rstrip(":") for line in planned] == [*["extract"] * 4, "train", "score", "count", "report"]
    assert planned[6] == "count: would count"

    assert "\ncount: 240 rows\n" in ran
    record = json.loads((study.parent / "work" / "record.json").read_text())
    assert list(record["stages"]) == ["extract pretrained", "train pretrained", "score", "count", "report"]
    assert record["stages"]["count"]["status"] == "done"
    assert json.loads((study.parent / "work" / "count" / "rows.json").read_text()) == {"rows": 240}

    assert again == "count: fresh\n"


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
