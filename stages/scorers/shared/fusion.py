"""Several layers as one feature: their normalised tokens end to end, and which layers that are, from ID rows alone.

The rule is that of MM++ (Hossain et al., arXiv 2606.17352; its equations as its authors' answers to their reviewers
have them). A layer's *entropy density* is H / D, H the entropy of the normalised eigenvalues of the covariance of its
ℓ2-normalised tokens around their class means, and D the number of features. Where it drops most from one layer to the
next, the network has thrown away most: the layers after the largest positive drops are taken, beside the last one.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from stages.id_data.lazy import LazyArray, RowNumbers
from stages.id_data.taps import TapToken
from stages.scorers.inputs import ScoreInputs
from stages.scorers.shared.arrays import l2_normalise
from stages.scorers.shared.moments import FeatureMoments, known_labels
from stages.scorers.shared.shrinkage import varies

Layers = Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] | Literal["auto"]
MostLayers = Annotated[int, Field(ge=1)]


class ChosenLayers(NamedTuple):
    """Layers that are fused with the last one, and what they were chosen by.

    Attributes:
        layers: their numbers, ascending.
        token: of each, ``"cls"`` or ``"mean"``.
        densities: entropy density of each layer of the cache, in order; none where the layers were given.
        candidates: numbers of these layers.
    """

    layers: tuple[int, ...]
    token: Literal["cls", "mean"]
    densities: tuple[float, ...] = ()
    candidates: tuple[int, ...] = ()

    def facts(self) -> dict[str, Any]:
        """Which layers, for the record; and the rule's numbers, to four digits, where it chose."""
        numbers = {str(layer): round(own, 4) for layer, own in zip(self.candidates, self.densities, strict=True)}
        return {"layers_used": list(self.layers)} | ({"entropy_density": numbers} if numbers else {})

    def remark(self) -> str:
        """Whether none was chosen."""
        return "" if self.layers else "of the last layer alone, for no layer's entropy density drops"


def choose_layers(train: ScoreInputs, who: str, asked: Layers, token: TapToken, most: int) -> ChosenLayers:
    """Layers to fuse: those that are asked for, or the rule's.

    Args:
        train: ID training rows with ``taps``, and ``labels`` for the rule.
        who: the score that needs them, for messages.
        asked: numbers of layers, or ``"auto"``.
        token: class token or mean patch.
        most: that the rule takes at most, the last one not counted.

    Raises:
        InputError: layers that are not cached, no class token, no labels.
    """
    taps = train.need_taps(who)
    own = taps.token(token)
    if asked != "auto":
        taps.check_layers(asked)
        return ChosenLayers(tuple(sorted({*asked})), own)
    moments = {layer: FeatureMoments(normalise=True) for layer in taps.layers}
    for block in train.blocks():
        labels = known_labels(block, who)
        for layer, tokens in zip(taps.layers, block.need_taps(who).read(taps.layers, own), strict=True):
            moments[layer].add(tokens, labels)
    densities = {layer: entropy_density(each) for layer, each in moments.items()}
    chosen = layers_after_drops(densities, most)
    return ChosenLayers(chosen, own, tuple(densities.values()), tuple(densities))


def entropy_density(moments: FeatureMoments) -> float:
    """−Σ p log p / D over the shares p of the within-class variance that principal directions have; natural logarithm.

    Args:
        moments: of rows, with their scatter; 0 where no two rows around one mean differ.

    >>> moments = FeatureMoments().add([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    >>> round(entropy_density(moments), 4)  # log 2 / 2
    0.3466
    """
    if not varies(moments.within, moments):
        return 0.0
    values, _ = moments.within.spectrum()
    shares = values / values.sum()
    return float(-(shares * np.log(shares)).sum() / moments.dim)


def layers_after_drops(densities: Mapping[int, float], most: int) -> tuple[int, ...]:
    """The layers whose density is lower than that of the layer before by most, ascending; of equal drops the earlier.

    Args:
        densities: of layers, in their order.
        most: how many at most; those alone whose drop is positive.

    >>> layers_after_drops({3: 0.5, 6: 0.2, 9: 0.25, 12: 0.1}, most=1), layers_after_drops({3: 0.1, 6: 0.2}, most=1)
    ((6,), ())
    """
    layers, values = list(densities), np.array([*densities.values()])
    drops = values[:-1] - values[1:]
    order = np.argsort(-drops, kind="stable")[:most]
    return tuple(sorted(layers[place + 1] for place in order.tolist() if drops[place] > 0))


def fused(x: ScoreInputs, chosen: ChosenLayers, who: str) -> LazyArray:
    """Tokens of the chosen layers and the features, each ℓ2-normalised, end to end: lazily read ``[n, ΣD]``."""
    taps, features = x.need_taps(who), x.need_unread(who)

    def read(numbers: RowNumbers) -> NDArray[np.float32]:
        parts = [*taps[numbers].read(chosen.layers, chosen.token), np.asarray(features[numbers])]
        return np.concatenate([l2_normalise(part) for part in parts], axis=1)

    dim = sum(taps.widths[layer] for layer in chosen.layers) + features.shape[1]
    return LazyArray(read, len(x), dim)
