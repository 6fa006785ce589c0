"""Two processes that fine-tune one backbone have the loss curve of one alone: real ones, joined by Gloo."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from safetensors.numpy import load_file

from stages import finetune as finetune_module
from stages.context import Context
from stages.training.checkpoint import Checkpoints
from tests.test_parity.test_distributed import together
from tests.test_stages.small_vit import metrics, tune

EVERYTHING = {
    "rand_augment": "rand-m9-mstd0.5-inc1",
    "random_erasing": 0.25,
    "mixup": 0.8,
    "cutmix": 1.0,
    "ema": 0.5,
    "drop_path": 0.3,
}


@pytest.mark.parametrize(
    "settings",
    [{"drop_path": 0.0}, EVERYTHING, {"beta": "dynamic", "cutmix": 1.0, "accumulate": 2, "head_epochs": 1}],
    ids=["plain", "everything", "dynamic"],
)
def test_two_processes_have_the_loss_curve_of_one(vit, vit_data, few_images, tmp_path, settings):
    def work(ranks):
        return [
            tune(vit, vit_data, few_images, tmp_path / "two", context=Context(ranks=ranks), **settings)
            for _ in range(2)
        ]

    assert together(work) == [[True, False]] * 2  # both train, one writes, and then it is fresh for both
    assert tune(vit, vit_data, few_images, tmp_path / "one", **settings)
    for ours, alone in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert ours.keys() == alone.keys()
        for name in ("loss", "select_loss"):
            assert ours[name] == pytest.approx(alone[name], abs=1e-4)
        for name in ("lr", "train_accuracy", "select_accuracy"):
            assert ours[name] == alone[name]
        np.testing.assert_allclose(ours.get("alpha", []), alone.get("alpha", []))
    weights, expected = (load_file(tmp_path / name / "backbone.safetensors") for name in ("two", "one"))
    for name, tensor in expected.items():
        np.testing.assert_allclose(weights[name], tensor, atol=2e-3, err_msg=name)


@pytest.mark.parametrize("most_lost", [60, 0], ids=["stored at the end", "stored at every step"])
def test_both_refuse_what_one_cannot_load(vit, vit_data, few_images, tmp_path, monkeypatch, most_lost):
    """The one that finds it must not leave the other waiting for its gradients, nor the one that stores."""
    stored = partial(Checkpoints, train_per_store=0, most_lost=most_lost)
    monkeypatch.setattr(finetune_module, "Checkpoints", stored)
    contents = list(few_images.contents)
    contents[int(vit_data.split.folds[0].train[0])] = b"no image"

    images = replace(few_images, contents=tuple(contents))

    def work(ranks):
        try:
            tune(vit, vit_data, images, tmp_path, context=Context(ranks=ranks))
        except Exception as error:
            return [type(error).__name__, str(error)]
        return []

    ours, theirs = together(work)
    assert ours == theirs
    assert "1 images cannot be used any more" in ours[1]
    assert len((tmp_path / "failures.jsonl").read_text().splitlines()) == 1
