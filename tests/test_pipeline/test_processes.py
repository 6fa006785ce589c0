"""Several processes for one command: really started, two Gloo processes on the CPU."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from tests.test_pipeline.command import Running, done, refused, settings
from tests.test_pipeline.tiny import STUDY, by_network, draw

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m"]
LONG = settings("train.epochs=10000")
DIVERGES = settings("train.lr=1e30")


@pytest.fixture(scope="module")
def study(vit, tmp_path_factory):
    """An extracted study, with a section of a fine-tune."""
    home = tmp_path_factory.mktemp("together")
    draw(home / "images/train", "sklearn:digits[0-2]/train", 32)
    text = by_network(vit, STUDY[: STUDY.index('[[sets]]\nname = "test"')] + STUDY[STUDY.index("[train]") :])
    text += "\n[finetune]\nepochs = 1\nmixup = 0.8\ndrop_path = 0.1\n"
    (home / "tiny.toml").write_text(text)
    done("extract", home / "tiny.toml")
    return home / "tiny.toml"


@pytest.fixture(scope="module")
def copied(study):
    """Arguments that name the study in a work folder of its own, by name."""

    def copied(name):
        shutil.copytree(study.parent / "work", study.parent / name)
        return [study, *settings(f"work={study.parent / name}")]

    return copied


@pytest.fixture(scope="module")
def alone(study, copied):
    """Work folder of what one process trains and fine-tunes."""
    for verb in ("train", "finetune"):
        done(verb, *copied(f"{verb}-alone"))
    return study.parent


@pytest.fixture(scope="module")
def torchrun(study, copied):
    """Standard output and error, and status, of all that torchrun is asked in this module, in one start.

    A verb that it is not for, a training and a fine-tune that go through, and a training that fails.
    """
    commands = [
        ["extract", study],
        ["train", *copied("train-torchrun")],
        ["finetune", *copied("finetune-torchrun")],
        ["train", *copied("failed-torchrun"), *DIVERGES],
    ]
    several = [shlex.join(map(str, command)) for command in commands]
    command = [*TORCHRUN, "tests.test_pipeline.several", *several]
    return subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


def is_what_one_trains(work, alone):
    found, expected = (folder / "model" / "pretrained" / "default" / "seed-0" for folder in (work, alone))
    ours, theirs = (load_file(folder / "mofe.safetensors") for folder in (found, expected))
    for name, tensor in theirs.items():
        assert np.allclose(ours[name], tensor, atol=1e-4), name
    ours, theirs = (json.loads((folder / "mofe.json").read_text()) for folder in (found, expected))
    assert ours["identity"] == theirs["identity"]
    record = json.loads((work / "record.json").read_text())
    assert record["stages"]["train pretrained"]["status"] == "done"


def test_two_processes_train_what_one_trains(study, copied, alone):
    """Called from Python, too, the other runs the same command."""
    answer = Running("train", *copied("train-two"), "--processes", 2).finish()
    assert answer.status == 0, answer.err
    assert answer.out.count("train pretrained default seed 0: done") == 1  # rank 0 alone speaks
    is_what_one_trains(study.parent / "train-two", alone / "train-alone")


def test_under_torchrun_they_train_what_one_trains(study, torchrun, alone):
    assert torchrun.stdout.count("train pretrained default seed 0: done") == 1
    is_what_one_trains(study.parent / "train-torchrun", alone / "train-alone")


def test_two_processes_fine_tune_what_one_does(study, torchrun, alone):
    assert torchrun.stdout.count("finetune seed 0: done") == 1
    two, one = (
        json.loads((study.parent / name / "finetune" / "seed-0" / "metrics.jsonl").read_text())
        for name in ("finetune-torchrun", "finetune-alone")
    )
    assert two.keys() == one.keys()
    for name in ("loss", "select_loss"):
        assert two[name] == pytest.approx(one[name], abs=1e-3)


def test_under_torchrun_what_fails_in_all_is_said_once(torchrun):
    statuses = re.findall(r"[a-z]+: status \d+", torchrun.stdout)
    expected = {"extract: status 2": 2, "train: status 0": 2, "finetune: status 0": 2, "train: status 1": 2}
    assert {status: statuses.count(status) for status in statuses} == expected
    assert torchrun.returncode == 1
    assert torchrun.stderr.count("error: train: the loss is not finite") == 1
    assert "error: torchrun is for train and finetune; extract runs in one process" in torchrun.stderr


def test_what_fails_in_all_is_said_once(copied):
    answer = Running("train", *copied("failed"), *DIVERGES, "--processes", 2).finish()
    assert answer.status == 1
    assert answer.err.count("error: train: the loss is not finite") == 1
    assert "Traceback" not in answer.err


def test_a_killed_process_ends_the_others(study, copied):
    process = Running("train", *copied("killed"), *LONG, "--processes", 2)
    while not list((study.parent / "killed").glob("model/*/*/*/*.checkpoint")):
        assert process.is_running()
        time.sleep(0.1)
    (other,) = psutil.Process(process.pid).children()
    other.kill()
    answer = process.finish()
    assert answer.status == 1
    assert "error: process 1 of 2 was killed by SIGKILL: what is finished is kept, the same command goes on" in (
        answer.err
    )
    assert "Traceback" not in answer.err


def test_an_interrupt_ends_all_of_them(study, copied):
    process = Running("train", *copied("interrupted"), *LONG, "--processes", 2)
    while "train pretrained" not in (study.parent / "interrupted" / "record.json").read_text():
        assert process.is_running()
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
    answer = process.finish()
    assert answer.status == 130, answer.err
    lines = [line for line in answer.err.splitlines() if " image/s" not in line]  # the others show progress
    assert len(lines) == 1, answer.err
    assert lines[0].startswith("interrupted; what is finished is kept")


@pytest.mark.parametrize("verb", ["extract", "score", "results", "predict"])
def test_no_other_verb_runs_under_torchrun(study, monkeypatch, verb):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert refused(verb, study) == f"torchrun is for train and finetune; {verb} runs in one process"
    assert refused("train", study, "--processes", 3) == (
        "--processes 3 given, but torchrun has started 2: leave it out"
    )
