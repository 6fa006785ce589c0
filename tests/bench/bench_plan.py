"""What `plan` says against what a run takes. ``make bench-plan``.

    python -m tests.bench.bench_plan [EXPERIMENT.toml …] [--work FOLDER] [--seconds 60]
    python -m tests.bench.bench_plan --imagenet

By default the demo. Of each study first the plan, then the run, in a work folder of its own; both on the machine as it
is, so nobody else should be at work on it. The run's seconds are those of its record. ``--imagenet`` runs nothing: it
prints what `plan` says of ImageNet-1K and 21K.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

DEMO = "pipeline/experiments/demo.toml"
WITHIN = 0.25
IMAGENET = "pipeline/experiments/openood-imagenet-1k.toml"
SIZES = {"ImageNet-1K": (1_281_167, 1_000), "ImageNet-21K": (14_197_122, 21_841)}  # images and classes of id-train
NETWORKS = {f"ViT-{name[0].upper()}/14": f"vit_{name}_patch14_dinov2.lvd142m" for name in ("small", "base", "large")}


def main() -> int:
    """Measure and print the tables; 1 where a whole run was not planned within `WITHIN`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("experiments", nargs="*", default=[DEMO])
    parser.add_argument("--work", help="Folder of the studies' work folders; a temporary one by default.")
    parser.add_argument("--seconds", default="60", help="Of the calibration.")
    parser.add_argument("--imagenet", action="store_true", help="The table of ImageNet-1K and 21K; runs nothing.")
    asked = parser.parse_args()
    if asked.imagenet:
        for line in imagenet(asked.seconds):
            print(line, flush=True)
        return 0
    missed = False
    with tempfile.TemporaryDirectory() as scratch:
        for experiment in asked.experiments:
            if not Path(experiment).is_file():
                print(f"{experiment} is not here: left out")
                continue
            work = Path(asked.work or scratch, Path(experiment).stem)
            planned, taken = plan_of(experiment, work, asked.seconds), run(experiment, work)
            missed |= show(experiment, planned, taken)
    return int(missed)


def plan_of(experiment: str, work: Path, seconds: str) -> dict[str, Any]:
    """The plan of a study, as JSON has it."""
    done = _pipeline("plan", experiment, work, "--json", "--seconds", seconds)
    found: dict[str, Any] = json.loads(done)
    return found


def imagenet(seconds: str) -> Iterator[str]:
    """What plans say of ImageNet, as a Markdown table."""
    yield "| ID | backbone | patches full / pool:4 / none | extract | train | score | memory | planned in |"
    yield "|---|---|---:|---:|---:|---:|---:|---:|"
    for name, (images, classes) in SIZES.items():
        for network, backbone in NETWORKS.items():
            stated = ("--images", str(images), "--classes", str(classes), "--set", f"backbone.name={backbone}")
            plan = json.loads(_pipeline("plan", IMAGENET, Path("nowhere"), "--json", "--seconds", seconds, *stated))
            kept = {own["patches"]: own["bytes"] for own in plan["kept"]}
            sizes = " / ".join(f"{kept[option] / 1e9:,.0f} GB" for option in ("full", "pool:4", "none"))
            hours = [f"{stage['seconds']['1'] / 3600:,.1f} h" for stage in plan["stages"][:3]]
            memory = f"{max(stage['memory'] for stage in plan['stages']) / 2**30:.1f} GiB"
            yield "| " + " | ".join([name, network, sizes, *hours, memory, f"{plan['calibrated']:.0f} s"]) + " |"


def run(experiment: str, work: Path) -> dict[str, Any]:
    """The stages of a run, as its record has them."""
    _pipeline("run", experiment, work)
    found: dict[str, Any] = json.loads((work / "record.json").read_text("utf-8"))["stages"]
    return found


def _pipeline(verb: str, experiment: str, work: Path, *options: str) -> str:
    command = [sys.executable, "-m", "pipeline", verb, experiment, "--set", f"work={work}", *options]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def show(experiment: str, planned: dict[str, Any], taken: dict[str, Any]) -> bool:
    """Print a study's table; whether its whole run was missed."""
    table = Table(title=f"{experiment}: seconds, memory")
    for column in ("stage", "planned", "taken", "planned / taken", "memory planned", "memory taken"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    sums = [0.0, 0.0]
    for stage in planned["stages"]:
        ours, own = stage["seconds"]["1"], taken[stage["stage"]]
        sums = [sums[0] + ours, sums[1] + own["duration_s"]]
        memory = (f"{n / 2**30:.2f} GiB" for n in (stage["memory"], own["peak_memory_bytes"]))
        table.add_row(stage["stage"], *_ratio(ours, own["duration_s"]), *memory)
    table.add_row("all", *_ratio(*sums), "", "")
    Console(width=120).print(table)
    return abs(sums[0] / sums[1] - 1) > WITHIN


def _ratio(planned: float, taken: float) -> tuple[str, str, str]:
    return f"{planned:.1f}", f"{taken:.1f}", f"{planned / taken:.2f}"


if __name__ == "__main__":
    sys.exit(main())
