"""Stage two: seeded to the bit, resumable to the bit, blind to the rows that judge it; and it learns."""

import json
import shutil
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count

import h5py
import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_post_hook

from cache import FeatureCache
from stages import train as train_module
from stages.config import BackboneConfig, TrainConfig
from stages.context import Context
from stages.errors import InputError, StageError
from stages.extract import extract_set
from stages.files.documents import read_document
from stages.heads.choose import load_heads
from stages.id_data.rows import id_data
from stages.id_data.tokens import read_tokens
from stages.mixture.mixup import class_alpha
from stages.mixture.refined import load_refined, refined_path
from stages.mixture.storage import load_mixture
from stages.networks.backbone import Backbone, load_backbone
from stages.progress import NullProgress
from stages.train import start_mixture, train_mixture, train_mofe, train_probe
from stages.training import finish as finish_module
from stages.training.cached import CachedTrainer
from stages.training.checkpoint import Checkpoints
from stages.training.identity import mixture_identity, mixture_is_fresh
from stages.training.optim import is_of_end, parameters_by_rate
from stages.training.recipes import resolve_settings
from tests.test_stages.drawn import create
from tests.test_stages.stops import StopsAt, StopsIn
from tests.test_stages.tallies import Tallies

ONE, TWO = (TrainConfig(experts=2, epochs=epochs) for epochs in (1, 2))


@pytest.fixture(scope="module")
def rows(data):
    """Every fourth row that trains: enough for what does not depend on how well it learns."""
    return data.split.folds[0].train[::4]


@pytest.fixture(scope="module")
def fit(data, rows, backbone, tmp_path_factory):
    """Train one mixture from zero, without refitted heads: on `rows` of `data`, two epochs unless told otherwise."""
    numbers, folder = count(), tmp_path_factory.mktemp("fit")

    def new():
        return folder / f"{next(numbers)}.checkpoint"

    def fit(data=data, groups=(0, 0, 1, 1), seed=0, progress=None, checkpoint=None, rows=rows, **settings):
        chosen = resolve_settings(
            TrainConfig(**{"preset": "zero", "experts": 2, "epochs": 2} | settings), data.n_classes
        )
        store = checkpoint if isinstance(checkpoint, Checkpoints) else Checkpoints(checkpoint or new())
        mixture = start_mixture(data, rows, groups, chosen, backbone.end, seed)
        return train_mixture(mixture, data, rows, chosen, seed, store, Context(progress or NullProgress()))

    return fit


@pytest.fixture(scope="module")
def plain(fit):
    return fit()


def bits(trained) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in trained.mixture.state_dict().items()}


def files(folder, *names) -> list[bytes]:
    return [(folder / name).read_bytes() for name in names]


# --------------------------------------------------------------------------------------------------------- learning


def test_it_learns(fit, data):
    trained = fit(epochs=4, seed=3, rows=data.split.final_train)
    losses = [record.select_loss for record in trained.history]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.7 * losses[0]
    assert trained.best_epoch == 3
    last = trained.history[-1]
    assert last.router_accuracy >= 0.85  # chance is one half
    assert last.select_accuracy >= 0.8  # chance is a quarter
    assert sum(last.load) == len(data.split.final_train)
    assert not trained.mixture.training


def test_the_kept_epoch_is_the_first_with_the_lowest_held_out_loss(fit, monkeypatch):
    judge, after = CachedTrainer.judge_held_out, []

    def judged(trainer, record):
        judge(trainer, record)
        record.select_loss = [0.9, 0.4, 0.4][record.epoch]
        after.append({name: tensor.numpy().tobytes() for name, tensor in trainer.judged.state_dict().items()})

    monkeypatch.setattr(CachedTrainer, "judge_held_out", judged)
    trained = fit(epochs=3)
    assert trained.best_epoch == 1
    assert bits(trained) == after[1] != after[2]


def test_the_held_out_loss_is_that_of_the_unmixed_rows(fit, data):
    """Written out: the right expert's cross-entropy and the router's, without mixing, in evaluation mode."""
    trained = fit(epochs=1)
    select, mixture = data.split.folds[0].select, trained.mixture
    truth = torch.from_numpy(data.train_labels[select]).long()
    tokens = read_tokens(data.train, select)
    with torch.inference_mode():
        out = mixture(tokens, mixture.group[truth])
        expected = functional.cross_entropy(out.logits, truth) + functional.cross_entropy(
            mixture.router(tokens.tap_cls), truth
        )
    record = trained.history[0]
    assert record.select_loss == pytest.approx(float(expected), abs=1e-4)
    arrived = (mixture.route(tokens)[0].argmax(1) == mixture.group[truth]).float().mean()
    assert record.router_accuracy == pytest.approx(float(arrived), abs=1e-6)


# ------------------------------------------------------------------------------------------------- seeds and resume


@pytest.mark.parametrize(("seconds", "expected"), [(0, [1, 2, 3, 4]), (1e9, [1, 4])])
def test_storing_checkpoints_does_not_slow_the_training(seconds, expected, fit, monkeypatch, tmp_path):
    """The first epoch and the last are stored, those between where storing is quick; a resumed run ends the same."""
    epochs, save = [], Checkpoints.save

    def spied(store, state):
        epochs.append(len(state["history"]))
        save(store, state)

    whole, store = fit(epochs=4, expert="frozen"), partial(Checkpoints, tmp_path / "mine.checkpoint", seconds)
    monkeypatch.setattr(Checkpoints, "save", spied)
    with pytest.raises(KeyboardInterrupt):
        fit(epochs=4, expert="frozen", checkpoint=store(), progress=StopsIn(3))
    assert epochs == expected[:-1]
    assert bits(fit(epochs=4, expert="frozen", checkpoint=store())) == bits(whole)
    assert epochs[-1] == 4


def test_within_a_long_epoch_it_goes_on_at_the_step_where_it_was(fit, rows, tmp_path):
    store = partial(Checkpoints, tmp_path / "mine.checkpoint", train_per_store=0, most_lost=0)  # every epoch takes long
    settings = {"batch_size": 16, "expert": "adapter"}
    n_rows, whole = len(rows), fit(**settings)
    for stop in (3 * n_rows // 2, 7 * n_rows // 4):  # twice in the second epoch, the second time in a resumed run
        with pytest.raises(KeyboardInterrupt):
            fit(checkpoint=store(), progress=StopsAt(stop), **settings)
    counted = StopsAt(None)
    resumed = fit(checkpoint=store(), progress=counted, **settings)
    assert counted.done == 2 * n_rows
    assert counted.learned <= n_rows // 4 + 16
    assert resumed.history == whole.history
    assert bits(resumed) == bits(whole)


# ------------------------------------------------------------------------------------------------- a step of learning


@contextmanager
def after_every_step(look):
    """Calls ``look(optimiser)`` whenever weights have moved."""
    handle = register_optimizer_step_post_hook(lambda optimiser, *_: look(optimiser))
    try:
        yield
    finally:
        handle.remove()


def weights_of(optimiser) -> list[np.ndarray]:
    return [p.detach().double().numpy().copy() for group in optimiser.param_groups for p in group["params"]]


def test_what_is_kept_is_the_moving_average_of_the_weights(fit):
    """Written out in float64 for one epoch, from the weights after each step."""
    seen = []
    with after_every_step(lambda optimiser: seen.append(weights_of(optimiser))):
        trained = fit(epochs=1, ema=0.9, expert="adapter", batch_size=16, lr=2e-3)
        plain = fit(epochs=1, ema=0.0, expert="adapter", batch_size=16, lr=2e-3)
    half = len(seen) // 2
    assert all(np.array_equal(a, b) for a, b in zip(seen[half - 1], seen[-1], strict=True))  # it changes no step
    settings = resolve_settings(TrainConfig(), 4)

    def parameters(mixture):
        return [p.detach().numpy() for own in parameters_by_rate(mixture, settings).values() for p in own]

    start = fit(epochs=1, ema=0.9, expert="adapter", batch_size=16, lr=1e-30, head_lr=1e-30, router_lr=1e-30)
    average = [p.astype(np.float64) for p in parameters(start.mixture)]
    for step, weights in enumerate(seen[:half]):
        decay = min(0.9, (1 + step) / (10 + step))
        average = [decay * a + (1 - decay) * w for a, w in zip(average, weights, strict=True)]
    for kept, expected, last in zip(parameters(trained.mixture), average, parameters(plain.mixture), strict=True):
        np.testing.assert_allclose(kept, expected, atol=1e-6)
        assert abs(last - expected).max() > 1e-5
    for kept, last in zip(parameters(plain.mixture), seen[-1], strict=True):
        np.testing.assert_array_equal(kept, last)


def test_gradients_are_clipped(fit):
    def norms(**settings):
        seen = []

        def look(optimiser):
            gradients = [p.grad for g in optimiser.param_groups for p in g["params"] if p.grad is not None]
            seen.append(float(torch.cat([g.flatten() for g in gradients]).norm()))

        with after_every_step(look):
            fit(epochs=1, **settings)
        return seen

    free = norms(gradient_clip=1e6)
    assert min(free) > 0.05
    assert max(norms(gradient_clip=0.05)) == pytest.approx(0.05, rel=1e-4)


def test_the_learning_rate_warms_up_and_falls_to_zero(fit):
    rates = []
    with after_every_step(lambda optimiser: rates.append({g["lr"] for g in optimiser.param_groups})):
        fit(epochs=3, batch_size=8, expert="adapter", lr=1e-4, head_lr=1e-3, router_lr=1e-3)
    ends = np.array([min(rate) for rate in rates])
    assert all(max(rate) == pytest.approx(10 * min(rate)) for rate in rates)
    batches = len(rates) // 3
    assert (np.diff(ends[:batches]) > 0).all()
    assert (np.diff(ends[batches:]) < 0).all()
    assert ends[0] == pytest.approx(1e-4 / (batches + 1))
    assert ends[batches] == pytest.approx(1e-4)
    assert ends[batches + batches] == pytest.approx(0.5e-4)  # half of the cosine
    assert ends[-1] < 2e-6


def test_a_long_training_takes_its_rates_in_proportion(fit):
    """So weights go about as far in many steps as in few: the sum of all rates is that of `rate_steps` steps."""

    def rates(**settings):
        seen = []
        with after_every_step(lambda optimiser: seen.append([g["lr"] for g in optimiser.param_groups])):
            fit(epochs=3, expert="adapter", batch_size=8, **settings)
        return np.array(seen)

    given = rates()
    np.testing.assert_array_equal(rates(rate_steps=len(given)), given)  # no more steps than the rates are for
    np.testing.assert_allclose(rates(rate_steps=len(given) // 3), given / 3, rtol=1e-12)


def test_ends_are_drawn_to_where_they_started(fit):
    """The stronger, the nearer they stay; heads and router learn all the same."""
    rates = {"lr": 1e-3, "head_lr": 1e-3, "router_lr": 1e-3}
    start = fit(expert="adapter", epochs=1, ema=0.0, **dict.fromkeys(rates, 1e-12)).mixture.state_dict()

    def moved(strength):
        trained = fit(expert="adapter", epochs=3, ema=0.0, l2_sp=strength, **rates).mixture.state_dict()
        ends = heads = 0.0
        for name, weights in trained.items():
            squares = float((weights - start[name]).square().sum())
            ends, heads = (ends + squares, heads) if is_of_end(name) else (ends, heads + squares)
        return ends, heads

    (free, _), (drawn, _), (held, learned) = map(moved, (0.0, 1.0, 100.0))
    assert free > drawn > held > 0
    assert learned > held


def test_patience_ends_the_run_and_a_resumed_one(fit, monkeypatch, tmp_path):
    judge = CachedTrainer.judge_held_out

    def judged(trainer, record):
        judge(trainer, record)
        record.select_loss = [0.9, 0.4, 0.5, 0.4, 0.1][record.epoch]

    monkeypatch.setattr(CachedTrainer, "judge_held_out", judged)
    checkpoint = tmp_path / "mine.checkpoint"
    for _ in range(2):
        trained = fit(epochs=5, patience=2, expert="frozen", checkpoint=checkpoint)
        assert (len(trained.history), trained.best_epoch) == (4, 1)
    assert len(fit(epochs=5, patience=3, expert="frozen").history) == 5


def test_progress_tells_loss_accuracy_and_load(fit, rows):
    class Listens(NullProgress):
        counted, fields = 0, {}

        def advance(self, n=1, **fields):
            self.counted += n
            self.fields |= fields

    progress = Listens()
    last = fit(progress=progress).history[-1]
    assert progress.counted == 2 * len(rows)
    assert progress.fields["accuracy"] == last.select_accuracy
    assert progress.fields["router"] == last.router_accuracy
    assert progress.fields["load"] == "/".join(map(str, last.load))
    assert progress.fields["loss"] > 0


# --------------------------------------------------------------------------------------------------- mixed precision


def test_bfloat16_trains_nearly_the_same(fit):
    """What it costs is rounding; weights, their average and all that judges them stay float32."""
    mixed, plain = (fit(precision=precision, epochs=1) for precision in ("bfloat16", "float32"))
    assert bits(mixed) != bits(plain)
    assert {parameter.dtype for parameter in mixed.mixture.parameters()} == {torch.float32}
    for ours, whole in zip(mixed.history, plain.history, strict=True):
        assert (ours.load, ours.lr) == (whole.load, whole.lr)
        assert ours.loss == pytest.approx(whole.loss, rel=0.01)
        assert ours.select_loss == pytest.approx(whole.select_loss, rel=0.02)


def test_a_transformers_end_trains_in_bfloat16(few_of):
    train = few_of(small_transformer("vit_tiny_patch16_224", img_size=32), "full")
    mixed, whole = (train(precision=precision) for precision in ("bfloat16", "float32"))
    assert mixed.history[0].loss == pytest.approx(whole.history[0].loss, rel=0.01)
    assert not torch.equal(mixed.mixture.experts[0].head.weight, whole.mixture.experts[0].head.weight)


# ------------------------------------------------------------------------------------------------ kinds of expert


@pytest.mark.parametrize("expert", ["adapter", "frozen", "dense"])
def test_every_kind_of_expert_is_trained_stored_and_loaded(expert, data, backbone, tmp_path):
    # At the preset's rates so few rows are learnt in the first epoch, and an adapter, which starts at 0, hardly moves.
    rates = {"lr": 3e-5, "head_lr": 1e-3, "router_lr": 1e-3}
    config = TrainConfig(preset="zero", experts=2, epochs=2, expert=expert, router_input="cls", **rates)
    assert train_mofe(data, config, backbone.end, seed=0, folder=tmp_path)
    about = json.loads((tmp_path / "mofe.json").read_text())
    assert about["settings"]["expert"] == expert
    assert len(set(about["groups"].values())) == (1 if expert == "dense" else 2)
    loaded = load_mixture(tmp_path, backbone.end, backbone.dim, backbone.tap_dim)
    assert sum(parameter.numel() for parameter in loaded.parameters()) == about["parameters"]
    tokens = read_tokens(data.train, np.arange(20))
    with torch.inference_mode():
        out = loaded(tokens)
    distance = (out.features - tokens.cls).abs().max()
    assert distance == 0 if expert == "frozen" else distance > 1e-3
    first, last = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert last["select_loss"] < first["select_loss"]
    assert last["router_accuracy"] > 0.8
    assert mixture_is_fresh(tmp_path, about["identity"], data)


def test_what_an_expert_does_not_see_is_not_read(fit, monkeypatch):
    """Patches are nearly all of a cache."""
    read, names = FeatureCache.read, set()

    def spied(cache, name, *how):
        names.add(name)
        return read(cache, name, *how)

    monkeypatch.setattr(FeatureCache, "read", spied)
    fit(expert="frozen", epochs=1, router_input="cls")
    assert names == {"cls"}
    fit(expert="adapter", epochs=1)
    assert names == {"cls", "tap_cls"}
    fit(epochs=1)
    assert names == {"cls", "tap_cls", "patches"}


@pytest.fixture
def few_of(few_images, tmp_path):
    """48 digits as another backbone sees them: ``few_of(backbone, patches)``, and that backbone's ends."""

    def few_of(backbone, patches):
        spec = backbone.feature_spec("float16", patches)
        train = extract_set("few", few_images, spec, tmp_path / "caches", lambda: backbone)
        data, config = id_data(train, None, val_share=0.2), TrainConfig(preset="zero", experts=2, epochs=1)

        def train_one(**settings):
            chosen = resolve_settings(config.model_copy(update=settings), 4)
            rows, path = data.split.final_train, tmp_path / f"{backbone.config.name}-{settings}.checkpoint"
            mixture = start_mixture(data, rows, (0, 0, 1, 1), chosen, backbone.end, 0)
            return train_mixture(mixture, data, rows, chosen, 0, Checkpoints(path))

        return train_one

    return few_of


def small_transformer(name, **kwargs):
    return Backbone(create(name, **kwargs), BackboneConfig(name=name, image_size=kwargs["img_size"]))


def test_without_patches_experts_see_the_class_token_alone(few_of, backbone):
    for train in (few_of(small_transformer("vit_tiny_patch16_224", img_size=32), "none"), few_of(backbone, "none")):
        assert np.isfinite(train().history[0].loss)
        assert np.isfinite(train(expert="adapter").history[0].loss)


@pytest.mark.parametrize(
    ("name", "kwargs", "patches"),
    [
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg", "img_size": 32}, "none"),  # nothing left
        ("eva02_tiny_patch14_224", {"img_size": 42}, "pool:2"),  # positions for 3 x 3 patches
    ],
)
def test_experts_that_cannot_run_on_what_was_cached_are_refused(name, kwargs, patches, few_of):
    train = few_of(small_transformer(name, **kwargs), patches)
    refusal = rf'train\.expert: "end" of {name} cannot run .* patches = "{patches}": extract with patches = "full", or'
    with pytest.raises(InputError, match=refusal):
        train()
    assert np.isfinite(train(expert="adapter").history[0].loss)


# ----------------------------------------------------------------------------------------------- small and bad data


def test_groups_of_one_class_and_classes_of_one_row(fit, rows, data):
    of_class = [rows[data.train_labels[rows] == c] for c in range(4)]
    rows = np.sort(np.concatenate([of_class[0], of_class[1][:1], of_class[2], of_class[3]]))
    trained = fit(rows=rows, groups=(0, 1, 2, 2))
    assert trained.history[-1].load[1] == 1
    assert np.isfinite(trained.history[-1].select_loss)


def test_a_group_of_one_class_has_its_heads(data, backbone, tmp_path):
    grouping = tmp_path / "groups.json"
    grouping.write_text('{"0": "round", "1": "other", "2": "other", "3": "other"}')
    config = TrainConfig(grouping=str(grouping), epochs=1, expert="adapter")
    assert train_mofe(data, config, backbone.end, seed=0, folder=tmp_path / "mofe")
    heads = load_heads(tmp_path / "mofe", "heads", read_document(tmp_path / "mofe/mofe.json")["heads"])
    assert np.isfinite(heads["refit-group-0"].final.bias).tolist() == [True, False, False, False]


@pytest.mark.parametrize("name", ["cls", "tap_cls", "patches"])
@pytest.mark.parametrize("part", ["train", "select"])
def test_features_that_are_not_finite_name_their_image(name, part, vit, vit_data, spoilt, tmp_path):
    row = getattr(vit_data.split.folds[0], part)[3]
    broken = spoilt([row], name, np.nan, vit_data)
    refusal = f"set 'few': {name} of image '{vit_data.train.ids[row]}' is not finite: leave the image out, or remove"
    if name == "cls":
        with pytest.raises(InputError, match=refusal):
            train_probe(broken, tmp_path / "probe")
    if (name, part) != ("cls", "select"):  # which a copy of the backbone's end does not look at
        with pytest.raises(InputError, match=refusal):
            train_mofe(broken, ONE, load_backbone(vit).end, seed=0, folder=tmp_path / "mofe")


# ----------------------------------------------------------------------------------------------- who teaches whom


@pytest.fixture
def spoilt(data, tmp_path):
    """A copy of `data`, or others, in which some rows of id-train hold noise, or one value, and a wrong label."""
    numbers = count()

    def spoilt(rows, only=None, value=None, data=data):
        path = shutil.copytree(data.train.path, tmp_path / f"spoilt-{next(numbers)}")
        rng = np.random.default_rng(0)
        (shard,) = path.glob("shard-*.h5")
        with h5py.File(shard, "r+") as file:
            for name in ("cls", "tap_cls", "patches") if only is None else (only,):
                array = file[name][:]
                array[rows] = rng.normal(size=array[rows].shape) if value is None else value
                file[name][:] = array
        cache, labels = FeatureCache.open(path), data.train_labels.copy()
        labels[rows] = (labels[rows] + 1) % 4
        return replace(data, train=cache, train_labels=labels, held_out=cache, held_out_labels=labels)

    return spoilt


def test_held_out_rows_teach_nothing(fit, rows, data, spoilt):
    fold = data.split.folds[0]
    without = bits(fit(epochs=1))
    assert bits(fit(data=spoilt(np.concatenate([fold.select, fold.calibrate])), epochs=1)) == without
    assert bits(fit(data=spoilt(rows[:1]), epochs=1)) != without


def test_calibration_rows_have_no_say_in_anything(vit, vit_data, spoilt, tmp_path):
    """Neither in weights, nor in when to stop, nor in groups and heads; of adapters and folds: test_leaks.py."""
    found = []
    for name, data in (
        ("plain", vit_data),
        ("spoilt", spoilt(vit_data.split.folds[0].calibrate, data=vit_data)),
    ):
        folder = tmp_path / name
        assert train_mofe(data, TWO, load_backbone(vit).end, seed=0, folder=folder)
        probe = train_probe(data, folder / "probe").final.weight
        found.append(
            [*files(folder, "mofe.safetensors", "heads.safetensors", "metrics.jsonl"), np.asarray(probe).tobytes()]
        )
    assert found[0] == found[1]


# ---------------------------------------------------------------------------------------------------------- mixup


def test_dynamic_alpha_follows_the_accuracy_of_the_epoch_before(fit):
    trained = fit(epochs=3, alpha_min=0.2, alpha_max=0.9)
    assert trained.history[0].alpha == [0.2] * 4  # nothing is known yet
    for before, record in zip(trained.history, trained.history[1:], strict=False):
        expected = class_alpha(np.array(before.accuracy), 0.2, 0.9)
        np.testing.assert_allclose(record.alpha, expected, atol=1e-6)
        assert max(record.alpha) == 0.9
        assert np.argmax(record.alpha) == np.argmin(before.accuracy)


def test_the_knob_turns_where_a_class_is_hard(fit, data):
    """A quarter of the digits 2 and 3, called a class of its own, is what nothing can tell from the others."""
    labels = np.minimum(data.train_labels, 2)
    drawn = np.random.default_rng(0).random(len(labels)) < 0.25
    labels[drawn & (labels == 2)] = 3
    hard = replace(data, train_labels=labels, held_out_labels=labels)
    history = fit(data=hard, rows=data.split.final_train, epochs=5, head_lr=3e-3, router_lr=1e-3).history
    alpha, mixing = (np.array([getattr(record, name) for record in history]) for name in ("alpha", "mixing"))
    assert history[-2].accuracy[3] < 0.5 < min(history[-2].accuracy[:3])
    assert alpha[0].tolist() == [0.1] * 4
    assert alpha[-1, 3] == 0.8
    assert alpha[-1, :3].max() < 0.3
    assert mixing[-3:, 3].mean() > 3 * mixing[0, 3]  # λ moves towards ½
    assert mixing[-1, :3].max() < 0.7 * mixing[-1, 3]  # and the others' does not
    assert mixing[-1, 0] == pytest.approx(mixing[0, 0], abs=0.03)


@pytest.mark.parametrize(("mixup", "alpha"), [("static", 0.3), ("none", 0.0)])
def test_static_and_no_mixup_keep_alpha(fit, mixup, alpha):
    trained = fit(mixup=mixup, alpha_min=0.3)
    assert [record.alpha for record in trained.history] == [[alpha] * 4] * 2


def test_difficulty_and_the_other_class_change_the_model(fit, plain):
    assert bits(fit(mixup="static")) != bits(plain)
    assert bits(fit(other_weight=0.0)) != bits(plain)


# ------------------------------------------------------------------------------------------------- other settings


def test_one_expert_has_nothing_other(fit, data):
    trained = fit(groups=[0] * 4, experts=1, epochs=1)
    assert trained.mixture.experts[0].head.out_features == 4
    out = trained.mixture(read_tokens(data.train, np.arange(5)))
    assert torch.isinf(out.other).all()
    assert torch.isfinite(out.logits).all()


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_loss_that_is_not_finite_stops_the_run(fit, epochs):
    with pytest.raises(StageError, match=r"loss .*train\.lr"):
        fit(lr=1e30, epochs=epochs)


def test_a_held_out_loss_that_is_not_finite_stops_it_too(fit, data):
    """One batch: its own loss is that of the weights before the step that ruins them."""
    with pytest.raises(StageError, match=r"held-out loss .* epoch 0"):
        fit(head_lr=1e37, epochs=1, batch_size=len(data.train), warmup_epochs=0.0)


# --------------------------------------------------------------------------------------------- what stands on disk


def test_what_a_trained_folder_holds(data, mixture, backbone):
    about = json.loads((mixture / "mofe.json").read_text())
    assert about["classes"] == ["0", "1", "2", "3"]
    assert sorted(about["groups"].values()) == [0, 0, 1, 1]
    assert about["features"] == data.train.fingerprint
    lines = [json.loads(line) for line in (mixture / "metrics.jsonl").read_text().splitlines()]
    assert [(line["run"], line["epoch"]) for line in lines] == [("final", -1), ("final", 0), ("final", 1)]
    assert len(lines[2]["alpha"]) == 4
    assert not list(mixture.glob("*.checkpoint"))
    loaded = load_mixture(mixture, backbone.end, backbone.dim, backbone.tap_dim)
    assert sum(parameter.numel() for parameter in loaded.parameters()) == about["parameters"]
    bank = load_refined(
        refined_path(mixture, "final", "id-train"),
        {"weights": about["files"]["mofe.safetensors"], "features": data.train.digest},
    )
    own_group = np.array([about["groups"][name] for name in data.class_names])[data.train_labels]
    train = data.split.final_train
    np.testing.assert_array_equal(bank.expert[train], own_group[train])
    held = np.setdiff1d(np.arange(len(data.train)), train)
    routed = loaded.route(read_tokens(data.train, held))[0].argmax(1)
    np.testing.assert_array_equal(bank.expert[held], routed)  # by the router, not by the label


def test_other_settings_seeds_and_grouping_files_are_other_models(data, tmp_path):
    grouping = tmp_path / "groups.json"
    config = TrainConfig(experts=2, epochs=2, grouping=str(grouping))

    def identity(config=TWO, seed=0):
        return mixture_identity(data, resolve_settings(config, 4), seed, tmp_path)

    grouping.write_text('{"0": "a", "1": "b", "2": "a", "3": "b"}')
    first = identity(config)
    grouping.write_text('{"0": "a", "1": "b", "2": "b", "3": "a"}')
    assert len({first, identity(config), identity(), identity(seed=1), identity(TrainConfig(experts=2, epochs=3))}) == 5


@pytest.mark.parametrize("killed_in", ["save_weights", "refine_to", "save_heads", "write_document"])
def test_killed_while_writing_it_is_neither_the_old_model_nor_the_new(
    killed_in, data, backbone, mixture, tmp_path, monkeypatch
):
    folder, other = shutil.copytree(mixture, tmp_path / "mixture"), ONE.model_copy(update={"expert": "adapter"})

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(finish_module, killed_in, killed)
    with pytest.raises(KeyboardInterrupt):
        train_mofe(data, other, backbone.end, seed=1, folder=folder)
    for config, seed in ((TWO, 0), (other, 1)):
        assert not mixture_is_fresh(
            folder, mixture_identity(data, resolve_settings(config, 4), seed, folder / "probe"), data
        )


@pytest.mark.parametrize(
    "lost", ["mofe.json", "heads.json", "heads.safetensors", "mofe.safetensors", "refined/final/id-train.safetensors"]
)
def test_a_folder_without_one_of_its_files_or_with_other_bytes_in_one_is_trained_again(lost, data, mixture, tmp_path):
    folder = shutil.copytree(mixture, tmp_path / "mixture")
    identity = mixture_identity(data, resolve_settings(TWO, 4), 0, folder / "probe")
    assert mixture_is_fresh(folder, identity, data)
    whole = (folder / lost).read_bytes()
    for at in (0, len(whole) // 2, len(whole) - 1):
        (folder / lost).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert not mixture_is_fresh(folder, identity, data)
    (folder / lost).write_bytes(whole)
    assert mixture_is_fresh(folder, identity, data)
    (folder / lost).unlink()
    assert not mixture_is_fresh(folder, identity, data)


# -------------------------------------------------------------------------------------------------- cross-fitting


def test_small_classes_are_cross_fitted(vit, vit_data, tmp_path):
    """12 images a class: a model for each fold and one of all that they have, stopped once on the way."""
    few, end = id_data(vit_data.train, None, val_share=0.2), load_backbone(vit).end
    assert few.split.cross_fitted
    config = TrainConfig(experts=2, epochs=2, batch_size=16)
    folder = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        train_mofe(few, config, end, seed=0, folder=folder, context=Context(StopsIn(1, "train fold-2")))
    tasks = Tallies()
    assert train_mofe(few, config, end, seed=0, folder=folder, context=Context(tasks))
    assert all(done == total for _, total, done in tasks.told)
    named = [" ".join(description.split()[:2]).rstrip(",") for description, *_ in tasks.told]
    assert [name for name in named if name.startswith("heads ")] == ["heads refit"]  # the probe's are there
    assert train_mofe(few, config, end, seed=0, folder=tmp_path / "whole")
    names = ["mofe.safetensors", "heads.safetensors", "metrics.jsonl"]
    names += [f"fold-{fold}/mofe.safetensors" for fold in range(3)]
    assert files(folder, *names) == files(tmp_path / "whole", *names)
    assert len(set(files(folder, "mofe.safetensors", *names[3:]))) == 4

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for run, rows in few.train_rows().items():
        start, *own = (line for line in lines if line["run"] == run)
        assert (start["epoch"], sum(start["load"])) == (-1, 0)
        assert sum(own[0]["load"]) == len(rows)
        np.testing.assert_allclose(own[1]["alpha"], class_alpha(np.array(own[0]["accuracy"]), 0.1, 0.8), atol=1e-5)
        assert own[1]["select_loss"] is not None


# ---------------------------------------------------------------------------------------------------------- probe


def test_the_probe_is_fitted_once_and_tells_classes_apart(data, probe, tmp_path, monkeypatch):
    fitted = train_probe(data, tmp_path)
    monkeypatch.setattr(train_module, "fit_heads", None)  # and now it is read
    read = train_probe(data, tmp_path)
    for heads in (fitted, read):
        np.testing.assert_array_equal(heads.final.weight, probe.final.weight)
    calibrate = data.split.folds[0].calibrate
    logits = probe.final.logits(np.float32(data.train.read("cls", calibrate)))
    assert (logits.argmax(1) == data.train_labels[calibrate]).mean() > 0.8


def test_the_probe_of_other_rows_is_another(data, few, tmp_path):
    first, second = train_probe(data, tmp_path), train_probe(few, tmp_path)
    assert len(first.folds) == 1
    assert len(second.folds) == 3
    assert not np.array_equal(second.folds[0].weight, second.final.weight)
