"""What the start of an exported detector costs beyond its network's own, and which libraries it takes.

``python -m tests.test_pipeline.starting FILE.ood SIDE IMAGE...``, of a detector by EfficientNet-Lite0 at SIDE pixels,
prints JSON: seconds of the network's own load and of all that `Detector.load` does beyond it, by the clock and of the
processor, and seconds of what its golden images take of that.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

LABORATORY = ("h5py", "dask", "distributed", "sklearn", "matplotlib", "pyarrow", "pandas")


def main(bundle: str, side: str, *images: str) -> None:
    """Load the network alone, then the detector, then ask it."""
    import faiss  # noqa: F401  the network's own, and the search's
    import timm  # noqa: F401
    import torch  # noqa: F401
    import torchvision  # noqa: F401

    from stages.config import BackboneConfig
    from stages.networks.backbone import load_backbone

    config = BackboneConfig(name="tf_efficientnet_lite0", weights="embedded", image_size=int(side))
    _, network, network_cpu = _timed(lambda: load_backbone(config))
    detector, whole, whole_cpu = _timed(lambda: _load(bundle))
    scores = detector.score(images, nearest=1).score.tolist()

    from stages.detection.bundle import read_bundle
    from stages.detection.golden import check_golden

    golden = read_bundle(bundle).golden
    _, again, _ = _timed(lambda: check_golden(detector, golden))
    said = {
        "network_s": network,
        "beyond_s": whole - network,
        "beyond_cpu_s": whole_cpu - network_cpu,
        "golden_s": again,
        "scores": scores,
        "laboratory": sorted(sys.modules.keys() & set(LABORATORY)),
    }
    print(json.dumps(said))


def _load(bundle: str) -> Any:
    from stages.detection import Detector

    return Detector.load(bundle)


def _timed(function: Callable[[], Any]) -> tuple[Any, float, float]:
    """What it gives, and its seconds by the clock and of the processor."""
    clock, cpu = time.perf_counter(), time.process_time()
    found = function()
    return found, time.perf_counter() - clock, time.process_time() - cpu


if __name__ == "__main__":
    main(*sys.argv[1:])
