"""The experiment file as documents have it: each key, each default, each file."""

import re
import tarfile
import tomllib

import pytest

from pipeline.config import load_config
from stages.config import FinetuneConfig, TrainConfig
from stages.training.recipes import FINETUNE_PRESETS, TRAIN_PRESETS
from tests.test_docs.pages import PAGES, page_with, table
from tests.test_docs.settings import SETTINGS, TABLES, key_of, keys_in
from tests.test_pipeline.command import done
from tests.test_pipeline.tiny import draw

KEYS = page_with("keys").between("keys")
TOML = [(page.name, code) for page in PAGES.values() for code in page.blocks("toml")]


def rows_of(name: str) -> dict[str, list[str]]:
    """Key to its other cells, in the table below this heading."""
    heading = "At the top" if name == "" else next(h for h in (f"`[{name}]`", f"`[[{name}]]`") if f"### {h}\n" in KEYS)
    text = KEYS.split(f"### {heading}\n")[1].split("\n### ")[0]
    cells = table(text)[1:]
    return {key: row[1:] for row in cells for key in re.findall(r"`([^`]+)`", row[0])}


@pytest.mark.parametrize("name", ["", *sorted(TABLES)])
def test_each_key_is_documented_and_each_documented_key_exists(name):
    known = {key.rpartition(".")[2] for key in SETTINGS if key.rpartition(".")[0] == name}
    assert set(rows_of(name)) == known


def test_each_table_is_documented():
    assert {h.strip("`[]") for h in re.findall(r"^### (.+)$", KEYS, re.MULTILINE)} == {"At the top", *TABLES}


def shown(value: object) -> object:
    """A default as a cell has it: a number by its value, nothing set as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    return float(value) if isinstance(value, int | float) else f'`"{value}"`' if value else "none"


def read(cell: str) -> object:
    try:
        return float(cell)
    except ValueError:
        return cell


@pytest.mark.parametrize("name", ["train", "finetune"])
def test_defaults_are_those_of_the_code(name):
    """What a preset does not change has an empty cell there."""
    config, presets = (TrainConfig(), TRAIN_PRESETS) if name == "train" else (FinetuneConfig(), FINETUNE_PRESETS)
    for key, (small, large, _) in rows_of(name).items():
        if key in ("seeds", "variants"):
            continue
        value = getattr(config, key)
        assert read(small) == shown(value), key
        other = presets["paper"].get(key, value)
        assert (read(large) if large else shown(value)) == shown(other), key


@pytest.mark.parametrize(("page", "code"), TOML, ids=[f"{page}-{n}" for n, (page, _) in enumerate(TOML)])
def test_every_toml_has_keys_that_exist(page, code):
    assert {key_of(key) for key in keys_in(tomllib.loads(code))} - SETTINGS == set()


@pytest.mark.parametrize(("page", "code"), [(page, code) for page, code in TOML if "\nwork = " in code])
def test_every_whole_experiment_is_accepted(page, code, tmp_path):
    (tmp_path / "pets.toml").write_text(code, "utf-8")
    config = load_config(tmp_path / "pets.toml")
    config.require_roles("run")
    assert config.work == tmp_path / "runs" / "pets"


@pytest.mark.parametrize(("page", "code"), [(page, code) for page, code in TOML if "\nwork = " in code])
def test_every_whole_experiment_says_what_it_would_do(page, code, tmp_path, monkeypatch):
    """On images as the page has them, by another network, since no weights can be had from the hub in tests."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pets.toml").write_text(code, "utf-8")
    for name, source in {"train": "sklearn:digits[0-2]/train", "test": "sklearn:digits[0-2]/test"}.items():
        draw(tmp_path / "data" / name, source, 12)
    draw(tmp_path / "data" / "textures", "sklearn:photos", 2, nested=False)
    with tarfile.open(tmp_path / "data" / "textures.tar", "w") as tar:
        tar.add(tmp_path / "data" / "textures", arcname=".")
    network = {"name": "tf_efficientnet_lite0", "weights": "embedded", "image_size": 32, "recipe": "timm"}
    overrides = [word for key, value in network.items() for word in ("--set", f"backbone.{key}={value}")]
    said = done("run", "pets.toml", "--dry-run", *overrides).out
    assert re.search(r"^extract pretrained textures: 4 images, would write ", said, re.MULTILINE)
    assert said.endswith(f"report: would write {tmp_path / 'runs' / 'pets' / 'report' / 'index.html'}\n")
    assert not (tmp_path / "runs").exists()


def test_readme_has_one_of_a_few_lines():
    code = PAGES["README.md"].code("experiment")
    assert (page_with("experiment").name, len(code.splitlines())) == ("README.md", 25)


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_every_key_that_text_names_exists(page):
    for span in page.spans:
        found = re.fullmatch(r"((?:backbone|cache|split|train|finetune|score)(?:\.\w[\w-]*)+)(?: ?=.*)?", span)
        if found and not span.endswith((".json", ".safetensors")):
            assert key_of(found[1]) in SETTINGS | TABLES, span
