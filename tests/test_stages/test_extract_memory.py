"""Peak memory of an extraction stays as it is while the data grow. Run as a program, it extracts and says its peak."""

import resource
import subprocess
import sys
from pathlib import Path

from stages.config import BackboneConfig
from stages.extract import ExtractOptions, extract_set
from stages.inputs.images import list_images
from stages.networks.backbone import load_backbone

N = 150


def peak_kib(images: Path, root: Path) -> int:
    command = [sys.executable, "-m", "tests.test_stages.test_extract_memory", str(images), str(root)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout)


def test_ten_times_the_images_need_no_more_memory(tmp_path):
    """150 and 1,500 images; the features of these are 55 MiB, in a process of half a gigabyte."""
    table = list_images("sklearn:digits/all")
    reader = table.reader()
    for index in range(10 * N):
        for folder in ("many", "few") if index < N else ("many",):
            path = tmp_path / folder / f"{index % 10}" / f"{index:04d}.pgm"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(reader.read(index % len(table)))
    few, many = peak_kib(tmp_path / "few", tmp_path / "root"), peak_kib(tmp_path / "many", tmp_path / "root")
    assert many < 1.05 * few


if __name__ == "__main__":
    config = BackboneConfig(name="tf_efficientnet_lite0", weights="embedded", image_size=48)
    backbone = load_backbone(config, expert_blocks=6)  # an early tap: large maps that cost little
    spec = backbone.feature_spec("float32", "full")
    images, root, options = list_images(sys.argv[1]), Path(sys.argv[2]), ExtractOptions(shard_rows=32)
    cache = extract_set("digits", images, spec, root, lambda: backbone, options=options)
    assert cache.n_rows in (N, 10 * N)
    assert spec.row_bytes > 40_000
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
