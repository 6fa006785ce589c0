"""No row that calibrates a model has a say in it: whatever it shows, groups, weights, heads and settings stay.

Its features are changed, its image and so its place in the split stay; both caches are trained on in full.
"""

import hashlib
import json

import numpy as np
import pytest

from cache import CacheBuilder, InputSet, InputTable, commit_shard, plan_shards
from stages.config import TrainConfig
from stages.heads.choose import load_heads
from stages.id_data.rows import IdData, id_data
from stages.mixture.storage import load_mixture
from stages.train import train_mofe, train_probe
from tests.test_cache.toy import make_spec

CLASSES, DIM = 6, 5
CONFIG = TrainConfig(experts=3, expert="adapter", epochs=3, batch_size=16, patience=1)


def id_set(folder, per_class: int, changed=(), cross_fit: bool = True, n_val: int = 0) -> IdData:
    """Classes around six centres; rows `changed` show another class, far out."""
    spec = make_spec(patches="none", grid=(0, 0), n_registers=0, cls_dim=DIM, tap_dim=DIM, dtype="float32")
    centres = 2 * np.random.default_rng(7).standard_normal((CLASSES, DIM))

    def sealed(name: str, n: int, changed=()):
        labels = np.arange(n) % CLASSES
        values = centres[labels] + np.random.default_rng(n).standard_normal((n, DIM))
        rows = np.asarray(changed, dtype=np.int64)
        values[rows] = 9 * centres[(labels[rows] + 3) % CLASSES]
        given = {"cls": values, "tap_cls": -values}
        inputs = InputTable.listing([f"{row:04d}.png" for row in range(n)], labels, np.full(n, 9), np.zeros(n, int))
        digests = [hashlib.sha256(f"{name} {row}".encode()).digest() for row in range(n)]
        hashes = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)
        plans = plan_shards(n, spec.row_bytes, max_rows=4096, multiple=2)
        with CacheBuilder.begin(folder / name, InputSet(name, inputs, "abcdef"), spec, plans, {}) as builder:
            for plan in builder.pending():
                arrays = {
                    key: np.zeros((n, *shape), kind) if key not in given else np.float32(given[key])
                    for key, (shape, kind) in spec.datasets().items()
                }
                commit_shard(builder.path, plan, arrays, inputs.with_results(hashes, np.zeros(n, bool)), [])
            return builder.seal()

    folder.mkdir()
    val = sealed("val", n_val, changed) if n_val else None
    train = sealed("train", per_class * CLASSES, () if n_val else changed)
    return id_data(train, val, val_share=0.2, cross_fit=cross_fit)


def made_of(data: IdData, folder, run: str) -> dict[object, bytes]:
    """Every array of one run's model by its name, an expert's by the classes of its group."""
    mixture = load_mixture(folder if run == "final" else folder / run, lambda: None, DIM, DIM)
    index = 0 if run == "final" else int(run.removeprefix("fold-"))
    identity = json.loads((folder / "mofe.json").read_text())["heads"]
    heads = load_heads(folder, "heads", identity) | {"probe": train_probe(data, folder / "probe")}

    def name_of(expert: int) -> str:
        return str(mixture.classes_of(expert).tolist())

    found = {}
    for name, tensor in mixture.state_dict().items():
        start, _, rest = name.partition(".")
        expert, _, rest = rest.partition(".") if start == "experts" else ("", "", rest)
        found[start, name_of(int(expert)) if expert else "", rest] = tensor.numpy().tobytes()
    for kind, fitted in heads.items():
        group = kind.removeprefix("refit-group-")
        for name, array in fitted.folds[index].tensors().items():
            found[kind if group == kind else name_of(int(group)), "", name] = array.tobytes()
    return found


@pytest.mark.parametrize("rule", ["cross-fitting", "held-out split", "fine-tuned", "id-val"])
def test_a_row_that_calibrates_changes_nothing_in_its_model(rule, tmp_path):
    settings = {
        "cross-fitting": {"per_class": 12},
        "held-out split": {"per_class": 40},
        "fine-tuned": {"per_class": 12, "cross_fit": False},
        "id-val": {"per_class": 12, "n_val": CLASSES},
    }[rule]
    plain = id_set(tmp_path / "plain", **settings)
    (run, fold), *others = plain.runs()
    assert plain.split.cross_fitted == (rule == "cross-fitting") == bool(others)
    changed = id_set(tmp_path / "changed", **settings, changed=fold.calibrate)
    models = []
    for name, data in (("plain", plain), ("changed", changed)):
        np.testing.assert_array_equal(data.split.folds[0].train, fold.train)
        folder = tmp_path / name / "mixture"
        train_mofe(data, CONFIG, lambda: None, seed=0, folder=folder)
        models.append(made_of(data, folder, run))
    assert models[0] == models[1]
    for other, _ in others:  # of which the rows are training rows
        assert made_of(plain, tmp_path / "plain" / "mixture", other) != made_of(
            changed, tmp_path / "changed" / "mixture", other
        )


def test_every_model_of_cross_fitting_is_trained_by_the_same_schedule_and_selected_on_the_same_rows(tmp_path):
    data = id_set(tmp_path / "set", per_class=12)
    folder = tmp_path / "mixture"
    train_mofe(data, CONFIG.model_copy(update={"patience": None}), lambda: None, seed=0, folder=folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    of = {run: [line for line in lines if line["run"] == run] for run in ("fold-0", "fold-1", "fold-2", "final")}
    for epochs in of.values():
        assert [line["epoch"] for line in epochs] == [-1, *range(CONFIG.epochs)]
        assert all(line["select_loss"] is not None for line in epochs)
        # The last step's rate: a cosine over all epochs, whichever is kept, but for how many steps an epoch has.
        assert epochs[-1]["lr"] < 0.1 * epochs[2]["lr"]
    final = of["final"]
    assert json.loads((folder / "mofe.json").read_text())["best_epoch"] == min(
        range(-1, CONFIG.epochs), key=lambda epoch: final[1 + epoch]["select_loss"]
    )
    assert not any(np.isin(fold.select, data.split.final_train).any() for fold in data.split.folds)


def test_experts_of_a_fold_have_the_numbers_of_the_final_ones_that_they_are_like(tmp_path):
    """What is calibrated per expert is pooled over folds: the same number must mean the same classes, mostly."""
    data = id_set(tmp_path / "set", per_class=12)
    folder = tmp_path / "mixture"
    train_mofe(data, CONFIG, lambda: None, seed=0, folder=folder)
    final = np.array(list(json.loads((folder / "mofe.json").read_text())["groups"].values()))
    for fold in range(3):
        own = np.array(list(json.loads((folder / f"fold-{fold}" / "mofe.json").read_text())["groups"].values()))
        alike = (own == final).sum()
        swaps = [np.array(order)[own] for order in ((1, 0, 2), (0, 2, 1), (2, 1, 0), (1, 2, 0), (2, 0, 1))]
        assert alike == max(alike, *((swap == final).sum() for swap in swaps))
