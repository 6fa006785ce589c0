"""What a fine-tune minimises: the backbone with a linear head, or with the experts and their router as well.

::

    plain    image ── backbone ── cls ── head

    joint    image ── first blocks ── n blocks ──┬── experts ── heads      (the end-to-end mixture)
                        (frozen)                 ├── router
                                                 ╎
                                     no gradient ╎ own last block, norm ── cls ── head

In a joint run experts and router alone teach the n blocks before the tap; the backbone's own end follows them on
detached tokens, so that what is cached of it, ``cls`` and its head, belongs to the blocks as they have become.
"""

from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from stages.id_data.rows import Labels
from stages.mixture.model import MixtureOfFeatureExperts, soft_cross_entropy
from stages.networks.backbone import Backbone
from stages.networks.transfer import to_device
from stages.training.optim import is_of_end, parameters_by_rate
from stages.training.recipes import MixturePlan


class Mixed(NamedTuple):
    """Images that one process computes in one pass.

    Attributes:
        images: ``[p, 3, H, W]``, mixed: b of them, and what fills a pass.
        targets: ``[b, C]`` soft targets, not smoothed.
        labels: ``[b]`` each row's own class.
        place: ``[b]`` of each row in the whole batch, on the CPU.
    """

    images: Tensor
    targets: Tensor
    labels: Tensor
    place: Tensor


class DrawnRows(NamedTuple):
    """Which rows of a whole batch teach which expert.

    Attributes:
        group: ``[B]`` of each row: it teaches that expert.
        chosen: ``[E, B]`` out-of-group rows that teach each expert "other".
    """

    group: NDArray[np.int64]
    chosen: NDArray[np.bool_]


class Judged(NamedTuple):
    """What an objective makes of images as they are."""

    loss: Tensor  # () sum
    right: Tensor  # [b] bool: the class is right, by the expert that the router picks where there are experts
    known: Tensor  # [b] bool: the class is right among those of its group; difficulty is made of it
    arrived: Tensor  # [b] bool: the router picks the right expert


class Objective(Protocol):
    """An `nn.Module` that gives the loss of training images, and judges others.

    Attributes:
        model: the timm model with its head.
        groups: ``[C]`` the group of each class; images are mixed within it. None: with all others.
    """

    model: Any
    groups: NDArray[np.int64] | None

    def draw(self, labels: Labels, rng: np.random.Generator) -> Any:
        """What is drawn for a whole batch, the same in every process."""

    def loss(self, mixed: Mixed, drawn: Any) -> tuple[Tensor, Tensor]:
        """Sum of the loss over rows, and how many rows got their own class right."""

    def judge(self, images: Tensor, labels: Tensor) -> Judged:
        """Images as they are, in evaluation mode: as many as there are labels, and what fills a pass."""

    def head_parameters(self) -> list[nn.Parameter]:
        """What is trained in the epochs of the head alone."""

    def parameter_groups(self, weight_decay: float, lr: float) -> list[dict[str, Any]]:
        """Of the optimiser, beyond those of the model; ``lr_scale`` of each is a factor on `lr`."""


class LinearObjective(nn.Module):
    """Cross-entropy of a linear head on the whole backbone."""

    groups: NDArray[np.int64] | None = None

    def __init__(self, model: nn.Module, label_smoothing: float) -> None:
        super().__init__()
        self.model: Any = model
        self._smoothing = label_smoothing

    def train(self, mode: bool = True) -> "LinearObjective":
        """Batch norm stays in evaluation mode."""
        super().train(mode)
        freeze_batch_norm(self)
        return self

    def draw(self, labels: Labels, rng: np.random.Generator) -> None:
        """Nothing is drawn."""

    def loss(self, mixed: Mixed, drawn: None) -> tuple[Tensor, Tensor]:
        """See `Objective`."""
        logits = self.model(mixed.images)[: len(mixed.labels)].float()
        right = (logits.argmax(1) == mixed.labels).sum()
        return soft_cross_entropy(logits, smooth(mixed.targets, self._smoothing)), right

    def judge(self, images: Tensor, labels: Tensor) -> Judged:
        """See `Objective`."""
        logits = self.model(images)[: len(labels)].float()
        right = logits.argmax(1) == labels
        return Judged(F.cross_entropy(logits, labels, reduction="sum"), right, right, torch.ones_like(right))

    def head_parameters(self) -> list[nn.Parameter]:
        """The classifier."""
        return list(self.model.get_classifier().parameters())

    def parameter_groups(self, weight_decay: float, lr: float) -> list[dict[str, Any]]:
        """None."""
        return []


class JointObjective(nn.Module):
    """The loss of the mixture of feature experts from images, and that of the backbone's own head beside it.

    In-group rows go to their true group's expert; as many out-of-group rows of the same batch teach it "other".

    Args:
        backbone: whose model has its head already.
        mixture: experts made of the backbone's end.
        plan: settings.
        label_smoothing: of the backbone's own head.
    """

    def __init__(
        self, backbone: Backbone, mixture: MixtureOfFeatureExperts, plan: MixturePlan, label_smoothing: float
    ) -> None:
        super().__init__()
        self.model: Any = backbone.model
        self.mixture = mixture
        self.groups: NDArray[np.int64] | None = mixture.group.cpu().numpy()
        self._backbone = backbone
        self._plan = plan
        self._smoothing = label_smoothing

    def train(self, mode: bool = True) -> "JointObjective":
        """Batch norm stays in evaluation mode, and so do the experts' ends."""
        super().train(mode)
        freeze_batch_norm(self)
        return self

    def draw(self, labels: Labels, rng: np.random.Generator) -> DrawnRows:
        """As many out-of-group rows for each expert as it has of its own."""
        assert self.groups is not None
        group = self.groups[labels]
        chosen = np.zeros((self.mixture.n_experts, len(labels)), dtype=np.bool_)
        for expert in range(self.mixture.n_experts):
            outside = np.flatnonzero(group != expert)
            chosen[expert, rng.permutation(outside)[: (group == expert).sum()]] = self._plan.other_weight > 0
        return DrawnRows(group, chosen)

    def loss(self, mixed: Mixed, drawn: DrawnRows) -> tuple[Tensor, Tensor]:
        """See `Objective`."""
        mixture, plan = self.mixture, self._plan
        tokens = self._backbone.tokens(mixed.images)[: len(mixed.labels)]
        place, device = mixed.place.numpy(), mixed.labels.device
        logits = self.model.get_classifier()(tokens.cls).float()
        loss = soft_cross_entropy(logits, smooth(mixed.targets, self._smoothing))
        loss = loss + soft_cross_entropy(mixture.class_logits(tokens).float(), mixed.targets)
        # Of each expert its own rows, then those of other groups. On the host: a GPU that is asked which rows these are
        # stops the host until it has come so far.
        inside = drawn.group[place] == np.arange(mixture.n_experts)[:, None]
        learned = np.stack([inside, drawn.chosen[:, place]], axis=1)
        expert, is_other, row = (to_device(torch.from_numpy(each), device) for each in np.nonzero(learned))
        # A row's partner is of the same group, so its targets lie within the expert's own outputs.
        outputs_of = mixture.outputs
        own = outputs_of.smooth(outputs_of.group_targets(mixed.targets[row], expert), expert, plan.label_smoothing)
        other = plan.other_weight * outputs_of.class_targets(mixed.labels[row], expert)
        targets = torch.where(is_other[:, None] == 1, other, own)
        for made in mixture.refine(learned.sum((1, 2)).tolist(), lambda at: tokens[row[at]]):
            outputs = made.outputs.float()
            loss = loss + soft_cross_entropy(outputs, targets[made.rows, : outputs.shape[1]])
        return loss, (logits.argmax(1) == mixed.labels).sum()

    def judge(self, images: Tensor, labels: Tensor) -> Judged:
        """By the mixture: its routed class and its own loss, as stage two on cached features has it."""
        mixture = self.mixture
        tokens = self._backbone.tokens(images)[: len(labels)].map(Tensor.float)
        out = mixture(tokens, mixture.group[labels])
        known, arrived = out.logits.argmax(1) == labels, out.gate.argmax(1) == mixture.group[labels]
        loss = F.cross_entropy(out.logits, labels, reduction="sum")
        loss = loss + F.cross_entropy(mixture.class_logits(tokens), labels, reduction="sum")
        return Judged(loss, known & arrived, known, arrived)

    def head_parameters(self) -> list[nn.Parameter]:
        """The backbone's classifier, the experts' heads and the router."""
        heads = [p for name, p in self.mixture.named_parameters() if not is_of_end(name)]
        return [*self.model.get_classifier().parameters(), *heads]

    def parameter_groups(self, weight_decay: float, lr: float) -> list[dict[str, Any]]:
        """Ends, heads and router by their learning rates; biases and norms without weight decay."""
        return [
            {"params": parameters, "lr_scale": own / lr, "weight_decay": weight_decay if decays else 0.0}
            for (own, decays), parameters in parameters_by_rate(self.mixture, self._plan).items()
        ]


def smooth(targets: Tensor, smoothing: float) -> Tensor:
    """Label smoothing of soft targets ``[B, outputs]``."""
    return targets * (1 - smoothing) + smoothing / targets.shape[1]


def freeze_batch_norm(module: nn.Module) -> None:
    """Put batch norm into evaluation mode: its statistics stay what they are."""
    for child in module.modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            child.eval()


class RowsOfBatch:
    """Which rows of the whole batch a pass computes; what drops paths asks it."""

    place: Tensor = torch.zeros(0, dtype=torch.long)
    n_batch: int = 0


class DropPathOfRows(nn.Module):
    """Stochastic depth that draws for the whole batch and takes its rows': the same in any number of processes.

    All draw from torch's generator, which `finetune` seeds before every pass; checkpointing restores it.
    """

    def __init__(self, drop_prob: float, rows: RowsOfBatch) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self._rows = rows

    def forward(self, x: Tensor) -> Tensor:
        """``[b, ...]`` with some rows at zero and the others scaled up."""
        if not self.training or self.drop_prob == 0:
            return x
        keep = torch.rand(self._rows.n_batch)[self._rows.place] >= self.drop_prob
        scale = to_device((keep.float() / (1 - self.drop_prob)).to(x.dtype), x.device)
        return x * scale.view(-1, *[1] * (x.ndim - 1))


def drop_paths_by_row(model: nn.Module) -> RowsOfBatch:
    """Replace timm's stochastic depth; returns what has to be told which rows come."""
    rows = RowsOfBatch()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, DropPath):
                setattr(module, name, DropPathOfRows(float(child.drop_prob), rows))
    return rows
