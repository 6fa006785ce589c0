import json
import subprocess
import time
from importlib import metadata

import pytest

from pipeline.config import RunConfig
from pipeline.record import RunRecord, git_revision, hardware, versions
from stages.files.documents import read_document, write_document


@pytest.fixture
def config(tmp_path):
    return RunConfig.model_validate(
        {
            "name": "toy",
            "work": str(tmp_path),
            "seeds": [0, 7],
            "cache": {"root": str(tmp_path / "cache")},
            "sets": [{"name": "train", "role": "id-train", "images": "sklearn:digits"}],
        }
    )


def test_stage_is_fresh_only_when_it_finished_from_the_same(tmp_path, config):
    record = RunRecord(tmp_path / "record.json", config)
    assert not record.is_fresh("score", "abc")
    with record.running("score", "abc"):
        assert not record.is_fresh("score", "abc")
    assert record.is_fresh("score", "abc")
    assert not record.is_fresh("score", "abd")


def test_stage_that_found_nothing_to_do_keeps_the_run_that_did_the_work(tmp_path, config):
    record = RunRecord(tmp_path / "record.json", config)
    with record.running("train", "abc"):
        time.sleep(0.01)
    first = record.stage("train")
    with record.running("train", "abc") as stage:
        stage.fresh = True
    assert record.stage("train") == first
    with record.running("train", "abd") as stage:  # from something else: the record says of what it is fresh
        stage.fresh = True
    assert record.stage("train").fingerprint == "abd"


@pytest.mark.parametrize(("error", "status"), [(ValueError, "failed"), (KeyboardInterrupt, "interrupted")])
def test_stage_that_did_not_finish(tmp_path, config, error, status):
    record = RunRecord(tmp_path / "record.json", config)
    with pytest.raises(error), record.running("train", "abc"):
        raise error
    assert record.stage("train").status == status
    assert not record.is_fresh("train", "abc")


def test_next_run_remembers(tmp_path, config):
    path = tmp_path / "work" / "record.json"
    with RunRecord(path, config).running("extract", "abc"):
        pass
    later = RunRecord(path, config)
    assert later.is_fresh("extract", "abc")
    with later.running("score", "def"):
        on_disk = json.loads(path.read_text())["stages"]
        assert {name: stage["status"] for name, stage in on_disk.items()} == {"extract": "done", "score": "running"}
    assert [file.name for file in path.parent.iterdir()] == ["record.json"]


def test_what_stands_in_it(tmp_path, config):
    path = tmp_path / "record.json"
    with RunRecord(path, config).running("extract", "abc"):
        pass
    written = json.loads(path.read_text())
    assert written["seeds"] == [0, 7]
    assert written["config"] == config.to_dict()
    assert written["versions"]["torch"] == metadata.version("torch")
    assert written["hardware"]["memory_bytes"] > 2**28
    stage = written["stages"]["extract"]
    assert stage.keys() == {"fingerprint", "started", "duration_s", "status", "peak_memory_bytes"}
    assert 2**24 < stage["peak_memory_bytes"] < written["hardware"]["memory_bytes"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"stages": 3}', '{"stages": {"score": {"status": "done"}}}', "\0"])
def test_damaged_record_knows_nothing(tmp_path, config, text):
    (tmp_path / "record.json").write_text(text)
    record = RunRecord(tmp_path / "record.json", config)
    assert record.stage("score") is None
    with record.running("score", "abc"):
        pass
    assert RunRecord(tmp_path / "record.json", config).is_fresh("score", "abc")


def test_versions_are_of_what_runs_and_not_of_what_tests():
    found = versions()
    assert {"python", "torch", "timm", "h5py", "dask"} <= found.keys()
    assert {"faiss-cpu", "faiss-gpu"} & found.keys()
    assert "pytest" not in found


def test_git_revision_and_whether_it_is_changed(tmp_path):
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.check_output(["git", "-C", tmp_path, *identity, *arguments], text=True).strip()

    assert git_revision(tmp_path) is None
    git("init", "--quiet")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "--quiet", "--message", "a")
    assert git_revision(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "a").write_text("2")
    assert git_revision(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": True}


def test_hardware():
    about = hardware()
    assert about["cpu"]
    assert about["cores"] >= 1
    assert isinstance(about["gpus"], list)


def test_a_record_of_before_the_memory_was_measured_is_still_read(tmp_path, config):
    path = tmp_path / "record.json"
    with RunRecord(path, config).running("score", "abc"):
        pass
    written = read_document(path)
    del written["stages"]["score"]["peak_memory_bytes"]
    write_document(path, written)
    assert RunRecord(path, config).is_fresh("score", "abc")
