"""Backbones: any timm model, its weights, its own transform, and its end cut out for experts.

A backbone is read at two places in one forward pass::

    image ── stem, first blocks ──┬── last `expert_blocks` blocks ── norm, pooling ── cls  [B, D]
                                  └── tap: tap_cls [B, D'], registers [B, R, D'], patches [B, P, D']

What lies right of the tap is `BackboneEnd`; run on the cached tap it gives `cls` again, and a copy of it is what
every expert starts from.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from cache import FeatureSpec
from cache.fingerprint import arrays_sha256
from cache.spec import square_grid
from stages.config import BackboneConfig
from stages.errors import InputError
from stages.machine import keep_freed_memory
from stages.networks.batch import CHOICES, batch_of_gpu
from stages.networks.compute import COMPUTE_BATCH, COMPUTE_THREADS, EXTRACTION_SEMANTICS
from stages.networks.end_check import reproduces, runs_on
from stages.networks.ends import BackboneEnd, ConvolutionalEnd, ResidualEnd, TransformerEnd
from stages.networks.preprocessing import Preprocessing
from stages.networks.repeatable import repeatable
from stages.networks.surgery import compile_parts, find_cut, restore_forward, uncompile_parts
from stages.networks.taps import AskedTaps, TapLayout, Taps, layout_of, stacked
from stages.networks.tokens import Tokens, reduce_patches, stored_grid
from stages.networks.weights.loading import create_model, first_line, load_model, transform_config, transform_notes

_AUTOCAST = {"float16": torch.float16, "bfloat16": torch.bfloat16}


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
        precision: what it computes in, "auto" resolved.
        preprocessing: from a decoded image to what it takes.
        n_registers: R, prefix tokens other than the class token.
        grid: ``(h, w)`` of the patch tokens.
        compiled: whether torch.compile has replaced forward passes of its parts.
        cut: whether the end could be cut out; if not, `end` gives a `ResidualEnd`.
        taps: reads what stands after its blocks or stages.
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
        self.precision = config.precision
        if config.precision == "auto":
            self.precision = "float32" if self.device.type == "cpu" else "float16"
        self.model: Any = model.eval().requires_grad_(False).to(self.device)
        self.has_class_token = getattr(model, "cls_token", None) is not None
        self.convolutional = not hasattr(model, "patch_embed")
        if self.convolutional:
            self.model.to(memory_format=torch.channels_last)  # 3 to 4 times faster convolutions on CPU
        self._place = find_cut(model, expert_blocks, config.name)
        self._tap = _Tap(detach_end)
        self._hook = None
        if self._place is not None:
            self._hook = self._place.module.register_forward_pre_hook(self._tap, with_kwargs=True)
        self.taps = Taps(model)
        self._block_kwargs: Mapping[str, Any] = {}
        self.data_config = transform_config(model, config)
        self.preprocessing = Preprocessing(self.data_config, config.decode)
        with repeatable(self.device):
            self._describe()
        self.compiled = False
        if config.compile is True:
            self.compile()

    def _describe(self) -> None:
        """Measure shapes, and whether the cut-out end reproduces the backbone, on two noise images."""
        size = self.config.image_size
        self.grid: tuple[int, int] = (0, 0)
        try:
            tokens = self._encode(noise := self._noise())
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
        self._of_noise = tokens
        self.dim, self.tap_dim = tokens.cls.shape[1], tokens.tap_cls.shape[1]
        self.n_registers = tokens.registers.shape[1]
        self.taps.n_tokens = int(self.has_class_token) + self.n_registers + tokens.patches.shape[1]

    def _noise(self) -> Tensor:
        size = self.config.image_size
        return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(self.device)

    def _end_reproduces(self, tokens: Tokens) -> bool:
        try:
            return reproduces(self._cut_end().to(self.device), tokens)
        except Exception:  # a family whose parts do not run by themselves fails in its own way
            return False

    def compile(self) -> None:
        """Let torch.compile replace the forward passes of its blocks or stages, if it does not yet."""
        if not self.compiled:
            self.batches  # noqa: B018  # by passes of other sizes, none of which is to be compiled
            compile_parts(self.model, dynamic=False)  # what a hook sees stays outside
            self.compiled = True

    def uncompile(self) -> None:
        """Take that back."""
        uncompile_parts(self.model)
        self.compiled = False

    @property
    def batch(self) -> int:
        """Images of one forward pass of an extraction, as chosen now; caches that are there say what it was then."""
        return self.batches[0]

    @cached_property
    def batches(self) -> tuple[int, ...]:
        """`batch`, and on a GPU what its memory may have chosen at another time instead."""
        if self.config.batch != "auto":
            return (self.config.batch,)
        if self.device.type == "cpu":
            return (COMPUTE_BATCH["cpu"],)
        with repeatable(self.device):
            chosen = batch_of_gpu(self.encode, self.config.image_size, self.device)
        return chosen, *(n for n in reversed(CHOICES) if n != chosen)

    @property
    def choices(self) -> list[dict[str, Any]]:
        """What a GPU has chosen for an extraction or may have at another time, as `FeatureSpec.compute` has it.

        The first is what `feature_spec` says; where nothing is left to choose it is the only one.
        """
        chooses = self.config.compile == "auto" and self.device.type != "cpu"
        ways = (False, True) if chooses else (self.config.compile is True,)
        return [{"batch": batch, "compiled": compiled} for compiled in ways for batch in self.batches]

    def transform(self, image: Image.Image) -> Tensor:
        """The transform that the weights carry, or that the experiment asks for.

        Args:
            image: RGB, upright.

        Returns:
            ``[3, H, W]`` float32.

        Raises:
            ImageError: see `Preprocessing.pixels`.
        """
        return self.preprocessing.normalise(self.preprocessing.pixels(image))

    def transform_notes(self) -> list[str]:
        """What is not as recipe or weights have it, or not known: a line each; wrong features often come from there."""
        return transform_notes(self.data_config, self.config)

    def notes(self) -> list[str]:
        """What is to be said before its features are used, a line each: of its weights, and of its transform."""
        return [*self.weights_notes, *(f"warning: {note}" for note in self.transform_notes())]

    @contextmanager
    def computing_in(self, precision: Literal["float32", "float16", "bfloat16"]) -> Iterator[None]:
        """Encode in another precision than its own, in all threads; afterwards it is as before."""
        own, self.precision = self.precision, precision
        try:
            yield
        finally:
            self.precision = own

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
    def encode_with_taps(self, images: Tensor, taps: Sequence[int]) -> tuple[Tokens, Tensor]:
        """The same pass, and the tokens after some blocks or stages, float32 (see `stages.networks.taps.stacked`).

        Args:
            images: as of `encode`.
            taps: numbers from 1, ascending.
        """
        with self.taps.reading(taps) as found:
            tokens = self.encode(images)
        return tokens, stacked(found)

    @torch.inference_mode()
    def tap_layout(self, asked: AskedTaps) -> TapLayout:
        """What taps of a network are, measured on noise.

        Args:
            asked: numbers of blocks or stages from 1, all there are, or None for none.

        Raises:
            InputError: blocks or stages that it does not have, or that cannot be read.
        """
        if asked is None:
            return TapLayout()
        with self.taps.reading(self.taps.numbers(asked, self.config.name)) as found, repeatable(self.device):
            self._encode(self._noise())
        return layout_of(found, self.config.name)

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
        self.grid = tuple(grid) if grid[0] * grid[1] == patches.shape[1] else square_grid(patches.shape[1])
        tap_cls = tap[:, 0] if self.has_class_token else patches.mean(1)
        return Tokens(cls, tap_cls, tap[:, first:prefix], patches)

    @torch.inference_mode()
    def end_reads(self, patches: str) -> bool:
        """Whether a copy of the end runs, and sees something, on tokens of which the ``patches`` option leaves a part.

        Rotary embeddings and relative positions of some families ask for all patches.
        """
        tokens = reduce_patches(self._of_noise, self.grid, patches)
        return runs_on(self.end(), tokens.map(lambda x: x.cpu()))

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
                assert self._place is not None  # or there would be no end to cut out
                end = ConvolutionalEnd(model, self._place, self.expert_blocks, self.grid)
        finally:
            self.model.to(self.device)
        restore_forward(end)  # neither the tap nor what is compiled for the backbone's own tensors travels along
        return end

    def feature_spec(self, dtype: Literal["float16", "float32"], patches: str, taps: AskedTaps = None) -> FeatureSpec:
        """What a cache made with this backbone holds.

        Args:
            dtype: how features are stored.
            patches: ``"full"``, ``"pool:G"`` (adaptive average to G x G) or ``"none"``.
            taps: as of `tap_layout`.
        """
        transform = {k: list(v) if isinstance(v, tuple) else v for k, v in self.data_config.items()}
        if self.config.recipe == "official":  # unsaid it is timm's, as in the caches from before there was another
            transform["recipe"] = "official"
        if self.config.decode != "pil":  # unsaid it is Pillow's, likewise
            transform["decode"] = self.config.decode
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
                "compiled": self.config.compile is True,
                **({} if self.device.type == "cpu" else {"tf32": False}),  # see `repeatable`
            },
            semantics=EXTRACTION_SEMANTICS,
            **self.tap_layout(taps)._asdict(),
        )


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


def network_of(backbone: Backbone) -> tuple[str, str, int, int]:
    """What a table of features says of the network whose end reads its tokens: `ArrayTable.spec`'s ``end``."""
    config = backbone.config
    return config.name, weights_sha(backbone.model), backbone.expert_blocks, config.image_size


def weights_sha(model: nn.Module) -> str:
    """SHA-256 over names, shapes and bytes of a model's tensors."""
    return arrays_sha256({name: tensor.cpu().numpy() for name, tensor in model.state_dict().items()})


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
