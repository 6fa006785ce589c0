"""Backbones: any timm model, its weights, its own transform, and its end cut out for experts.

A backbone is read at two places in one forward pass::

    image ── stem, first blocks ──┬── last `expert_blocks` blocks ── norm, pooling ── cls  [B, D]
                                  └── tap: tap_cls [B, D'], registers [B, R, D'], patches [B, P, D']

What lies right of the tap is `BackboneEnd`; run on the cached tap it gives `cls` again, and a copy of it is what
every expert starts from.
"""

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Literal

import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from cache import FeatureSpec
from cache.fingerprint import arrays_sha256
from stages.allocator import keep_freed_memory
from stages.config import BackboneConfig
from stages.errors import InputError
from stages.inputs.images import MAX_PIXELS, ImageError
from stages.networks.weights.loading import create_model, first_line, load_model, transform_config, transform_notes

# The meaning of a cached row. Raise it when the same image and weights would give other features.
EXTRACTION_SEMANTICS = 2

# Every forward pass of an extraction has exactly this many images, by kind of device, the last one padded: with one
# shape, one memory format, one precision and one thread a pass the kernels, and so the bits, do not depend on the sizes
# of shards, on cores or on workers.
COMPUTE_BATCH = {"cpu": 16, "cuda": 128}
COMPUTE_THREADS = 1

_AUTOCAST = {"float16": torch.float16, "bfloat16": torch.bfloat16}

# Largest difference, relative to the largest value of `cls`, at which the cut-out end counts as the backbone's own.
END_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Tokens:
    """What is known of a batch of images: the final class embedding and the tokens at the tap, un-normalised.

    Attributes:
        cls: ``[B, D]`` final, normalised class embedding (or pooled vector where there is no class token).
        tap_cls: ``[B, D']`` class token at the tap; mean of `patches` where there is no class token.
        registers: ``[B, R, D']`` other prefix tokens at the tap.
        patches: ``[B, P, D']`` patch tokens at the tap, row-major; for a convolutional net the pixels of the map.
    """

    cls: Tensor
    tap_cls: Tensor
    registers: Tensor
    patches: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> "Tokens":
        """Apply one function to every field."""
        return Tokens(*(function(getattr(self, field.name)) for field in fields(self)))

    def combine(self, other: "Tokens", function: Callable[[Tensor, Tensor], Tensor]) -> "Tokens":
        """Apply one function to every field of both."""
        return Tokens(*(function(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)))

    def concatenate(self, other: "Tokens") -> "Tokens":
        """The rows of both."""
        return self.combine(other, lambda x, y: torch.cat([x, y]))

    def __getitem__(self, rows: Any) -> "Tokens":
        return self.map(lambda x: x[rows])

    def __len__(self) -> int:
        return len(self.cls)


class TransformerEnd(nn.Module):
    """The last blocks of a transformer with its final norm and pooling: tap tokens to ``cls [B, D]``."""

    tail: Any

    def __init__(self, model: nn.Module, blocks: int, block_kwargs: Mapping[str, Any], has_class_token: bool) -> None:
        super().__init__()
        self.has_class_token = has_class_token
        # Rotary embeddings and the like that a block is called with travel with the end.
        self.constants = {k: v for k, v in block_kwargs.items() if v is not None and not isinstance(v, Tensor)}
        self.buffer_names = [k for k, v in block_kwargs.items() if isinstance(v, Tensor)]
        for name in self.buffer_names:
            self.register_buffer(f"block_{name}", block_kwargs[name].cpu().clone(), persistent=False)
        tail: Any = _without(model, _before(model, "blocks"))
        tail.blocks = tail.blocks[-blocks:]
        for parameter in ("pos_embed", "cls_token", "reg_token", "dist_token"):
            if getattr(tail, parameter, None) is not None:
                setattr(tail, parameter, None)
        self.tail = tail

    def forward(self, tokens: Tokens) -> Tensor:
        """Tap tokens to the final class embedding ``[B, D]``."""
        return self.tail.forward_head(self._refined(tokens), pre_logits=True)

    def patch_tokens(self, tokens: Tokens) -> Tensor:
        """Tap tokens to the patch tokens after the final norm, ``[B, P, D]``."""
        x = self._refined(tokens)
        return x[:, x.shape[1] - tokens.patches.shape[1] :]

    def _refined(self, tokens: Tokens) -> Tensor:
        parts = [tokens.registers, tokens.patches]
        if self.has_class_token:
            parts.insert(0, tokens.tap_cls[:, None])
        x = torch.cat(parts, dim=1)  # (B, 1 + R + P, D')
        kwargs = self.constants | {name: getattr(self, f"block_{name}") for name in self.buffer_names}
        for block in self.tail.blocks:
            x = block(x, **kwargs)
        return self.tail.norm(x)


class ConvolutionalEnd(nn.Module):
    """The last stages of a convolutional net with its head convolution, norm and pooling: tap map to ``cls [B, D]``."""

    tail: Any

    def __init__(self, model: nn.Module, stem: list[str], stages: str | None, keep: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        tail: Any = _without(model, stem)
        if stages is not None:
            setattr(tail, stages, getattr(tail, stages)[-keep:])
        self.tail = tail

    def forward(self, tokens: Tokens) -> Tensor:
        """Tap tokens to the pooled final vector ``[B, D]``."""
        return self.tail.forward_head(self._map(tokens), pre_logits=True)

    def patch_tokens(self, tokens: Tokens) -> Tensor:
        """Tap tokens to the pixels of the map that is pooled, ``[B, P, D]``."""
        return self._map(tokens).flatten(2).transpose(1, 2)

    def _map(self, tokens: Tokens) -> Tensor:
        patches = tokens.patches if tokens.patches.shape[1] else tokens.tap_cls[:, None]
        height, width = self.grid if patches.shape[1] == self.grid[0] * self.grid[1] else _square(patches.shape[1])
        x = patches.transpose(1, 2).unflatten(2, (height, width))  # (B, D', h, w)
        x = x.contiguous(memory_format=torch.channels_last)
        return self.tail.forward_features(x)


class ResidualEnd(nn.Module):
    """Stands in where a backbone's end cannot be cut out: ``cls`` plus a block whose last layer starts at zero."""

    def __init__(self, dim: int, tap_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim + tap_dim)
        self.hidden = nn.Linear(dim + tap_dim, dim)
        self.out = nn.Linear(dim, dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def patch_tokens(self, tokens: Tokens) -> Tensor:
        """The patches as they were cached: such a backbone's are those that the whole network ends in."""
        return tokens.patches

    def forward(self, tokens: Tokens) -> Tensor:
        """``cls`` and the tap's class token to refined ``cls``, ``[B, D]``."""
        x = self.norm(torch.cat([tokens.cls, tokens.tap_cls], dim=1))
        return tokens.cls + self.out(F.gelu(self.hidden(x)))


BackboneEnd = TransformerEnd | ConvolutionalEnd | ResidualEnd


class Backbone:
    """A frozen timm model that gives `Tokens`, with the transform that its weights carry.

    Args:
        model: timm model without classifier (``num_classes=0``), in evaluation mode.
        config: what it was built from.
        expert_blocks: how many last blocks (transformer) or stages (convolutional net) lie behind the tap.
        device: where it runs.
        detach_end: whether gradients of ``cls`` end at the tap where the model is trained: what learns from the other
            tokens then shapes the blocks before the tap alone, and the backbone's own end follows them.
        weights_notes: what is to be said of the file that its weights came from, a line each.

    Attributes:
        dim, tap_dim: D and D'.
        batch: images of one forward pass of an extraction.
        precision: what it computes in, "auto" resolved.
        n_registers: R, prefix tokens other than the class token.
        grid: ``(h, w)`` of the patch tokens.
        cut: whether the end could be cut out; if not, `end` gives a `ResidualEnd`.
    """

    def __init__(
        self,
        model: nn.Module,
        config: BackboneConfig,
        expert_blocks: int = 1,
        device: str | torch.device = "cpu",
        detach_end: bool = False,
        weights_notes: Sequence[str] = (),
    ) -> None:
        keep_freed_memory()
        self.config = config
        self.expert_blocks = expert_blocks
        self.weights_notes = tuple(weights_notes)
        self.device = torch.device(device)
        self.batch = COMPUTE_BATCH.get(self.device.type, COMPUTE_BATCH["cuda"])
        self.precision = config.precision
        if config.precision == "auto":
            self.precision = "float32" if self.device.type == "cpu" else "float16"
        self.model: Any = model.eval().requires_grad_(False).to(self.device)
        self.has_class_token = getattr(model, "cls_token", None) is not None
        self.convolutional = not hasattr(model, "patch_embed")
        if self.convolutional:
            self.model.to(memory_format=torch.channels_last)  # 3 to 4 times faster convolutions on CPU
        self._tap_stages, tapped = _tap_module(model, expert_blocks, config.name)
        self._tap = _Tap(detach_end)
        self._hook = None if tapped is None else tapped.register_forward_pre_hook(self._tap, with_kwargs=True)
        self._block_kwargs: Mapping[str, Any] = {}
        self.data_config = transform_config(model, config)
        self._transform: Callable[[Image.Image], Tensor] = timm.data.create_transform(**self.data_config)
        self._describe()
        if config.compile:
            for part in _parts(self.model):  # what a hook sees stays outside
                part.forward = torch.compile(part.forward, dynamic=False)

    def _describe(self) -> None:
        """Measure shapes, and whether the cut-out end reproduces the backbone, on two noise images."""
        size = self.config.image_size
        noise = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(self.device)
        self.grid: tuple[int, int] = (0, 0)
        try:
            tokens = self._encode(noise)
            self._block_kwargs = self._tap.kwargs
        except (RuntimeError, AssertionError, ValueError) as error:  # windows or strides that do not divide the map
            raise InputError(
                f"backbone.image_size: {self.config.name} does not run at {size} px ({first_line(error)}): "
                "give the size that it was trained at"
            ) from error
        self.cut = self._hook is not None and self._end_reproduces(tokens)
        if not self.cut and self._hook is not None:
            self._hook.remove()  # read what the whole network ends in: only there does its family's layout hold
            self._hook = None
            tokens = self._encode(noise)
        self.dim, self.tap_dim = tokens.cls.shape[1], tokens.tap_cls.shape[1]
        self.n_registers = tokens.registers.shape[1]

    @torch.inference_mode()
    def _end_reproduces(self, tokens: Tokens) -> bool:
        try:
            error = (self._cut_end().to(self.device)(tokens) - tokens.cls).abs().max()
        except Exception:  # a family whose parts do not run by themselves fails in its own way
            return False
        return bool(error <= END_TOLERANCE * tokens.cls.abs().max())

    def transform(self, image: Image.Image) -> Tensor:
        """The transform that the weights carry, or that the experiment asks for.

        Args:
            image: RGB, upright.

        Returns:
            ``[3, H, W]`` float32.

        Raises:
            ImageError: so elongated that resizing its short side would make it larger than any image may be.
        """
        short, long = sorted(image.size)
        side = self.config.image_size / self.data_config["crop_pct"]
        if side * side * long / short > MAX_PIXELS:
            raise ImageError(f"too elongated: {image.width} x {image.height} pixels")
        return self._transform(image)

    def transform_notes(self) -> list[str]:
        """What is not as recipe or weights have it, or not known: a line each; wrong features often come from there."""
        return transform_notes(self.data_config, self.config)

    def notes(self) -> list[str]:
        """What is to be said before its features are used, a line each: of its weights, and of its transform."""
        return [*self.weights_notes, *(f"warning: {note}" for note in self.transform_notes())]

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tokens:
        """One forward pass; safe in threads.

        Args:
            images: ``[B, 3, H, W]`` float32, transformed.

        Returns:
            `Tokens` in float32 on the backbone's device.
        """
        if self.precision == "float32":
            return self._encode(images)
        with torch.autocast(self.device.type, _AUTOCAST[self.precision]):
            tokens = self._encode(images)
        return tokens.map(Tensor.float)

    @torch.inference_mode()
    def _encode(self, images: Tensor) -> Tokens:
        return self.tokens(images)

    def tokens(self, images: Tensor) -> Tokens:
        """One forward pass in the precision of its input; `Tokens` with their graph where the model is trained.

        Args:
            images: ``[B, 3, H, W]`` on the backbone's device, transformed.
        """
        if self.convolutional:
            images = images.contiguous(memory_format=torch.channels_last)
        self._tap.tokens = None
        final = self.model.forward_features(images)
        tap, self._tap.tokens = self._tap.tokens, None
        return self._split(self.model.forward_head(final, pre_logits=True), final if tap is None else tap)

    def _split(self, cls: Tensor, tap: Any) -> Tokens:
        if not isinstance(tap, Tensor) or not isinstance(cls, Tensor):
            raise InputError(
                f"backbone.name: {self.config.name} ends in several sequences of tokens at once: "
                "its family cannot be read; take another"
            )
        if tap.ndim == 4:  # a map (B, D', h, w), or (B, h, w, D') in Swin and its kin
            if str(getattr(self.model, "output_fmt", "NCHW")).endswith("NHWC"):
                tap = tap.permute(0, 3, 1, 2)
            self.grid = (tap.shape[2], tap.shape[3])
            patches = tap.flatten(2).transpose(1, 2)
            return Tokens(cls, patches.mean(1), patches[:, :0], patches)
        first = int(self.has_class_token)
        prefix = int(getattr(self.model, "num_prefix_tokens", first))
        patches = tap[:, prefix:]
        grid = getattr(getattr(self.model, "patch_embed", None), "grid_size", None) or (0, 0)
        # A pyramid has fewer tokens at its end than its patch embedding made.
        self.grid = tuple(grid) if grid[0] * grid[1] == patches.shape[1] else _square(patches.shape[1])
        tap_cls = tap[:, 0] if self.has_class_token else patches.mean(1)
        return Tokens(cls, tap_cls, tap[:, first:prefix], patches)

    @torch.inference_mode()
    def end_reads(self, patches: str) -> bool:
        """Whether a copy of the end runs, and sees something, on tokens of which the ``patches`` option leaves a part.

        Rotary embeddings and relative positions of some families ask for all patches.
        """
        size = self.config.image_size
        noise = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(self.device)
        return runs_on(self.end(), reduce_patches(self._encode(noise), self.grid, patches).map(lambda x: x.cpu()))

    def end(self) -> BackboneEnd:
        """A fresh, trainable copy of everything behind the tap, on the CPU."""
        end = self._cut_end() if self.cut else ResidualEnd(self.dim, self.tap_dim)
        return end.requires_grad_(True).eval()

    def _cut_end(self) -> BackboneEnd:
        model = self.model.to("cpu")
        end: TransformerEnd | ConvolutionalEnd
        try:
            if not self.convolutional:
                end = TransformerEnd(model, self.expert_blocks, self._block_kwargs, self.has_class_token)
            else:
                stem, stages = self._tap_stages
                end = ConvolutionalEnd(model, stem, stages, self.expert_blocks, self.grid)
        finally:
            self.model.to(self.device)
        for (
            module
        ) in end.modules():  # neither the tap nor what is compiled for the backbone's own tensors travels along
            module._forward_pre_hooks.clear()
            module._forward_pre_hooks_with_kwargs.clear()
            module.__dict__.pop("forward", None)
        return end

    def feature_spec(self, dtype: Literal["float16", "float32"], patches: str) -> FeatureSpec:
        """What a cache made with this backbone holds.

        Args:
            dtype: how features are stored.
            patches: ``"full"``, ``"pool:G"`` (adaptive average to G x G) or ``"none"``.
        """
        transform = {k: list(v) if isinstance(v, tuple) else v for k, v in self.data_config.items()}
        if self.config.recipe == "official":  # unsaid it is timm's, as in the caches from before there was another
            transform["recipe"] = "official"
        return FeatureSpec(
            backbone=self.config.name,
            weights_sha=weights_sha(self.model),
            transform=transform,
            image_size=self.config.image_size,
            expert_blocks=self.expert_blocks,
            patches=patches,
            dtype=dtype,
            cls_dim=self.dim,
            tap_dim=self.tap_dim,
            n_registers=self.n_registers,
            grid=stored_grid(self.grid, patches),
            compute={
                "precision": self.precision,
                "device": self.device.type,
                "batch": self.batch,
                "threads": COMPUTE_THREADS,
                "memory_format": "channels_last" if self.convolutional else "contiguous",
                "compiled": self.config.compile,
            },
            semantics=EXTRACTION_SEMANTICS,
        )


def default_device() -> str:
    """Where networks run: on a GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_backbone(config: BackboneConfig, expert_blocks: int = 1, device: str | torch.device = "cpu") -> Backbone:
    """Build a timm model with the weights that an experiment asks for.

    Args:
        config: name, weights (``"hub"``, ``"embedded"`` or a local file), recipe and image size.
        expert_blocks: how many last blocks or stages lie behind the tap.
        device: where it runs.

    Raises:
        InputError: unknown model, weights that cannot be had or do not fit, an image size that does not fit.
    """
    loaded = load_model(config)
    return Backbone(loaded.model, config, expert_blocks, device, weights_notes=loaded.notes)


def build_architecture(config: BackboneConfig, expert_blocks: int = 1) -> Backbone:
    """The same network with untrained weights: the shape into which stored experts are loaded."""
    return Backbone(create_model(config), config, expert_blocks)


def weights_sha(model: nn.Module) -> str:
    """SHA-256 over names, shapes and bytes of a model's tensors."""
    return arrays_sha256({name: tensor.cpu().numpy() for name, tensor in model.state_dict().items()})


@torch.inference_mode()
def runs_on(end: nn.Module, tokens: Tokens) -> bool:
    """Whether an end (or what is made of ends) runs on such tokens, and tells two images or more apart by them."""
    try:
        features = end(tokens)
    except (RuntimeError, ValueError, AssertionError):  # as the architecture's own code has it
        return False
    return bool(torch.isfinite(features).all() and (features != features[:1]).any())


def reduce_patches(tokens: Tokens, grid: tuple[int, int], option: str) -> Tokens:
    """Apply the cache's ``patches`` option: ``"full"``, ``"pool:G"`` or ``"none"``."""
    if option == "full":
        return tokens
    if option == "none":
        return Tokens(tokens.cls, tokens.tap_cls, tokens.registers, tokens.patches[:, :0])
    maps = tokens.patches.transpose(1, 2).unflatten(2, grid)
    pooled = F.adaptive_avg_pool2d(maps, stored_grid(grid, option)).flatten(2).transpose(1, 2)
    return Tokens(tokens.cls, tokens.tap_cls, tokens.registers, pooled)


def stored_grid(grid: tuple[int, int], option: str) -> tuple[int, int]:
    """``(h, w)`` of the patch tokens that the ``patches`` option leaves."""
    if option == "none":
        return (0, 0)
    if option == "full":
        return grid
    side = int(option.removeprefix("pool:"))
    return (side, side)


def _tap_module(
    model: nn.Module, expert_blocks: int, name: str
) -> tuple[tuple[list[str], str | None], nn.Module | None]:
    """The first module behind the tap, with what stands before it: ((children, sequence to shorten), module)."""
    for sequence in ("blocks", "stages"):
        parts = getattr(model, sequence, None)
        if isinstance(parts, nn.Sequential | nn.ModuleList) and len(parts) > 1:
            _check_depth(expert_blocks, len(parts), name)
            return (_before(model, sequence), sequence), parts[-expert_blocks]
    numbered = [child for child, _ in model.named_children() if child in {f"layer{i}" for i in range(1, 9)}]
    if len(numbered) > 1:
        _check_depth(expert_blocks, len(numbered), name)
        first = numbered[-expert_blocks]
        return (_before(model, first), None), getattr(model, first)
    return ([], None), None


def _parts(model: nn.Module) -> list[Any]:
    """The blocks or stages that a backbone is made of."""
    for sequence in ("blocks", "stages"):
        if isinstance(parts := getattr(model, sequence, None), nn.Sequential | nn.ModuleList):
            return list(parts)
    return [module for name, module in model.named_children() if name.startswith("layer")] or [model]


def freeze_first(model: nn.Module, n: int, key: str) -> None:
    """Keep the first n blocks or stages of a timm model as they are, and all that stands before them; train the rest.

    Args:
        model: with its head.
        n: 0 freezes nothing.
        key: what asked for it, for the error.

    Raises:
        InputError: there are not as many, or the family has no such sequence.
    """
    model.requires_grad_(True)
    if n == 0:
        return
    parts = _parts(model)
    if n > len(parts) or parts == [model]:
        raise InputError(f"{key}: {n} given, the backbone has {len(parts)} blocks or stages that can stay as they are")
    names = [name for name, _ in model.named_children()]
    last = next(name for name in reversed(names) if getattr(model, name) is parts[-1] or name in ("blocks", "stages"))
    after = [getattr(model, name) for name in names[names.index(last) + 1 :]]
    model.requires_grad_(False)
    for part in [*parts[n:], *after]:
        part.requires_grad_(True)


def n_parts(model: nn.Module) -> int:
    """How many blocks (transformer) or stages (convolutional net) a timm model is made of."""
    return len(_parts(model))


def compile_parts(model: nn.Module) -> None:
    """Let torch.compile replace the forward pass of each block or stage, and not what holds them together."""
    for part in _parts(model):
        part.forward = torch.compile(part.forward)


class _Tap(threading.local):
    """Hook that keeps what entered a module in the forward pass that this thread runs."""

    tokens: Tensor | None = None
    kwargs: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, detaches: bool = False) -> None:  # runs once in every thread, with the same argument
        self.detaches = detaches

    def __call__(
        self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]] | None:
        self.tokens, self.kwargs = args[0], kwargs
        return ((args[0].detach(), *args[1:]), kwargs) if self.detaches else None

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Tap":
        return self  # a copy of the module has no use for it


def _check_depth(expert_blocks: int, depth: int, name: str) -> None:
    if expert_blocks >= depth:
        raise InputError(f"cache.expert_blocks: {expert_blocks} given, {name} has {depth}: give at most {depth - 1}")


def _before(model: nn.Module, child: str) -> list[str]:
    names = [name for name, _ in model.named_children()]
    return names[: names.index(child)]


def _without(model: nn.Module, children: list[str]) -> nn.Module:
    """A deep copy of a model in which the named children are the identity."""
    kept = {name: getattr(model, name) for name in children}
    for name in children:
        setattr(model, name, nn.Identity())
    try:
        return copy.deepcopy(model)
    finally:
        for name, module in kept.items():
            setattr(model, name, module)


def _square(count: int) -> tuple[int, int]:
    side = round(count**0.5)
    return (side, side) if side * side == count else (1, count)
