"""Networks of one architecture, each with rows of its own, as one network with stacked weights.

A GPU that computes small networks one after the other waits for the host, which starts every kernel anew for each of
them. Stacked, an operation of all of them is one kernel: ``torch.func.functional_call`` under ``torch.vmap``, with the
few operations written anew that vmap cannot do, or does slowly.
"""

import copy
import inspect
import math
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from stages.networks.tokens import Tokens
from stages.networks.transfer import to_device

# When it pays on a GPU, see `pays`. Measured forwards and backwards in bfloat16 by `make check-gpu` on an H100, in its
# steps `experts: …`: one network alone takes 3 to 6 ms whatever its rows, stacked ones 7 to 10 ms and 35 µs a row, be
# it of a ViT-S's last block or of EfficientNet-Lite0's end with a ninth of its multiply-adds. A faster host, or a
# slower GPU, has fewer LAUNCHES. With none networks are left one after another.
LAUNCHES = 7e10  # multiply-adds of a forward pass, stacked, in the time in which the host starts a network's kernels
STACKING = 2  # networks whose kernels it could start while it starts those of stacked ones, and stacks their weights
CONVOLVED = 20  # as many times longer takes a multiply-add where it stands beside depthwise convolutions
MOST_PADDED = 3.0  # computed rows for every row: what it costs of memory

_SKELETONS = threading.Lock()  # `functional_call` puts weights into a module while it runs


def pays(counts: Sequence[int], work: float, device: torch.device) -> bool:
    """Whether networks with rows of their own are faster stacked, where all are padded to the most that one has.

    They are where computing all rows takes less time than the launches that are saved: one network after the other
    waits for launches alone. On a CPU, where a launch costs nothing, they never are.

    Args:
        counts: rows of each network.
        work: multiply-adds of one row, stacked, see `Stacked.work_of`.
        device: where they run.
    """
    busy = [count for count in counts if count]
    computed, given = max(busy, default=0) * len(busy), sum(busy)
    if device.type != "cuda" or len(busy) < 2 or computed > MOST_PADDED * given:
        return False
    return computed * work <= (len(busy) - STACKING) * LAUNCHES


class Stacked:
    """Networks of one architecture that can be run at once.

    Weights stay the networks' own: every call stacks them anew, and gradients go through that to where they belong. It
    costs a copy of the weights of those that run, and one of their gradients.

    Args:
        networks: alike but for the length of the first dimension of a weight. Which they are does not change.
        reads_patches: whether they run on all tokens, or on class embeddings alone.

    Attributes:
        forced: whether they are to be run at once; None: where it `pays`, and vmap can do all that they do.
    """

    def __init__(self, networks: Sequence[nn.Module], reads_patches: bool) -> None:
        self.forced: bool | None = None
        self._networks, self._reads_patches = list(networks), reads_patches
        self._skeleton: nn.Module | None = None
        self._tables: list[dict[str, dict[str, Any]]] = []
        self._work: float | None = None  # of a row, see `work_of`; inf where vmap cannot do it

    def is_used(self, counts: Sequence[int], row: Callable[[], Tokens]) -> bool:
        """Whether networks are to be run at once.

        Args:
            counts: rows of each.
            row: gives one, where they run.
        """
        if self.forced is not None:
            return self.forced and any(counts)
        device = next((tensor.device for tensor in self._networks[0].parameters()), torch.device("cpu"))
        if device.type != "cuda" or sum(map(bool, counts)) < 2:
            return False
        if self._work is None:
            first = row()
            work = self.work_of(first)
            self._work = work if math.isfinite(work) and self.runs_on(first) else math.inf
        return pays(counts, self._work, device)

    def work_of(self, row: Tokens) -> float:
        """Multiply-adds of a row, or as many as take as long: every weight meets every token that is read.

        What reads and writes the maps of convolutions takes longer than their multiply-adds, see `CONVOLVED`. Windows
        that are not depthwise have not been measured: inf, so that stacking does not pay.
        """
        network = self._networks[0]
        n_tokens = 1 + row.registers.shape[1] + row.patches.shape[1] if self._reads_patches else 1
        work = float(n_tokens * sum(weight.numel() for weight in network.parameters()))
        layers = (layer for layer in network.modules() if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)))
        windows = [layer for layer in layers if max(layer.kernel_size) > 1]
        if any(layer.groups < layer.in_channels for layer in windows):
            return math.inf
        return CONVOLVED * work if windows else work

    def __call__(self, members: Sequence[int], tokens: Tokens, shared: bool = False) -> Any:
        """What each of some networks makes of its tokens.

        Args:
            members: numbers of those that run, M of them.
            tokens: ``[M, B, ...]``; where `shared`, ``[B, ...]`` for all.
            shared: whether all read the same.

        Returns:
            As a network returns it, tensors ``[M, ...]``; a head with fewer outputs than the longest has zeros there.
        """
        if self._skeleton is None:
            self._skeleton = copy.deepcopy(self._networks[0]).to("meta")
            self._tables = [_tables(network) for network in self._networks]
        skeleton, names = self._skeleton, [(name, name.rpartition(".")[2]) for name in self._tables[0]]
        state = {name: _stack([self._tables[member][name][key] for member in members]) for name, key in names}

        def run(state: dict[str, Tensor], fields: tuple[Tensor, ...]) -> Any:
            return functional_call(skeleton, state, (Tokens(*fields),))

        with _SKELETONS, _Rewritten():
            return torch.vmap(run, in_dims=(0, None if shared else 0))(state, tuple(vars(tokens).values()))

    def runs_on(self, row: Tokens) -> bool:
        """Whether vmap can do all that the architecture does, backwards too, and nothing one network after the other.

        Args:
            row: ``[1, ...]``, where it is going to run.
        """
        try:
            with warnings.catch_warnings(), torch.enable_grad():
                warnings.filterwarnings("error", message="There is a performance drop")
                made = self(range(2), row.map(Tensor.detach), shared=True)
                sums = [each.sum() for each in ([made] if isinstance(made, Tensor) else made) if each.requires_grad]
                weights = [weight for weight in self._networks[0].parameters() if weight.requires_grad]
                if sums and weights:
                    torch.autograd.grad(sums, weights, allow_unused=True)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, KeyError, UserWarning):  # as the architecture's own code has it
            return False
        return True


def _tables(network: nn.Module) -> dict[str, dict[str, Any]]:
    """Of every parameter and buffer the dictionary that it stands in: what it is may change, as when it is moved."""
    found = {}
    for prefix, module in network.named_modules():
        for table in (module._parameters, module._buffers):
            for key in (key for key, tensor in table.items() if tensor is not None):
                found[f"{prefix}.{key}" if prefix else key] = table
    return found


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """``[M, ...]``; shorter ones end in zeros."""
    lengths = [tensor.shape[:1] for tensor in tensors]
    if len(set(lengths)) == 1:
        return torch.stack([*tensors])
    ends = torch.tensor(lengths).flatten().cumsum(0)
    longest = max(length[0] for length in lengths)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])[:, None]
    place = starts + torch.arange(longest)
    place = torch.where(place < ends[:, None], place, ends[-1])  # the last stands for zero
    parts = torch.cat([*tensors, tensors[0].new_zeros(1, *tensors[0].shape[1:])])
    return parts.index_select(0, to_device(place.flatten(), parts.device)).unflatten(0, (len(tensors), longest))


# -------------------------------------------------------------------------------------- operations in other words


class _Rewritten(TorchFunctionMode):
    """Within it, what vmap cannot do, or does slowly, is done by operations that mean the same."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _IN_OTHER_WORDS.get(func, func)(*args, **kwargs or {})


def _contiguous(x: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    """Other memory formats do not exist within vmap; they would change no value."""
    return x.contiguous() if memory_format is torch.contiguous_format else x


def _conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """One of 1 x 1 as the matrix product that it is; of several networks vmap makes a convolution in groups."""
    if torch.is_autocast_enabled(x.device.type):  # which comes too late within vmap
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype)
    if weight.shape[2:] == (1, 1) and groups == 1 and stride in (1, (1, 1)) and padding in (0, (0, 0), "same", "valid"):
        return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
    return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)


def _batch_norm(*args: Any, **kwargs: Any) -> Tensor:
    """By fixed statistics it is a scale and a shift; vmap's own copies all rows, and refuses mixed precision."""
    given = _BATCH_NORM.bind(*args, **kwargs)
    given.apply_defaults()
    x, running_mean, running_var, weight, bias, training, _, eps = given.args
    if training or running_mean is None or running_var is None:
        return F.batch_norm(*args, **kwargs)
    scale = (running_var + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -running_mean * scale if bias is None else bias - running_mean * scale
    scale, shift = (each.view(-1, *[1] * (x.ndim - 2)) for each in (scale, shift))
    return (x * scale + shift).to(x.dtype)


def _pool(x: Tensor, output_size: Any) -> Tensor:
    """To one value: a mean. PyTorch would keep the memory format, which vmap cannot."""
    if output_size in (1, (1, 1), [1, 1]):
        return x.mean((-2, -1), keepdim=True).to(x.dtype)
    return F.adaptive_avg_pool2d(x, output_size)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """Networks and rows in one dimension, outside of vmap.

    Within it PyTorch asks wrapped tensors whether a gradient will be needed, hears that none is, and leaves out what
    the backward pass of its fast kernels reads.
    """
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:-2], *attn_mask.shape[-2:])
    result: Tensor = _Attention.apply(query, key, value, attn_mask, dropout_p, is_causal, options)
    return result


class _Attention(torch.autograd.Function):
    """What holds `_attention`'s rule for vmap. It is that rule which is differentiated."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        raise NotImplementedError("attention of stacked networks whose queries do not depend on the network")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> tuple[Tensor, int]:
        *tensors, dropout_p, is_causal, options = inputs

        def flat(x: Any, dim: int | None) -> Any:
            if x is None:
                return None
            return (x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)

        query, key, value, mask = (flat(x, dim) for x, dim in zip(tensors, in_dims, strict=False))
        attended = F.scaled_dot_product_attention(query, key, value, mask, dropout_p, is_causal, **options)
        return attended.unflatten(0, (info.batch_size, -1)), 0


_BATCH_NORM = inspect.signature(F.batch_norm)

_IN_OTHER_WORDS: dict[Any, Any] = {
    Tensor.contiguous: _contiguous,
    torch.conv2d: _conv2d,
    F.batch_norm: _batch_norm,
    F.adaptive_avg_pool2d: _pool,
    F.scaled_dot_product_attention: _attention,
}
