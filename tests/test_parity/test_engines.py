"""One process, or many: the same cache, byte for byte."""

import numpy as np
import pytest
import torch
from PIL import Image

from stages.extract import ExtractOptions, extract_set
from stages.inputs.images import list_dataset
from stages.networks.backbone import load_backbone
from tests.test_stages.slow_extraction import small_shards


@pytest.fixture
def images(few_images, tmp_path):
    reader = few_images.reader()
    for index, name in enumerate(few_images.ids):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(reader.read(index))
    (tmp_path / "images" / "0" / "notes.png").write_bytes(b"no image at all")
    return tmp_path / "images"


@pytest.mark.dask
def test_workers_make_the_cache_that_one_process_makes(workers, images, backbone, tmp_path):
    """Here with two threads, there in two processes of one thread each, which finish in an order of their own."""
    torch.set_num_threads(2)
    try:
        serial = small_shards(backbone, images, tmp_path / "serial", max_failures=1.0)
    finally:
        torch.set_num_threads(1)
    parallel = small_shards(backbone, images, tmp_path / "dask", max_failures=1.0, mapper=workers.map)
    assert len(serial.manifest.shards) == 4
    assert len(serial.failures()) == 1
    for file in serial.path.iterdir():
        assert (parallel.path / file.name).read_bytes() == file.read_bytes(), file.name
    assert len(list(parallel.path.iterdir())) == len(list(serial.path.iterdir()))


@pytest.mark.dask
def test_many_tiny_shards(workers, vit, tmp_path, pytestconfig):
    """A shard an image; `make stress` has a thousand of them."""
    pixels = np.random.default_rng(0).integers(0, 256, (pytestconfig.getoption("shards"), 8, 8, 3), np.uint8)
    samples = list_dataset([Image.fromarray(each) for each in pixels], "tiny")
    network = load_backbone(vit.model_copy(update={"batch": 1}))

    def extracted(folder, mapper):
        spec, options = network.feature_spec("float16", "full"), ExtractOptions(shard_rows=1, mapper=mapper)
        return extract_set("tiny", samples, spec, tmp_path / folder, lambda: network, options=options)

    parallel, serial = extracted("dask", workers.map), extracted("serial", None)
    assert len(parallel.manifest.shards) == parallel.n_rows == len(pixels)
    assert parallel.digest == serial.digest
