"""Every option of the fine-tune turns what it says, on a small ViT."""

import json
import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import psutil
import pytest
import timm
import torch
from safetensors.torch import load_file

from stages import finetune as finetune_module
from stages.context import Context
from stages.errors import InputError, StageError
from stages.networks.batch import filled
from stages.networks.surgery import freeze_first
from stages.networks.weights.loading import build_model
from stages.training.checkpoint import Checkpoints, load_checkpoint
from stages.training.identity import read_finetuned_head
from stages.training.images import ImageTrainer
from stages.training.objectives import DropPathOfRows, LinearObjective, Mixed, RowsOfBatch, drop_paths_by_row
from stages.training.optim import NetworkSchedule, network_optimiser
from stages.training.recipes import FinetuneSettings
from tests.test_stages.drawn import create
from tests.test_stages.small_vit import NAME, metrics, tune
from tests.test_stages.stops import StopsAt, StopsIn

EVERY_STEP = partial(Checkpoints, train_per_store=0, most_lost=0)


@pytest.fixture(scope="module")
def run(vit, vit_data, few_images, tmp_path_factory):
    """Fine-tune with some settings into a new folder, or the one given; gives the folder."""

    def run(folder=None, images=few_images, **settings):
        folder = folder or tmp_path_factory.mktemp("finetune")
        assert tune(vit, vit_data, images, folder, **settings)
        return folder

    return run


@pytest.fixture(scope="module")
def plain(run):
    return run()


def backbone_of(folder):
    return load_file(folder / "backbone.safetensors")


def curve(folder):
    return [record[name] for record in metrics(folder) for name in ("loss", "select_loss")]


def files(folder):
    names = ("backbone.safetensors", "head.safetensors", "metrics.jsonl", "finetune.json")
    return [(folder / name).read_bytes() for name in names]


class Told(StopsIn):
    """Stops early, with what was noted."""

    def __init__(self):
        super().__init__(0)
        self.notes = []

    def note(self, line):
        self.notes.append(line)


def test_how_images_are_decoded_is_said_where_it_is_not_as_asked(vit, vit_data, few_images, tmp_path):
    notes = {}
    for decode in ("pil", "draft"):
        told, asked = Told(), vit.model_copy(update={"decode": decode})
        with pytest.raises(KeyboardInterrupt):
            tune(asked, vit_data, few_images, tmp_path / decode, context=Context(told))
        notes[decode] = [line for line in told.notes if "decode" in line]
    assert notes["pil"] == []
    assert notes["draft"] == [
        'finetune: backbone.decode = "draft" is for extraction and predict; images are decoded by Pillow in full here, '
        "since crops of them are enlarged"
    ]


# ----------------------------------------------------------------------------------------------------- how it computes


@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.8, "cutmix": 1.0}, {"beta": "dynamic"}])
def test_a_batch_in_several_passes_is_the_same_batch(run, mixing):
    whole = curve(run(**mixing))
    np.testing.assert_allclose(curve(run(accumulate=4, **mixing)), whole, atol=2e-5)
    assert np.ptp(whole) > 0.01  # it moved


def test_checkpointed_gradients_are_the_gradients(run, plain):
    """Dropped paths, too, are drawn again as they were."""
    np.testing.assert_allclose(curve(run(checkpointing=True)), curve(plain), atol=1e-5)


def test_no_gradient_checkpointing_in_a_family(vit, vit_data, few_images, tmp_path, monkeypatch):
    def none(self, enable=True):
        assert not enable, "gradient checkpointing not supported"  # as timm's models without it say

    monkeypatch.setattr(timm.models.VisionTransformer, "set_grad_checkpointing", none)
    with pytest.raises(InputError, match=r"finetune\.checkpointing: timm's VisionTransformer has no"):
        tune(vit, vit_data, few_images, tmp_path, checkpointing=True)


def test_half_precision_is_near(run, plain):
    half = curve(run(precision="bfloat16"))
    np.testing.assert_allclose(half, curve(plain), rtol=0.03)
    assert half != curve(plain)
    assert all(tensor.dtype == torch.float32 for tensor in backbone_of(run(precision="bfloat16", epochs=1)).values())


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch._dynamo hides it in its own way
def test_compiled_it_learns_the_same(run, monkeypatch):
    """The moving average is not what was compiled, and what is stored is plain.

    Graphs are traced, split into both passes and run as they are; the kernels of a backbone's are compiled in
    test_backbone.py, which takes half a minute of C++ for the many that train.
    """
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    settings = {"drop_path": 0.0, "epochs": 1, "ema": 0.5}
    compiled, expected = run(compile=True, **settings), run(**settings)
    np.testing.assert_allclose(curve(compiled), curve(expected), atol=1e-4)
    assert backbone_of(compiled).keys() == backbone_of(expected).keys()


def test_paths_are_dropped_by_the_row_of_the_batch():
    rows, x = RowsOfBatch(), torch.ones(6, 2, 3)
    drop = DropPathOfRows(0.5, rows)

    def dropped(place):
        torch.manual_seed(1)
        rows.place, rows.n_batch = torch.tensor(place), 6
        return drop(x[place])

    whole = dropped([0, 1, 2, 3, 4, 5])
    assert set(whole.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(dropped([4, 1]), whole[[4, 1]])
    assert torch.equal(drop.eval()(x), x)


def test_what_fills_a_pass_teaches_nothing_and_is_not_judged():
    model, labels = create(NAME), torch.arange(3)
    model.reset_classifier(4)
    objective, images = LinearObjective(model, 0.1), torch.rand(3, 3, 32, 32)
    found = []
    for given in (images, filled(images, [8, 5])):
        objective.zero_grad()
        loss, right = objective.loss(Mixed(given, torch.eye(4)[labels], labels, labels), None)
        loss.backward()
        judged = objective.judge(given, labels)
        found.append([loss, right, *judged, *(parameter.grad for parameter in model.parameters())])
    for alone, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, alone)


def test_all_of_timms_dropped_paths_are_replaced():
    model = create(NAME, drop_path_rate=0.3)
    drop_paths_by_row(model)
    kinds = {type(module).__name__ for module in model.modules() if "DropPath" in type(module).__name__}
    assert kinds == {"DropPathOfRows"}


# ------------------------------------------------------------------------------------------------- what is trained


def test_frozen_blocks_stay_and_the_others_move(run, vit):
    before, after = build_model(vit).state_dict(), backbone_of(run(freeze=4))
    for name, tensor in after.items():
        first = not name.startswith(("blocks.4.", "blocks.5.", "norm."))
        assert torch.equal(tensor, before[name]) is first, name


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet18", "convnext_atto", NAME])
def test_freezing_counts_from_the_image(name):
    """All that stands before the first free block is frozen, all that stands behind is free; the head always is."""
    model = create(name) if name == NAME else timm.create_model(name, num_classes=3)
    freeze_first(model, 2, "finetune.freeze")
    flags = [parameter.requires_grad for parameter in model.parameters()]
    assert 0 < sum(flags) < len(flags)
    if name != NAME:  # timm registers a ViT's class token before its patch embedding
        assert flags == sorted(flags)
        assert model.get_classifier().weight.requires_grad
    freeze_first(model, 0, "finetune.freeze")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_more_blocks_than_there_are(vit, vit_data, few_images, tmp_path):
    with pytest.raises(InputError, match=r"finetune\.freeze: 7 .* 6 blocks"):
        tune(vit, vit_data, few_images, tmp_path, freeze=7)


def test_the_head_alone_comes_first(run, vit, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, head_epochs=1, epochs=3, context=Context(StopsIn(1)))
    (path,) = tmp_path.glob("*.checkpoint")
    state, before = load_checkpoint(path)["training"]["objective"], build_model(vit).state_dict()
    for name, tensor in before.items():
        assert torch.equal(state[f"model.{name}"], tensor), name
    assert metrics(tmp_path)[0]["lr"] == FinetuneSettings().head_lr
    after = backbone_of(run(tmp_path, head_epochs=1, epochs=3))
    assert not torch.equal(after["blocks.5.mlp.fc1.weight"], before["blocks.5.mlp.fc1.weight"])
    assert metrics(tmp_path)[1]["lr"] < 1e-3  # on the cosine that begins when the backbone is trained


def test_layers_learn_the_slower_the_farther_they_are_from_the_head():
    model = create(NAME)
    model.reset_classifier(4)
    optimiser = network_optimiser(LinearObjective(model, 0.0), FinetuneSettings(layer_decay=0.5))
    scale = {id(p): group["lr_scale"] for group in optimiser.param_groups for p in group["params"]}
    scales = [scale[id(block.mlp.fc1.weight)] for block in model.blocks]
    np.testing.assert_allclose(np.array(scales[1:]) / scales[:-1], 2)
    assert scale[id(model.head.weight)] == 1
    decays = {id(p): group["weight_decay"] for group in optimiser.param_groups for p in group["params"]}
    assert decays[id(model.head.bias)] == 0 < decays[id(model.head.weight)]


def test_learning_rates_warm_up_and_fall_along_a_cosine(run):
    rates = [record["lr"] for record in metrics(run(epochs=4, warmup_epochs=1, lr=1e-3, batch_size=48))]
    np.testing.assert_allclose(rates, [1e-4, 1e-3 * 0.853553, 0.5e-3, 1e-3 * 0.146447], rtol=1e-5)  # a step an epoch


def test_gradients_are_clipped(run):
    """Clipped to next to nothing they vanish beside Adam's epsilon, and little is learned."""
    free, clipped, off = (metrics(run(gradient_clip=clip)) for clip in (1e6, 1e-8, 0.0))
    assert off == free
    assert clipped[-1]["select_loss"] > free[-1]["select_loss"] + 0.05


# ---------------------------------------------------------------------------------------------------- what is kept


def test_the_moving_average_is_judged_and_kept(run, plain):
    averaged = run(ema=0.9)
    assert [record["loss"] for record in metrics(averaged)] == [record["loss"] for record in metrics(plain)]
    assert [record["select_loss"] for record in metrics(averaged)] != [r["select_loss"] for r in metrics(plain)]
    assert not np.array_equal(read_finetuned_head(averaged)[0], read_finetuned_head(plain)[0])


def test_no_better_epoch_for_too_long_ends_it(run, monkeypatch):
    losses = iter([0.5, 0.4, 0.6, 0.7, 0.1])
    judged = ({"select_accuracy": 0.5}, np.zeros(4, dtype=int))
    monkeypatch.setattr(
        ImageTrainer, "judge_held_out", lambda trainer: (judged[0] | {"select_loss": next(losses)}, judged[1])
    )
    folder = run(epochs=5, patience=2)
    assert [record["epoch"] for record in metrics(folder)] == [0, 1, 2, 3]
    assert json.loads((folder / "finetune.json").read_text())["best_epoch"] == 1


def test_difficulty_makes_harder_classes_mix_more(run):
    folder = run(beta="dynamic", epochs=3)
    (first, *later), settings = metrics(folder), FinetuneSettings()
    assert set(first["alpha"]) == {settings.alpha_min}  # nothing is known yet, so all are alike
    for before, record in zip([first, *later], later, strict=False):
        order = np.argsort(before["accuracy"])
        assert (np.diff(np.asarray(record["alpha"])[order]) <= 0).all()
    assert max(later[-1]["alpha"]) == settings.alpha_max
    assert "alpha" not in metrics(run(epochs=1))[0]


# ------------------------------------------------------------------------------------------------- kills and failures


def test_killed_it_goes_on_to_the_same_run(vit, vit_data, few_images, run, tmp_path):
    """A real SIGKILL in the second epoch, while others load the images; it goes on without them."""
    settings = {"mixup": 0.8, "ema": 0.9, "beta": "dynamic"}
    whole = run(**settings)
    (tmp_path / "images").write_bytes(pickle.dumps(few_images))
    given = (vit.weights, tmp_path / "images", vit_data.train.path.parent, tmp_path / "killed")
    command = [sys.executable, "-m", "tests.test_stages.killed_finetune", *map(str, given)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.strip() == "1":
            others = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
    assert others
    assert not psutil.wait_procs(others, timeout=20)[1]  # none goes on holding memory
    process.stdout.close()
    assert len(metrics(tmp_path / "killed")) == 1
    assert not (tmp_path / "killed" / "finetune.json").exists()
    assert files(run(tmp_path / "killed", **settings)) == files(whole)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_within_a_long_epoch_it_goes_on_at_the_step_where_it_was(run, vit_data, monkeypatch, tmp_path, accumulate):
    settings = {"mixup": 0.8, "ema": 0.9, "beta": "dynamic", "batch_size": 6, "accumulate": accumulate}
    n_images, whole = len(vit_data.split.folds[0].train), run(**settings)
    monkeypatch.setattr(finetune_module, "Checkpoints", EVERY_STEP)
    for stop in (3 * n_images // 2, 7 * n_images // 4):  # twice in the second epoch, the second time in a resumed run
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, context=Context(StopsAt(stop)), **settings)
    counted = StopsAt(None)
    assert files(run(tmp_path, context=Context(counted), **settings)) == files(whole)
    assert counted.done == 2 * n_images
    assert counted.learned <= n_images // 4 + 2 * 6  # what is checked only after the step that follows is done twice


def test_weights_whose_loss_is_no_number_are_not_stored(run, monkeypatch, tmp_path):
    """The loss of the first step is a number, what it makes of the weights is useless."""
    monkeypatch.setattr(finetune_module, "Checkpoints", EVERY_STEP)
    with pytest.raises(StageError, match=r"epoch 0; no checkpoint .*finetune\.lr"):
        run(tmp_path, lr=1e30, batch_size=6)


def test_images_that_fail_are_all_listed_and_none_is_replaced(vit, vit_data, few_images, tmp_path):
    contents, fold = list(few_images.contents), vit_data.split.folds[0]
    broken = [int(fold.train[4]), int(fold.train[20]), int(fold.select[0])]
    for row in broken:
        contents[row] = b"no image"
    with pytest.raises(InputError, match=r"3 images .* run make extract"):
        tune(vit, vit_data, replace(few_images, contents=tuple(contents)), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "failures.jsonl").read_text().splitlines()]
    assert {line["id"] for line in lines} == {few_images.ids[row] for row in broken}
    assert all(line["reason"] for line in lines)


def test_diverged_it_keeps_the_last_good_checkpoint_and_says_so(run, tmp_path, monkeypatch):
    original = NetworkSchedule.set

    def jump(schedule, epoch, step):
        original(schedule, epoch, step)
        if epoch == 1:
            for group in schedule.optimiser.param_groups:
                group["lr"] = 1e30

    monkeypatch.setattr(NetworkSchedule, "set", jump)
    with pytest.raises(StageError) as error:
        run(tmp_path)
    (checkpoint,) = tmp_path.glob("*.checkpoint")
    assert f"in epoch 1; the checkpoint of epoch 0, the last good one, is kept in {checkpoint}" in str(error.value)
    assert [record["epoch"] for record in metrics(tmp_path)] == [0]
    assert all(tensor.isfinite().all() for tensor in load_checkpoint(checkpoint)["best"].values())
