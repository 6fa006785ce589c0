"""Targets of the Makefile, by what make says that it would run where the environment is ready."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAGES = ["extract", "train", "finetune", "score", "report"]
TARGETS = ["setup", "demo", *STAGES, "run", "verify", "test", "lint", "bench", "clean"]
VERBS = [*STAGES, "run", "plan", "predict", "export", "serve", "verify", "info"]


@pytest.fixture
def make(tmp_path):
    """Run make in a checkout, with or without an environment that is ready."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    stages = Path("pipeline", "stages_of_study")  # which are targets
    shutil.copytree(ROOT / stages, tmp_path / stages)
    for name in ("pyproject.toml", ".ci/constraints.txt", ".venv/.installed-cpu"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def run(*arguments: str, ready: bool = True) -> str:
        if not ready:
            (tmp_path / ".venv" / ".installed-cpu").unlink()
        command = ["make", "FAISS=cpu", *arguments]
        # `make test ARGS=…` runs this test: a make below another one would take its flags and variables.
        inherited = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "ARGS", "DATA", "EXPERIMENT", "WORK")
        environment = {name: value for name, value in os.environ.items() if name not in inherited}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout

    return run


def test_help_lists_the_targets(make):
    lines = make("help").splitlines()
    assert [target for target in TARGETS if target not in [line.split()[0] for line in lines]] == []
    assert all(len(line.split()) > 2 for line in lines)  # each says what it does
    assert make().splitlines() == lines


def test_demo_is_the_command_of_the_readme(make):
    command = shlex.split(make("--dry-run", "demo"))
    assert command == [
        ".venv/bin/python",
        "-m",
        "pipeline",
        "run",
        "pipeline/experiments/demo.toml",
        "--set",
        "work=runs/demo",
    ]
    assert (ROOT / "pipeline/experiments/demo.toml").is_file()
    assert "\nmake demo" in (ROOT / "README.md").read_text("utf-8")


@pytest.mark.parametrize("verb", VERBS)
def test_verb(make, verb):
    command = shlex.split(make("--dry-run", verb, "EXPERIMENT=my study.toml", "ARGS=--set train.epochs=5"))
    assert command == [*f".venv/bin/python -m pipeline {verb}".split(), "my study.toml", "--set", "train.epochs=5"]


@pytest.mark.parametrize("target", ["setup", "demo", "test", "lint", "train"])
def test_every_target_makes_the_environment_first(make, target):
    commands = re.sub(r"\\\n\s+", "", make("--dry-run", target, "PYTHON=python3.11", ready=False)).splitlines()
    assert commands[0] == "python3.11 -m venv .venv"
    pinned = "--constraint .ci/constraints.txt --editable '.[cpu,test]'"
    by_uv, by_pip = next(line for line in commands if pinned in line).split(" || ")  # which reads no pip.conf
    assert by_uv.startswith(".venv/bin/uv pip install ")
    assert by_uv.endswith(pinned)
    assert ".venv/bin/python -m pip " in by_pip
    assert by_pip.endswith(f"{pinned}; }}")


def test_clean_keeps_runs_and_caches(make, tmp_path):
    kept = ["runs/demo/cache/train-0123abcd/manifest.json", "cache/store.py", "my-caches/shard-00000.h5"]
    gone = [".venv/bin/python", "build/lib/a.py", ".pytest_cache/a", ".mypy_cache/a", ".ruff_cache/a"]
    for name in kept + gone:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    make("clean")
    assert [name for name in kept if not (tmp_path / name).exists()] == []
    assert [name for name in gone if (tmp_path / name).exists()] == []
