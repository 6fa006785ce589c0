"""Extract a folder of images in shards of 16. Run it, and it stops after every batch until it is told to go on.

python -m tests.test_stages.slow_extraction IMAGES ROOT
"""

import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from cache import FeatureCache, plan_shards
from stages import extract
from stages.config import BackboneConfig
from stages.inputs.images import list_images
from stages.networks.backbone import Backbone, load_backbone
from stages.progress import NullProgress


@contextmanager
def few_rows_a_shard(rows: int = 16):
    whole, extract.plan_shards = extract.plan_shards, partial(plan_shards, max_rows=rows)
    try:
        yield
    finally:
        extract.plan_shards = whole


def small_shards(backbone: Backbone, images: Path, root: Path, **options) -> FeatureCache:
    """`extract_set` as it is, but for the size of its shards."""
    spec = backbone.feature_spec("float16", "full")
    with few_rows_a_shard():
        return extract.extract_set("digits", list_images(str(images)), spec, root, lambda: backbone, **options)


class WaitsAfterEveryBatch(NullProgress):
    def advance(self, n=1, **fields):
        print(n, flush=True)
        sys.stdin.readline()


if __name__ == "__main__":
    config = BackboneConfig(name="tf_efficientnet_lite0", weights="embedded", image_size=48)
    small_shards(load_backbone(config), Path(sys.argv[1]), Path(sys.argv[2]), progress=WaitsAfterEveryBatch())
