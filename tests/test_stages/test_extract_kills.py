"""SIGKILL at random moments of a real extraction: it goes on, and the bytes are those of an undisturbed run."""

import multiprocessing
import shutil
import time

import numpy as np

from cache import FeatureCache
from stages.extraction.changes import compare_versions
from stages.inputs.images import list_images
from stages.progress import NullProgress
from tests.test_stages.slow_extraction import small_shards

IMAGES = "sklearn:digits[0,1]/train"
SHARD, AHEAD = 16, 3 * 16  # images of a shard; images that may be under way while a shard is written


class Tells(NullProgress):
    """Sends how many images are done."""

    def __init__(self, listener):
        self.listener = listener

    def advance(self, n=1, **fields):
        self.listener.send(n)


def test_killed_at_random_moments(backbone, tmp_path, request):
    whole = small_shards(backbone, IMAGES, tmp_path / "whole")
    rng, kills, lost_at_most, sealed = np.random.default_rng(0), 0, 0, 0
    root, before = tmp_path / "killed", 0
    planned, forks = request.config.getoption("kills", 10), multiprocessing.get_context("fork")

    def extract_and_tell(teller):
        small_shards(backbone, IMAGES, root, progress=Tells(teller))

    while kills < planned or not sealed:
        listener, teller = forks.Pipe(duplex=False)
        process = forks.Process(target=extract_and_tell, args=(teller,))
        process.start()
        teller.close()
        kept = listener.recv()  # what it found done: the first count that it gives
        lost_at_most = max(lost_at_most, before - kept)
        # Where no run came to the end, as on a slow machine, the next ones live longer.
        time.sleep(rng.uniform(0, 0.25 * max(1, kills / planned) ** 2))
        process.kill()
        process.join()
        kills += process.exitcode == -9
        before = kept
        while listener.poll():
            try:
                before += listener.recv()
            except EOFError:
                break
        if compare_versions("digits", list_images(IMAGES), whole.spec, root):
            (path,) = (path for path in root.iterdir() if path.is_dir())
            assert FeatureCache.open(path).verify() == []
            assert {file.name: file.read_bytes() for file in path.iterdir()} == {
                file.name: file.read_bytes() for file in whole.path.iterdir()
            }
            shutil.rmtree(root)
            sealed, before = sealed + 1, 0
    assert lost_at_most <= SHARD + AHEAD
