"""Refined features: each row through the expert that it is sent to, kept under what they are made of."""

import tracemalloc

import numpy as np
import pytest
import torch

from cache import file_sha256
from stages.context import Context
from stages.extract import ExtractOptions, extract_set
from stages.files.tensors import write_described
from stages.id_data.tokens import read_tokens
from stages.inputs.images import list_images
from stages.mixture import refine as refine_module
from stages.mixture.config import MixtureConfig
from stages.mixture.model import build_mixture
from stages.mixture.refine import refine, refine_to
from stages.mixture.refined import Routes, load_refined, refined_digest, refined_path
from stages.mixture.storage import load_mixture


@pytest.fixture(scope="module")
def network(mixture, backbone):
    return load_mixture(mixture, backbone.end, backbone.dim, backbone.tap_dim)


@pytest.fixture(scope="module")
def routed(network, caches):
    return refine(network, caches["test"])


def test_the_router_sends_each_row_to_its_likeliest_group(network, routed, caches):
    tokens = read_tokens(caches["test"], slice(None))
    with torch.inference_mode():
        probability = network.router(tokens.cls).softmax(1).numpy()
    group = network.group.numpy()
    gate = np.stack([probability[:, group == expert].sum(1) for expert in range(2)], axis=1)
    np.testing.assert_array_equal(routed.expert, gate.argmax(1))
    np.testing.assert_allclose(routed.confidence, gate.max(1), rtol=1e-5)
    np.testing.assert_array_equal(routed.router_class, probability.argmax(1))
    assert len(np.unique(routed.expert)) == 2


def test_each_row_is_what_its_expert_makes_of_it(network, routed, caches):
    for row in range(0, len(routed.expert), 40):
        expert = int(routed.expert[row])
        with torch.inference_mode():
            features, outputs = network.experts[expert](read_tokens(caches["test"], np.array([row])))
        np.testing.assert_allclose(routed.features[row], features[0], rtol=1e-4, atol=1e-5)
        classes = network.classes_of(expert).numpy()
        np.testing.assert_allclose(routed.logits[row, classes], outputs[0, :-1], rtol=1e-4, atol=1e-5)
        assert np.isneginf(np.delete(routed.logits[row], classes)).all()
        assert routed.other[row] == pytest.approx(float(outputs[0, -1]), abs=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU answers here")
def test_a_gpu_refines_as_the_cpu_does(network, caches):
    gpu, cpu = (refine(network, caches["test"], context=Context(device=device)) for device in ("cuda", "cpu"))
    np.testing.assert_array_equal(gpu.expert, cpu.expert)
    for name in ("features", "logits", "other", "gate", "others"):
        np.testing.assert_allclose(getattr(gpu, name), getattr(cpu, name), rtol=1e-3, atol=1e-4)
    assert network.group.device.type == "cpu"  # and is brought back


def test_without_a_gpu_auto_is_the_cpu(network, routed, caches, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("auto", "cpu"):
        refined = refine(network, caches["test"], context=Context(device=device))
        assert all(np.array_equal(own, getattr(refined, name)) for name, own in vars(routed).items())


def test_rows_can_be_sent_to_an_expert(network, routed, caches):
    asked = np.arange(caches["test"].n_rows) % 3 - 1  # by the router, to 0, to 1, …
    refined = refine(network, caches["test"], Routes(asked))
    np.testing.assert_array_equal(refined.expert, np.where(asked < 0, routed.expert, asked))
    same = np.flatnonzero(refined.expert == routed.expert)
    np.testing.assert_allclose(refined.features[same], routed.features[same], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(refined.confidence, routed.confidence)  # what the router said stays what it said


def test_the_runner_up_is_the_second_likeliest_group(routed):
    order = np.argsort(-routed.gate, axis=1)
    np.testing.assert_array_equal(routed.runner_up, order[:, 1])
    np.testing.assert_array_equal(routed.confidence, routed.gate.max(1))
    assert (routed.runner_up != routed.expert).all()


def test_some_rows_alone(network, routed, caches):
    rows = np.array([3, 70, 71, 200])
    some = refine(network, caches["test"], Routes(routed.runner_up[rows], rows))
    np.testing.assert_array_equal(some.expert, routed.runner_up[rows])
    np.testing.assert_allclose(some.gate, routed.gate[rows], rtol=1e-5)
    own = refine(network, caches["test"], Routes(rows=rows))
    np.testing.assert_allclose(own.features, routed.features[rows], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "groups"), [("frozen", (0, 1, 2, 1)), ("frozen", (0, 0, 0, 0)), ("adapter", (0, 1, 1, 0))]
)
def test_every_group_says_other_where_all_heads_see_the_frozen_features(backbone, caches, kind, groups):
    torch.manual_seed(0)
    mixture = build_mixture(MixtureConfig(backbone.dim, backbone.tap_dim, groups, kind), backbone.end)
    for expert in mixture.experts:
        torch.nn.init.normal_(expert.head.weight, std=0.05)
    refined = refine(mixture, caches["test"])
    if kind != "frozen" or max(groups) == 0:  # features of one expert say nothing to another's head; one has no "other"
        assert refined.others.shape == (caches["test"].n_rows, 0)
        return
    features = torch.from_numpy(np.float32(caches["test"].read("cls")))
    with torch.inference_mode():
        expected = [expert.head(features).softmax(1)[:, -1].numpy() for expert in mixture.experts]
    np.testing.assert_allclose(1 / (1 + np.exp(-refined.others)), np.stack(expected, axis=1), rtol=1e-4)
    own = np.arange(len(features)), refined.expert
    exponentials = np.exp(np.float64(refined.logits)).sum(1)  # of the routed expert's classes
    np.testing.assert_allclose(refined.others[own], refined.other - np.log(exponentials), rtol=1e-4, atol=1e-5)


def test_the_size_of_a_batch_does_not_matter(network, routed, caches, monkeypatch):
    monkeypatch.setattr(refine_module, "REFINE_BATCH", 100)
    again = refine(network, caches["test"])
    np.testing.assert_array_equal(again.expert, routed.expert)
    np.testing.assert_allclose(again.features, routed.features, rtol=1e-4, atol=1e-5)


def test_a_cache_without_rows(network, backbone, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    spec, samples = backbone.feature_spec("float16", "full"), list_images(str(tmp_path / "images"))
    empty = extract_set("empty", samples, spec, tmp_path, lambda: backbone, options=ExtractOptions(max_failures=1.0))
    refined = refine(network, empty)
    refine_to(tmp_path / "empty.safetensors", {}, network, empty)
    for found in (refined, load_refined(tmp_path / "empty.safetensors", {})):
        assert found.features.shape == (0, backbone.dim)
        assert found.logits.shape == (0, 4)
        assert len(found.expert) == 0


def test_kept_and_read_back(network, routed, caches, tmp_path):
    path, identity = refined_path(tmp_path, "final", "test"), {"mixture": "a", "features": "b"}
    assert load_refined(path, identity) is None
    refine_to(path, identity, network, caches["test"])
    stored = load_refined(path, identity)
    for name, array in vars(routed).items():
        np.testing.assert_array_equal(getattr(stored, name), array)
        assert getattr(stored, name).dtype == array.dtype
    np.testing.assert_array_equal(stored[np.array([3, 1])].features, routed.features[[3, 1]])
    assert not stored.features.flags.owndata  # it stays in the file until rows are looked at
    assert not stored.features.flags.writeable
    assert load_refined(path, {"mixture": "a", "features": "c"}) is None


def test_damaged_files_are_computed_again_and_not_believed(network, caches, tmp_path):
    path, identity = refined_path(tmp_path, "final", "test"), {"mixture": "a"}
    refine_to(path, identity, network, caches["test"])
    path.write_bytes(path.read_bytes()[:-1])
    assert load_refined(path, identity) is None
    path.unlink()
    assert load_refined(path, identity) is None


def test_files_of_another_version_are_computed_again(routed, tmp_path):
    path, identity = refined_path(tmp_path, "final", "test"), {"mixture": "a"}
    write_described(path, {"features": routed.features, "confidence": routed.confidence}, identity)
    assert load_refined(path, identity) is None


def test_killed_while_writing_the_new_rows_do_not_pass_for_the_old(network, caches, tmp_path, monkeypatch):
    path = refined_path(tmp_path, "final", "test")
    refine_to(path, {"mixture": "old"}, network, caches["test"])

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("stages.files.rows.write_document", killed)  # between the arrays and what says whose they are
    with pytest.raises(KeyboardInterrupt):
        refine_to(path, {"mixture": "new"}, network, caches["test"])
    monkeypatch.undo()
    assert load_refined(path, {"mixture": "old"}) is None
    assert load_refined(path, {"mixture": "new"}) is None


@pytest.mark.parametrize("some", [False, True])
def test_by_blocks_into_a_file_it_is_what_it_is_in_memory(network, caches, tmp_path, some):
    cache, identity = caches["test"], {"mixture": "a", "features": "b"}
    rows = np.arange(3, cache.n_rows, 2) if some else None
    expert = np.arange(len(rows)) % 3 - 1 if some else None
    routes = Routes(expert, rows)
    refined = refine(network, cache, routes)
    whole, blocks = (refined_path(tmp_path, run, "test") for run in ("whole", "blocks"))
    write_described(whole, vars(refined), identity)
    written = refine_to(blocks, identity, network, cache, routes)
    assert blocks.read_bytes() == whole.read_bytes()
    assert refined_digest(blocks) == refined_digest(whole) == file_sha256(blocks)
    for stored in (written, load_refined(blocks, identity)):
        for name, array in vars(refined).items():
            np.testing.assert_array_equal(getattr(stored, name), array)
    assert not written.features.flags.writeable


def test_ten_times_the_rows_take_no_more_memory(backbone, caches, tmp_path):
    mixture = build_mixture(MixtureConfig(backbone.dim, backbone.tap_dim, (0, 1, 1, 0), "frozen"), backbone.end)
    peaks = []
    for n in (400, 4000):  # of 5 KiB: 2 MB, 20 MB
        rows = np.sort(np.arange(n) % caches["test"].n_rows)
        tracemalloc.start()
        refined = refine_to(refined_path(tmp_path, "final", f"{n}"), {}, mixture, caches["test"], Routes(rows=rows))
        assert refined.features.shape == (n, backbone.dim)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0] + 200 * 4000  # expert, gate and the like stay in memory
