"""End-to-end fine-tune: a seeded, resumable run whose checkpoint is a plain timm backbone."""

import json
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from stages import finetune as finetune_module
from stages.config import BackboneConfig, FinetuneConfig
from stages.context import Context
from stages.errors import InputError, StageError
from stages.extract import extract_set
from stages.finetune import TuningImages, finetune
from stages.inputs.images import decode_image
from stages.networks.backbone import load_backbone
from stages.training.augment import generators_kept, transforms
from stages.training.identity import read_finetuned_head
from stages.training.images import ImageTrainer
from stages.training.loading import ImageSet
from stages.training.recipes import resolve_recipe
from tests.test_stages.small_vit import metrics, small_vit

EMBEDDED = BackboneConfig(name="tf_efficientnet_lite0", weights="embedded", image_size=48)
TWO = FinetuneConfig(epochs=2, batch_size=16, lr=1e-3, hflip=0.0, crop_scale=0.8, warmup_epochs=0)


@pytest.fixture(scope="module")
def tune(small, few_images, tmp_path_factory):
    """Fine-tune into a new folder, or the one given."""

    def tune(config=TWO, data=small, images=few_images, seed=0, folder=None, context=Context(), backbone=EMBEDDED):
        folder = folder or tmp_path_factory.mktemp("finetune")
        return folder, finetune(backbone, TuningImages(data, images, images), config, seed, folder, context)

    return tune


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    """A small network with batch norms, for what does not depend on how well it learns."""
    return small_vit(tmp_path_factory.mktemp("resnet"), "test_resnet", image_size=48)


@pytest.fixture(scope="module")
def tuned(tune):
    folder, done = tune()
    assert done
    return folder


def files(folder) -> list[bytes]:
    return [
        (folder / name).read_bytes()
        for name in ("backbone.safetensors", "head.safetensors", "metrics.jsonl", "finetune.json")
    ]


def test_it_learns(tuned):
    first, last = metrics(tuned)
    assert last["loss"] < first["loss"]
    assert last["select_loss"] < first["select_loss"]
    about = json.loads((tuned / "finetune.json").read_text())
    assert about["best_epoch"] == 1
    assert about["select_accuracy"] == last["select_accuracy"] > 0.5


def test_the_kept_epoch_is_the_first_with_the_lowest_held_out_loss(tune, resnet, monkeypatch):
    losses, heads = iter([0.4, 0.4, 0.9]), []

    def judged(trainer):
        heads.append(trainer.objective.model.get_classifier().weight.detach().clone().numpy())
        return {"select_loss": next(losses), "select_accuracy": 0.5}, np.zeros(4, dtype=int)

    monkeypatch.setattr(ImageTrainer, "judge_held_out", judged)
    folder, _ = tune(TWO.model_copy(update={"epochs": 3}), backbone=resnet)
    np.testing.assert_array_equal(read_finetuned_head(folder)[0], heads[0])
    assert not np.array_equal(heads[0], heads[1])
    assert json.loads((folder / "finetune.json").read_text())["best_epoch"] == 0


# --------------------------------------------------------------------------------------------------- the checkpoint


def test_plain_timm_loads_the_checkpoint(tuned, few_images):
    """Every key, none missing; and it gives the features that our extraction caches."""
    state = load_file(tuned / "backbone.safetensors")
    model = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    model.load_state_dict(state, strict=True)
    ours = load_backbone(EMBEDDED.model_copy(update={"weights": str(tuned / "backbone.safetensors")}))
    reader = few_images.reader()
    images = torch.stack([ours.transform(decode_image(reader.read(index))) for index in range(8)])
    with torch.inference_mode():
        expected = model.eval()(images)
    torch.testing.assert_close(ours.encode(images).cls, expected, rtol=1e-4, atol=1e-5)


def test_its_features_are_others_and_go_to_another_cache(tuned, backbone, few, few_images, tmp_path):
    ours = load_backbone(EMBEDDED.model_copy(update={"weights": str(tuned / "backbone.safetensors")}))
    spec = ours.feature_spec("float16", "full")
    assert spec.fingerprint != few.train.fingerprint
    assert few.train.spec.first_difference(spec).startswith("weights_sha")
    cache = extract_set("few", few_images, spec, tmp_path, lambda: ours)
    assert not np.allclose(cache.read("cls"), few.train.read("cls"), atol=1e-2)


def test_the_stored_head_gives_the_logits_of_the_trained_model(tuned, small, few_images):
    """Seen from outside: it must reach the held-out loss and accuracy that training wrote down."""
    ours = load_backbone(EMBEDDED.model_copy(update={"weights": str(tuned / "backbone.safetensors")}))
    weight, bias = read_finetuned_head(tuned)
    assert weight.shape == (4, ours.dim)
    rows, reader = small.split.folds[0].select, few_images.reader()
    images = torch.stack([ours.transform(decode_image(reader.read(int(row)))) for row in rows])
    logits = ours.encode(images).cls @ torch.from_numpy(weight).T + torch.from_numpy(bias)
    truth = torch.from_numpy(small.train_labels[rows]).long()
    best = metrics(tuned)[1]
    loss = torch.nn.functional.cross_entropy(logits, truth)
    assert float(loss) == pytest.approx(best["select_loss"], abs=1e-4)
    assert float((logits.argmax(1) == truth).float().mean()) == pytest.approx(best["select_accuracy"], abs=1e-6)


def test_batch_norm_statistics_stay_and_weights_move(tuned, backbone):
    state, before = load_file(tuned / "backbone.safetensors"), backbone.model.state_dict()
    assert state.keys() == before.keys()
    for name, tensor in state.items():
        if "running_" in name or "num_batches" in name:
            assert torch.equal(tensor, before[name]), name
        elif tensor.ndim > 1:
            assert not torch.equal(tensor, before[name]), name


# -------------------------------------------------------------------------------------------------- seeds and resume


def test_each_image_is_augmented_on_its_own_and_anew_each_epoch(small, few_images, backbone):
    settings = resolve_recipe(TWO.model_copy(update={"crop_scale": 0.3}), len(small.train))
    same = replace(few_images, contents=few_images.contents[:1] * 48)  # one picture under 48 names
    both = transforms(backbone.model, EMBEDDED, settings)
    images = ImageSet(same, small.train.ids, np.arange(48), small.train_labels, *both)

    def drawn(order, epoch):
        with generators_kept():
            return torch.stack([images.load(row, (0, epoch)) for row in order])

    one = drawn(range(12), 0)
    assert len({image.numpy().tobytes() for image in one}) > 6  # of a picture of 8 x 8 some crops are the same
    assert not torch.equal(drawn(range(12), 1), one)
    assert torch.equal(drawn([7, 3], 0), one[[7, 3]])  # whatever else is in the batch


def test_held_out_images_teach_nothing(tune, small, few_images, resnet):
    """Their pictures and labels are changed: the weights after an epoch stay; those of training rows move them."""
    one, fold, numbers = TWO.model_copy(update={"epochs": 1}), small.split.folds[0], count()

    def spoilt(rows):
        contents, labels = list(few_images.contents), small.train_labels.copy()
        for row in rows:
            contents[row] = contents[(row + 24) % 48]  # a digit of another class
            labels[row] = (labels[row] + 2 + next(numbers) % 2) % 4
        data = replace(small, train_labels=labels, held_out_labels=labels)
        return files(tune(one, data, replace(few_images, contents=tuple(contents)), backbone=resnet)[0])[0]

    weights = spoilt([])
    assert spoilt(fold.select) == weights
    assert spoilt(fold.train[:1]) != weights


# ------------------------------------------------------------------------------------------------------ what is fresh


def test_killed_while_writing_it_is_not_whole(tune, resnet, monkeypatch):
    one = TWO.model_copy(update={"epochs": 1})
    folder, _ = tune(one, backbone=resnet)
    assert (folder / "finetune.json").exists()

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune_module, "write_document", killed)
    with pytest.raises(KeyboardInterrupt):
        tune(one, seed=1, folder=folder, backbone=resnet)
    assert not (folder / "finetune.json").exists()  # the new weights do not pass for those of seed 0


# ------------------------------------------------------------------------------------------------------- what is said


@pytest.mark.parametrize(("lr", "epochs"), [(1e20, 1), (1e20, 2)])
def test_a_loss_that_is_not_finite_stops_the_run(tune, resnet, lr, epochs):
    with pytest.raises(StageError, match=r"loss .* epoch 0.*finetune\.lr \(now 1e\+20\)"):
        tune(TWO.model_copy(update={"lr": lr, "epochs": epochs}), backbone=resnet)


def test_a_held_out_loss_that_is_not_finite_stops_it_too(tune, resnet):
    with pytest.raises(StageError, match=r"held-out loss .* epoch 0"):  # after the only batch
        tune(TWO.model_copy(update={"lr": 1e20, "epochs": 1, "batch_size": 64}), backbone=resnet)


def test_images_that_are_gone_are_named(tune, few_images):
    kept = slice(1, None)
    fewer = replace(few_images, ids=few_images.ids[kept], contents=few_images.contents[kept])
    with pytest.raises(InputError, match=r"1 images .* \(0/\d+\.pgm .*: run make extract"):
        tune(images=fewer)


def test_a_folder_without_a_head_is_said(tmp_path):
    with pytest.raises(InputError, match="head: run make finetune"):
        read_finetuned_head(tmp_path)
