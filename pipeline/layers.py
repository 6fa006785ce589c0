"""Layers that scores are asked to look at, against those that are kept: no score, and no network, is loaded for it."""

from collections.abc import Iterator, Sequence

from cache import FeatureSpec
from pipeline.config import RunConfig
from stages.errors import InputError


def asked_layers(config: RunConfig) -> Iterator[tuple[str, Sequence[int]]]:
    """Scores whose settings name layers, and which."""
    for name, settings in config.score.params.items():
        if (layers := settings.get("layers", "auto")) != "auto":
            yield name, layers


def check_layers(config: RunConfig, spec: FeatureSpec) -> None:
    """Refuse settings of scores that name a layer which features do not have.

    Args:
        config: the study.
        spec: of its features.

    Raises:
        InputError: naming the setting, and the layers that there are.
    """
    for name, layers in asked_layers(config) if spec.taps else ():
        if absent := sorted({*layers} - {*spec.taps}):
            known = ", ".join(map(str, spec.taps))
            raise InputError(
                f"score.params.{name}.layers: {absent[0]} given, features were kept after {known}: give some of them"
            )
