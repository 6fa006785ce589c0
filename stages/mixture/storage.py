"""A trained mixture on disk: ``mofe.safetensors``, and ``mofe.json`` that says whose it is."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import NDArray

from stages.config import ExpertKind, RouterInput
from stages.errors import InputError
from stages.files.documents import write_document
from stages.files.tensors import read_described, write_tensors
from stages.heads.affine import LinearHead
from stages.mixture.config import MixtureConfig

if TYPE_CHECKING:  # torch, for those alone who have or want the network: its heads are read without
    from torch import nn

    from stages.mixture.model import MixtureOfFeatureExperts


def run_folder(folder: Path, run: str) -> Path:
    """Where the mixture of one run (``final`` or ``fold-<i>``) of a training stands."""
    return folder if run == "final" else folder / run


def save_weights(folder: Path, mixture: "MixtureOfFeatureExperts") -> str:
    """Write ``mofe.safetensors`` alone, in place of an older pair; returns the SHA-256 of its bytes.

    Args:
        folder: where to.
        mixture: on any device.
    """
    (folder / "mofe.json").unlink(missing_ok=True)
    tensors = {name: tensor.cpu().numpy() for name, tensor in mixture.state_dict().items()}
    return write_tensors(folder / "mofe.safetensors", tensors)


def save_mixture(folder: Path, mixture: "MixtureOfFeatureExperts", description: Mapping[str, Any]) -> None:
    """Write ``mofe.safetensors`` and, last, ``mofe.json``.

    Args:
        folder: where to.
        mixture: on any device.
        description: what ``mofe.json`` holds: ``"groups"``, the classes and their groups, and ``"settings"`` with the
            kind of expert, what the router reads and the number of experts, where they are not the usual ones.
    """
    digest = save_weights(folder, mixture)
    write_document(folder / "mofe.json", {**description, "files": {"mofe.safetensors": digest}})


def load_mixture(
    folder: Path, make_end: "Callable[[], nn.Module]", dim: int, tap_dim: int
) -> "MixtureOfFeatureExperts":
    """Read what `save_mixture` wrote, in evaluation mode.

    Raises:
        InputError: missing or damaged files, or weights of another architecture.
    """
    import torch

    from stages.mixture.model import build_mixture

    description, tensors = _stored(folder)
    groups, kind = _stored_groups(description), _stored_kind(description)
    if groups is None or kind is None:
        raise _not_whole(folder)
    mixture = build_mixture(MixtureConfig(dim, tap_dim, tuple(groups), *kind), make_end)
    try:
        mixture.load_state_dict({name: torch.from_numpy(array) for name, array in tensors.items()})
    except RuntimeError as error:
        raise InputError(f"{folder}: the stored mixture is of another architecture: run make train") from error
    return mixture.eval()


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
