"""Checkpoints that a killed training goes on from: tensors and plain values, arriving whole or not at all."""

import io
from pathlib import Path
from typing import Any

import torch

from cache.files import write_file


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a state of tensors and plain values, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_file(path, buffer.getbuffer())


def load_checkpoint(path: Path, device: str = "cpu") -> dict[str, Any] | None:
    """Read a state onto a device, running no code in it; None where there is none."""
    return torch.load(path, weights_only=True, map_location=device) if path.is_file() else None
