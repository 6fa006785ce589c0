"""All that the GPU is for, checked and measured by one command. ``make check-gpu``.

    python -m tests.bench.check_gpu --minutes 8 --out gpu.json

runs the steps of `tests.bench.gpu.steps` in order of worth and stops when the time is up. Each runs in a process apart
from this one, so that a failure hides none of the others, and `gpu.json` has at every moment what was found until then.
It ends in a table, and in a section that can be pasted into a page; `--show gpu.json` prints both again, and those of
several runs on one machine as one.

Exit status: 0 nothing failed, 1 a step failed, 2 the command line is wrong, 3 no GPU answers.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from tests.bench.gpu.report import Kept, markdown, read_kept, table, verdict
from tests.bench.gpu.runner import Check, NoGpuError, Plan, run_steps
from tests.bench.gpu.step import SIZES

LISTING = "tests.bench.gpu.steps:STEPS"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; gives the exit status."""
    asked = _parser().parse_args(arguments)
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 160)
    if asked.show:
        check = read_kept(asked.show)
        console.print(table(check))
        print(markdown(check))
        return 0
    with tempfile.TemporaryDirectory(prefix="check-gpu-") as scratch:
        plan = Plan(asked.listing, asked.device, asked.sizes, Path(scratch), 60 * asked.minutes, tuple(asked.only))
        try:
            outcomes = plan.outcomes()
        except KeyError as unknown:
            console.print(f"error: --only: no step {unknown}: see {LISTING}", markup=False)
            return 2
        check = Check(plan, outcomes)
        kept = Kept(asked.out, check)
        try:
            run_steps(check, kept.write, lambda line: console.print(line, markup=False, highlight=False))
        except NoGpuError:
            console.print("no GPU answers here: nothing was checked; --device cpu runs the steps on the CPU")
            return 3
        except KeyboardInterrupt:
            console.print(f"stopped; {asked.out} has what was found until then")
            return 130
    console.print(table(check))
    print(markdown(check))
    console.print(f"{verdict(check)}: {asked.out}")
    return 1 if verdict(check) == "failed" else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="for everything (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="what was found (%(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where networks run (%(default)s)")
    parser.add_argument("--sizes", choices=tuple(SIZES), default="full", help="how much is computed (%(default)s)")
    parser.add_argument("--only", nargs="+", default=[], metavar="STEP", help="these steps alone, in this order")
    parser.add_argument("--show", nargs="+", type=Path, metavar="FILE", help="run nothing: what these files have kept")
    parser.add_argument("--listing", default=LISTING, help="module:name of the steps (%(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
