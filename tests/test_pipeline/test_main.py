"""`python -m pipeline` sets its process up before anything starts threads."""

import ctypes
import subprocess
import sys

import pytest

_INTERRUPTED = """
import os, runpy, signal, sys

class Interrupts:
    def find_spec(self, name, path=None, target=None):
        if name == "pipeline.cli":
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Interrupts())
runpy.run_module("pipeline", run_name="__main__")
"""
_COUNT_ARENAS = """
import ctypes, sys
import pipeline.__main__
import pyarrow.parquet, torch  # both start threads
torch.randn(1000, 1000) @ torch.randn(1000, 1000)
libc = ctypes.CDLL(None)
libc.fopen.restype, libc.fopen.argtypes = ctypes.c_void_p, [ctypes.c_char_p] * 2
libc.malloc_info.argtypes, libc.fclose.argtypes = [ctypes.c_int, ctypes.c_void_p], [ctypes.c_void_p]
file = libc.fopen(sys.argv[1].encode(), b"w")
libc.malloc_info(0, file)
libc.fclose(file)
"""


def test_interrupted_while_it_is_imported():
    """No traceback, and the status of an interrupt."""
    run = subprocess.run([sys.executable, "-c", _INTERRUPTED], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (130, "", "interrupted\n")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="this C library does not list its arenas")
def test_all_threads_share_one_arena(tmp_path):
    """A forward pass whose thread has an arena of its own maps and unmaps its memory again and again."""
    listing = tmp_path / "arenas.xml"
    subprocess.run([sys.executable, "-c", _COUNT_ARENAS, str(listing)], check=True)
    assert listing.read_text().count("<heap ") == 1
