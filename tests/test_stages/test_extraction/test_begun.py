"""What a GPU has chosen once, caches say from then on; whoever goes on with them, and every worker, computes by it."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from stages.config import BackboneConfig
from stages.errors import StageError
from stages.extraction.begun import as_begun, chosen_spec
from stages.networks.backbone import Backbone
from stages.networks.batch import CHOICES, choose_batch
from stages.networks.compiling import compiling_pays, try_compiling
from tests.test_stages.drawn import create
from tests.test_stages.test_extraction.digits import extract, files, write_images

MIB = 1 << 20


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


def of_batch(spec, batch):
    return replace(spec, compute={**spec.compute, "batch": batch})


def test_caches_that_are_there_decide(images, backbone, tmp_path):
    spec = backbone.feature_spec("float16", "none")
    chosen = of_batch(spec, 64)
    choices = [{"batch": batch, "compiled": compiled} for compiled in (False, True) for batch in (64, 8, 4)]
    assert as_begun(chosen, tmp_path / "none", choices) is None
    extract(images, tmp_path, backbone, spec=of_batch(spec, 4))
    assert as_begun(chosen, tmp_path, choices) == of_batch(spec, 4)
    assert as_begun(chosen, tmp_path, choices[:1]) is None  # whoever has set it means it
    other = replace(chosen, patches="full", grid=backbone.grid)
    assert as_begun(other, tmp_path, choices) is None  # of other features
    assert chosen_spec(backbone, "float16", "none", tmp_path, 10**9) == spec  # a CPU has nothing to choose


def test_passes_have_the_images_that_the_spec_says(images, backbone, tmp_path, monkeypatch):
    """In this process and in a worker, whatever the network would choose there."""
    encode, sizes = backbone.encode, set()
    monkeypatch.setattr(type(backbone), "encode", lambda self, batch: sizes.add(len(batch)) or encode(batch))
    spec = of_batch(backbone.feature_spec("float16", "full"), 4)
    here = extract(images, tmp_path / "here", backbone, spec=spec)
    assert sizes == {4}
    elsewhere = extract(images, tmp_path / "elsewhere", backbone, spec=spec, mapper=lambda fn, tasks: map(fn, tasks))
    assert sizes == {4}
    assert files(here.path) == files(elsewhere.path)
    of_16 = extract(images, tmp_path / "16", backbone)
    np.testing.assert_allclose(here.read("cls").astype(float), of_16.read("cls").astype(float), atol=2e-2, rtol=2e-2)


def test_what_torch_is_to_compile_is_said_by_the_spec(images, tmp_path, monkeypatch):
    """By a backend that writes no code: the parts run compiled, alone at first, and give the same bits."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    name = "test_efficientnet"
    backbone = Backbone(create(name), BackboneConfig(name=name, image_size=32, compile="auto"))
    spec = of_batch(backbone.feature_spec("float16", "none"), 4)
    assert not spec.compute["compiled"]  # on a CPU
    plain = extract(images, tmp_path, backbone, spec=spec)
    assert not compiling_pays(backbone, 4, n_images=4)  # so few are not worth a trial
    assert not backbone.compiled
    compiled = extract(images, tmp_path, backbone, spec=replace(spec, compute={**spec.compute, "compiled": True}))
    assert backbone.compiled
    np.testing.assert_array_equal(plain.read("cls"), compiled.read("cls"))
    backbone.uncompile()
    assert not any("forward" in vars(module) for module in backbone.model.modules())
    trial = try_compiling(backbone, 4)
    assert backbone.compiled
    assert min(trial) > 0


def test_a_setting_says_how_many(backbone):
    assert backbone.batches == (16,)
    assert backbone.choices == [{"batch": 16, "compiled": False}]
    assert backbone.feature_spec("float16", "none").compute["batch"] == 16
    assert "tf32" not in backbone.feature_spec("float16", "none").compute  # of a CPU there is nothing to say


def test_the_largest_batch_that_memory_holds_is_chosen():
    def needs(each, fixed=0):
        return lambda n: fixed + n * each

    image = 3 * 4 * 224**2
    chosen = [choose_batch(needs(10 * MIB, 100 * MIB), gib << 30, image) for gib in (1, 2, 4, 8, 16, 32, 80)]
    assert chosen == sorted(chosen)
    assert set(chosen) <= set(CHOICES)
    assert (chosen[0], chosen[-1]) == (8, 256)
    assert choose_batch(needs(1), 80 << 30, 3 * 4 * 518**2) == 64  # of large images the host would hold too many
    assert choose_batch(needs(80 << 30), 1 << 30, image) == CHOICES[0]  # which a pass then says


def test_what_cannot_be_compiled_is_said_and_left_by_auto(images, tmp_path, monkeypatch):
    def no_compiler(graph, inputs):
        raise RuntimeError("Failed to find C compiler\nmore")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=no_compiler))
    name = "test_efficientnet"
    backbone = Backbone(create(name), BackboneConfig(name=name, image_size=32, compile="auto"))
    assert not compiling_pays(backbone, 4, n_images=4, worth=0.0)
    assert not backbone.compiled
    spec = backbone.feature_spec("float16", "none")
    with pytest.raises(StageError, match=r"^backbone\.compile: .*Failed to find C compiler.*\)[^\n]*$"):
        extract(images, tmp_path, backbone, spec=replace(spec, compute={**spec.compute, "compiled": True}))
