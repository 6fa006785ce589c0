"""What a process holds over a long run: of the GPU as torch has allocated it, and of the host."""

import os
import shutil
from pathlib import Path

import torch

from stages.context import Context
from stages.extract import extract_set
from stages.inputs.images import list_images
from tests.bench.gpu.step import Bench, NotRun
from tests.bench.gpu.subjects import jpegs
from tests.bench.gpu.training import Subject

ALLOCATED_GROWTH = 1.0  # MiB
RESIDENT_GROWTH = 0.05  # of what is held


def long_run(bench: Bench) -> None:
    """Extractions and trainings in turn; what is held after the last lap, beside a third of them."""
    if not Path("/proc/self/statm").exists():
        raise NotRun("no /proc here that says what a process holds")
    subject = Subject(bench, "small")
    backbone, rows, context = subject.backbone, subject.some_rows, Context(device=bench.device)
    images, spec = list_images(str(jpegs(bench, bench.sizes.jpegs))), backbone.feature_spec("float16", "full")
    held = []
    for lap in range(bench.sizes.laps):
        root = bench.scratch / f"lap-{lap}"
        extract_set("bench", images, spec, root, lambda: backbone)
        shutil.rmtree(root)
        subject.train(rows, subject.some_data, context, experts=2)
        held.append((allocated(bench), resident()))
    (first_allocated, first_resident), (last_allocated, last_resident) = held[bench.sizes.laps // 3], held[-1]
    bench.measure("laps of an extraction and a training", len(held))
    bench.measure("host, resident at the end", last_resident, "MiB")
    growth = last_resident / first_resident - 1
    bench.measure("host, growth after a third of the laps", growth, at_most=RESIDENT_GROWTH)
    if bench.device == "cuda":
        bench.measure("GPU, allocated at the end", last_allocated, "MiB")
        grown = last_allocated - first_allocated
        bench.measure("GPU, growth after a third of the laps", grown, "MiB", at_most=ALLOCATED_GROWTH)
        bench.measure("GPU, reserved at the end", torch.cuda.memory_reserved() / 2**20, "MiB")


def allocated(bench: Bench) -> float:
    """MiB of a GPU that tensors hold."""
    return torch.cuda.memory_allocated() / 2**20 if bench.device == "cuda" else 0.0


def resident() -> float:
    """MiB of the host that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
