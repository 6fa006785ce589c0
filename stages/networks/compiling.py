"""Whether torch.compile pays for an extraction: by a short trial on the device that is to do it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from stages.errors import StageError
from stages.networks.backbone import Backbone
from stages.networks.repeatable import repeatable
from stages.networks.weights.loading import first_line

_WORTH_A_TRIAL = 300.0  # seconds of passes as they are: compiling takes about a minute, and every worker does it
_TIMED = 8  # passes


class Trial(NamedTuple):
    """What a trial has found, in seconds.

    Attributes:
        plain, compiled: of a pass, without and with it.
        compiling: once.
    """

    plain: float
    compiled: float
    compiling: float

    def pays(self, n_passes: int) -> bool:
        """Whether so many passes save more than compiling takes.

        >>> Trial(plain=0.05, compiled=0.04, compiling=60.0).pays(1000), Trial(0.05, 0.04, 60.0).pays(10_000)
        (False, True)
        """
        return (self.plain - self.compiled) * n_passes > self.compiling


@contextmanager
def compiler_errors() -> Iterator[None]:
    """What torch.compile cannot do within, above all where there is no C compiler, is said as a user can use it.

    Raises:
        StageError: it has failed.
    """
    from torch._dynamo.exc import TorchDynamoException  # what compiles has loaded it; nobody else needs to

    try:
        yield
    except TorchDynamoException as error:
        said = first_line(error)
        raise StageError(
            f"backbone.compile: torch.compile fails here ({said}): leave it out, or install what is missing"
        ) from error


def compiling_pays(backbone: Backbone, batch: int, n_images: int, worth: float = _WORTH_A_TRIAL) -> bool:
    """Whether it pays for so many images; the backbone is left compiled where it does, and as it was where not.

    Where nothing can be compiled it does not.

    Args:
        backbone: not compiled.
        batch: images of a pass.
        n_images: that are to be extracted.
        worth: seconds of passes as they are; for less nothing is tried.
    """
    n_passes = -(-n_images // batch)
    with repeatable(backbone.device):
        if seconds_of_pass(backbone, batch) * n_passes < worth:
            return False
        try:
            pays = try_compiling(backbone, batch).pays(n_passes)
        except StageError:
            pays = False
    if not pays:
        backbone.uncompile()
    return pays


def try_compiling(backbone: Backbone, batch: int) -> Trial:
    """Compile a backbone, and time its passes before and after.

    Raises:
        StageError: it cannot be compiled.
    """
    plain = seconds_of_pass(backbone, batch)
    start = time.perf_counter()
    backbone.compile()
    with compiler_errors():
        seconds_of_pass(backbone, batch, timed=1)
    compiling = time.perf_counter() - start
    return Trial(plain, seconds_of_pass(backbone, batch), compiling)


def seconds_of_pass(backbone: Backbone, batch: int, timed: int = _TIMED) -> float:
    """How long a forward pass takes, after one that warms up."""
    side = backbone.config.image_size
    images = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0)).to(backbone.device)
    backbone.encode(images)
    _settle(backbone.device)
    start = time.perf_counter()
    for _ in range(timed):
        backbone.encode(images)
    _settle(backbone.device)
    return (time.perf_counter() - start) / timed


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
