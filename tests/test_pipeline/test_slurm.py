"""The files for SLURM: as shellcheck wants them, and run here with stand-ins for `srun` and `scontrol`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path("pipeline/experiments/slurm").absolute()
FILES = sorted(FOLDER.glob("*.sbatch"))
STAND_INS = {
    "srun": 'exec "$@"\n',
    "scontrol": 'echo "$@" >> "$SCONTROL"\n',
    "nvidia-smi": "exit 9\n",
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shellcheck_finds_nothing(path):
    checked = subprocess.run([Path(sys.executable).with_name("shellcheck"), path], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.fixture
def environment(tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in STAND_INS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}")
        (folder / name).chmod(0o755)
    return os.environ | {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "SCHEDULER_FILE": str(tmp_path / "scheduler.json"),
        "SCONTROL": str(tmp_path / "scontrol"),
        "SLURM_JOB_ID": "7",
        "SLURM_ARRAY_JOB_ID": "8",
        "SLURM_ARRAY_TASK_ID": "1",
        "LIFETIME": "1 minutes",
        "STAGGER": "0 seconds",
    }


@pytest.mark.dask
def test_a_command_is_given_the_scheduler_once_there_is_a_worker(environment, tmp_path):
    """And when it is done all is gone: scheduler, worker, and the file; nothing goes back into the queue."""
    experiment = tmp_path / "study.toml"
    experiment.write_text('name = "study"\nwork = "work"\n')
    workers = subprocess.Popen(["bash", FOLDER / "workers.sbatch"], env=environment, stderr=subprocess.DEVNULL)
    command = ["bash", FOLDER / "scheduler.sbatch", "extract", str(experiment)]
    scheduler = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert scheduler.returncode == 2  # the pipeline's own answer: the study has no sets
    assert f"error: {experiment}: " in scheduler.stderr
    assert workers.wait(90) == 0
    assert not (tmp_path / "scheduler.json").exists()
    assert not (tmp_path / "scontrol").exists()
