"""Several processes that train one mixture end with what one process alone has: real ones, joined by Gloo."""

import json
import multiprocessing
import os
import socket
import traceback

import numpy as np
import pytest
import torch

from stages.config import TrainConfig
from stages.context import Context, Ranks
from stages.files.tensors import read_tensors
from stages.progress import NullProgress
from stages.train import start_mixture, train_mixture, train_mofe
from stages.training import distributed
from stages.training.checkpoint import Checkpoints
from stages.training.recipes import resolve_settings


def _as_rank(rank, world, port, results, work):
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    try:
        ranks = distributed.init_from_environment()
        results.put((rank, work(ranks)))
        distributed.leave()
    except BaseException:
        results.put((rank, traceback.format_exc()))


def start(work, world=2):
    """Several processes, set up as torchrun does it, and the queue of what `work` returns in each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_as_rank, args=(r, world, port, results, work)) for r in range(world)]
    for process in processes:
        process.start()
    return processes, results


def together(work):
    """What `work` returns in each of two joined processes, by rank."""
    processes, results = start(work)
    try:
        found = dict(results.get(timeout=120) for _ in processes)
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()
    failed = [result for result in found.values() if isinstance(result, str)]
    assert not failed, failed[0]
    return [found[rank] for rank in range(len(processes))]


def weights(trained) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in trained.mixture.state_dict().items()}


@pytest.fixture(scope="module")
def rows(data):
    """Every fourth row that trains: enough to share."""
    return data.split.folds[0].train[::4]


@pytest.fixture(scope="module")
def fit(data, rows, backbone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")

    def fit(name, ranks=Ranks(), **settings):
        chosen = resolve_settings(TrainConfig(preset="zero", experts=2, **{"epochs": 2} | settings), 4)
        own = rows[: 8 * settings["batch_size"]] if "batch_size" in settings else rows
        groups = [0] * 4 if chosen.expert == "dense" else (0, 0, 1, 1)
        mixture = start_mixture(data, own, groups, chosen, backbone.end, 0)
        checkpoints = Checkpoints(folder / f"{name}.checkpoint")
        return train_mixture(mixture, data, own, chosen, 0, checkpoints, Context(ranks=ranks))

    return fit


# ------------------------------------------------------------------------------------------------------- the parts


def test_an_ordinary_process_is_one_of_one():
    ranks = distributed.init_from_environment()
    assert ranks == distributed.current() == Ranks(0, 1)
    assert ranks.first
    assert list(range(5))[ranks.share] == list(range(5))
    assert ranks.agree("mine") == "mine"
    assert ranks.add(torch.ones(2)).tolist() == [1, 1]
    distributed.leave()


def test_ranks_share_rows_sum_and_agree():
    def work(ranks):
        first, second, third = (torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(3))
        first.grad = torch.full((2, 3), 1.0 + ranks.rank)
        if ranks.rank == 1:
            second.grad = torch.arange(6.0).view(2, 3)
        ranks.add_gradients([first, second, third])
        gradients = [None if p.grad is None else p.grad.tolist() for p in (first, second, third)]
        return list(range(5))[ranks.share], gradients, ranks.agree({"rank": ranks.rank}), ranks.first

    one, other = together(work)
    assert (one[0], other[0]) == ([0, 2, 4], [1, 3])
    assert one[1] == other[1] == [[[3.0] * 3] * 2, [[0, 1, 2], [3, 4, 5]], None]  # nobody's gradient stays nobody's
    assert one[2] == other[2] == {"rank": 0}
    assert (one[3], other[3]) == (True, False)


# ---------------------------------------------------------------------------------------------------- the training


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("default", {}),
        ("clipped", {"gradient_clip": 0.05, "ema": 0.0, "label_smoothing": 0.1}),
        ("tiny", {"batch_size": 3, "expert": "adapter", "epochs": 1}),  # a process may have no row of an expert
        ("dense", {"expert": "dense", "router_input": "cls", "epochs": 1}),
    ],
)
def test_two_processes_train_what_one_trains(name, settings, fit):
    alone = fit(f"{name}-alone", **settings)

    def work(ranks):
        trained = fit(name, ranks, **settings)
        return weights(trained), trained.history, trained.best_epoch

    (first, history, best_epoch), (second, other_history, _) = together(work)
    assert all(np.array_equal(first[key], second[key]) for key in first)
    assert history == other_history
    for key, expected in weights(alone).items():
        np.testing.assert_allclose(first[key], expected, atol=1e-4)
    assert best_epoch == alone.best_epoch
    for ours, expected in zip(history, alone.history, strict=True):
        assert (ours.load, ours.alpha, ours.mixing) == (expected.load, expected.alpha, expected.mixing)
        assert ours.loss == pytest.approx(expected.loss, abs=1e-4)
        assert ours.select_loss == pytest.approx(expected.select_loss, abs=1e-4)
        assert ours.select_accuracy == expected.select_accuracy


def test_stopped_together_they_go_on_together_or_alone(fit, rows, data, backbone, tmp_path):
    whole = weights(fit("whole"))

    class Stops(NullProgress):
        def advance(self, n=1, **fields):
            if fields.get("epoch") == 1:
                os._exit(9)  # rank 0 dies in its second epoch, and the other, left alone, with it

    def run(context=Context()):
        chosen = resolve_settings(TrainConfig(preset="zero", experts=2, epochs=2), 4)
        mixture = start_mixture(data, rows, (0, 0, 1, 1), chosen, backbone.end, 0)
        return train_mixture(mixture, data, rows, chosen, 0, Checkpoints(tmp_path / "mine.checkpoint"), context)

    processes, _ = start(lambda ranks: run(Context(Stops(), ranks=ranks)))
    for process in processes:
        process.join(timeout=60)
        process.kill()
    assert processes[0].exitcode == 9
    for resumed in (*together(lambda ranks: weights(run(Context(ranks=ranks)))), weights(run())):
        for key, expected in whole.items():
            np.testing.assert_allclose(resumed[key], expected, atol=1e-4)


def test_one_folder_is_written_by_one_of_them(data, backbone, tmp_path):
    """Heads, refined features and descriptions are rank 0's work; a second run finds all fresh."""
    config = TrainConfig(experts=2, epochs=1, expert="adapter")

    def work(ranks):
        context = Context(ranks=ranks)
        return [train_mofe(data, config, backbone.end, 0, tmp_path / "two", context) for _ in range(2)]

    assert together(work) == [[True, False]] * 2
    assert train_mofe(data, config, backbone.end, seed=0, folder=tmp_path / "one")
    two, one = (json.loads((tmp_path / name / "mofe.json").read_text()) for name in ("two", "one"))
    of_bits = {"digest", "files", "bank", "heads"}  # sums of two processes round otherwise than one's
    assert {key: two[key] for key in two.keys() - of_bits} == {key: one[key] for key in one.keys() - of_bits}
    assert two.keys() == one.keys() > of_bits
    assert not list((tmp_path / "two").glob("*.checkpoint"))
    ours, theirs = (read_tensors(tmp_path / name / "mofe.safetensors") for name in ("two", "one"))
    for key, expected in theirs.items():
        np.testing.assert_allclose(ours[key], expected, atol=1e-4)


def test_all_of_them_refuse_what_one_would(fit):
    """A loss that is not finite must not leave the other waiting for a sum that never comes."""

    def work(ranks):
        try:
            fit("refused", ranks, epochs=1, lr=1e30)
        except Exception as error:
            return [str(error)]
        return []

    (ours,), (theirs,) = together(work)
    assert "loss is not finite" in ours
    assert ours == theirs
