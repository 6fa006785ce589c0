"""How far stage one is from the bare forward pass. ``make bench-extract``.

The limit is the forward pass of the same network on batches that are in memory already: same batch, as many threads as
the stage has. The stage lists JPEG files of 500 x 375 pixels (ImageNet's size), reads, hashes, decodes and transforms
them, computes, and seals a cache on disk, all on the same cores. Both in turn; medians. Nothing here is a test.
"""

import tempfile
from itertools import count
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from sklearn.datasets import load_sample_images

import pipeline.__main__  # noqa: F401  the process is set up as the command line sets it up
from stages.config import BackboneConfig
from stages.extract import extract_set
from stages.inputs.images import list_images
from stages.networks.backbone import Backbone, build_architecture, load_backbone
from tests.bench.timing import RUNS, in_turn, rates, row

N_LITE0, N_VIT = 768, 192  # some ten seconds each, so that start and end, where decoding waits, weigh little


def main() -> None:
    """Measure and print the table."""
    table = rates(
        f"median of {RUNS} runs each, in turn; {torch.get_num_threads()} threads; {N_LITE0} and {N_VIT} JPEG files"
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        lite0 = load_backbone(BackboneConfig(name="tf_efficientnet_lite0", weights="embedded", image_size=224))
        row(table, "EfficientNet-Lite0, 224 px", "images/s", *extraction(lite0, N_LITE0, folder / "lite0"))
        vit = build_architecture(BackboneConfig(name="vit_small_patch14_dinov2", image_size=224))
        row(table, "ViT-S/14, 224 px", "images/s", *extraction(vit, N_VIT, folder / "vit"))
    Console().print(table)


def write_jpegs(folder: Path, n: int) -> None:
    """Crops of scikit-learn's two photographs as JPEG files of ImageNet's usual size."""
    folder.mkdir(parents=True)
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]  # 640 x 427
    for number in range(n):
        left, top = number % 140, number % 50
        crop = photos[number % 2].crop((left, top, left + 500, top + 375))
        crop.save(folder / f"{number:04d}.jpg", quality=90)


def extraction(backbone: Backbone, n: int, root: Path) -> tuple[float, float]:
    """Images per second: the bare forward pass, the stage."""
    write_jpegs(root / "jpeg", n)
    samples = list_images(str(root / "jpeg"))
    spec = backbone.feature_spec("float16", "full")
    batches = [torch.randn(backbone.batch, 3, 224, 224) for _ in range(2)]
    versions = count()

    def bare() -> None:
        for number in range(-(-n // backbone.batch)):
            backbone.encode(batches[number % 2])

    def stage() -> None:
        extract_set("bench", samples, spec, root / str(next(versions)), lambda: backbone)

    return in_turn(n, bare, stage)


if __name__ == "__main__":
    main()
