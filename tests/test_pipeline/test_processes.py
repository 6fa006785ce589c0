"""Several processes for one command: really started, from the command line, two Gloo processes on the CPU."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.test_pipeline.command import done, refused
from tests.test_pipeline.tiny import STUDY, draw

ALONE = [sys.executable, "-m", "pipeline"]
TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--nproc-per-node",
    "2",
    "--standalone",
    "-m",
    "pipeline",
]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """An extracted study."""
    home = tmp_path_factory.mktemp("together")
    draw(home / "images/train", "sklearn:digits[0-2]/train", 32)
    text = STUDY[: STUDY.index('[[sets]]\nname = "test"')] + STUDY[STUDY.index("[train]") :]
    (home / "tiny.toml").write_text(text)
    done("extract", home / "tiny.toml")
    return home / "tiny.toml"


def command(*words, start=ALONE, **kwargs):
    """A process of its own, with one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*start, *map(str, words)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs
    )


def trained(study, name, *options, start=ALONE):
    """Folder of a mixture that a command has trained in a work folder of its own."""
    work = study.parent / name
    shutil.copytree(study.parent / "work", work, dirs_exist_ok=True)
    process = command("train", study, "--set", f"work={work}", *options, start=start)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.count("train pretrained default seed 0: done") == 1  # rank 0 alone speaks
    return work / "model" / "pretrained" / "default" / "seed-0"


BOTH = pytest.mark.parametrize(
    ("start", "options"), [(ALONE, ["--processes", 2]), (TORCHRUN, [])], ids=["option", "torchrun"]
)


@pytest.fixture(scope="module")
def alone(study):
    """What one process trains."""
    return trained(study, "one")


@BOTH
def test_two_processes_train_what_one_trains(study, alone, start, options):
    two = trained(study, f"two-{len(options)}", *options, start=start)
    expected, found = (load_file(folder / "mofe.safetensors") for folder in (alone, two))
    for name, tensor in expected.items():
        assert np.allclose(found[name], tensor, atol=1e-4), name
    assert (
        json.loads((two / "mofe.json").read_text())["identity"]
        == json.loads((alone / "mofe.json").read_text())["identity"]
    )
    record = json.loads((two.parents[3] / "record.json").read_text())
    assert record["stages"]["train pretrained"]["status"] == "done"


def test_called_from_python_the_others_run_the_same_command(study):
    work = study.parent / "called"
    shutil.copytree(study.parent / "work", work)
    words = ["train", str(study), "--set", f"work={work}", "--processes", "2"]
    process = command(start=[sys.executable, "-c", f"from pipeline.cli import main; raise SystemExit(main({words!r}))"])
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.count("train pretrained default seed 0: done") == 1


def finetuned(study, name, *options, start=ALONE):
    """Records of a fine-tune that a command has run in a work folder of its own."""
    work = study.parent / name
    shutil.copytree(study.parent / "work", work)
    (study.parent / "tuned.toml").write_text(
        study.read_text() + "\n[finetune]\nepochs = 1\nmixup = 0.8\ndrop_path = 0.1\n"
    )
    process = command("finetune", study.parent / "tuned.toml", "--set", f"work={work}", *options, start=start)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert out.count("finetune seed 0: done") == 1
    (record,) = (work / "finetune" / "seed-0" / "metrics.jsonl").read_text().splitlines()
    return json.loads(record)


def test_two_processes_fine_tune_what_one_does(study):
    alone, two = finetuned(study, "tuned-1"), finetuned(study, "tuned-2", start=TORCHRUN)
    assert two.keys() == alone.keys()
    for name in ("loss", "select_loss"):
        assert two[name] == pytest.approx(alone[name], abs=1e-3)


@BOTH
def test_what_fails_in_all_is_said_once(study, start, options):
    work = study.parent / f"failed-{len(options)}"
    shutil.copytree(study.parent / "work", work)
    process = command("train", study, "--set", "train.lr=1e30", "--set", f"work={work}", *options, start=start)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err.count("error: train: the loss is not finite") == 1
    if start is ALONE:
        assert "Traceback" not in err


def test_a_killed_process_ends_the_others(study):
    work = study.parent / "killed"
    shutil.copytree(study.parent / "work", work)
    process = command("train", study, "--set", f"work={work}", "--set", "train.epochs=10000", "--processes", 2)
    deadline = time.monotonic() + 60
    while not (children := _children(process.pid)) or not list(work.glob("model/*/*/*/*.checkpoint")):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.kill(children[0], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error: process 1 of 2 was killed by SIGKILL: what is finished is kept, the same command goes on" in err
    assert "Traceback" not in err


def test_other_verbs_run_in_one_process(study):
    process = command("extract", study, start=TORCHRUN)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "error: torchrun is for train and finetune; extract runs in one process" in err


def test_an_interrupt_ends_all_of_them(study):
    work = study.parent / "interrupted"
    shutil.copytree(study.parent / "work", work)
    words = ("train", study, "--set", f"work={work}", "--set", "train.epochs=10000", "--processes", 2)
    process = command(*words, start_new_session=True)  # a group of its own, as a terminal gives it
    while "train pretrained" not in (work / "record.json").read_text():
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)  # the pipe is open for as long as one of them lives
    assert process.returncode == 130, err
    lines = [line for line in err.splitlines() if " image/s" not in line]  # the others show progress
    assert len(lines) == 1, err
    assert lines[0].startswith("interrupted; what is finished is kept")


@pytest.mark.parametrize("verb", ["score", "results", "predict"])
def test_no_other_verb_runs_under_torchrun(study, monkeypatch, verb):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert refused(verb, study) == f"torchrun is for train and finetune; {verb} runs in one process"
    assert refused("train", study, "--processes", 3) == (
        "--processes 3 given, but torchrun has started 2: leave it out"
    )


def _children(pid):
    listed = subprocess.run(["pgrep", "-P", str(pid), "-f", "pipeline train"], capture_output=True, text=True)
    return [int(line) for line in listed.stdout.split()]
