"""A mixture whose heads and router start as the linear probe: it says what the probe says before it learns anything.

Heads that start at zero send noise into experts that start trained, and distort what they knew; a probe first, then
training, does not: Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution",
ICLR 2022.
"""

from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import logsumexp
from torch import nn

from stages.heads.affine import LinearHead
from stages.heads.sums import blocks
from stages.id_data.lazy import Rows2D
from stages.mixture.model import Expert, MixtureOfFeatureExperts, Router

_UNSEEN = 20.0  # how far below the lowest bias that of a class without rows starts: its probability is none
_RIDGE = 1e-6  # share of the logits' mean variance; a softmax leaves their common shift open


def start_heads(mixture: MixtureOfFeatureExperts, probe: LinearHead, features: Rows2D) -> None:
    """Give each expert's head the probe's rows of its classes and, for "other", the classes outside its group.

    A head that has all classes would say log Σ exp of the logits outside the group for "other". A linear map cannot:
    it starts as the affine map of the probe's logits that comes closest to it on the rows, by least squares.

    Args:
        mixture: whose experts still give the backbone's ``cls``.
        probe: fitted on `features`; a head on all C classes.
        features: ``[N, D]`` of the ID rows that the mixture is to learn from.
    """
    weight, bias = _on_raw_features(probe)
    outside = [mixture.group.cpu().numpy() != number for number in range(mixture.n_experts)]
    others = _affine_other(weight, bias, features, outside) if mixture.config.has_other else None
    for number, expert in enumerate(mixture.experts):
        own = mixture.classes_of(number).cpu().numpy()
        rows, biases = weight[own], bias[own]
        if others is not None:
            of_logits, constant = others[0][number], others[1][number]
            rows = np.vstack([rows, of_logits @ weight])
            biases = np.append(biases, of_logits @ bias + constant)
        _set(cast(Expert, expert).head, rows, biases)


def start_router(router: Router, probe: LinearHead) -> None:
    """Give the router the probe of what it reads, as a map of its own standardised inputs."""
    weight, bias = _on_raw_features(probe)
    mean, scale = router.mean.double().cpu().numpy(), router.scale.double().cpu().numpy()
    _set(router.linear, weight * scale, bias + weight @ mean)


def _on_raw_features(probe: LinearHead) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weight ``[C, D]`` and finite bias ``[C]``."""
    raw = probe.on_raw_features()
    weight, bias = raw.weight.astype(np.float64), raw.bias.astype(np.float64)
    return weight, np.where(np.isfinite(bias), bias, bias[probe.classes].min() - _UNSEEN)


def _affine_other(
    weight: NDArray[np.float64], bias: NDArray[np.float64], features: Rows2D, outside: list[NDArray[np.bool_]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """``[E, C]`` and ``[E]`` of each expert: what its "other" is of the logits.

    On the logits and not on the features: there are fewer of them, and a channel that is nearly dead on these rows
    keeps the small weight that the penalty of the probe left it.
    """
    n_classes, n_experts = len(weight), len(outside)
    moments, count = np.zeros((n_classes + n_experts + 1,) * 2), len(features)
    origin: NDArray[np.float64] | None = None
    for block in blocks(count):
        logits = np.asarray(features[block], dtype=np.float64) @ weight.T + bias
        wanted = [logsumexp(logits[:, classes], axis=1) for classes in outside]
        rows = np.column_stack([logits, *wanted, np.ones(len(logits))])
        origin = rows.mean(0) if origin is None else origin
        rows[:, :-1] -= origin[:-1]  # the difference of two large sums would lose a small deviation
        moments += rows.T @ rows
    assert origin is not None
    mean = moments[-1, :-1] / count
    covariance = moments[:-1, :-1] / count - np.outer(mean, mean)
    mean = mean + origin[:-1]
    of_logits = covariance[:n_classes, :n_classes]
    ridge = _RIDGE * max(np.trace(of_logits) / n_classes, np.finfo(np.float64).tiny)
    maps = np.linalg.solve(of_logits + ridge * np.eye(n_classes), covariance[:n_classes, n_classes:]).T
    return maps, mean[n_classes:] - maps @ mean[:n_classes]


@torch.no_grad()
def _set(linear: nn.Linear, weight: NDArray[np.float64], bias: NDArray[np.float64]) -> None:
    linear.weight.copy_(torch.from_numpy(weight))
    linear.bias.copy_(torch.from_numpy(bias))
