"""Extract a folder of images in shards of 16. Run it, and it stops after every batch until it is told to go on.

python -m tests.test_stages.slow_extraction IMAGES ROOT
"""

import sys
from pathlib import Path

from cache import FeatureCache
from stages.config import BackboneConfig
from stages.extract import ExtractOptions, extract_set
from stages.inputs.images import list_images
from stages.networks.backbone import Backbone, load_backbone
from stages.progress import NullProgress


def small_shards(backbone: Backbone, images: Path, root: Path, **options) -> FeatureCache:
    """`extract_set` with shards of 16 images."""
    spec, chosen = backbone.feature_spec("float16", "full"), ExtractOptions(shard_rows=16, **options)
    return extract_set("digits", list_images(str(images)), spec, root, lambda: backbone, options=chosen)


class WaitsAfterEveryBatch(NullProgress):
    def advance(self, n=1, **fields):
        print(n, flush=True)
        sys.stdin.readline()


if __name__ == "__main__":
    config = BackboneConfig(name="tf_efficientnet_lite0", weights="embedded", image_size=48)
    small_shards(load_backbone(config), Path(sys.argv[1]), Path(sys.argv[2]), progress=WaitsAfterEveryBatch())
