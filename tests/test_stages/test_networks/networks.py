"""Small networks of any family, with drawn weights."""

from stages.config import BackboneConfig
from stages.networks.backbone import Backbone
from tests.test_stages.drawn import create

EMBEDDED = BackboneConfig(name="tf_efficientnet_lite0", weights="embedded", image_size=48)  # as the fixture `backbone`
SMALL = {"depth": 3, "embed_dim": 48, "num_heads": 3}  # of any transformer family: the same parts, run in milliseconds


def untrained(name: str, image_size: int = 64, expert_blocks: int = 1, **kwargs) -> Backbone:
    """A backbone of this architecture, with seeded weights."""
    config = BackboneConfig(name=name, image_size=image_size)
    return Backbone(create(name, **kwargs), config, expert_blocks)
