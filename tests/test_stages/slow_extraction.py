"""Extract a folder of images in shards of 16, in a process that stops after every batch until it is told to go on."""

from multiprocessing.connection import Connection
from pathlib import Path

from cache import FeatureCache
from stages.extract import ExtractOptions, extract_set
from stages.inputs.images import list_images
from stages.networks.backbone import Backbone
from stages.progress import NullProgress


def small_shards(backbone: Backbone, images: Path, root: Path, **options) -> FeatureCache:
    """`extract_set` with shards of 16 images."""
    spec, chosen = backbone.feature_spec("float16", "full"), ExtractOptions(shard_rows=16, **options)
    return extract_set("digits", list_images(str(images)), spec, root, lambda: backbone, options=chosen)


class WaitsAfterEveryBatch(NullProgress):
    """Says how many images are done to whoever is at the other end, and waits for an answer."""

    def __init__(self, other: Connection) -> None:
        self._other = other

    def advance(self, n=1, **fields):
        self._other.send(n)
        self._other.recv()
