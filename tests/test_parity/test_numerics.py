"""What the bits of a feature depend on, and what they do not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stages.config import BackboneConfig
from stages.extract import extract_set
from stages.inputs.images import list_images
from stages.networks.backbone import load_backbone
from tests.test_stages.drawn import DINOV2, dinov2, photos

LITE0 = BackboneConfig(name="tf_efficientnet_lite0", weights="embedded", image_size=48)
TOLERANCE = 1e-5  # of the largest value, between kinds of CPU; the README states it


def features() -> dict[str, torch.Tensor]:
    """Tokens of real photographs through a convolutional net and a transformer."""
    networks = {"lite0": load_backbone(LITE0), "dinov2": dinov2(DINOV2)}
    return {
        f"{name} {field}": tokens
        for name, network in networks.items()
        for field, tokens in vars(network.encode(photos(network, 16))).items()
        if tokens.numel()
    }


@pytest.mark.parametrize("network", ["lite0", "dinov2"])
def test_shards_do_not_depend_on_cores_or_on_threads_that_decode(network, backbone, tmp_path, monkeypatch):
    loaded = backbone if network == "lite0" else dinov2(DINOV2)
    samples, spec = list_images("sklearn:photos").take(range(40)), loaded.feature_spec("float32", "full")
    caches = []
    for cores in (1, 2, 5):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        torch.set_num_threads(cores)
        try:
            caches.append(extract_set("photos", samples, spec, tmp_path / str(cores), lambda: loaded))
            assert torch.get_num_threads() == cores  # as it was
        finally:
            torch.set_num_threads(1)
    for file in caches[0].path.iterdir():
        assert all((cache.path / file.name).read_bytes() == file.read_bytes() for cache in caches), file.name


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="this CPU has the oldest kernels only")
def test_another_kind_of_cpu_gives_the_same_features_to_the_stated_tolerance(tmp_path):
    """The kernels of a CPU of 2008, which sum in another order, in a process of their own."""
    old = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}
    command = [sys.executable, "-m", "tests.test_parity.test_numerics", str(tmp_path / "old.pt")]
    subprocess.run(command, cwd=Path(__file__).parents[2], env=os.environ | old, check=True)
    elsewhere, here = torch.load(tmp_path / "old.pt"), features()
    assert elsewhere.keys() == here.keys()
    differences = {name: ((elsewhere[name] - here[name]).abs().max() / here[name].abs().max()).item() for name in here}
    assert all(difference <= TOLERANCE for difference in differences.values()), differences
    assert any(differences.values())  # they are other kernels


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save(features(), sys.argv[1])
