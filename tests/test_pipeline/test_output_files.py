"""Files that commands are to write are refused before the work where they cannot be; nothing stands in their place."""

import os
from pathlib import Path

import pytest

from tests.test_pipeline.command import refused

DEMO = Path(__file__).parents[2] / "pipeline" / "experiments" / "demo.toml"
WRITING = {
    "-o": ("export", DEMO),
    "--state": ("watch", "it.ood", "-"),
    "--prometheus": ("watch", "it.ood", "-"),
    "results --page": ("results", "images"),
    "map --page": ("map", "images"),
}
# /proc takes no file, whoever asks and whatever its permissions say.
elsewhere = pytest.mark.skipif(not os.path.isdir("/proc"), reason="no /proc")


@pytest.mark.parametrize("option", WRITING)
def test_no_file_can_stand_there(option, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    before = {path: path.stat() for path in tmp_path.iterdir()}
    for place, why in {
        "pipe": "not a regular file",
        "": "a folder, a file is needed",
        "no/it": "No such file or directory",
        "file/it": "Not a directory",
    }.items():
        line = refused(*WRITING[option], option.split()[-1], tmp_path / place)
        assert f"{tmp_path / place} cannot be written to: {why}; give a file in a folder that is there" in line
    assert {path: path.stat() for path in tmp_path.iterdir()} == before  # not even a file that was there for a moment


@elsewhere
def test_a_folder_that_takes_no_file():
    assert "/proc/it.ood cannot be written to: " in refused("export", DEMO, "-o", "/proc/it.ood")
    assert refused("run", DEMO, "--set", "work=/proc/it").startswith("work: /proc cannot be written to: ")
