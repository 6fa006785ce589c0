"""What features an extraction makes: as caches under a root have begun them, or as a GPU chooses now."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from cache import FeatureSpec, Place, find_caches

if TYPE_CHECKING:  # timm and torch, for those alone who have a network
    from stages.networks.backbone import Backbone
    from stages.networks.taps import AskedTaps


def chosen_spec(
    backbone: "Backbone",
    dtype: Literal["float16", "float32"],
    patches: str,
    root: Place,
    n_images: int,
    taps: "AskedTaps" = None,
) -> FeatureSpec:
    """The spec of an extraction, with what is left to a GPU chosen once: by the first cache of a network.

    Args:
        backbone: the network.
        dtype: how features are stored.
        patches: which of them, see `Backbone.feature_spec`.
        root: folder of all caches.
        n_images: of the sets that are to be extracted.
        taps: see `Backbone.tap_layout`.
    """
    spec = backbone.feature_spec(dtype, patches, taps)
    begun = as_begun(spec, root, backbone.choices)
    if begun is not None:
        return begun
    if backbone.config.compile == "auto" and backbone.device.type != "cpu":
        from stages.networks.compiling import compiling_pays

        return _with(spec, {"compiled": compiling_pays(backbone, spec.compute["batch"], n_images)})
    return spec


def as_begun(spec: FeatureSpec, root: Place, choices: Sequence[Mapping[str, Any]]) -> FeatureSpec | None:
    """The spec that caches of these features have, begun or sealed, of whatever set; None where there are none.

    A GPU's memory, with more or less of it in use, may give another number of images a pass than the day before. Caches
    that are there decide: sets of a study are compared, so they must have one spec.

    Args:
        spec: as it would be chosen now.
        root: folder of all caches.
        choices: see `Backbone.choices`.
    """
    candidates = (_with(spec, choice) for choice in choices)
    return next((candidate for candidate in candidates if find_caches(root, None, candidate)), None)


def _with(spec: FeatureSpec, choice: Mapping[str, Any]) -> FeatureSpec:
    return replace(spec, compute={**spec.compute, **choice})
