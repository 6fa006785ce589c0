"""Bytes of an image's features by what a cache may keep of it."""

from dataclasses import dataclass, replace

from cache import FeatureSpec
from stages.networks.backbone import Backbone
from stages.networks.tokens import stored_grid

_POOLED = 4  # the G of "pool:G" that is shown beside the option that is asked for


@dataclass(frozen=True)
class KeptOption:
    """One choice of what is kept.

    Attributes:
        patches: the option of ``[cache]``.
        row_bytes: of an image, without taps.
        tap_bytes: of an image's taps: of those that are asked for, or else of all that there are.
    """

    patches: str
    row_bytes: int
    tap_bytes: int


def kept_options(spec: FeatureSpec, network: Backbone | None) -> list[KeptOption]:
    """What each option of ``patches`` keeps of an image, the one that is asked for first.

    Args:
        spec: what is asked for.
        network: the backbone, with weights or without; None: features came as arrays, and all is kept.
    """
    if network is None:
        return [_kept(spec)]
    asked = spec if spec.taps else replace(spec, **network.tap_layout("all")._asdict())
    pooled = [f"pool:{_POOLED}"] if min(network.grid) > _POOLED else []
    options = dict.fromkeys([spec.patches, "full", *pooled, "none"])
    return [_kept(replace(asked, patches=option, grid=stored_grid(network.grid, option))) for option in options]


def _kept(spec: FeatureSpec) -> KeptOption:
    without = spec.without_taps().row_bytes
    return KeptOption(spec.patches, without, spec.row_bytes - without)
