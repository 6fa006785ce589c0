"""The demo as a step, and a process of the step that starts two."""

import json

from tests.bench.gpu import ranks
from tests.bench.gpu.steps import STEPS
from tests.test_bench.small import run


def test_demo(tmp_path):
    (demo,) = (step for step in STEPS if step.name == "demo")
    run(demo, tmp_path)


def test_one_of_two_processes(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    found = tmp_path / "joined.json"
    ranks.main("cpu", "tiny", str(tmp_path), str(tmp_path), str(found))
    assert len(json.loads(found.read_text())) == 2  # a loss of each epoch
