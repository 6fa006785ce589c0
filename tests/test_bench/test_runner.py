"""The check goes on whatever a step does, and keeps what was found."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.bench.check_gpu import main
from tests.bench.gpu.report import Kept, markdown, read_kept, verdict
from tests.bench.gpu.runner import BAD, LEAST_S, Check, Plan, run_steps
from tests.bench.gpu.step import Step
from tests.test_bench.small import run

ROOT = Path(__file__).parents[2]
LISTING = "tests.test_bench.broken_steps:STEPS"


def plan(scratch, seconds=60.0, only=()):
    return Plan(LISTING, "cpu", "tiny", scratch, seconds, only)


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    """All of the broken steps, with ``gpu.json`` beside the scratch folder."""
    scratch = tmp_path_factory.mktemp("check") / "scratch"
    scratch.mkdir()
    check = Check(plan(scratch), plan(scratch).outcomes())
    run_steps(check, Kept(scratch.parent / "gpu.json", check).write)
    return check


@pytest.fixture(scope="module")
def found(check):
    return {outcome.step.name: outcome for outcome in check.outcomes}


def test_every_step_has_its_verdict(found):
    assert {name: outcome.verdict for name, outcome in found.items()} == {
        "first": "passed",
        "raises": "failed",
        "hangs": "timed out",
        "dies": "crashed",
        "missing": "failed",
        "lacks": "not run",
        "outside": "failed",
        "not a number": "failed",
        "last": "passed",
    }


def test_what_was_measured_before_the_end_stays(found):
    assert {name: len(outcome.values) for name, outcome in found.items() if not outcome.values} == {
        "missing": 0,
        "lacks": 0,
    }


def test_failures_say_why(found):
    assert found["raises"].said == "ValueError: the kernel"
    assert found["raises"].diagnostics[-2:] == ["ValueError: the kernel", "is not there"]
    assert found["hangs"].said == "it had 1 s to run"
    assert any("in hanging" in line for line in found["hangs"].diagnostics)
    assert found["dies"].said == "its process ended with SIGKILL"
    assert "last words" in found["dies"].diagnostics
    assert "nowhere" in found["missing"].said
    assert found["lacks"].said == "faiss has no GPU build here"
    assert found["outside"].said == "outside its limit: a number"


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_step_that_is_stopped_leaves_no_process(found):
    (value,) = found["hangs"].values
    assert not is_running(int(value.value))


def test_the_file_says_it_all(check, found):
    text = (check.plan.scratch.parent / "gpu.json").read_text()
    about = json.loads(text)
    assert about["verdict"] == verdict(check) == "failed"
    assert [step["name"] for step in about["steps"]] == list(found)
    assert about["steps"][6]["values"] == [
        {"what": "a number", "value": 3.0, "unit": "rows/s", "at_most": 2, "at_least": None, "holds": False}
    ]
    assert {"machine", "versions", "git", "gpu", "device", "sizes"} <= about.keys()


def test_the_section_can_be_pasted(check):
    text = markdown(check)
    header, rule, *rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in (header, rule, *rows)} == {7}
    assert "| first | passed |" in text
    assert "| a number | 3 rows/s | ≤ 2 ✗ |" in text
    assert "- **lacks**: what cannot run here is no failure." in text


def test_what_was_kept_is_shown_again(check, tmp_path, capsys):
    kept, later = check.plan.scratch.parent / "gpu.json", tmp_path / "later.json"
    assert main(["--show", str(kept)]) == 0
    assert capsys.readouterr().out.strip() == markdown(check).strip()
    about = json.loads(kept.read_text())
    about["steps"] = about["steps"][:2]
    about["steps"][0] |= {"seconds": 77.0}
    about["steps"][1] |= {"verdict": "out of time"}
    later.write_text(json.dumps(about))
    merged = read_kept([kept, later]).outcomes
    assert [outcome.seconds for outcome in merged[:1]] == [77.0]
    assert [outcome.verdict for outcome in merged] == [outcome.verdict for outcome in check.outcomes]


def test_time_that_is_up_leaves_the_rest(tmp_path):
    check = Check(plan(tmp_path, seconds=0), plan(tmp_path).outcomes())
    run_steps(check, lambda: None)
    assert {outcome.verdict for outcome in check.outcomes} == {"out of time"}
    assert verdict(check) == "unfinished"
    assert "out of time" not in BAD


def test_a_step_that_time_was_not_left_for_has_not_failed(tmp_path):
    """What it measured meanwhile stays; in another run it may pass."""
    own = replace(plan(tmp_path, seconds=LEAST_S + 1), listing="tests.test_bench.broken_steps:LONG")
    check = Check(own, own.outcomes())
    run_steps(check, lambda: None)
    (outcome,) = check.outcomes
    assert outcome.verdict == "out of time"
    assert re.fullmatch(r"\d s of (600|120) were left to (run|start|import what it needs)", outcome.said)
    assert verdict(check) == "unfinished"


def test_steps_run_in_the_order_that_is_asked_for(tmp_path):
    asked = plan(tmp_path, only=("last", "first", "last"))
    assert [outcome.step.name for outcome in asked.outcomes()] == ["last", "first"]


def test_what_a_step_leaves_no_other_finds(tmp_path):
    for name in ("leaves", "leaves once more"):
        run(Step(name, "each has a folder of its own", "tests.test_bench.broken_steps:leaving"), tmp_path)


CHECK = (sys.executable, "-m", "tests.bench.check_gpu")


def command(out, *arguments):
    return [*CHECK, "--device", "cpu", "--listing", LISTING, "--out", str(out), *arguments]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_it_leaves_what_was_found_and_no_process(tmp_path, number):
    out = tmp_path / "gpu.json"
    running = subprocess.Popen(command(out, "--only", "first", "hangs"), cwd=ROOT, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while time.monotonic() < until and '"process"' not in (out.read_text() if out.exists() else ""):
        time.sleep(0.02)
    os.kill(running.pid, number)
    assert running.wait(20) in (130, -number)
    first, hangs = json.loads(out.read_text())["steps"]
    assert first["verdict"] == "passed"
    (process,) = hangs["values"]
    until = time.monotonic() + 10
    while time.monotonic() < until and is_running(int(process["value"])):
        time.sleep(0.02)
    assert not is_running(int(process["value"]))


def test_command_line(tmp_path, capsys):
    out = tmp_path / "gpu.json"
    good = subprocess.run(command(out, "--only", "first"), cwd=ROOT, capture_output=True, text=True)
    assert good.returncode == 0
    assert "| first | passed |" in good.stdout
    assert json.loads(out.read_text())["verdict"] == "passed"
    here = command(out)[len(CHECK) :]
    assert main([*here, "--only", "outside"]) == 1
    assert main([*here, "--only", "nothing"]) == 2
    assert capsys.readouterr().err.splitlines()[-1][:29] == "error: --only: no step 'nothi"


def test_without_a_gpu_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["--out", str(tmp_path / "gpu.json")]) == 3
    assert capsys.readouterr().err.splitlines() == [
        "no GPU answers here: nothing was checked; --device cpu runs the steps on the CPU"
    ]
    assert not (tmp_path / "gpu.json").exists()
