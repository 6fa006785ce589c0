"""Peak memory of an extraction stays as it is while the data grow. Run as a program, it extracts and says its peaks."""

import resource
import subprocess
import sys
from pathlib import Path

from stages.config import BackboneConfig
from stages.extract import ExtractOptions, extract_set
from stages.inputs.images import list_images
from stages.networks.backbone import load_backbone

N = 100


def peaks_kib(few: Path, many: Path, root: Path) -> list[int]:
    """Of one process that extracts a few images, and then many."""
    command = [sys.executable, "-m", "tests.test_stages.test_extract_memory", *map(str, (root, few, many))]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True, check=True)
    return list(map(int, done.stdout.split()))


def test_ten_times_the_images_need_no_more_memory(tmp_path):
    """100 and 1,000 images; the features of these are 37 MiB, in a process of half a gigabyte."""
    table = list_images("sklearn:digits/all")
    reader = table.reader()
    for index in range(10 * N):
        for folder in ("many", "few") if index < N else ("many",):
            path = tmp_path / folder / f"{index % 10}" / f"{index:04d}.pgm"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(reader.read(index % len(table)))
    few, many = peaks_kib(tmp_path / "few", tmp_path / "many", tmp_path / "root")
    assert many < 1.05 * few


if __name__ == "__main__":
    config = BackboneConfig(name="tf_efficientnet_lite0", weights="embedded", image_size=48)
    backbone = load_backbone(config, expert_blocks=6)  # an early tap: large maps that cost little
    spec = backbone.feature_spec("float32", "full")
    assert spec.row_bytes > 40_000
    root, options = Path(sys.argv[1]), ExtractOptions(shard_rows=32)
    for folder, n_rows in zip(sys.argv[2:], (N, 10 * N), strict=True):
        cache = extract_set(Path(folder).name, list_images(folder), spec, root, lambda: backbone, options=options)
        assert cache.n_rows == n_rows
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
