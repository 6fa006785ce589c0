"""Tokens that were computed elsewhere lead to their features through the backbone's end, or are refused."""

import numpy as np
import pytest

from cache import FeatureCache
from stages.errors import InputError
from stages.inputs.arrays import list_arrays
from stages.networks.backbone import network_of
from stages.networks.end_check import check_end


def as_npz(path, rows):
    np.savez(path, **rows)
    return path


def tokens_of(cache: FeatureCache, n: int) -> dict[str, np.ndarray]:
    return {name: cache.read(name, np.arange(n)) for name in cache.spec.datasets()}


def test_tokens_that_lead_to_cls_are_taken(caches, backbone, tmp_path):
    table = list_arrays(str(as_npz(tmp_path / "f.npz", tokens_of(caches["train"], 20))))
    check_end(table, backbone)
    spec = table.spec("digits", "float16", network_of(backbone))
    assert (spec.backbone, spec.expert_blocks, spec.image_size) == ("tf_efficientnet_lite0", 1, 48)
    assert spec.weights_sha == caches["train"].spec.weights_sha
    assert spec.fingerprint != caches["train"].fingerprint


def test_tokens_of_another_place_or_network_are_refused(caches, backbone, tmp_path):
    tokens = tokens_of(caches["train"], 20)
    table = list_arrays(str(as_npz(tmp_path / "f.npz", tokens | {"patches": tokens["patches"] * np.float16(1.1)})))
    with pytest.raises(InputError, match=r"f\.npz: .* cls .* 1 block\(s\) of tf_"):
        check_end(table, backbone)
    table = list_arrays(str(as_npz(tmp_path / "f.npz", tokens | {"patches": tokens["patches"][:, :-1]})))
    with pytest.raises(InputError, match=r"h, w of its tokens is \(\d+, \d+\), that of tf_.* at 48 px \(\d, \d\)"):
        check_end(table, backbone)
