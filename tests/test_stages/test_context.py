"""Long work is told where it is done and who listens, in one argument."""

import subprocess
import sys

import torch

from stages.context import Context, Ranks
from stages.progress import NullProgress


def test_a_process_alone_shares_with_nobody():
    ranks = Context().ranks
    assert ranks.first
    assert list(range(5))[ranks.share] == list(range(5))
    assert ranks.add(torch.ones(2)).tolist() == [1, 1]
    assert ranks.agree("mine") == "mine"


def test_of_several_processes_the_first_alone_is_heard():
    class Listens(NullProgress):
        pass

    listens = Listens()
    assert Context(listens, ranks=Ranks(0, 2)).progress is listens
    assert Context(listens, ranks=Ranks(1, 2)).progress is not listens


def test_it_loads_no_torch():
    command = "import sys, stages.context; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], capture_output=True, text=True).stdout.split() == ["False"]
