"""The table of states in the README: each state is built from its files, and every call does what stands there."""

import re
from pathlib import Path

import pytest

import cache
from cache import FeatureCache, restore_manifest
from tests.test_cache.toy import begin, commit, files, fill, make_inputs, make_spec, restore

README = Path(cache.__file__).with_name("README.md")
CALLS = {"FeatureCache.open": FeatureCache.open, "CacheBuilder.begin": begin, "restore_manifest": restore_manifest}
ENDS = {  # what a cell says of a folder whose state is not refused, and what state it is in then
    "begins": "unfinished",
    "goes on": "unfinished",
    "goes on, removes the copy": "unfinished",
    "opens": None,
    "opens, removes plan and records": "sealed",
    "nothing to put back": None,
    "nothing to put back, removes plan and records": "sealed",
    "puts the copy back": "sealed",
    "puts the manifest back": "sealed",
}


def rows() -> list[dict[str, str]]:
    """The table's rows, by the names of its columns."""
    lines = README.read_text(encoding="utf-8").split("## States of a folder")[1].split("\n\n")[2].splitlines()
    head, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip((name.strip("`") for name in head), row, strict=True)) for row in body]


STATES = {row["state"]: row for row in rows()}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Every file that a cache has at some time."""
    folder = tmp_path_factory.mktemp("stored")
    with begin(folder / "unfinished") as builder:
        for plan in builder.pending():
            commit(folder / "unfinished", make_spec(), make_inputs(), plan)
    return files(folder / "unfinished") | files(fill(folder / "sealed").path) | {"notes.txt": b"notes"}


def made(cell: str, stored: dict[str, bytes]) -> dict[str, bytes]:
    """The files that a cell names."""
    found = {}
    for part in cell.split(", "):
        if name := re.search("`(.+)`", part):
            data = stored[name[1]]
            found[name[1]] = data[: -len(part)] if part.endswith("damaged") else data  # two are never damaged alike
        elif part != "none":
            suffix = {"shards": ".h5", "records": ".json"}[part]
            found |= {name: data for name, data in stored.items() if re.fullmatch(rf"shard-\d+\{suffix}", name)}
    return found


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("state", STATES)
def test_a_call_does_what_the_table_says(state, call, stored, tmp_path):
    row, path = STATES[state], tmp_path / "pets"
    before = made(row["files"], stored)
    if before:
        restore(path, before)
    said = row[call]
    if said.startswith("`"):
        with pytest.raises(cache.CacheError) as refusal:
            CALLS[call](path)
        assert type(refusal.value).__name__ == said.strip("`")
        assert (files(path) if path.exists() else {}) == before
        return
    answer = CALLS[call](path)
    if call == "CacheBuilder.begin":
        with answer as builder:
            assert len(builder.pending()) == (6 if said == "begins" else 0)
    if call == "restore_manifest":
        assert answer == said.startswith("puts")
    after = files(path)
    if said == "begins":
        assert after.keys() == {"plan.json"}
    elif said.startswith("goes on"):
        assert after == {name: data for name, data in before.items() if name != "manifest.copy.json"}
    else:
        assert after == (made(STATES["sealed"]["files"], stored) if ENDS[said] == "sealed" else before)


def test_every_file_that_a_cache_can_have_stands_in_the_table_of_files(stored):
    text = README.read_text(encoding="utf-8").split("## What a folder holds")[1].split("## ")[0]
    named = set(re.findall(r"^\| `([^`]+)`", text, re.MULTILINE))
    kinds = {re.sub(r"\d{5}", "00000", name) for name in stored} - {"notes.txt"}
    assert named == kinds


def test_every_module_stands_in_the_table_of_modules():
    text = README.read_text(encoding="utf-8").split("## Which module does what")[1]
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("|")]
    named = {name for cell in cells for name in re.findall("`([a-z]+)`", cell)}
    assert named == {path.stem for path in README.parent.glob("*.py")} - {"__init__"}
