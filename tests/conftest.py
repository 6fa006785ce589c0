"""Fixtures that several test modules share: real weights, real images, small enough for seconds.

    backbone   tf_efficientnet_lite0 with its embedded ImageNet weights, at 48 px
    caches     sealed caches of its features: "train", "test" (digits 0 to 3), "near" (7 and 8), "far" (photographs)
    data       the ID side of a study on them: 4 classes, a fifth of id-train held out
    few        the same of 12 images a class: too few to halve a held-out share, so it is cross-fitted
    few_images the images of `few`
    small      `few` with its held-out share halved, however few rows: one model, no cross-fitting
    mixture    folder of a mixture of 2 experts trained on `data`, 2 epochs, seed 0
    probe      the linear probe on `data`
    object_store  the proxy of an S3 server on this machine, with a bucket
    workers    two local Dask workers, which tests may kill
    vit        a ViT of six small blocks with seeded random weights
    vit_data   the ID side of a study on its features of `few_images`, a quarter held out, never cross-fitted

All are made once a session and belong to everybody: copy what you change.
"""

import gc
import os
import signal

# One thread a process: the nets are tiny, and threads that wait for one another cost more than they do on busy cores.
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

from pathlib import Path

import pytest
from hypothesis import settings

# Whatever imports torch is imported by the fixtures that use it: xdist's controller, which runs no test, starts the
# workers as soon as it has read this file.

# A shell's background jobs ignore Ctrl-C, and so would the processes that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Libraries, and all tests: a million objects that stay. `pytest_collection_finish` collects again.
gc.disable()

settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")

# Files that take longest, in that order: `make test` begins with them, so that its workers end together. README.md says
# how they are measured.
LONGEST = (
    "test_pipeline/test_demo.py",
    "test_pipeline/test_study.py",
    "test_pipeline/test_processes.py",
    "test_stages/test_score.py",
    "test_pipeline/test_benchmark/test_run.py",
    "test_pipeline/test_export.py",
    "test_contracts/test_training_contract.py",
    "test_stages/test_training/test_finetune_options.py",
    "test_pipeline/test_serving.py",
    "test_stages/test_detection/test_thresholds.py",
    "test_stages/test_train.py",
    "test_pipeline/test_object_store.py",
    "test_contracts/test_scorer_contract.py",
    "test_cache/test_remote.py",
    "test_pipeline/test_report.py",
    "test_bench/test_steps.py",
    "test_pipeline/test_experiments.py",
    "test_stages/test_score_memory.py",
    "test_pipeline/test_study_bytes.py",
    "test_stages/test_detection/test_auto.py",
    "test_parity/test_numerics.py",
    "test_pipeline/test_benchmark/test_map.py",
    "test_pipeline/test_adding.py",
    "test_parity/test_distributed.py",
    "test_parity/test_engines.py",
)


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=10, help="how often a process that fills a cache is killed")
    parser.addoption("--mutants", type=int, default=300, help="how many flipped bits, and damaged images, are tried")
    parser.addoption("--shards", type=int, default=50, help="how many tiny ones a cluster makes")


def pytest_ignore_collect(collection_path):
    """Helpers have no doctests: they are loaded by those who use them, and benches by nobody."""
    return True if collection_path.suffix == ".py" and not collection_path.name.startswith("test_") else None


def pytest_collection_modifyitems(items):
    ranks = {Path(__file__).parent / name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


def pytest_collection_finish():
    """What has been loaded stays to the end: the collector need not look through it again and again."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk():
    """Flushing is for losses of power, of which no test has any: what a process that is killed has written stays."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


SOURCES = {
    "train": "sklearn:digits[0-3]/train",
    "test": "sklearn:digits[0-3]/test",
    "near": "sklearn:digits[7-8]/test",
    "far": "sklearn:photos",
}


@pytest.fixture(scope="session")
def backbone():
    from stages.config import BackboneConfig
    from stages.networks.backbone import load_backbone

    return load_backbone(BackboneConfig(name="tf_efficientnet_lite0", weights="embedded", image_size=48))


@pytest.fixture(scope="session")
def caches(backbone, tmp_path_factory):
    from stages.extract import extract_set
    from stages.inputs.images import list_images

    root, spec = tmp_path_factory.mktemp("caches"), backbone.feature_spec("float16", "full")
    return {
        name: extract_set(name, list_images(source), spec, root, lambda: backbone) for name, source in SOURCES.items()
    }


@pytest.fixture(scope="session")
def data(caches):
    from stages.id_data.rows import id_data

    return id_data(caches["train"], None, val_share=0.2)


def first_of_each_class(n):
    """The first n images of each of the digits 0 to 3."""
    import numpy as np

    from stages.inputs.images import list_images

    table = list_images(SOURCES["train"])
    rows = np.sort(np.concatenate([np.flatnonzero(table.labels == label)[:n] for label in range(4)]))
    return table.take(rows)


@pytest.fixture(scope="session")
def few_images():
    return first_of_each_class(12)


@pytest.fixture(scope="session")
def few(backbone, few_images, tmp_path_factory):
    from stages.extract import extract_set
    from stages.id_data.rows import id_data

    root, spec = tmp_path_factory.mktemp("few"), backbone.feature_spec("float16", "full")
    return id_data(extract_set("few", few_images, spec, root, lambda: backbone), None, val_share=0.2)


@pytest.fixture(scope="session")
def small(few):
    from stages.id_data.rows import id_data

    return id_data(few.train, None, val_share=0.25, cross_fit=False)


@pytest.fixture(scope="session")
def mixture(backbone, data, tmp_path_factory):
    from stages.config import TrainConfig
    from stages.train import train_mofe

    folder = tmp_path_factory.mktemp("mixture")
    assert train_mofe(data, TrainConfig(experts=2, epochs=2), backbone.end, seed=0, folder=folder)
    return folder


@pytest.fixture(scope="session")
def probe(data, tmp_path_factory):
    from stages.train import train_probe

    return train_probe(data, tmp_path_factory.mktemp("probe"))


@pytest.fixture(scope="session")
def object_store():
    from tests.object_store import ObjectStore

    store = ObjectStore()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        patch.setattr("s3fs.S3FileSystem.retries", 3)  # of 5: each waits longer than the one before
        yield store.proxy
    store.close()


@pytest.fixture(scope="session")
def workers():
    from pipeline.engine import DaskEngine

    with DaskEngine(workers=2) as engine:
        yield engine


@pytest.fixture(scope="session")
def vit(tmp_path_factory):
    from tests.test_stages.small_vit import small_vit

    return small_vit(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="session")
def vit_data(vit, few_images, tmp_path_factory):
    from tests.test_stages.small_vit import cached

    return cached(vit, few_images, tmp_path_factory.mktemp("vit-caches"))
