"""Extract a folder of images in shards of 16. Run it, and it stops after every batch until it is told to go on.

python -m tests.test_stages.slow_extraction IMAGES ROOT
"""

import sys
from functools import partial
from pathlib import Path

from cache import FeatureCache, plan_shards
from stages import extract
from stages.backbone import Backbone, load_backbone
from stages.config import BackboneConfig
from stages.images import list_images
from stages.progress import NullProgress


def small_shards(backbone: Backbone, images: Path, root: Path, **options) -> FeatureCache:
    """`extract_set` as it is, but for the size of its shards."""
    whole, extract.plan_shards = extract.plan_shards, partial(plan_shards, max_rows=16)
    try:
        spec = backbone.feature_spec("float16", "full")
        return extract.extract_set("digits", list_images(str(images)), spec, root, lambda: backbone, **options)
    finally:
        extract.plan_shards = whole


class WaitsAfterEveryBatch(NullProgress):
    def advance(self, n=1, **fields):
        print(n, flush=True)
        sys.stdin.readline()


if __name__ == "__main__":
    config = BackboneConfig(name="tf_efficientnet_lite0", weights="embedded", image_size=48)
    small_shards(load_backbone(config), Path(sys.argv[1]), Path(sys.argv[2]), progress=WaitsAfterEveryBatch())
