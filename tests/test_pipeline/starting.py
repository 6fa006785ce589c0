"""What the start of an exported detector costs beyond its network's own, and which libraries it takes.

``python -m tests.test_pipeline.starting FILE.ood SIDE IMAGE...``, of a detector by EfficientNet-Lite0 at SIDE pixels,
prints JSON; seconds are those of the processor.
"""

import json
import sys
import time

LABORATORY = ("h5py", "dask", "distributed", "sklearn", "matplotlib", "pyarrow", "pandas")


def main(bundle: str, side: str, *images: str) -> None:
    """Load the network alone, then the detector, then ask it."""
    import faiss  # noqa: F401  the network's own, and the search's
    import timm  # noqa: F401
    import torch  # noqa: F401
    import torchvision  # noqa: F401

    from stages.config import BackboneConfig
    from stages.networks.backbone import load_backbone

    begun = time.process_time()
    load_backbone(BackboneConfig(name="tf_efficientnet_lite0", weights="embedded", image_size=int(side)))
    network = time.process_time() - begun
    begun = time.process_time()
    from stages.detection import Detector

    detector = Detector.load(bundle)
    beyond = time.process_time() - begun - network
    scores = detector.score(images, nearest=1).score.tolist()
    loaded = sorted(sys.modules.keys() & set(LABORATORY))
    print(json.dumps({"network_s": network, "beyond_s": beyond, "scores": scores, "laboratory": loaded}))


if __name__ == "__main__":
    main(*sys.argv[1:])
