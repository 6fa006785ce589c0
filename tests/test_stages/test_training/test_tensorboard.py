"""Scalars for TensorBoard: its own reader finds what metrics.jsonl says, each step once."""

import json
import sys
from collections import Counter

import numpy as np
import pytest

from stages.config import TrainConfig
from stages.context import Context
from stages.errors import InputError
from stages.train import train_mofe
from stages.training.identity import finetune_identity
from stages.training.tensorboard import EVENT_FILES, require_tensorboard, scalars_of
from tests.test_stages.small_vit import SMALL, metrics, tune
from tests.test_stages.stops import StopsIn


def events(folder):
    """(tag, step, value) of all that stands in the one event file of a folder."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    (path,) = folder.glob(EVENT_FILES)
    loaded = LegacyEventFileLoader(str(path)).Load()
    return sorted((value.tag, event.step, value.simple_value) for event in loaded for value in event.summary.value)


def expected(folder):
    """The same from metrics.jsonl, as precise as an event file is."""
    return sorted(
        (tag, record["epoch"], float(np.float32(value)))
        for record in metrics(folder)
        for tag, value in scalars_of(record).items()
    )


def test_a_fine_tune_that_was_interrupted_has_every_step_once(vit, vit_data, few_images, tmp_path):
    settings = {"epochs": 3, "tensorboard": True, "beta": "dynamic"}
    with pytest.raises(KeyboardInterrupt):
        tune(vit, vit_data, few_images, tmp_path, context=Context(StopsIn(2)), **settings)
    assert events(tmp_path) == expected(tmp_path)  # there while it trains
    assert {step for _, step, _ in events(tmp_path)} == {0, 1}
    assert tune(vit, vit_data, few_images, tmp_path, **settings)
    assert events(tmp_path) == expected(tmp_path)
    steps = Counter((tag, step) for tag, step, _ in events(tmp_path))
    names = ("loss", "train_accuracy", "select_loss", "select_accuracy", "lr")
    assert steps == Counter((name, step) for name in names for step in range(3))


def test_asked_for_later_it_is_made_of_what_is_there(vit, vit_data, few_images, tmp_path):
    assert tune(vit, vit_data, few_images, tmp_path, epochs=1)
    assert not list(tmp_path.glob(EVENT_FILES))
    before = (tmp_path / "finetune.json").read_bytes()
    for _ in range(2):
        assert not tune(vit, vit_data, few_images, tmp_path, epochs=1, tensorboard=True)
        assert events(tmp_path) == expected(tmp_path)
    assert (tmp_path / "finetune.json").read_bytes() == before
    # Trained anew without being asked, it leaves none that belong to the run before.
    assert tune(vit, vit_data, few_images, tmp_path, epochs=1, lr=5e-4)
    assert not list(tmp_path.glob(EVENT_FILES))


def test_it_is_no_part_of_what_a_fine_tune_is(vit_data):
    asked = SMALL.model_copy(update={"tensorboard": True})
    assert finetune_identity(vit_data, asked, 0) == finetune_identity(vit_data, SMALL, 0)


def test_a_mixture_has_a_curve_a_run(few, backbone, tmp_path):
    """Cross-fitted: three folds and the final model; asked for again, nothing is trained."""
    config = TrainConfig(experts=2, epochs=2, expert="frozen", tensorboard=True)
    assert train_mofe(few, config, backbone.end, seed=0, folder=tmp_path)
    assert events(tmp_path) == expected(tmp_path)
    assert {tag.split("/")[0] for tag, _, _ in events(tmp_path)} == {"fold-0", "fold-1", "fold-2", "final"}
    (path,) = tmp_path.glob(EVENT_FILES)
    path.unlink()
    assert not train_mofe(few, config.model_copy(update={"tensorboard": False}), backbone.end, seed=0, folder=tmp_path)
    assert not list(tmp_path.glob(EVENT_FILES))
    assert not train_mofe(few, config, backbone.end, seed=0, folder=tmp_path)
    assert events(tmp_path) == expected(tmp_path)


def test_without_the_package_it_is_refused_before_any_work(vit, vit_data, few_images, few, backbone, tmp_path, absent):
    message = r"tensorboard: needs the package tensorboard: pip install 'mofe-feature-cache\[tensorboard\]', or leave"
    with pytest.raises(InputError, match=f"^finetune.{message}"):
        tune(vit, vit_data, few_images, tmp_path, tensorboard=True)
    with pytest.raises(InputError, match=f"^train.{message}"):
        train_mofe(few, TrainConfig(tensorboard=True), backbone.end, seed=0, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_the_package_all_else_works(vit, vit_data, few_images, tmp_path, absent):
    with pytest.raises(InputError):
        require_tensorboard("finetune.tensorboard")
    assert tune(vit, vit_data, few_images, tmp_path, epochs=1)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["epoch"] == 0


@pytest.fixture
def absent(monkeypatch):
    """What Python does for modules that are not there."""
    for name in ("tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
