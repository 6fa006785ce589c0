"""Who decodes: threads or processes, the same images, digests and reasons; when processes are worth it."""

import os
import signal
from typing import NamedTuple

import pytest
from torch import Tensor

from stages.errors import StageError
from stages.extraction.decoding import DecodingProcesses, DecodingThreads, decoding_processes
from stages.extraction.reader import Reader
from stages.extraction.shards import make_shards
from stages.inputs.images import ImageReader, UndecodedJpeg, list_images
from stages.inputs.images.table import FileRange
from stages.machine import usable_cores
from stages.networks.preprocessing import Preprocessing
from tests.test_stages.jpegs import odd, plain
from tests.test_stages.test_extraction.digits import BROKEN, extract, files, write_images


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


def contents(decoders, reader, batches):
    """What is decoded of each image: digest, and pixels or the reason."""
    found = []
    with decoders:
        assert isinstance(decoders, DecodingThreads) or decoders.started()
        begun = [decoders.begin(reader, rows) for rows in batches[:2]]
        for rows in [*batches[2:], *[None] * len(begun)]:
            with begun.pop(0) as read:
                found += [(digest, c.tolist() if isinstance(c, Tensor) else c) for digest, c in read]
            if rows is not None:
                begun.append(decoders.begin(reader, rows))
    return found


def test_processes_decode_as_threads_do(images, backbone):
    """Forty images in batches of 9, more of them than are in memory at once."""
    samples = list_images(str(images))
    reader, batches = Reader(samples.reader(), backbone.preprocessing), []
    for start in range(0, len(samples), 9):
        batches.append(list(range(start, min(start + 9, len(samples)))))
    threads = contents(DecodingThreads(3), reader, batches)
    processes = contents(DecodingProcesses(2, backbone.preprocessing, 9, ahead=2), reader, batches)
    assert processes == threads
    assert sum(isinstance(content, str) for _, content in threads) == len(BROKEN)


def test_what_a_gpu_is_to_decode_is_read_by_processes(backbone):
    files = [*plain().values(), *odd().values(), b"no image"]
    preprocessing = Preprocessing(backbone.data_config, "cuda")
    reader, batches = Reader(ImageReader(files), preprocessing), [list(range(len(files)))]
    threads = contents(DecodingThreads(2), reader, batches)
    assert contents(DecodingProcesses(1, preprocessing, len(files), ahead=1), reader, batches) == threads
    assert sum(isinstance(content, UndecodedJpeg) for _, content in threads) == len(plain())


def test_a_cache_has_the_same_bytes_whoever_decodes(images, backbone, tmp_path):
    def by_processes(_, tasks):
        return make_shards(tasks, backbone, processes=2)

    threads = extract(images, tmp_path / "threads", backbone)
    assert files(extract(images, tmp_path / "processes", backbone, mapper=by_processes).path) == files(threads.path)


class Deadly(NamedTuple):
    """Bytes that cost the process that reads them its life, as a system without memory does."""

    def read(self):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_is_said(backbone):
    reader = Reader(ImageReader([Deadly()]), backbone.preprocessing)
    with DecodingProcesses(1, backbone.preprocessing, 8, ahead=1) as decoders:
        assert decoders.started()
        begun = decoders.begin(reader, [0])
        with pytest.raises(StageError, match="a process that decodes images has ended"):
            begun.__enter__()


class EndsWhereItArrives:
    """Stands for whatever keeps a process from starting, as a script that cannot be imported does."""

    shape = (3, 48, 48)

    def __reduce__(self):
        return os._exit, (1,)


def test_threads_decode_where_no_process_starts(images, backbone):
    reader = Reader(list_images(str(images)).reader(), backbone.preprocessing)
    with DecodingProcesses(1, EndsWhereItArrives(), 8, ahead=1) as decoders:
        assert not decoders.started()
        with decoders.begin(reader, range(8)) as read:
            assert len(read) == 8


def test_threads_decode_until_processes_have_started(images, backbone):
    """No more batches are begun than are in memory at once, which would wait for ever if they were there."""
    samples = list_images(str(images))
    reader = Reader(samples.reader(), backbone.preprocessing)
    with DecodingProcesses(1, backbone.preprocessing, 8, ahead=1) as decoders:
        begun = [decoders.begin(reader, range(8)) for _ in range(3)]
        for images_of_batch in begun:
            with images_of_batch as read:
                assert len(read) == 8


FILES = [FileRange("a.jpg"), FileRange("b.tar", 512, 100)]


@pytest.mark.parametrize(
    ("device", "what", "n_images"),
    [
        ("cpu", FILES, 10**6),  # threads take what the network leaves
        ("cuda", FILES, 1000),  # they would start for longer than they help
        ("cuda", [*FILES, b"P5 1 1 255 0"], 10**6),  # the bytes themselves would travel
    ],
)
def test_threads_decode_where_processes_do_not_pay(device, what, n_images):
    assert decoding_processes(device, what, n_images) == 0


def test_a_gpu_is_fed_by_a_process_for_each_core():
    assert decoding_processes("cuda", FILES, 10**5) == usable_cores()
