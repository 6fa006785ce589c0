"""Commands one after another in each process that torchrun starts, each as ``python -m pipeline`` runs it.

torchrun --nproc-per-node 2 -m tests.test_pipeline.several 'train a.toml' 'finetune a.toml'
"""

import runpy
import shlex
import sys


def run(commands: list[str]) -> object:
    """The status of the last one."""
    status: object = 0
    for command in commands:
        sys.argv = ["pipeline", *shlex.split(command)]
        try:
            runpy.run_module("pipeline", run_name="__main__")
        except SystemExit as ended:
            status = ended.code
        sys.stdout.write(f"{command.split()[0]}: status {status}\n")  # at once: processes share one pipe
        sys.stdout.flush()
    return status


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
