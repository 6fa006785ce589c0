"""What a cluster makes is what one process makes, to the bit; a worker that dies costs its items, and no more."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.engine import ItemsFailedError
from stages.config import TrainConfig
from stages.context import Context
from stages.errors import StageError
from stages.heads import sums
from stages.heads.choose import HeadRows, choose_head
from stages.heads.handed import GroupItem, Others
from stages.mixture.refine import REFINE_BATCH, RefinePart, refine_in_parts, refine_part, refine_to
from stages.mixture.refined import Routes, load_refined
from stages.mixture.storage import load_mixture
from stages.networks.backbone import load_backbone
from stages.scorers.neighbours.bank import FeatureBank
from stages.scorers.neighbours.cluster import SearchItem, cluster_distances, search_item
from stages.scorers.neighbours.store import NeighbourStore
from stages.train import train_mofe
from tests.test_parity.clusters import InHere, Killing


def drawn(n, dim, seed, near=0.0):
    """Rows around twenty directions, many of them alike."""
    rng = np.random.default_rng(seed)
    means = np.random.default_rng(0).normal(size=(20, dim))
    rows = means[rng.integers(0, 20, n)] + (near or 1) * rng.normal(size=(n, dim))
    return np.float16(np.concatenate([rows, rows[: n // 10]]))


# ---------------------------------------------------------------------------------------------------------- neighbours


@pytest.mark.parametrize("near", [0.0, 0.02])
@pytest.mark.parametrize("k", [1, 60])
def test_blocks_of_a_bank_have_the_distances_of_the_whole(near, k, tmp_path):
    """Near neighbours tie in their cosines, and are told apart by their rows."""
    bank, queries = FeatureBank(drawn(2200, 24, 1, near), device="cpu"), drawn(1100, 24, 2, near)
    serial = bank.by_blocks(queries, k)
    here = InHere()
    assert np.array_equal(cluster_distances(bank, queries, k, here, tmp_path / "found", bank_rows=1024), serial)
    assert len(here.done) == 3
    assert not (tmp_path / "found").exists()
    anew = FeatureBank(bank.features, device="cpu", held_bytes=0, block_rows=1024)
    assert np.array_equal(anew.by_blocks(queries, k), serial)
    np.testing.assert_allclose(serial, bank.search(queries, k)[0], atol=1e-5)


@pytest.mark.dask
def test_workers_find_the_neighbours_that_one_process_finds(workers, tmp_path):
    bank, queries = FeatureBank(drawn(2200, 24, 1), device="cpu"), drawn(4500, 24, 2)
    alone = NeighbourStore(tmp_path / "alone").distances(bank, queries, 50)
    killing = Killing(workers, tmp_path / "killed")
    store = NeighbourStore(tmp_path / "together", cluster=killing, least_pairs=0)
    assert np.array_equal(store.distances(bank, queries, 50), alone)
    assert (tmp_path / "killed").exists()
    (file,) = (tmp_path / "alone").glob("*/*.safetensors")
    assert (tmp_path / "together" / file.parent.name / file.name).read_bytes() == file.read_bytes()


def test_a_search_goes_on_where_it_was(tmp_path):
    bank, queries = FeatureBank(drawn(2200, 24, 1), device="cpu"), drawn(1100, 24, 2)
    with pytest.raises(StageError, match="gone"):
        cluster_distances(bank, queries, 5, InHere(most=2), tmp_path / "found", bank_rows=1024)
    here = InHere()
    found = cluster_distances(bank, queries, 5, here, tmp_path / "found", bank_rows=1024)
    assert len(here.done) == 1
    assert np.array_equal(found, bank.by_blocks(queries, 5))


def test_few_rows_are_searched_here(tmp_path):
    here = InHere()
    NeighbourStore(tmp_path, cluster=here).distances(FeatureBank(drawn(50, 4, 0)), drawn(9, 4, 1), 3)
    assert here.done == []


# ------------------------------------------------------------------------------------------------------------ refining


@pytest.fixture(scope="module")
def network(mixture, backbone):
    return load_mixture(mixture, backbone.end, backbone.dim, backbone.tap_dim)


@pytest.fixture(scope="module")
def routes(caches):
    """Every other row, to the one expert, the other, or wherever the router sends it."""
    rows = np.arange(0, caches["test"].n_rows, 2)
    return Routes(rows % 3 - 1, rows)


@pytest.fixture(scope="module", autouse=True)
def two_threads():
    """Here; workers have one, and take as many where that is seen in the bits."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def serial(network, caches, routes, tmp_path_factory):
    path = tmp_path_factory.mktemp("serial") / "test.safetensors"
    refine_to(path, {"of": "test"}, network, caches["test"], routes)
    return path


@pytest.mark.dask
def test_workers_refine_what_one_process_does(workers, network, caches, routes, serial, tmp_path):
    path, context = tmp_path / "test.safetensors", Context(cluster=Killing(workers, tmp_path / "killed"))
    refine_in_parts(path, {"of": "test"}, network, caches["test"], routes, context, REFINE_BATCH)
    assert (tmp_path / "killed").exists()
    assert path.read_bytes() == serial.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["killed", "test.json", "test.safetensors"]


def test_refining_goes_on_where_it_was(network, caches, routes, serial, tmp_path):
    path, arguments = tmp_path / "test.safetensors", (network, caches["test"], routes)
    stopped, here = InHere(most=1), InHere()
    with pytest.raises(StageError, match="gone"):
        refine_in_parts(path, {"of": "test"}, *arguments, Context(cluster=stopped), REFINE_BATCH)
    assert load_refined(path, {"of": "test"}) is None
    refine_in_parts(path, {"of": "test"}, *arguments, Context(cluster=here), REFINE_BATCH)
    assert path.read_bytes() == serial.read_bytes()
    n_parts = -(-len(routes.rows) // REFINE_BATCH)
    assert (len(stopped.done), len(here.done)) == (1, n_parts - 1)


@pytest.mark.dask
def test_items_are_small_and_named(workers, tmp_path):
    part = RefinePart("mixture.pt", "cpu", "cache/train", "digest", np.arange(2048), np.arange(2048), "part", 1)
    item = SearchItem("bank.npy", "queries.npy", (0, 1 << 17), (4096, 8192), 200, "found")
    assert str(part) == "rows 0 to 2047 of cache/train, to be refined"
    assert str(item) == "queries 4096 to 8191 in rows 0 to 131071 of bank.npy"
    with pytest.raises(ItemsFailedError, match=r"2 items failed.*queries 4096 to 8191 .*bank.npy: FileNotFoundError"):
        list(workers.map(search_item, [item, replace(item, k=3)]))
    assert refine_part.__module__ == "stages.mixture.refine"


# --------------------------------------------------------------------------------------------------------------- heads


@pytest.mark.dask
def test_workers_fit_the_head_that_one_process_fits(workers, tmp_path, monkeypatch):
    """Three groups of rows that memory does not keep, mapped from a file; a worker is killed."""
    monkeypatch.setattr(sums, "KEPT_BYTES", 0)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 40_000).astype(np.int32)
    np.save(tmp_path / "features.npy", np.float32(rng.normal(size=(40_000, 6)) + labels[:, None]))
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    rows, own = HeadRows(mapped, labels, mapped[:500], labels[:500]), tmp_path / "head"
    own.mkdir()
    found = choose_head(rows, 3, [0.01, 1.0], Others(Killing(workers, tmp_path / "killed"), own))
    alone = choose_head(rows, 3, [0.01, 1.0])
    assert (found.strength, found.judged) == (alone.strength, alone.judged)
    for name, values in alone.head.tensors().items():
        assert np.array_equal(found.head.tensors()[name], values), name
    assert (tmp_path / "killed").exists()
    assert list(own.iterdir()) == []


def test_all_heads_of_a_training_are_those_of_one_process(vit, vit_data, tmp_path, monkeypatch):
    """The probe's, and those refitted on refined rows, of which no item holds a row."""
    monkeypatch.setattr(sums, "KEPT_BYTES", 0)
    here, backbone, config = InHere(), load_backbone(vit), TrainConfig(experts=2, epochs=1)
    for name, context in (("alone", Context()), ("handed", Context(cluster=here))):
        train_mofe(vit_data, config, backbone.end, 0, tmp_path / name, context)
    for name in ("probe/probe.safetensors", "heads.safetensors", "mofe.safetensors"):
        assert (tmp_path / "handed" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    assert {type(item) for item in here.done} == {GroupItem}
    assert max(len(pickle.dumps(item)) for item in here.done) < 1000
