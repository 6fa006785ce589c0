"""Figures of the README that follow from the code are those of the code."""

import io
import re
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import timm
import torch

from cache import FeatureSpec
from stages.networks.tokens import stored_grid
from stages.scorers import SCORERS

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
IMAGENET = 1_281_167
FAMILY = ("vit_small_patch14", "vit_base_patch14", "vit_large_patch14", "vit_giant_patch14")


def row_bytes(name: str, size: int, patches: str) -> int:
    """Bytes of one image's features in float16, by the network's own shapes (nothing is computed or held in memory)."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0, img_size=size)
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
    )
    return spec.row_bytes


def bytes_table() -> str:
    lines = [
        "| DINOv2 | px | `full` | with 4 registers | `pool:4` | `none` | 1.28 M images, `full` |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name in FAMILY:
        for size in (224, 518):
            full, pooled, none = (row_bytes(f"{name}_dinov2", size, patches) for patches in ("full", "pool:4", "none"))
            registers = row_bytes(f"{name}_reg4_dinov2", size, "full")
            cells = " | ".join(f"{n:,}" for n in (full, registers, pooled, none))
            letter = {"giant": "g"}.get(name.split("_")[1], name.split("_")[1][0].upper())
            lines.append(f"| ViT-{letter}/14 | {size} | {cells} | {full * IMAGENET / 1e9:,.0f} GB |")
    return "\n".join(lines)


def test_bytes_per_image():
    stated = re.search(r"<!-- bytes table: begin -->\n(.*?)\n<!-- bytes table: end -->", README, re.DOTALL)
    assert stated[1] == bytes_table()


def test_scores_and_profiles_are_those_of_the_code():
    """A row a score; its last column says which defaults another library has."""
    stated = re.search(r"<!-- scores table: begin -->\n(.*?)\n<!-- scores table: end -->", README, re.DOTALL)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in stated[1].splitlines()[2:]]
    profiles = {
        name: "; ".join(
            f"{profile}: " + ", ".join(f"{key} = {value}" for key, value in settings.items())
            for profile, settings in scorer.profiles.items()
        )
        for name, scorer in SCORERS.items()
    }
    assert {row[0].strip("`"): row[3] for row in rows} == profiles


def run(name: str, **replaced: str) -> str:
    """What the Python between two marks of the README prints."""
    code = re.search(rf"<!-- {name}: begin -->\n```python\n(.*?)```", README, re.DOTALL)[1]
    for word, instead in replaced.items():
        assert word in code
        code = code.replace(word, instead)
    with redirect_stdout(io.StringIO()) as out:
        exec(code, {})
    return out.getvalue()


def test_ones_own_arrays_are_scored_in_ten_lines(caches, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, source in {"train": "train", "test": "test", "textures": "far", "places": "near"}.items():
        np.save(f"{name}.npy", caches[source].read("cls"))
    np.save("train.label.npy", caches["train"].labels)
    lines = run("own arrays").splitlines()
    assert [line.split(" | ")[1] for line in lines[2:5]] == ["textures", "places", "average"]
    assert float(lines[2].split(" | ")[2]) > 95  # photographs are far from digits
    assert lines[2 + 3 * 3] == ""
    assert [line.split(":")[0] for line in lines[3 + 3 * 3 :]] == ["mahalanobis-pp", "ssd"]  # few rows: they are shrunk


def test_the_parts_are_used_as_shown(caches):
    shown = run("caches", **{f"cache/{name}-…": str(caches[name].path) for name in ("train", "test", "far")})
    assert shown.startswith("OODMetrics(n_id=")
    assert shown.endswith("[-2.3132617]\n")
