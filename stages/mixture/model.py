"""The Mixture of Feature Experts (MoFE): experts, router, mixture, their loss.

Zhao et al., "Equipping Vision Foundation Model with Mixture of Experts for Out-of-Distribution Detection", ICCV 2025.
The label space is split into E groups. The router sees the class embedding at the tap and picks one group; that
group's expert refines the tokens; OOD is scored with the refined class embedding in that expert's subspace::

    tap_cls (B, D') ── Router ── p(class) (B, C) ── sum over each group ── gate (B, E) ── argmax ── expert (B,)
    tokens ── Expert[expert] ── features (B, D) ── head ── logits over the group's classes + "other"

What an expert is made of. All but the heads and the router start so that the features are the frozen ``cls``:

    ========== =============================================================== ============ =======================
    kind       features                                                        reads        trained, for E groups
    ========== =============================================================== ============ =======================
    end        a copy of the backbone's end on the tokens                      all tokens   E ends, heads, router
    adapter    cls + W_up · GELU(W_down · LayerNorm(cls)), rank 64             cls          E adapters, heads, router
    frozen     cls: group softmax with "other" alone, as MOS has it (below)    cls          heads, router
    dense      a weighted sum of E copies of the backbone's end: as many       all tokens   E ends, one head
               parameters as E experts, nothing routed, nothing "other"
    ========== =============================================================== ============ =======================

MOS: Huang and Li, "MOS: Towards Scaling Out-of-distribution Detection for Large Semantic Space", CVPR 2021.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.errors import InputError
from stages.mixture.config import MixtureConfig
from stages.mixture.outputs import Outputs
from stages.networks.batch import filled, rows_of_pass
from stages.networks.stacked import Stacked
from stages.networks.tokens import Tokens
from stages.networks.transfer import to_device


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


class Refinement(NamedTuple):
    """What experts make of rows that are in the order of their experts.

    Attributes:
        rows: which of them.
        features: ``[n, D]``.
        outputs: ``[n, O]`` of the expert's head, O of the longest here; a shorter one ends in very negative ones.
    """

    rows: slice
    features: Tensor
    outputs: Tensor


class Adapter(nn.Module):
    """``cls`` plus a bottleneck whose last layer starts at zero: few parameters, and no patches are read."""

    def __init__(self, config: MixtureConfig, rank: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim)
        self.down = nn.Linear(config.dim, rank)
        self.up = nn.Linear(rank, config.dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, tokens: Tokens) -> Tensor:
        """``cls`` to refined ``cls``, ``[B, D]``."""
        return tokens.cls + self.up(F.gelu(self.down(self.norm(tokens.cls))))


class FrozenEnd(nn.Module):
    """No expert at all: the frozen ``cls``."""

    def forward(self, tokens: Tokens) -> Tensor:
        """``[B, D]`` as it was cached."""
        return tokens.cls


class DenseEnd(nn.Module):
    """Several copies of the backbone's end, summed with fixed positive weights that add up to 1 for each feature.

    The sum starts as one copy alone would. The weights differ, or all copies would have the same gradient and stay
    one network.
    """

    share: Tensor

    def __init__(self, config: MixtureConfig, ends: Sequence[nn.Module]) -> None:
        super().__init__()
        self.ends = nn.ModuleList(ends)
        drawn = torch.rand(len(ends), config.dim, generator=torch.Generator().manual_seed(0)) + 0.5
        self.register_buffer("share", drawn / drawn.sum(0))  # (copies, D)
        self.stacked = Stacked(ends, reads_patches=True)

    def forward(self, tokens: Tokens) -> Tensor:
        """Tap tokens to refined ``cls``, ``[B, D]``."""
        copies = range(len(self.ends))
        if self.stacked.is_used([len(tokens)] * len(copies), lambda: tokens[:1]):
            return (self.share[:, None] * self.stacked(copies, tokens, shared=True)).sum(0)
        return sum(share * end(tokens) for share, end in zip(self.share, self.ends, strict=True))


class Expert(nn.Module):
    """What refines the tokens of one group, with a head over its classes and, last, "other".

    At the start its features are the frozen backbone's ``cls``.

    Args:
        config: of the mixture.
        number: of its group.
        end: what makes the features.
    """

    def __init__(self, config: MixtureConfig, number: int, end: nn.Module) -> None:
        super().__init__()
        self.end = end
        self.head = nn.Linear(config.dim, config.n_outputs(number))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def train(self, mode: bool = True) -> "Expert":
        """The end stays in evaluation mode: its batch-norm statistics are the backbone's and stay so."""
        super().train(mode)
        self.end.eval()
        return self

    def forward(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Tap tokens to (features ``[B, D]``, logits ``[B, n_outputs]``), as precise as the tokens in any autocast."""
        features = self.end(tokens)
        return features.to(tokens.cls.dtype), self.head(features).to(tokens.cls.dtype)


class Router(nn.Module):
    """Linear classifier on the un-normalised class embedding at the tap, or on the final ``cls``.

    Inputs are shifted and scaled by training statistics first: still a linear map of them, better conditioned. The
    scale is one for all features, as in `stages.heads.choose` and for its reason: divided by its own deviation, a
    channel that is nearly dead on ID rows would give an OOD row that moves it an enormous logit, and decide where it
    goes.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, config: MixtureConfig) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(config.router_dim))
        self.register_buffer("scale", torch.ones(1))
        self.linear = nn.Linear(config.router_dim, config.n_classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def standardise(self, blocks: Iterable[Tensor]) -> None:
        """Take mean ``[D']`` and scale ``[1]``, the root of the mean variance, of rows in blocks ``[n, D']``."""
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        origin: Tensor | None = None
        for block in blocks:
            rows = block.double()
            origin = rows.mean(0) if origin is None else origin
            # Counted from the first block's mean: the difference of two large sums would lose a small deviation.
            shifted = rows - origin
            count, total, squares = count + len(rows), total + shifted.sum(0), squares + (shifted**2).sum(0)
        if origin is None:
            raise ValueError("no rows to standardise by")
        mean = total / count
        self.mean.copy_(origin + mean)
        self.scale.copy_((squares / count - mean**2).mean().clamp_min(0).sqrt().clamp_min(1e-6))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, D']`` to class logits ``[B, C]``, as precise as the input in any autocast."""
        return self.linear((x - self.mean) / self.scale).to(x.dtype)


class MixtureOfFeatureExperts(nn.Module):
    """E experts and their router; `build_mixture` makes it whole.

    Args:
        config: its shape.
        router: of the same.
        experts: one a group.

    Attributes:
        stacked: the experts as one network, which a GPU computes sooner than one after another.
        few_sizes: whether experts see one of a few numbers of rows (`stages.networks.batch`), the last row over and
            over; None: where they convolve on a GPU.
    """

    group: Tensor
    column: Tensor
    n_outputs: Tensor

    def __init__(self, config: MixtureConfig, router: Router, experts: Sequence[Expert]) -> None:
        super().__init__()
        self.config = config
        self.experts = nn.ModuleList(experts)
        self.router = router
        groups = config.groups
        self.register_buffer("group", torch.as_tensor(np.asarray(groups)), persistent=False)  # (C,)
        # The output of its expert's head that stands for each class.
        column = [sum(g == groups[c] for g in groups[:c]) for c in range(len(groups))]
        self.register_buffer("column", torch.as_tensor(column), persistent=False)  # (C,)
        n_outputs = [config.n_outputs(number) for number in range(config.n_experts)]
        self.register_buffer("n_outputs", torch.as_tensor(n_outputs), persistent=False)  # (E,)
        self.stacked = Stacked(experts, "patches" in config.reads)
        self.few_sizes: bool | None = None
        self._convolves = any(isinstance(layer, nn.Conv2d) for layer in self.experts.modules())

    @property
    def n_experts(self) -> int:
        """E."""
        return self.config.n_experts

    def classes_of(self, expert: int) -> Tensor:
        """Classes of one expert's group, in the order of its head's outputs."""
        return torch.nonzero(self.group == expert).flatten()

    def renumber(self, number: Sequence[int]) -> None:
        """Give each expert, and its group, another number: expert e becomes ``number[e]``; nothing else changes."""
        self.experts = nn.ModuleList(self.experts[expert] for expert in np.argsort(number))
        self.config = replace(self.config, groups=tuple(number[group] for group in self.config.groups))
        self.group = torch.as_tensor(np.asarray(number), device=self.group.device)[self.group]
        self.n_outputs = self.n_outputs[torch.as_tensor(np.argsort(number), device=self.group.device)]
        self.stacked = Stacked([*self.experts], "patches" in self.config.reads)

    def class_logits(self, tokens: Tokens) -> Tensor:
        """The router's logits ``[B, C]``."""
        return self.router(getattr(tokens, self.config.router_input))

    def route(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """B rows to (gate ``[B, E]``, class probabilities ``[B, C]``): p(group) = sum of p(class) over it."""
        probability = self.class_logits(tokens).softmax(1)
        gate = probability.new_zeros(len(tokens), self.n_experts)
        return gate.index_add(1, self.group, probability), probability

    def forward(self, tokens: Tokens, expert: Tensor | None = None) -> MixtureOutput:
        """Refine each row with one expert: only routed tokens are computed.

        Args:
            tokens: of B images.
            expert: ``[B]`` forces the expert of each row; by default the router decides.
        """
        gate, probability = self.route(tokens)
        chosen = gate.argmax(1) if expert is None else expert
        order = chosen.argsort(stable=True)
        counts = (chosen[:, None] == torch.arange(self.n_experts, device=chosen.device)).sum(0)
        features = torch.zeros_like(tokens.cls)
        logits = torch.full_like(probability, -torch.inf)
        other = torch.full_like(probability[:, 0], -torch.inf)
        for part in self.refine(counts.tolist(), lambda rows: tokens[order[rows]]):
            rows = order[part.rows]
            own = chosen[rows]
            last = self.n_outputs[own][:, None] - 1
            column = self.column.minimum(last)  # of classes of other groups: any
            of_classes = part.outputs.gather(1, column).where(self.group == own[:, None], -torch.inf)
            features = features.index_copy(0, rows, part.features)
            logits = logits.index_copy(0, rows, of_classes)
            if self.config.has_other:
                other = other.index_copy(0, rows, part.outputs.gather(1, last)[:, 0])
        return MixtureOutput(features, logits, other, chosen, gate, probability)

    def refine(self, counts: Sequence[int], take: Callable[[Any], Tokens]) -> Iterator[Refinement]:
        """Run each expert on rows of its own, which stand in the order of the experts.

        One expert after another; on a GPU, where it pays (`stages.networks.stacked.pays`), all at once on rows that are
        padded to the most that one expert has. An expert without rows is left out either way. Experts that convolve
        have one of a few numbers of rows there (`stages.networks.batch`).

        Args:
            counts: ``[E]`` rows of each expert.
            take: gives tokens by numbers of rows, a slice or a tensor; a row is asked for when its expert runs.
        """
        if self.stacked.is_used(counts, lambda: take(slice(0, 1))):
            yield self._refine_at_once(counts, take)
            return
        start = 0
        for number, count in enumerate(counts):
            if count:
                rows = slice(start, start + count)
                tokens = take(rows).map(lambda x: filled(x, [self._computed(len(x))]))
                features, outputs = self.experts[number](tokens)
                yield Refinement(rows, features[:count], outputs[:count])
                start += count

    def _computed(self, n: int) -> int:
        """How many rows an expert computes for n."""
        few = self.group.is_cuda and self._convolves if self.few_sizes is None else self.few_sizes
        return rows_of_pass(n) if few else n

    def _refine_at_once(self, counts: Sequence[int], take: Callable[[Any], Tokens]) -> Refinement:
        busy = np.flatnonzero(counts)
        sizes, device = np.asarray(counts)[busy, None], self.group.device
        place = np.arange(self._computed(int(sizes.max())))  # among the rows of an expert, whose last one pads
        rows = np.cumsum(sizes)[:, None] - sizes + np.minimum(place, sizes - 1)
        given = to_device(torch.from_numpy(np.flatnonzero(place < sizes)), device)
        numbers = to_device(torch.from_numpy(rows.flatten()), device)
        tokens = take(numbers).map(lambda x: x.unflatten(0, rows.shape))
        features, outputs = self.stacked(busy.tolist(), tokens)
        absent = (
            torch.arange(outputs.shape[2], device=device) >= self.n_outputs[torch.from_numpy(busy).to(device), None]
        )
        outputs = outputs.masked_fill(absent[:, None], torch.finfo(outputs.dtype).min / 2)
        features, outputs = (each.flatten(0, 1).index_select(0, given) for each in (features, outputs))
        return Refinement(slice(0, len(given)), features, outputs)

    @property
    def outputs(self) -> Outputs:
        """What the outputs of the heads stand for, where the mixture is."""
        most = max(self.config.sizes) + int(self.config.has_other)
        return Outputs(self.group, self.column, self.n_outputs, most)


def build_mixture(config: MixtureConfig, make_end: Callable[[], nn.Module]) -> MixtureOfFeatureExperts:
    """A mixture as it is before training.

    Args:
        config: its shape.
        make_end: gives a fresh copy of the backbone's end; called where experts are made of it.
    """
    experts = [Expert(config, number, _expert_end(config, make_end)) for number in range(config.n_experts)]
    return MixtureOfFeatureExperts(config, Router(config), experts)


def _expert_end(config: MixtureConfig, make_end: Callable[[], nn.Module]) -> nn.Module:
    match config.kind:
        case "end":
            return make_end()
        case "adapter":
            return Adapter(config)
        case "frozen":
            return FrozenEnd()
        case "dense":
            return DenseEnd(config, [make_end() for _ in range(config.copies)])


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with soft targets, summed over rows: −Σ_b Σ_c t_bc · log softmax(l_b)_c."""
    return -(targets * logits.log_softmax(1)).sum()


def cannot_read(kind: str, backbone: str, patches: str) -> InputError:
    """What to say of experts whose network does not run on the patches that are cached."""
    return InputError(
        f'train.expert: "{kind}" of {backbone} cannot run on a cache with patches = "{patches}": extract with '
        'patches = "full", or give expert = "adapter"'
    )
