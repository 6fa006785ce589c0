"""Tables of documents that follow from the code, or from one another, are those."""

import csv
import gzip
import re
from collections import Counter

import pytest
import timm
import torch

from cache import FeatureSpec
from pipeline.benchmark.images import LISTED
from stages.detection.conformal import FalseAlarms
from stages.detection.subject import NO_HEAD
from stages.networks.tokens import stored_grid
from stages.results.method import HEADS, NO_ROUTING, ROUTINGS
from stages.results.table import COLUMNS
from tests.test_docs.pages import PAGES, ROOT, page_with, table

IMAGENET = 1_281_167
FAMILY = ("vit_small_patch14", "vit_base_patch14", "vit_large_patch14", "vit_giant_patch14")


def row_bytes(name: str, size: int, patches: str, taps: int = 0) -> int:
    """Bytes of one image's features in float16, by the network's own shapes (nothing is computed or held in memory)."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0, img_size=size, weight_init="skip")
    spec = FeatureSpec(
        backbone=name,
        weights_sha="0a1b",
        transform={},
        image_size=size,
        expert_blocks=1,
        patches=patches,
        dtype="float16",
        cls_dim=model.num_features,
        tap_dim=model.embed_dim,
        n_registers=model.num_prefix_tokens - 1,
        grid=stored_grid(model.patch_embed.grid_size, patches),
        compute={},
        semantics=1,
        taps=tuple(range(1, taps + 1)),
        tap_widths=(model.embed_dim,) * taps,
        tap_tokens=2 if taps else 0,
    )
    return spec.row_bytes


def bytes_table() -> str:
    lines = [
        "| DINOv2 | px | `full` | with 4 registers | `pool:4` | `none` | each of `taps` | 1.28 M images, `full` |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in FAMILY:
        for size in (224, 518):
            full, pooled, none = (row_bytes(f"{name}_dinov2", size, patches) for patches in ("full", "pool:4", "none"))
            registers = row_bytes(f"{name}_reg4_dinov2", size, "full")
            tap = row_bytes(f"{name}_dinov2", size, "none", taps=1) - none
            cells = " | ".join(f"{n:,}" for n in (full, registers, pooled, none, tap))
            letter = {"giant": "g"}.get(name.split("_")[1], name.split("_")[1][0].upper())
            lines.append(f"| ViT-{letter}/14 | {size} | {cells} | {full * IMAGENET / 1e9:,.0f} GB |")
    return "\n".join(lines)


def test_bytes_per_image():
    assert page_with("bytes table").between("bytes table") == bytes_table()


def test_readme_has_six_rows_of_the_demo():
    """A test of the demo holds the whole table to what it gives."""
    rows = {tuple(cells[:4]): cells for cells in table(PAGES["pipeline/experiments/README.md"].between("demo table"))}
    header, *some = table(PAGES["README.md"].between("demo table"))
    assert len(some) == 6
    whole = rows["backbone", "features", "head", "score"]
    for cells in some:
        assert (
            dict(zip(header, cells, strict=True)).items()
            <= dict(zip(whole, rows[tuple(cells[:4])], strict=True)).items()
        )


def test_the_benchmarks_sets_are_those_of_its_list():
    with gzip.open(LISTED, "rt", encoding="utf-8", newline="") as file:
        listed = Counter(line["set"] for line in csv.DictReader(file))
    page = PAGES["pipeline/benchmark/README.md"]
    _, *rows = table(page.text.split("\n## Sets\n")[1].split("\n## ")[0])
    assert {cells[0].strip("`"): int(cells[2].replace(",", "")) for cells in rows} == listed
    assert f"{sum(listed.values()):,} in {len(listed)} sets" in page.text


def test_what_thresholds_admit_is_what_the_simulation_found():
    """The ranges of METHOD.md are those of the tables of coverage, without the line of exchangeable scores."""
    tables = PAGES["tests/bench/README.md"].text.split("\n## Coverage of the thresholds\n")[1].split("\n\n")
    admitted = {}
    for columns, _, *rows in (table(text) for text in tables if text.startswith("| score ")):
        for cells in rows:
            for column, cell in list(zip(columns, cells, strict=True))[3:]:
                admitted.setdefault(int(column.split()[0]), []).append(cell.split()[0])
    many = [cell for n, cells in admitted.items() if n >= 20 for cell in cells]
    said = f"{min(many, key=float)} to {max(many, key=float)} % of new rows from 20 rows a class on, "
    assert said + f"up to {max(admitted[5], key=float)} % with 5" in " ".join(PAGES["stages/METHOD.md"].text.split())


@pytest.mark.parametrize("page", ["README.md", "pipeline/EXPERIMENTS.md"])
def test_the_promise_of_a_threshold_is_computed(page):
    assert FalseAlarms.of(77, 0.95).words(77) in " ".join(PAGES[page].text.split())


def first_cells(mark: str) -> list[str]:
    """What stands in backticks in a table's first column, from top to bottom."""
    _, *rows = table(page_with(mark).between(mark))
    return [name for cells in rows for name in re.findall(r"`([^`]+)`", cells[0])]


def test_words_of_the_table_are_those_of_the_code():
    assert first_cells("columns") == list(COLUMNS)
    assert first_cells("heads") == [NO_HEAD, *HEADS]
    assert first_cells("routings") == [NO_ROUTING, *ROUTINGS]


def test_every_room_of_the_house_is_described():
    packages = {path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("[sp]*/*/__init__.py")}
    described = first_cells("rooms of stages") + first_cells("rooms of pipeline")
    assert packages <= set(described)
