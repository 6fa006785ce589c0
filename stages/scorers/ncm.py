"""Distance to the nearest class mean, among the routed expert's classes where there are experts."""

from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stages.bank import checked_features, l2_normalise
from stages.errors import InputError, StageError
from stages.scorers.base import ScoreInputs
from stages.scorers.knn import ExpertBanks


def class_means(features: ArrayLike, labels: NDArray[np.integer]) -> tuple[NDArray[np.float64], NDArray[np.integer]]:
    """Mean of each class's ℓ2-normalised features, and the classes that have rows, ascending.

    Args:
        features: [n, D], any float type.
        labels: [n].

    Returns:
        [C, D] float64, not normalised again; [C].

    >>> class_means([[3.0, 0.0], [0.0, 4.0], [0.0, 2.0]], np.array([7, 7, 9]))[0].tolist()
    [[0.5, 0.5], [0.0, 1.0]]
    """
    rows = checked_features(features, "class mean")
    classes = np.unique(labels)
    means = [l2_normalise(rows[labels == c]).mean(axis=0, dtype=np.float64) for c in classes]
    return np.reshape(means, (len(classes), rows.shape[1])), classes


class NCMScorer:
    """√(2 − 2·cos) to the nearest class mean of the ℓ2-normalised ID training features; higher = more OOD.

    Nearest class mean: Mensink et al., "Distance-Based Image Classification: Generalizing to New Classes at Near-Zero
    Cost", TPAMI 2013; as an OOD score the *cosine to prototype*, −max_c cos(z, μ_c), of Bitterwolf et al., "In or Out?
    Fixing ImageNet Out-of-Distribution Detection Evaluation", ICML 2023. That one takes the means of the features as
    they are; here every row counts alike, and the distance is on kNN's scale. With experts a row is compared with the
    classes of its own expert.
    """

    name: ClassVar[str] = "ncm"
    needs: ClassVar[frozenset[str]] = frozenset({"features", "bank"})

    def __init__(self) -> None:
        self._means: ExpertBanks | None = None

    def params(self) -> dict[str, Any]:
        """None: there is nothing to set."""
        return {}

    def fit(self, train: ScoreInputs) -> Self:
        """Takes the class means, of each expert's rows apart where ``train`` names experts.

        Raises:
            InputError: no rows, no labels, or NaN or inf in a feature.
        """
        features, labels = train.need("features", "a class mean"), train.need("labels", "a class mean")
        if not len(train):
            raise InputError("class means need ID training rows, none given")
        if train.expert is None:
            self._means = ExpertBanks(ScoreInputs(features=class_means(features, labels)[0]))
            return self
        experts = np.unique(train.expert)
        means = [class_means(features[train.expert == e], labels[train.expert == e])[0] for e in experts]
        expert = np.repeat(experts, [len(own) for own in means])
        self._means = ExpertBanks(ScoreInputs(features=np.concatenate(means), expert=expert))
        return self

    def score(self, x: ScoreInputs) -> NDArray[np.float32]:
        """Distance to the nearest class mean, [n] float32 in [0, 2]."""
        if self._means is None:
            raise StageError("ncm has no class means yet: call fit() with the ID training rows first")
        return self._means.distances(x, k_max=1)[:, 0]
