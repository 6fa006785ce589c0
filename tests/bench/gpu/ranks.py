"""Processes that train one mixture together: NCCL on GPUs, Gloo on the CPU, joined as ``torchrun`` joins them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from torch import distributed

from stages.context import Context
from stages.training.distributed import JOINED_BY, Joined, init_from_environment, leave
from tests.bench.gpu.runner import ROOT
from tests.bench.gpu.step import SIZES, Bench, NotRun
from tests.bench.gpu.training import LOSS_TOLERANCES, Subject, losses

JOIN_S = 180.0  # in which all processes have to be done, where nobody stops the step before


def one_process(bench: Bench) -> None:
    """What processes do together, by one that has joined nobody; the loss of a training is that of one that has not."""
    backend = JOINED_BY if bench.device == "cuda" else "gloo"
    distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    try:
        ranks = Joined(0, 1)
        values = torch.arange(4.0, device=bench.device)
        bench.measure("sum: largest difference", float((ranks.add(values.clone()) - values).abs().max()), at_most=0)
        told = {"epoch": 3, "groups": [0, 1, 1]}
        bench.measure("what rank 0 holds arrives", ranks.agree(told) == told, at_least=1)
        joined = losses_of(bench, Context(device=bench.device, ranks=ranks))
    finally:
        leave()
    compare(bench, joined, losses_of(bench, Context(device=bench.device)), backend)


def two_processes(bench: Bench) -> None:
    """Two that share the rows of every batch, one for each GPU."""
    if bench.device == "cuda" and torch.cuda.device_count() < 2:
        raise NotRun("one GPU: two processes need two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    name = next(name for name, sizes in SIZES.items() if sizes == bench.sizes)
    found = bench.scratch / "joined.json"
    shared = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    losses_of(bench, Context(device="cpu"))  # fills the cache, which both only read
    command = [
        sys.executable,
        "-m",
        "tests.bench.gpu.ranks",
        bench.device,
        name,
        *map(str, (bench.scratch, bench.shared, found)),
    ]
    both = [
        subprocess.Popen(command, cwd=ROOT, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    try:
        codes = [process.wait(JOIN_S) for process in both]
    finally:
        for process in both:
            process.kill()
            process.wait()
    bench.measure("exit status of the processes", max(map(abs, codes)), at_most=0)
    joined = json.loads(found.read_text())
    compare(bench, joined, losses_of(bench, Context(device=bench.device)), "two processes")


def losses_of(bench: Bench, context: Context) -> list[float]:
    """Of each epoch of a training in float32."""
    subject = Subject(bench, "small")
    trained = subject.train(subject.some_rows, subject.some_data, context, experts=2, precision="float32")
    return losses(trained)


def compare(bench: Bench, joined: list[float], alone: list[float], how: str) -> None:
    """Losses of processes that have joined, and of one that is alone."""
    for epoch, (ours, there) in enumerate(zip(joined, alone, strict=True)):
        what = f"{how}, epoch {epoch}: loss, relative to one alone"
        bench.measure(what, abs(ours - there) / there, at_most=LOSS_TOLERANCES["float32"])


def main(device: str, sizes: str, scratch: str, shared: str, found: str) -> None:
    """One of the processes: trains, and rank 0 writes the losses."""
    bench = Bench(device, SIZES[sizes], Path(scratch), Path(shared), lambda value: None)  # type: ignore[index]
    ranks = init_from_environment()
    try:
        of_epochs = losses_of(bench, Context(device=device, ranks=ranks))
    finally:
        leave()
    if ranks.first:
        Path(found).write_text(json.dumps(of_epochs))


if __name__ == "__main__":
    main(*sys.argv[1:])
