"""Images a second: the decoder alone, stage one from JPEG files, and the bare forward pass that is its limit."""

import copy
import shutil
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stages.errors import StageError
from stages.extract import extract_set
from stages.extraction.reader import Reader
from stages.inputs.images import list_images
from stages.machine import usable_cores
from stages.networks.backbone import Backbone
from stages.networks.compiling import compiler_errors, try_compiling
from stages.networks.repeatable import repeatable
from stages.networks.surgery import compile_parts
from tests.bench.gpu.step import Bench, NotRun
from tests.bench.gpu.subjects import jpegs, named_network, network, placed, rate

HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_numbers = count()


def decoder(bench: Bench) -> None:
    """Read, hash, decode and resize in 1, 2, 4, … threads, and nothing else."""
    config = named_network(bench, "small")
    backbone = placed(network(config), config, bench.device)
    table = list_images(str(jpegs(bench, bench.sizes.jpegs)))
    reader = Reader(table.reader(), backbone.preprocessing)
    threads = 1
    while True:
        with ThreadPoolExecutor(threads) as pool:
            n = min(len(table), 64 * threads)
            decoded = rate(bench, n, partial(_read, pool, reader, n))
        bench.measure(f"read, hash, decode, resize: {threads} threads", decoded, "images/s")
        if threads >= usable_cores():
            break
        threads = min(2 * threads, usable_cores())


def _read(pool: ThreadPoolExecutor, reader: Reader, n: int) -> None:
    deque(pool.map(reader.read, range(n)), maxlen=0)


def extraction(bench: Bench, name: str, large: bool = False) -> None:
    """Stage one from JPEG files beside eager forward passes of the same batches in memory."""
    config = named_network(bench, name, large)
    model = network(config)
    backbone = placed(copy.deepcopy(model), config, bench.device, precision="float16")
    stage_one(bench, backbone, jpegs(bench, bench.sizes.jpegs), "full")  # warms up
    pace = stage_one(bench, backbone, jpegs(bench, bench.sizes.jpegs), "full")
    folder = jpegs(bench, as_many(bench, pace))
    bench.measure("images of a pass, as memory allows", backbone.batch)
    limit = forward_rate(bench, backbone, backbone.encode)
    bench.measure("bare forward, autocast to float16", limit, "images/s")
    for patches in ("full", "none"):
        ours = stage_one(bench, backbone, folder, patches)
        bench.measure(f"extraction, float16, patches = {patches}", ours, "images/s")
        bench.measure(f"the same / bare forward, patches = {patches}", ours / limit)
    for what, dtype in HALVES.items():
        bare = forward_rate(bench, backbone, passes_of(halved(model, dtype, bench.device)))
        bench.measure(f"bare eager, weights in {what}", bare, "images/s")


def as_many(bench: Bench, pace: float) -> int:
    """Images that take some seconds at a pace of so many a second."""
    n = min(bench.sizes.listed, int(pace * bench.sizes.extraction_s))
    return bench.sizes.jpegs * max(1, round(n / bench.sizes.jpegs))


def compiled(bench: Bench, name: str, large: bool = False) -> None:
    """The bare forward pass, its blocks or stages compiled as an extraction has them."""
    if bench.device != "cuda":
        raise NotRun("for the CPU it would compile C++, which takes minutes")
    config = named_network(bench, name, large)
    model = network(config)
    backbone = placed(copy.deepcopy(model), config, bench.device)
    started = time.perf_counter()
    half = halved(model, torch.float16, bench.device)
    compile_parts(half, dynamic=False)
    try:
        with compiler_errors():
            bare = forward_rate(bench, backbone, passes_of(half))
    except StageError as error:
        raise NotRun(str(error)) from error
    bench.measure("bare compiled, weights in float16", bare, "images/s")
    bench.measure("compilation, at most", time.perf_counter() - started, "s")


def trial(bench: Bench, name: str) -> None:
    """What `compile = "auto"` finds: passes of an extraction without and with torch.compile, and where it pays."""
    if bench.device == "cpu":
        raise NotRun("on a CPU nothing chooses to compile")
    config = named_network(bench, name)
    backbone = placed(network(config), config, bench.device, precision="float16")
    try:
        with repeatable(bench.device):  # as an extraction runs its passes
            found = try_compiling(backbone, backbone.batch)
    except StageError as error:
        raise NotRun(str(error)) from error
    bench.measure("passes as they are", backbone.batch / found.plain, "images/s")
    bench.measure("compiled", backbone.batch / found.compiled, "images/s")
    bench.measure("compiling", found.compiling, "s")
    if found.plain > found.compiled:
        bench.measure("pays from", found.compiling / (found.plain - found.compiled) * backbone.batch, "images")


def stage_one(bench: Bench, backbone: Backbone, folder: Path, patches: str) -> float:
    """Images a second from the list of files to the sealed cache, which is removed."""
    samples, spec = list_images(str(folder)), backbone.feature_spec("float16", patches)
    root = bench.scratch / f"extracted-{next(_numbers)}"
    start = time.perf_counter()
    cache = extract_set("bench", samples, spec, root, lambda: backbone)
    taken = time.perf_counter() - start
    assert cache.n_rows == len(samples)
    shutil.rmtree(root)
    return len(samples) / taken


def forward_rate(bench: Bench, backbone: Backbone, forward: Callable[[Tensor], object]) -> float:
    """Images a second of forward passes on batches in the device's memory, of as many images as an extraction's."""
    size = backbone.config.image_size
    batches = [torch.randn(backbone.batch, 3, size, size, device=bench.device) for _ in range(2)]
    turn = count()
    with torch.inference_mode():
        return rate(bench, backbone.batch, lambda: forward(batches[next(turn) % 2]))


def halved(model: nn.Module, dtype: torch.dtype, device: str) -> Any:
    """A network whose very weights are of this type: no autocast, which would cast them in every pass."""
    half: Any = copy.deepcopy(model).eval().requires_grad_(False).to(device, dtype)
    return half.to(memory_format=_layout(half))


def passes_of(half: Any) -> Callable[[Tensor], Any]:
    """Its forward pass, which casts images."""
    dtype, layout = next(half.parameters()).dtype, _layout(half)
    return lambda images: half.forward_features(images.to(dtype).contiguous(memory_format=layout))


def _layout(model: nn.Module) -> torch.memory_format:
    return torch.contiguous_format if hasattr(model, "patch_embed") else torch.channels_last
