"""What every trainer promises: the same bits of the same seed, whatever interrupts it; what is fresh is left alone."""

import multiprocessing
import random
import shutil
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from stages.config import TrainConfig
from stages.context import Context
from stages.networks.backbone import load_backbone
from stages.progress import NullProgress
from stages.train import train_mofe, train_probe
from tests.test_stages.small_vit import PLAN, tune
from tests.test_stages.stops import StopsIn

EVERY_AUGMENTATION = {"mixup": 0.8, "cutmix": 1.0, "random_erasing": 0.25, "rand_augment": "rand-m9-mstd0.5-inc1"}


@dataclass(frozen=True)
class Subject:
    """A trainer on a few images; `train` says whether it found anything to do."""

    name: str
    fixtures: dict[str, Any]

    def train(self, folder: Path, seed: int = 0, context: Context = Context(), lr: float = 1e-3) -> bool:
        given = self.fixtures
        small, vit = given["small"], (given["vit"], given["vit_data"], given["few_images"])
        mixture = TrainConfig(experts=2, epochs=2, batch_size=16, lr=lr)
        match self.name:
            case "probe":
                before = set(folder.rglob("*"))
                train_probe(small, folder, context)
                return set(folder.rglob("*")) != before
            case "mixture":  # of copies of the network's end
                return train_mofe(given["vit_data"], mixture, given["network"].end, seed, folder, context)
            case "adapters":
                adapters = mixture.model_copy(update={"expert": "adapter"})
                return train_mofe(small, adapters, given["backbone"].end, seed, folder, context)
            case "fine-tune":
                return tune(*vit, folder, seed, context, lr=lr, ema=0.9, beta="dynamic", **EVERY_AUGMENTATION)
            case _:
                return tune(*vit, folder, seed, context, PLAN, lr=lr, joint=2, mixup=0.8)


SEEDED = ("mixture", "adapters", "fine-tune", "joint fine-tune")  # a probe draws nothing and has no epochs
seeded = pytest.mark.parametrize("subject", SEEDED, indirect=True, scope="module")


@pytest.fixture(scope="module", params=["probe", *SEEDED])
def subject(request):
    names = ("small", "backbone", "vit", "vit_data", "few_images")
    given = {name: request.getfixturevalue(name) for name in names}
    return Subject(request.param, given | {"network": load_backbone(given["vit"])})


@pytest.fixture(scope="module")
def trained(subject, tmp_path_factory):
    folder = tmp_path_factory.mktemp(subject.name.replace(" ", "-"))
    assert subject.train(folder)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_same_seed_same_bits(subject, trained, tmp_path):
    """Whatever the process has drawn before."""
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    assert subject.train(tmp_path)
    assert files(tmp_path) == files(trained)


@seeded
def test_another_seed_other_bits(subject, trained, tmp_path):
    assert subject.train(tmp_path, seed=1)
    ours, others = files(tmp_path), files(trained)
    assert ours.keys() == others.keys()
    assert all(
        ours[name] != others[name] for name in ours if name.endswith(("mofe.safetensors", "backbone.safetensors"))
    )


def test_what_is_fresh_is_left_alone(subject, trained):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    assert not subject.train(trained)
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


@seeded
def test_interrupted_it_goes_on_to_the_same_bits(subject, trained, tmp_path):
    """In the first epoch, and in the second of the run that went on."""
    for epoch in (0, 1):
        with pytest.raises(KeyboardInterrupt):
            subject.train(tmp_path, context=Context(StopsIn(epoch)))
    assert list(tmp_path.rglob("*.checkpoint"))
    assert subject.train(tmp_path)
    assert files(tmp_path) == files(trained)


def test_killed_again_and_again_it_ends_as_if_never_killed(subject, trained, tmp_path):
    """SIGKILL, which nothing can catch, wherever it strikes: inside a step, an evaluation or the writing of a file."""
    rng, struck = np.random.default_rng(0), 0
    begun = time.process_time()
    assert subject.train(tmp_path / "timed")
    duration = time.process_time() - begun
    shutil.rmtree(tmp_path / "timed")
    for _ in range(3):
        child = multiprocessing.get_context("fork").Process(target=subject.train, args=(tmp_path,))
        child.start()
        # By what it has computed, so that other work on the machine changes nothing.
        process, until = psutil.Process(child.pid), duration * rng.uniform(0.2, 0.6)
        while child.is_alive() and sum(process.cpu_times()[:2]) < until:
            time.sleep(0.002)
        child.kill()
        child.join()
        struck += child.exitcode == -signal.SIGKILL
    assert struck
    subject.train(tmp_path)
    for left in tmp_path.rglob("*.tmp"):  # all that a kill may leave: a file that was being written
        left.unlink()
    assert files(tmp_path) == files(trained)


@seeded
def test_nothing_of_other_settings_is_gone_on_from(subject, trained, tmp_path):
    """Neither from the whole model that stood there nor from a checkpoint: the folder ends as a new one does."""
    assert subject.train(tmp_path, lr=1e-4)
    with pytest.raises(KeyboardInterrupt):
        subject.train(tmp_path, context=Context(StopsIn(1)), lr=2e-4)
    assert list(tmp_path.rglob("*.checkpoint"))
    assert subject.train(tmp_path)
    assert files(tmp_path) == files(trained)


def test_the_callers_random_numbers_are_left_alone(subject, tmp_path):
    def drawn():
        return random.random(), np.random.random(), float(torch.rand(1))

    def seed():
        random.seed(5)
        np.random.seed(5)
        torch.manual_seed(5)

    seed()
    expected = drawn()
    for progress in (StopsIn(0), NullProgress()):
        seed()
        with suppress(KeyboardInterrupt):
            subject.train(tmp_path, context=Context(progress))
        assert drawn() == expected
