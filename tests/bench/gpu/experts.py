"""Experts of a batch one after another and stacked as one network: what they compute, and how fast."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from stages.mixture.config import MixtureConfig
from stages.mixture.model import MixtureOfFeatureExperts, build_mixture
from stages.networks.backbone import Backbone
from stages.networks.stacked import pays
from stages.networks.tokens import Tokens
from tests.bench.gpu.step import Bench
from tests.bench.gpu.subjects import named_network, network, placed, rate

# Relative to the largest value; in bfloat16 both ways round differently.
TOLERANCES = {"float32": 1e-3, "bfloat16": 5e-2}
WAYS = {"one after another": False, "stacked": True}


def compare(bench: Bench, name: str) -> None:
    """Both ways give the same features, outputs and gradients; then rows a second of both, as in training."""
    config = named_network(bench, name, batch=bench.sizes.tuned_batch)
    backbone = placed(network(config), config, bench.device)
    images = torch.randn(64, 3, *[config.image_size] * 2, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        tokens = backbone.encode(images.to(bench.device)).map(lambda x: x.float())
    tokens = tokens.map(torch.clone)  # outside of inference mode: gradients are needed
    say_differences(bench, mixture_of(backbone, 4, bench.device), tokens)
    for experts in bench.sizes.experts:
        mixture = mixture_of(backbone, experts, bench.device)
        for n_rows in bench.sizes.batches:
            say_rates(bench, mixture, tokens, n_rows)


def mixture_of(backbone: Backbone, experts: int, device: str) -> MixtureOfFeatureExperts:
    """Experts of four classes each, none as it began."""
    config = MixtureConfig(backbone.dim, backbone.tap_dim, tuple(np.repeat(np.arange(experts), 4).tolist()))
    mixture = build_mixture(config, backbone.end)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return mixture.to(device)


def shown(experts: int, n_rows: int) -> list[int]:
    """``[E]`` rows that each expert of a training gets of a batch: its own, and as many others."""
    own = np.bincount(np.random.default_rng(0).integers(0, experts, n_rows), minlength=experts)
    return [2 * int(count) for count in own]


def say_differences(bench: Bench, mixture: MixtureOfFeatureExperts, tokens: Tokens) -> None:
    """In features, heads' outputs and gradients, one expert without a row; every precision."""
    counts = [len(tokens) // 2, 0, len(tokens) // 4, len(tokens) - len(tokens) // 2 - len(tokens) // 4]
    for precision, tolerance in TOLERANCES.items():
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        found = []
        for stacked in WAYS.values():
            mixture.stacked.forced = stacked
            # By torch's default convolutions round their inputs to the 10 bits of TF32.
            with (
                torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
                torch.autocast(bench.device, dtype, enabled=precision != "float32"),
            ):
                found.append(learned(mixture, tokens, counts))
        for what, alone, ours in zip(("features", "outputs", "gradients"), *found, strict=True):
            error = max(float((x - y).abs().max() / x.abs().max()) for x, y in zip(alone, ours, strict=True))
            bench.measure(f"{precision}: {what}, relative to one after another", error, at_most=tolerance)


def learned(
    mixture: MixtureOfFeatureExperts, tokens: Tokens, counts: list[int]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Features and outputs, and the gradients of the weights that have any."""
    mixture.zero_grad(set_to_none=True)
    parts = list(mixture.refine(counts, lambda rows: tokens[rows]))
    features, outputs = (torch.cat([part[place].float() for part in parts]) for place in (1, 2))
    (outputs.log_softmax(1)[:, 0].sum() + features.square().sum()).backward()
    gradients = [p.grad for p in mixture.experts.parameters() if p.grad is not None]
    return [features.detach()], [outputs.detach()], [grad for grad in gradients if bool(grad.abs().max() > 0)]


def say_rates(bench: Bench, mixture: MixtureOfFeatureExperts, tokens: Tokens, n_rows: int) -> None:
    """Rows a second that experts get in training, forwards and backwards, of a batch of so many."""
    counts = shown(mixture.n_experts, n_rows)
    place = torch.arange(sum(counts), device=bench.device) % len(tokens)
    title = f"E = {mixture.n_experts}, batch of {n_rows}"
    found = {}
    for way, stacked in WAYS.items():
        mixture.stacked.forced = stacked
        if bench.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        found[way] = rate(bench, sum(counts), step(bench.device, mixture, lambda rows: tokens[place[rows]], counts))
        bench.measure(f"{title}: {way}", found[way], "rows/s")
        if bench.device == "cuda":
            bench.measure(f"{title}: {way}, peak memory", torch.cuda.max_memory_allocated() / 2**20, "MiB")
    bench.measure(f"{title}: stacked / one after another", found["stacked"] / found["one after another"])
    bench.measure(f"{title}: computed rows / rows", max(counts) * np.count_nonzero(counts) / sum(counts))
    chosen = pays(counts, mixture.stacked.work_of(tokens), torch.device(bench.device))
    bench.measure(f"{title}: stacked by the rule (1: yes)", chosen)


def step(
    device: str, mixture: MixtureOfFeatureExperts, take: Callable[[slice | Tensor], Tokens], counts: list[int]
) -> Callable[[], None]:
    """A step without the optimiser's, in the precision of a training."""

    def run() -> None:
        mixture.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = sum(part.outputs.log_softmax(1)[:, 0].sum() for part in mixture.refine(counts, take))
        assert isinstance(loss, Tensor)
        loss.backward()

    return run
