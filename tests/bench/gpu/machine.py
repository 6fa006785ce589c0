"""The GPU as torch sees it, and what drives it."""

import subprocess
from contextlib import suppress
from typing import Any

import torch


def gpu() -> dict[str, Any] | None:
    """Of the first GPU: its name, memory, and versions; None where none answers."""
    if not torch.cuda.is_available():
        return None
    about = torch.cuda.get_device_properties(0)
    return {
        "name": about.name,
        "n_gpus": torch.cuda.device_count(),
        "memory_bytes": about.total_memory,
        "capability": f"{about.major}.{about.minor}",
        "multiprocessors": about.multi_processor_count,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": _nccl(),
        "bfloat16": torch.cuda.is_bf16_supported(),
    }


def _driver() -> str | None:
    with suppress(OSError, subprocess.SubprocessError, IndexError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    return None


def _nccl() -> str | None:
    with suppress(Exception):  # a build without it has no such module
        return ".".join(map(str, torch.cuda.nccl.version()))
    return None
