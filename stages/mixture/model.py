"""The Mixture of Feature Experts (MoFE): experts, router, mixture, their loss, save and load.

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

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from stages.errors import InputError
from stages.files.documents import write_document
from stages.files.tensors import read_described, write_tensors
from stages.heads.affine import LinearHead
from stages.networks.tokens import Tokens

ExpertKind = Literal["end", "adapter", "frozen", "dense"]
RouterInput = Literal["tap_cls", "cls"]


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


class Adapter(nn.Module):
    """``cls`` plus a bottleneck whose last layer starts at zero: few parameters, and no patches are read."""

    def __init__(self, dim: int, rank: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.down = nn.Linear(dim, rank)
        self.up = nn.Linear(rank, dim)
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

    def __init__(self, ends: Sequence[nn.Module], dim: int) -> None:
        super().__init__()
        self.ends = nn.ModuleList(ends)
        drawn = torch.rand(len(ends), dim, generator=torch.Generator().manual_seed(0)) + 0.5
        self.register_buffer("share", drawn / drawn.sum(0))  # (copies, D)

    def forward(self, tokens: Tokens) -> Tensor:
        """Tap tokens to refined ``cls``, ``[B, D]``."""
        return sum(share * end(tokens) for share, end in zip(self.share, self.ends, strict=True))


class Expert(nn.Module):
    """What refines the tokens of one group, with a head over its classes and, last, "other".

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

    def __init__(self, dim: int, n_classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(1))
        self.linear = nn.Linear(dim, n_classes)
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
    """E experts and their router.

    Args:
        make_end: gives a fresh copy of the backbone's end.
        dim: D, width of the refined features.
        tap_dim: D', width of the tokens at the tap.
        groups: ``[C]`` the group (= expert) of each class, 0 to E − 1, none empty.
        kind: what the experts are made of, see the table above.
        router_input: what the router reads.
        copies: of the backbone's end in the one expert of kind ``"dense"``.
    """

    group: Tensor
    column: Tensor

    def __init__(
        self,
        make_end: Callable[[], nn.Module],
        dim: int,
        tap_dim: int,
        groups: Sequence[int],
        kind: ExpertKind = "end",
        router_input: RouterInput = "tap_cls",
        copies: int = 1,
    ) -> None:
        super().__init__()
        self.sizes: list[int] = np.bincount(np.asarray(groups)).tolist()
        if 0 in self.sizes:
            raise InputError(f"train.grouping: group {self.sizes.index(0)} has no class")
        self.n_experts = len(self.sizes)
        self.n_classes = len(groups)
        self.kind = kind
        self.router_input = router_input

        def make() -> nn.Module:
            match kind:
                case "end":
                    return make_end()
                case "adapter":
                    return Adapter(dim)
                case "frozen":
                    return FrozenEnd()
                case "dense":
                    return DenseEnd([make_end() for _ in range(copies)], dim)

        has_other = self.n_experts > 1  # a single expert has nothing outside its group
        self.experts = nn.ModuleList(Expert(make(), dim, size + has_other) for size in self.sizes)
        self.router = Router(tap_dim if router_input == "tap_cls" else dim, self.n_classes)
        self.register_buffer("group", torch.as_tensor(np.asarray(groups)), persistent=False)  # (C,)
        # The output of its expert's head that stands for each class.
        column = [sum(g == groups[c] for g in groups[:c]) for c in range(len(groups))]
        self.register_buffer("column", torch.as_tensor(column), persistent=False)  # (C,)

    @property
    def reads(self) -> tuple[str, ...]:
        """Fields of `Tokens` that it needs; the others may be left unread."""
        if self.kind in ("end", "dense"):
            return ("cls", "tap_cls", "registers", "patches")
        return ("cls", "tap_cls") if self.router_input == "tap_cls" else ("cls",)

    def classes_of(self, expert: int) -> Tensor:
        """Classes of one expert's group, in the order of its head's outputs."""
        return torch.nonzero(self.group == expert).flatten()

    def renumber(self, number: Sequence[int]) -> None:
        """Give each expert, and its group, another number: expert e becomes ``number[e]``; nothing else changes."""
        order = np.argsort(number)
        self.experts = nn.ModuleList(self.experts[expert] for expert in order)
        self.sizes = [self.sizes[expert] for expert in order]
        self.group = torch.as_tensor(np.asarray(number), device=self.group.device)[self.group]

    def class_logits(self, tokens: Tokens) -> Tensor:
        """The router's logits ``[B, C]``."""
        return self.router(getattr(tokens, self.router_input))

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


def run_folder(folder: Path, run: str) -> Path:
    """Where the mixture of one run (``final`` or ``fold-<i>``) of a training stands."""
    return folder if run == "final" else folder / run


def save_weights(folder: Path, mixture: MixtureOfFeatureExperts) -> str:
    """Write ``mofe.safetensors`` alone, in place of an older pair; returns the SHA-256 of its bytes.

    Args:
        folder: where to.
        mixture: on any device.
    """
    (folder / "mofe.json").unlink(missing_ok=True)
    tensors = {name: tensor.cpu().numpy() for name, tensor in mixture.state_dict().items()}
    return write_tensors(folder / "mofe.safetensors", tensors)


def save_mixture(folder: Path, mixture: MixtureOfFeatureExperts, description: Mapping[str, Any]) -> None:
    """Write ``mofe.safetensors`` and, last, ``mofe.json``.

    Args:
        folder: where to.
        mixture: on any device.
        description: what ``mofe.json`` holds: ``"groups"``, the classes and their groups, and ``"settings"`` with the
            kind of expert, what the router reads and the number of experts, where they are not the usual ones.
    """
    digest = save_weights(folder, mixture)
    write_document(folder / "mofe.json", {**description, "files": {"mofe.safetensors": digest}})


def load_mixture(folder: Path, make_end: Callable[[], nn.Module], dim: int, tap_dim: int) -> MixtureOfFeatureExperts:
    """Read what `save_mixture` wrote, in evaluation mode.

    Raises:
        InputError: missing or damaged files, or weights of another architecture.
    """
    description, tensors = _stored(folder)
    groups, kind = _stored_groups(description), _stored_kind(description)
    if groups is None or kind is None:
        raise _not_whole(folder)
    mixture = MixtureOfFeatureExperts(make_end, dim, tap_dim, groups, *kind)
    try:
        mixture.load_state_dict({name: torch.from_numpy(array) for name, array in tensors.items()})
    except RuntimeError as error:
        raise InputError(f"{folder}: the stored mixture is of another architecture: run make train") from error
    return mixture.eval()


def cannot_read(kind: str, backbone: str, patches: str) -> InputError:
    """What to say of experts whose network does not run on the patches that are cached."""
    return InputError(
        f'train.expert: "{kind}" of {backbone} cannot run on a cache with patches = "{patches}": extract with '
        'patches = "full", or give expert = "adapter"'
    )


def load_trained_heads(folder: Path) -> tuple[LinearHead, ...]:
    """The head of each expert over all C classes, as `save_mixture` wrote it; builds no network.

    Its weights stand in the rows of the expert's own classes; "other" is left out.

    Raises:
        InputError: missing or damaged files.
    """
    description, tensors = _stored(folder)
    groups = _stored_groups(description)
    if groups is None:
        raise _not_whole(folder)
    heads = []
    for expert in range(max(groups) + 1):
        own = np.flatnonzero(np.asarray(groups) == expert)
        weight, bias = tensors[f"experts.{expert}.head.weight"], tensors[f"experts.{expert}.head.bias"]
        all_weight = np.zeros((len(groups), weight.shape[1]), dtype=np.float32)
        all_bias = np.full(len(groups), -np.inf, dtype=np.float32)
        all_weight[own], all_bias[own] = weight[: len(own)], bias[: len(own)]
        heads.append(LinearHead(all_weight, all_bias))
    return tuple(heads)


def _stored(folder: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    stored = read_described(folder / "mofe.safetensors")
    if stored is None:
        raise _not_whole(folder)
    return stored


def _not_whole(folder: Path) -> InputError:
    return InputError(f"{folder} holds no whole mofe.json and mofe.safetensors: run make train")


def _stored_groups(description: dict[str, Any]) -> list[int] | None:
    """``[C]`` the group of each class, or None where the description does not say it."""
    stored = description.get("groups")
    groups = list(stored.values()) if isinstance(stored, dict) else []
    whole = groups and all(type(group) is int for group in groups)
    return groups if whole and set(groups) == set(range(len(set(groups)))) else None


def _stored_kind(description: dict[str, Any]) -> tuple[ExpertKind, RouterInput, int] | None:
    """Kind of expert, the router's input and the number of copies, or None where what is stored makes no sense."""
    settings = description.get("settings", {})
    if not isinstance(settings, dict):
        return None
    kind, reads = settings.get("expert", "end"), settings.get("router_input", "tap_cls")
    copies = settings.get("experts", 1)
    known = kind in get_args(ExpertKind) and reads in get_args(RouterInput) and type(copies) is int
    return (kind, reads, copies) if known and 1 <= copies <= 2**16 else None
