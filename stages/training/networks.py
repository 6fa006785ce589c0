"""The network that a fine-tune trains: built, frozen in part, refused where its shape does not allow what is asked."""

from typing import Any, cast

import torch

from stages.config import BackboneConfig
from stages.context import Context
from stages.errors import InputError
from stages.id_data.rows import IdData, read_blocks
from stages.mixture.config import MixtureConfig
from stages.mixture.grouping import group_training_classes
from stages.mixture.model import build_mixture
from stages.networks.backbone import Backbone
from stages.networks.surgery import freeze_first, n_parts
from stages.networks.weights.loading import build_model, model_shape
from stages.training.objectives import JointObjective, LinearObjective
from stages.training.recipes import FinetuneSettings, MixturePlan


def network_options(backbone: BackboneConfig, settings: FinetuneSettings) -> dict[str, float]:
    """What the model is built with beside its name; some families know nothing of stochastic depth.

    Raises:
        InputError: this is one of them, and some is asked for.
    """
    options = {"drop_path_rate": settings.drop_path}
    try:
        model_shape(backbone, **options)
    except TypeError as error:
        if settings.drop_path:
            raise InputError(
                f"finetune.drop_path: {settings.drop_path:g} given, {backbone.name} has no stochastic depth: give 0"
            ) from error
        return {}
    return options


def check_joint(tapped: Backbone, joint: int) -> int:
    """How many blocks or stages stand before the experts.

    Raises:
        InputError: fewer than are to be trained with them, or an end that cannot be cut out.
    """
    name = tapped.config.name
    if not tapped.cut:
        raise InputError(f"finetune.joint: the end of {name} cannot be cut out for experts: leave joint at 0")
    if joint > (before := n_parts(tapped.model) - tapped.expert_blocks):
        raise InputError(f"finetune.joint: {joint} given, {name} has {before} blocks or stages before the experts")
    return before


def checkpoint_gradients(model: Any) -> None:
    """Let a model compute its activations twice instead of holding them.

    Raises:
        InputError: its family cannot.
    """
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        name = type(model).__name__
        raise InputError(
            f"finetune.checkpointing: timm's {name} has no gradient checkpointing: leave it out"
        ) from error


def build_objective(
    backbone: BackboneConfig,
    data: IdData,
    settings: FinetuneSettings,
    plan: MixturePlan | None,
    seed: int,
    context: Context,
) -> LinearObjective | JointObjective:
    """The network to train, on the device, with what stays as it is frozen.

    Args:
        backbone: what to start from.
        data: whose classes it is to tell apart.
        settings: of the fine-tune.
        plan: the experts that are trained together with it; needed where ``settings.joint`` is not 0.
        seed: of their groups.
        context: where it is trained.

    Raises:
        InputError: the network, or what was cached of it, does not allow the settings.
    """
    model = build_model(backbone, **network_options(backbone, settings))
    if not settings.joint:
        cast(Any, model).reset_classifier(data.n_classes)
        freeze_first(model, settings.freeze, "finetune.freeze")
        model.to(context.place)
        if not hasattr(model, "patch_embed"):
            model.to(memory_format=torch.channels_last)
        return LinearObjective(model, settings.label_smoothing)
    assert plan is not None
    spec, train = data.train.spec, data.split.folds[0].train
    plain = backbone.model_copy(update={"compile": False, "precision": "float32"})
    tapped = Backbone(model, plain, spec.expert_blocks, context.place, detach_end=True)
    before = check_joint(tapped, settings.joint)
    if spec.patches != "full":
        raise InputError(
            f'finetune.joint: experts read all patches: extract with patches = "full", not "{spec.patches}"'
        )
    groups = context.ranks.agree(group_training_classes(data, train, plan.experts, plan.grouping, seed))
    config = MixtureConfig(tapped.dim, tapped.tap_dim, tuple(groups), "end", plan.router_input)
    mixture = build_mixture(config, tapped.end)
    blocks = read_blocks(data.train, plan.router_input, train)
    mixture.router.standardise(torch.from_numpy(values) for _, values in blocks)
    cast(Any, model).reset_classifier(data.n_classes)
    freeze_first(model, before - settings.joint, "finetune.joint")
    return JointObjective(tapped, mixture, plan, settings.label_smoothing).to(context.place)
