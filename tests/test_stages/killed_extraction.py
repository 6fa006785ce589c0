"""An extraction in a process that may be killed: forked from a server that has the network loaded already.

Everything here is at module level, so that the server can import it before it forks.
"""

from multiprocessing.connection import Connection
from pathlib import Path

import torch

from stages.config import BackboneConfig
from stages.inputs.images import list_images
from stages.networks.backbone import load_backbone
from stages.progress import NullProgress
from tests.test_stages.slow_extraction import small_shards

IMAGES = "sklearn:digits[0,1]/train"

torch.set_num_threads(1)
list_images(IMAGES)  # what it imports is imported
BACKBONE = load_backbone(BackboneConfig(name="tf_efficientnet_lite0", weights="embedded", image_size=48))


class Tells(NullProgress):
    """Sends how many images are done."""

    def __init__(self, listener: Connection) -> None:
        self.listener = listener

    def advance(self, n=1, **fields):
        self.listener.send(n)


def extract_and_tell(root: str, listener: Connection) -> None:
    small_shards(BACKBONE, IMAGES, Path(root), progress=Tells(listener))
