"""What became of each tensor of a file of weights: used, left out for a reason, or left over.

How timm and this package rename, split, join and resample tensors is not repeated here: it is watched, by looking at
every operation on them until something of them is copied into a parameter of the model.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

# Parts of a file's network that do not touch the features that are read, by what stands in their names.
_OTHER_PARTS = re.compile(
    r"^(head|heads|head_\w+|fc|classifier|\w+_classifier|cls_head|lm_head|linear_head)\."  # classifiers
    r"|^(pooler|pre_logits|text_projection|visual_projection)\."  # what some put between features and classifier
    r"|^(decoder|decoder_\w+)(\.|$)"  # of masked autoencoders
    r"|^(dino_head|ibot_head|projector|projectors|projection|projection_head|proj_head|predictor|prototypes)\."
    r"|(^|\.)mask_token$"
    r"|^local_cls_norm\."  # DINOv3: of local crops in training alone
    r"|(^|\.)(relative_position_index|position_ids|num_batches_tracked|attn_mask|bias_mask)$"
)
# CLIP's text tower stands beside the vision tower without a prefix of its own.
_CLIP_TEXT = re.compile(r"^(transformer|token_embedding|ln_final|positional_embedding|text|logit_scale|logit_bias)")


class Watch(TorchDispatchMode):
    """Context in which it is seen which of some tensors end, changed or not, in others that they are copied into.

    Args:
        tensors: by name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names: Any = WeakIdKeyDictionary()
        for name, tensor in tensors.items():
            self._names[tensor] = frozenset((name,))
        self._copied: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if names := frozenset().union(*(self._names.get(x, ()) for x in inputs)):
            if func is torch.ops.aten.copy_.default:
                self._copied[args[0]] = self._copied.get(args[0], frozenset()) | names
            for x in tree_leaves(out):
                if isinstance(x, Tensor):
                    self._names[x] = names
        return out

    def used(self, model: nn.Module) -> set[str]:
        """Names of tensors that are in a model's parameters or buffers now."""
        return {name for x in model.state_dict(keep_vars=True).values() for name in self._copied.get(x, ())}

    def missing(self, model: nn.Module) -> list[str]:
        """Names of a model's parameters and stored buffers into which nothing was copied."""
        state = model.state_dict(keep_vars=True)
        return [n for n, x in state.items() if x not in self._copied and not n.endswith("num_batches_tracked")]


def left_over(tensors: Mapping[str, Tensor], unused: Iterable[str], prefix: str, model: nn.Module) -> list[str]:
    """Of the tensors of a file that were not used, those that would change the features of its network.

    Not among them: other networks than that below the prefix; classifiers, decoders, projection heads, mask tokens;
    biases that are all zero; indices of positions, and what the model computes for itself.

    Args:
        tensors: all that the file holds.
        unused: names of those that are not in the model.
        prefix: of the network's tensors.
        model: that was loaded.
    """
    computed = [x for name, x in model.named_buffers()]
    is_clip = any(name.startswith(f"{prefix}visual.") for name in tensors)
    found = []
    for name in unused:
        inside = name.removeprefix(prefix)
        if is_clip:
            if _CLIP_TEXT.match(inside) or inside == "visual.proj":
                continue
            inside = inside.removeprefix("visual.").removeprefix("trunk.")
        if not name.startswith(prefix) or _OTHER_PARTS.search(inside):
            continue
        if not _is_zero_bias(name, tensors) and not any(_same(tensors[name], x) for x in computed):
            found.append(name)
    return found


def _is_zero_bias(name: str, tensors: Mapping[str, Tensor]) -> bool:
    bias, mask = tensors[name], tensors.get(f"{name}_mask")
    if mask is not None:  # DINOv3 has no bias of keys: it is masked, whatever is stored
        bias = torch.where(mask.nan_to_num() != 0, bias, torch.zeros_like(bias))
    return name.endswith("bias") and not bias.any()


def _same(stored: Tensor, computed: Tensor) -> bool:
    """Whether a stored tensor is, to the precision of bfloat16, a buffer that the model fills by itself."""
    if stored.shape != computed.shape:
        return False
    return torch.allclose(stored.float(), computed.float().cpu(), rtol=2**-7, atol=1e-6)


def first_names(names: Iterable[str], most: int = 3) -> str:
    """The first names of several: ``"a, b, c and 4 more"``."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
