"""The Mixture of Feature Experts (MoFE): experts, router, mixture, their loss, save and load.

Zhao et al., "Equipping Vision Foundation Model with Mixture of Experts for Out-of-Distribution Detection", ICCV 2025.
The label space is split into E groups. The router sees the class embedding at the tap and picks one group; that
group's expert refines the tokens; OOD is scored with the refined class embedding in that expert's subspace::

    tap_cls (B, D') ── Router ── p(class) (B, C) ── sum over each group ── gate (B, E) ── argmax ── expert (B,)
    tokens ── Expert[expert] ── features (B, D) ── head ── logits over the group's classes + "other"
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.artifacts import read_json, read_tensors, write_described
from stages.backbone import Tokens
from stages.errors import InputError


@dataclass(frozen=True)
class MixtureOutput:
    """What the mixture says of a batch.

    Attributes:
        features: ``[B, D]`` refined class embedding of the expert that each row went to.
        logits: ``[B, C]`` of that expert's head; ``-inf`` for classes outside its group.
        other: ``[B]`` logit of that expert's "other" class; ``-inf`` for a mixture of one expert, which has none.
        expert: ``[B]`` int64, the expert that each row went to.
        gate: ``[B, E]`` group probabilities of the router.
        class_probability: ``[B, C]`` class probabilities of the router.
    """

    features: Tensor
    logits: Tensor
    other: Tensor
    expert: Tensor
    gate: Tensor
    class_probability: Tensor

    @property
    def load(self) -> Tensor:
        """``[E]`` rows that each expert got."""
        return torch.bincount(self.expert, minlength=self.gate.shape[1])


class Expert(nn.Module):
    """A copy of the backbone's own end with a head over its group's classes and, last, "other".

    At the start its features are the frozen backbone's ``cls``.
    """

    def __init__(self, end: nn.Module, dim: int, n_outputs: int) -> None:
        super().__init__()
        self.end = end
        self.head = nn.Linear(dim, n_outputs)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def train(self, mode: bool = True) -> "Expert":
        """The end stays in evaluation mode: its batch-norm statistics are the backbone's and stay so."""
        super().train(mode)
        self.end.eval()
        return self

    def forward(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Tap tokens to (features ``[B, D]``, logits ``[B, n_outputs]``)."""
        features = self.end(tokens)
        return features, self.head(features)


class Router(nn.Module):
    """Linear classifier on the un-normalised class embedding at the tap.

    Inputs are shifted and scaled by training statistics first: still a linear map of ``tap_cls``, better conditioned.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, dim: int, n_classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))
        self.linear = nn.Linear(dim, n_classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def standardise(self, tap_cls: Tensor) -> None:
        """Take mean and standard deviation from training rows ``[N, D']``."""
        self.mean.copy_(tap_cls.mean(0))
        self.scale.copy_(tap_cls.std(0, correction=0).clamp_min(1e-6))

    def forward(self, tap_cls: Tensor) -> Tensor:
        """``[B, D']`` to class logits ``[B, C]``."""
        return self.linear((tap_cls - self.mean) / self.scale)


class MixtureOfFeatureExperts(nn.Module):
    """E experts and their router.

    Args:
        make_end: gives a fresh copy of the backbone's end, once for each expert.
        dim: D, width of the refined features.
        tap_dim: D', width of the tokens at the tap.
        groups: ``[C]`` the group (= expert) of each class, 0 to E − 1, none empty.
    """

    group: Tensor
    column: Tensor

    def __init__(self, make_end: Callable[[], nn.Module], dim: int, tap_dim: int, groups: Sequence[int]) -> None:
        super().__init__()
        self.sizes: list[int] = np.bincount(np.asarray(groups)).tolist()
        if 0 in self.sizes:
            raise InputError(f"train.grouping: group {self.sizes.index(0)} has no class")
        self.n_experts = len(self.sizes)
        self.n_classes = len(groups)
        has_other = self.n_experts > 1  # a single expert has nothing outside its group
        self.experts = nn.ModuleList(Expert(make_end(), dim, size + has_other) for size in self.sizes)
        self.router = Router(tap_dim, self.n_classes)
        self.register_buffer("group", torch.as_tensor(np.asarray(groups)), persistent=False)  # (C,)
        # The output of its expert's head that stands for each class.
        column = [sum(g == groups[c] for g in groups[:c]) for c in range(len(groups))]
        self.register_buffer("column", torch.as_tensor(column), persistent=False)  # (C,)

    def classes_of(self, expert: int) -> Tensor:
        """Classes of one expert's group, in the order of its head's outputs."""
        return torch.nonzero(self.group == expert).flatten()

    def route(self, tap_cls: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, D']`` to (gate ``[B, E]``, class probabilities ``[B, C]``): p(group) = sum of p(class) over it."""
        probability = self.router(tap_cls).softmax(1)
        gate = probability.new_zeros(len(tap_cls), self.n_experts)
        return gate.index_add(1, self.group, probability), probability

    def forward(self, tokens: Tokens, expert: Tensor | None = None) -> MixtureOutput:
        """Refine each row with one expert: only routed tokens are computed.

        Args:
            tokens: of B images.
            expert: ``[B]`` forces the expert of each row; by default the router decides.
        """
        gate, probability = self.route(tokens.tap_cls)
        chosen = gate.argmax(1) if expert is None else expert
        features = torch.zeros_like(tokens.cls)
        logits = torch.full_like(probability, -torch.inf)
        other = torch.full_like(probability[:, 0], -torch.inf)
        for index, module in enumerate(self.experts):
            rows = torch.nonzero(chosen == index).flatten()
            if len(rows) == 0:
                continue
            refined, outputs = module(tokens[rows])
            classes = self.classes_of(index)
            features = features.index_copy(0, rows, refined)
            logits = logits.index_put((rows[:, None], classes[None]), outputs[:, : len(classes)])
            if outputs.shape[1] > len(classes):
                other = other.index_copy(0, rows, outputs[:, -1])
        return MixtureOutput(features, logits, other, chosen, gate, probability)

    def class_targets(self, labels: Tensor, expert: int, smoothing: float = 0.0) -> Tensor:
        """Soft targets ``[B, n_outputs]`` of one expert's head; a class outside its group is "other"."""
        outputs = self.sizes[expert] + int(self.n_experts > 1)
        inside = self.group[labels] == expert
        index = torch.where(inside, self.column[labels], outputs - 1)
        return F.one_hot(index, outputs).float() * (1 - smoothing) + smoothing / outputs


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with soft targets, summed over rows: −Σ_b Σ_c t_bc · log softmax(l_b)_c."""
    return -(targets * logits.log_softmax(1)).sum()


def save_mixture(folder: Path, mixture: MixtureOfFeatureExperts, description: Mapping[str, Any]) -> None:
    """Write ``mofe.safetensors`` and, last, ``mofe.json``: the description, with the classes and their groups."""
    tensors = {name: tensor.numpy() for name, tensor in mixture.state_dict().items()}
    write_described(folder / "mofe.safetensors", tensors, description)


def load_mixture(folder: Path, make_end: Callable[[], nn.Module], dim: int, tap_dim: int) -> MixtureOfFeatureExperts:
    """Read what `save_mixture` wrote, in evaluation mode.

    Raises:
        InputError: missing or damaged files, or weights of another architecture.
    """
    groups, tensors = _stored_groups(read_json(folder / "mofe.json")), read_tensors(folder / "mofe.safetensors")
    if groups is None or tensors is None:
        raise InputError(f"{folder} holds no whole mofe.json and mofe.safetensors: run make train")
    mixture = MixtureOfFeatureExperts(make_end, dim, tap_dim, groups)
    try:
        mixture.load_state_dict({name: torch.from_numpy(array) for name, array in tensors.items()})
    except RuntimeError as error:
        raise InputError(f"{folder}: the stored mixture is of another architecture: run make train") from error
    return mixture.eval()


def _stored_groups(description: dict[str, Any] | None) -> list[int] | None:
    """``[C]`` the group of each class, or None where the description does not say it."""
    stored = (description or {}).get("groups")
    groups = list(stored.values()) if isinstance(stored, dict) else []
    whole = groups and all(type(group) is int for group in groups)
    return groups if whole and set(groups) == set(range(len(set(groups)))) else None
