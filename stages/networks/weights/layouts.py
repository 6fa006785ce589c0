"""Layouts of files of weights: where in a file a network stands, and its tensors under timm's names.

A network is found by its tensors' names, below whatever prefix or key they stand (``state_dict.model.`` of Lightning,
``module.`` of DDP, ``teacher.backbone.``). transformers' layouts of DINOv2, DINOv3, ViT and SigLIP are renamed and
their q, k and v joined, and torchvision's of ViT; timm's own conversions read many more. What is known and not read is
named.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.errors import InputError

State = dict[str, Tensor]

# Where timm's training script stores the moving average, which timm itself takes.
AVERAGES = ("state_dict_ema.", "model_ema.")

# Of the tensors that a network needs, the share that a file must have by name for it to be that network's layout.
_COVERED = 0.5


@dataclass(frozen=True)
class Found:
    """A network in a file.

    Attributes:
        state: its tensors under names that timm reads.
        prefix: what stands before the names of its tensors in the file.
    """

    state: State
    prefix: str


def find_network(tensors: Mapping[str, Tensor], needed: Collection[str]) -> Found:
    """Find the network in a file.

    Args:
        tensors: all that the file holds, see `stages.networks.weights.files.read_weights`.
        needed: names of the tensors of timm's model.

    Raises:
        InputError: it holds several, or a layout that is known and not read.
    """
    names = set(needed)
    if any(re.search(r"(^|\.)lora_[AB]\.", name) for name in tensors):
        raise InputError("it is a LoRA adapter: merge it into its network (peft's merge_and_unload) and save that")
    tensors = _without_chunks(tensors, names)
    hits = Counter(prefix for name in tensors for prefix, rest in _splits(name) if rest in names)
    best = max(hits.values(), default=0)
    if best >= _COVERED * len(names):
        prefix = _only([prefix for prefix, n in hits.items() if n >= 0.9 * best])
        return Found(_below(tensors, prefix), prefix)
    if any(name.endswith("visual.class_embedding") for name in tensors) and "norm_pre.weight" not in names:
        raise InputError("it is of CLIP (visual.…): give a name of CLIP as backbone.name, vit_…_clip_…")
    for anchor, rename in _EMBEDDED_BY.items():
        if prefixes := [name.removesuffix(anchor) for name in tensors if f".{name}".endswith(f".{anchor}")]:
            prefix = _only(prefixes)
            state = _below(tensors, prefix)
            _refuse_unread(state)
            state = rename(state)
            if "blocks.0.norm1.weight" in state:
                return Found(state, prefix)
    if any(re.match(r"(\w+\.)?(embeddings|embedder)\.", name) for name in tensors):
        raise InputError("it has a layout of transformers that is not read: give timm's file of that model")
    for key in (*AVERAGES, "state_dict.", "model.", ""):
        if state := _below(tensors, key):  # timm's own conversion is tried on it
            return Found({re.sub(r"^(_orig_mod\.|module\.)+", "", name): x for name, x in state.items()}, key)
    raise AssertionError("every name begins with nothing")


def _splits(name: str) -> Iterable[tuple[str, str]]:
    """All ways to read a dotted name as a prefix, dot included, and the rest."""
    yield "", name
    for match in re.finditer(r"\.", name):
        yield name[: match.end()], name[match.end() :]


def _below(tensors: Mapping[str, Tensor], prefix: str) -> State:
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def _only(prefixes: list[str]) -> str:
    """The one network to take, where there is no doubt; of timm's checkpoints the moving average, as timm does."""
    averages = [prefix for prefix in prefixes if prefix.startswith(AVERAGES)]
    found = averages or prefixes
    if len(found) > 1:
        shown = " and ".join(repr(prefix.rstrip(".")) for prefix in found[:3])
        raise InputError(f"it holds several networks, {shown}: give a file with the tensors of one of them")
    return found[0]


def _without_chunks(tensors: Mapping[str, Tensor], names: Collection[str]) -> Mapping[str, Tensor]:
    """DINOv2's training groups its blocks, ``blocks.0.3.…``, and the second number counts through."""
    if any(re.match(r"blocks\.\d+\.\d+\.", name) for name in names):  # stages of a convolutional net
        return tensors
    return {re.sub(r"(^|\.)blocks\.\d+\.(\d+\.)", r"\1blocks.\2", name): x for name, x in tensors.items()}


# --------------------------------------------------------------------------- transformers' layouts, and torchvision's

Rules = tuple[tuple[str, str], ...]

_BLOCK = r"^(?:model\.)?(?:encoder\.)?layers?\.(\d+)\."
_ATTENTION: Rules = (
    (r"\.attention\.attention\.(q|k|v)[a-z]+\.", r".attn.\1."),  # query, key, value
    (r"\.(?:attention|self_attn)\.(q|k|v)_proj\.", r".attn.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.(?:attention\.o|self_attn\.out)_proj\.", ".attn.proj."),
)
_EMBEDDINGS: Rules = (
    (r"^embeddings\.(?:patch_embeddings\.projection|patch_embeddings?)\.", "patch_embed.proj."),
    (r"^embeddings\.position_embedding(?:s|\.weight)$", "pos_embed"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.cls_token$", "cls_token"),
    (_BLOCK, r"blocks.\1."),
)
_VIT: Rules = (
    *_EMBEDDINGS,
    *_ATTENTION,
    (r"\.layer_scale(1|2)\.lambda1$", r".ls\1.gamma"),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.mlp\.(?:weights_out|down_proj)\.", ".mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"^layernorm\.", "norm."),
)
_DINOV3: Rules = (
    *_EMBEDDINGS,
    *_ATTENTION,
    (r"\.layer_scale(1|2)\.lambda1$", r".gamma_\1"),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
)
_SIGLIP: Rules = (
    *_EMBEDDINGS,
    *_ATTENTION,
    (r"\.layer_norm(1|2)\.", r".norm\1."),
    (r"^post_layernorm\.", "norm."),
    (r"^head\.probe$", "attn_pool.latent"),
    (r"^head\.attention\.in_proj_", "attn_pool.in."),
    (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"^head\.layernorm\.", "attn_pool.norm."),
    (r"^head\.mlp\.", "attn_pool.mlp."),
)
_TORCHVISION: Rules = (
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^class_token$", "cls_token"),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_(1|2)\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(?:0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(?:3|linear_2)\.", ".mlp.fc2."),
    (r"^encoder\.ln\.", "norm."),
)


def _renamed(state: State, rules: Rules) -> State:
    found = {}
    for name, x in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        found[name] = x
    return found


def _joined(state: State, parts: tuple[str, ...], whole: str) -> None:
    """Put tensors of each block one below the other, where all of them are there: q, k and v as one."""
    for name in [name for name in state if re.search(rf"{re.escape(parts[0])}\.(weight|bias)$", name)]:
        names = [name.replace(parts[0], part) for part in parts]
        if all(part in state for part in names):
            state[name.replace(parts[0], whole)] = torch.cat([state.pop(part) for part in names])


def _vit(state: State) -> State:
    """DINOv2, with registers and without, and ViT."""
    state = _renamed(state, _VIT)
    _joined(state, (".attn.q", ".attn.k", ".attn.v"), ".attn.qkv")
    _joined(state, (".mlp.gate_proj", ".mlp.up_proj"), ".mlp.fc1")
    # timm's own conversion takes this for a sign of other layouts; where it was cut out nothing misses it.
    state.pop("embeddings.mask_token", None)
    if "reg_token" in state and "pos_embed" in state:  # timm adds to the class token what stands at its position
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    return state


def _dinov3(state: State) -> State:
    gated = any(".mlp.gate_proj." in name for name in state)
    mlp = ((r"\.mlp\.up_proj\.", ".mlp.fc1_x." if gated else ".mlp.fc1."), (r"\.mlp\.gate_proj\.", ".mlp.fc1_g."))
    state = _renamed(state, (*_DINOV3, *mlp))
    weights = {name: x for name, x in state.items() if name.endswith(".weight")}
    _joined(weights, (".attn.q", ".attn.k", ".attn.v"), ".attn.qkv")
    others = {name: x for name, x in state.items() if not name.endswith(".weight")}
    others.pop("embeddings.mask_token", None)
    return weights | _renamed(others, ((r"\.attn\.(q|k|v)\.bias$", r".attn.\1_bias"),))


def _siglip(state: State) -> State:
    state = _renamed(state, _SIGLIP)
    _joined(state, (".attn.q", ".attn.k", ".attn.v"), ".attn.qkv")
    if "pos_embed" in state:
        state["pos_embed"] = state["pos_embed"][None]
    for kind in ("weight", "bias"):
        if (whole := state.pop(f"attn_pool.in.{kind}", None)) is not None:
            third = len(whole) // 3
            state[f"attn_pool.q.{kind}"], state[f"attn_pool.kv.{kind}"] = whole[:third], whole[third:]
    return state


def _torchvision(state: State) -> State:
    return _renamed(state, _TORCHVISION)


# By the name of the patch embedding, which no two of them share.
_EMBEDDED_BY: dict[str, Callable[[State], State]] = {
    "conv_proj.weight": _torchvision,
    "embeddings.patch_embeddings.projection.weight": _vit,
    "embeddings.patch_embeddings.weight": _dinov3,
    "embeddings.patch_embedding.weight": _siglip,
}

# Of layouts with these embeddings, those that are not read: a name that shows it, and what it is.
_UNREAD = {
    r"^embeddings\.class_embedding$": ("CLIP", "vit_…_clip_…"),
    r"distillation_token$": ("DeiT", "deit_…_distilled_…"),
    r"\.lambda_1$|\.relative_position_bias_table$": ("BEiT", "beit_…"),
}


def _refuse_unread(state: Mapping[str, Tensor]) -> None:
    for pattern, (what, timms) in _UNREAD.items():
        if any(re.search(pattern, name) for name in state):
            raise InputError(f"it has transformers' layout of {what}, which is not read: give timm's file ({timms})")
