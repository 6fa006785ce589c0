"""The demo on the device, its table beside that of the same demo on the CPU, which runs at the same time."""

import csv
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.config import RunOptions, load_config
from pipeline.study import Study
from stages.machine import usable_cores
from tests.bench.gpu.runner import ROOT
from tests.bench.gpu.step import Bench

DEMO = ROOT / "pipeline" / "experiments" / "demo.toml"
KEYS = ("backbone", "features", "head", "variant", "seed", "routing", "score", "profile", "calibrated", "ood", "group")
Row = dict[str, str]
FLOAT32 = tuple(f"{section}.precision=float32" for section in ("backbone", "train", "finetune"))


def demo(bench: Bench, last: str = "pretrained") -> None:
    """Run both, and count rows of the device's table whose AUROC and FPR95 are within the CPU's 95 % intervals.

    Both compute in float32, as the CPU does by default. The intervals are of images that might have been drawn and not
    of trainings, which end elsewhere in a GPU's default, bfloat16: in that a row may lie outside, its FPR95 by points,
    where nothing is wrong. In float32 an H100's features and losses are the CPU's to 1e-5, and so every row of the
    pre-trained backbone is held. What half precision may change is held in the steps of features and of mixtures, by
    tolerances of their own. Rows of the fine-tuned backbone, whose every weight is trained, are counted.

    Args:
        bench: of the step.
        last: "pretrained", or "finetuned": both backbones.
    """
    on_cpu, ours = bench.scratch / "demo-cpu", bench.scratch / f"demo-{bench.device}"
    other = None if bench.device == "cpu" else start(bench, last, on_cpu)  # without a GPU the two are one
    try:
        started = time.monotonic()
        stages(last, settings(bench, ours))
        bench.measure("the demo on this device, the CPU's beside it", time.monotonic() - started, "s")
        if other is not None and other.wait():
            raise RuntimeError(f"the demo on the CPU ended with exit status {other.returncode}")
        bench.measure("both", time.monotonic() - started, "s")
    finally:
        if other is not None:
            other.kill()
            other.wait()
    compare(bench, *(read(work / "scores" / "table.csv") for work in (ours, on_cpu)))


def settings(bench: Bench, work: Path) -> list[str]:
    """Of the experiment, as ``--set`` takes them."""
    return [f"work={work}", *FLOAT32, *bench.sizes.demo]


def compare(bench: Bench, ours: Mapping[tuple[str, ...], Row], exact: Mapping[tuple[str, ...], Row]) -> None:
    """Tables of the device and of the CPU."""
    bench.measure("rows that only one of the tables has", len(ours.keys() ^ exact.keys()), at_most=0)
    for backbone in dict.fromkeys(key[0] for key in exact):
        pairs = [(ours[key], row) for key, row in exact.items() if key[0] == backbone and key in ours]
        for metric in ("auroc", "fpr95"):
            bounds = [[float(row[name]) for name in (f"{metric}_lo", f"{metric}_hi")] for _, row in pairs]
            found = [float(row[metric]) for row, _ in pairs]
            within = [low <= value <= high for value, (low, high) in zip(found, bounds, strict=True)]
            held = 1.0 if backbone == "pretrained" else None
            share = sum(within) / len(within)
            bench.measure(f"{backbone}: rows whose {metric} is in the CPU's interval", share, at_least=held)
            furthest = max(abs(value - float(row[metric])) for value, (_, row) in zip(found, pairs, strict=True))
            bench.measure(f"{backbone}: {metric}, largest difference", 100 * furthest, "points")


def read(path: Path) -> dict[tuple[str, ...], Row]:
    """Rows of a table, by what they are of."""
    with path.open(encoding="utf-8", newline="") as file:
        return {tuple(row[key] for key in KEYS): row for row in csv.DictReader(file)}


def start(bench: Bench, last: str, work: Path) -> "subprocess.Popen[bytes]":
    """The demo in another process, which sees no GPU and leaves the other one's threads their cores."""
    command = [sys.executable, "-m", "tests.bench.gpu.demo", last, *settings(bench, work)]
    environment = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(max(1, usable_cores() // 2))}
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | environment)


def stages(last: str, overrides: Sequence[str]) -> None:
    """Every stage but the report, of the pre-trained backbone and, if it is the last, of the fine-tuned one."""
    study = Study(load_config(DEMO, overrides), RunOptions())
    for backbone in ("pretrained", "finetuned"):
        study.do("extract", backbone)
        study.do("train", backbone)
        if backbone == last:
            break
        study.do("finetune")
    study.do("score")


if __name__ == "__main__":
    stages(sys.argv[1], sys.argv[2:])
