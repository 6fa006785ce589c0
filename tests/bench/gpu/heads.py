"""Linear heads of rows that are on the device."""

import time

import torch

from stages.heads.choose import ChosenHead, HeadRows, choose_head
from stages.heads.on_device import OnDevice
from stages.heads.summing import HERE, Summing
from tests.bench.bench_heads import Size, drawn, objective
from tests.bench.gpu.step import Bench


def heads(bench: Bench) -> None:
    """The head that is chosen is the CPU's; seconds of as many rows as ImageNet-1K has, beside a pass's products."""
    device = torch.device(bench.device)
    on_device = OnDevice(bench.device, worth=0, kept_bytes=None if device.type == "cuda" else 1 << 30)
    torch.zeros(1, device=device)  # the first time that a process asks for a GPU takes a second
    size = Size(*bench.sizes.heads)
    rows = drawn(size)
    (ours, seconds), (exact, there) = (_timed(rows, size.classes, summing) for summing in (on_device, HERE))
    bench.measure("strength that is chosen, over the CPU's", ours.strength / exact.strength, at_least=1, at_most=1)
    losses = [objective(chosen.head, rows, ours.strength) for chosen in (ours, exact)]
    bench.measure("loss with its penalty, relative to the CPU's", abs(losses[0] / losses[1] - 1), at_most=1e-6)
    bench.measure(f"{size}", seconds, "s")
    bench.measure(f"{size}: on the CPUs", there, "s")
    large = Size(*bench.sizes.large_heads)
    bench.measure(f"{large}", _timed(drawn(large), large.classes, on_device)[1], "s")
    if device.type == "cuda":
        bench.measure(f"{large}: peak memory", torch.cuda.max_memory_allocated() / 2**20, "MiB")
    bench.measure(f"{large}: a pass's products alone", _products(large, device), "s")


def _timed(rows: HeadRows, n_classes: int, summing: Summing) -> tuple[ChosenHead, float]:
    start = time.perf_counter()
    return choose_head(rows, n_classes, summing=summing), time.perf_counter() - start


def _products(size: Size, device: torch.device) -> float:
    """Seconds of the two products of a pass over all rows, in float32, of rows that are on the device."""
    rows = torch.randn(size.rows * 4 // 5, size.dim, device=device)
    weight = torch.randn(size.dim, size.classes, device=device)
    chunk = max(1, (1 << 25) // size.classes)
    for _ in range(2):  # the first pass loads kernels
        start = time.perf_counter()
        total = sum(((own @ weight).T @ own).sum() for own in rows.split(chunk))
        float(total)
        seconds = time.perf_counter() - start
    return seconds
