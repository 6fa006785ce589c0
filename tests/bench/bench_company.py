"""Two trainings side by side, each with as many threads as there are cores. ``make bench-company``.

    two at once, rows a second together   /   one alone, as OpenMP's threads wait by default

Processes train the experts of a batch, as stage two does; each takes its turn in short rounds, so that a busy machine
weighs on all of them alike. Those called ours are set up as ``python -m pipeline`` is that begins in company
(`stages.machine.wait_briefly`).
"""

import os
import statistics
import subprocess
import sys
import time

import torch
from rich.console import Console
from rich.table import Table

from stages.config import BackboneConfig
from stages.machine import usable_cores, wait_briefly
from stages.networks.backbone import build_architecture

NETWORKS = {
    "EfficientNet-Lite0, 224 px": BackboneConfig(name="tf_efficientnet_lite0", weights="embedded", image_size=224),
    "ViT-S/14, 224 px": BackboneConfig(name="vit_small_patch14_dinov2", image_size=224),
}
ROUNDS = 12
SECONDS = 0.6  # of a round
ROWS = 8  # of a batch


def main() -> None:
    """Measure and print the table."""
    table = Table(title=f"medians of {ROUNDS} rounds; {usable_cores()} threads each; of one alone by default")
    for column in ("training", "one alone", "ours alone", "two by default", "two of ours"):
        table.add_column(column, justify="left" if column == "training" else "right")
    for name in NETWORKS:
        table.add_row(name, *measured(name))
    Console(width=120).print(table)


def measured(name: str) -> list[str]:
    """Rows a second of one alone, and what the others are of it."""
    plain, ours = ([_started(name, environment) for _ in range(2)] for environment in _environments())
    try:
        for process in (*plain, *ours):
            assert process.stdout is not None
            while process.stdout.readline() != "ready\n":
                assert process.poll() is None
        ways = {"ours alone": ours[:1], "two": plain, "two of ours": ours}
        shares: dict[str, list[float]] = {way: [] for way in ways}
        alone = []
        for _ in range(ROUNDS):
            alone.append(_rate(plain[:1]))
            for way, processes in ways.items():
                shares[way].append(_rate(processes) / alone[-1])
        return [f"{statistics.median(alone):.0f} rows/s", *(f"{statistics.median(own):.2f}" for own in shares.values())]
    finally:
        for process in (*plain, *ours):
            process.kill()
            process.wait()


def _environments() -> tuple[dict[str, str], dict[str, str]]:
    """As the processes' OpenMP finds it, by default and ours."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    wait_briefly()
    return plain, plain | {name: value for name, value in os.environ.items() if name.startswith("GOMP_")}


def _started(name: str, environment: dict[str, str]) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tests.bench.bench_company", name]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def _rate(processes: "list[subprocess.Popen[str]]") -> float:
    """Rows a second of all of them together, at work at the same time."""
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(f"{SECONDS}\n")
        process.stdin.flush()
    return sum(float(process.stdout.readline()) for process in processes if process.stdout is not None)


def train(name: str) -> None:
    """Train on random images for as many seconds as every line of standard input says."""
    torch.set_num_threads(usable_cores())
    backbone = build_architecture(NETWORKS[name])
    with torch.inference_mode():
        size = backbone.config.image_size
        encoded = backbone.encode(torch.randn(ROWS, 3, size, size, generator=torch.Generator().manual_seed(0)))
    tokens, end = encoded.map(torch.clone), backbone.end()
    optimiser = torch.optim.AdamW(end.parameters(), lr=1e-5)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        end(tokens).sum().backward()
        torch.nn.utils.clip_grad_norm_(end.parameters(), 1.0)
        optimiser.step()

    step()
    print("ready", flush=True)
    for line in sys.stdin:
        rows, began = 0, time.perf_counter()
        while time.perf_counter() - began < float(line):
            step()
            rows += ROWS
        print(rows / (time.perf_counter() - began), flush=True)


if __name__ == "__main__":
    train(sys.argv[1]) if len(sys.argv) > 1 else main()
