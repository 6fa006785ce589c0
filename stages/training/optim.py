"""What moves weights: groups of parameters with their rates, schedules, and the moving average."""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from stages.mixture.model import MixtureOfFeatureExperts
from stages.training.recipes import FinetuneSettings, TrainSettings

# ---------------------------------------------------------------------------------------- a mixture, on cached features


class Rates(Protocol):
    """Learning rates of the parts of a mixture: experts' ends, their heads, the router."""

    @property
    def lr(self) -> float:
        """Of the ends."""

    @property
    def head_lr(self) -> float:
        """Of the heads."""

    @property
    def router_lr(self) -> float:
        """Of the router."""


def is_of_end(name: str) -> bool:
    """Whether a parameter of a mixture belongs to an expert's end, and not to a head or the router."""
    return ".end." in name


def parameters_by_rate(mixture: MixtureOfFeatureExperts, rates: Rates) -> dict[tuple[float, bool], list[nn.Parameter]]:
    """Parameters by their learning rate and by whether they decay, which biases and norms do not."""
    found: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in mixture.named_parameters():
        lr = rates.router_lr if name.startswith("router.") else rates.lr if is_of_end(name) else rates.head_lr
        found.setdefault((lr, parameter.ndim > 1), []).append(parameter)
    return found


def mixture_optimiser(mixture: MixtureOfFeatureExperts, settings: TrainSettings) -> torch.optim.Optimizer:
    """AdamW; ``initial_lr`` of each group is what `warm_cosine` is a factor on."""
    groups = [
        {"params": parameters, "lr": lr, "initial_lr": lr} | ({} if decays else {"weight_decay": 0.0})
        for (lr, decays), parameters in parameters_by_rate(mixture, settings).items()
    ]
    return torch.optim.AdamW(groups, weight_decay=settings.weight_decay, fused=True)


class PullToStart:
    """L2-SP: weights that start trained are drawn back to there, by λ/2 ‖w − w₀‖² in the loss.

    Li et al., "Explicit Inductive Bias for Transfer Learning with Convolutional Networks", ICML 2018. Of the experts'
    ends: heads and router are new.

    Args:
        mixture: as it starts.
        strength: λ; 0: nothing is drawn, and nothing is kept.
    """

    def __init__(self, mixture: MixtureOfFeatureExperts, strength: float) -> None:
        ends = [weights for name, weights in mixture.named_parameters() if is_of_end(name)] if strength else []
        self._strength = strength
        self._pairs = [(weights, weights.detach().clone()) for weights in ends]

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Add λ (w − w₀) to the gradients of weights that have any: an expert without rows in a batch has none."""
        for weights, start in self._pairs:
            if weights.grad is not None:
                weights.grad.add_(weights - start, alpha=self._strength)


def warm_cosine(settings: TrainSettings, done: float, step: float) -> float:
    """Linear warm-up, then a cosine to zero; `done` and the length of a step are counted in epochs."""
    if done < settings.warmup_epochs:
        return (done + step) / (settings.warmup_epochs + step)
    return 0.5 * (1 + math.cos(math.pi * (done - settings.warmup_epochs) / (settings.epochs - settings.warmup_epochs)))


def rate_share(settings: TrainSettings, step: float) -> float:
    """How much of its rates a training takes: all, or so much that it moves weights as far as ``rate_steps`` steps do.

    Args:
        settings: of the training.
        step: its length in epochs.
    """
    return min(1.0, settings.rate_steps * step / settings.epochs) if settings.rate_steps else 1.0


@torch.no_grad()
def follow(average: Sequence[Tensor], weights: Sequence[Tensor], decay: float, steps: int) -> None:
    """Draw an average after the weights; young, it forgets faster. Buffers are frozen: none is averaged.

    Args:
        average: is moved.
        weights: as they have become, in the same order.
        decay: of an average that is old.
        steps: that were taken before.
    """
    own = 1 - min(decay, (1 + steps) / (10 + steps))
    torch._foreach_lerp_(tuple(average), tuple(weights), own)


# ------------------------------------------------------------------------------------------- a whole network, on images


def network_optimiser(objective: Any, settings: FinetuneSettings) -> torch.optim.Optimizer:
    """AdamW with the paper's betas; the learning rate falls with the distance of a layer from the head.

    On a GPU in one kernel for each group of parameters, of which there are two a layer. What it is on the CPU differs
    from that by rounding, and stays.
    """
    model = objective.model
    gpu = model.get_classifier().weight.device.type == "cuda"
    groups = param_groups_layer_decay(
        model,
        weight_decay=settings.weight_decay,
        no_weight_decay_list=getattr(model, "no_weight_decay", set)(),
        layer_decay=settings.layer_decay,
    )
    groups += objective.parameter_groups(settings.weight_decay, settings.lr)
    how: dict[str, Any] = {"fused": True} if gpu else {}
    return create_optimizer_v2(groups, opt="adamw", lr=settings.lr, weight_decay=0.0, betas=(0.9, 0.99), **how)


class NetworkSchedule:
    """Learning rates of a fine-tune: constant while the head alone is trained, then a warm-up and a cosine to zero.

    Args:
        optimiser: whose rates are set.
        settings: of the fine-tune.
        steps_of_epoch: how many steps an epoch has.
    """

    def __init__(self, optimiser: torch.optim.Optimizer, settings: FinetuneSettings, steps_of_epoch: int) -> None:
        self.optimiser, self._settings, self._steps_of_epoch = optimiser, settings, steps_of_epoch
        epochs = settings.epochs - settings.head_epochs
        self._cosine = CosineLRScheduler(
            optimiser,
            t_initial=max(epochs * steps_of_epoch, 2),  # of one step timm would say that it has no effect
            warmup_t=min(settings.warmup_epochs, epochs - 1) * steps_of_epoch,
            warmup_lr_init=settings.lr / 10,
            warmup_prefix=False,
            t_in_epochs=False,
        )

    def set(self, epoch: int, step: int) -> None:
        """Set the rates of one step of an epoch."""
        settings = self._settings
        if epoch < settings.head_epochs:
            for group in self.optimiser.param_groups:
                group["lr"] = settings.head_lr
        else:
            self._cosine.step_update((epoch - settings.head_epochs) * self._steps_of_epoch + step)
