"""A fine-tune in a process that may be killed: it tells how many images it has trained on.

``python -m tests.test_stages.killed_finetune WEIGHTS IMAGES CACHE-FOLDER RESULT-FOLDER``; images are a pickled table:
what it would take to list them takes longer to import than all the rest to run.
"""

import pickle
import sys
from pathlib import Path

import torch

from stages.config import BackboneConfig
from stages.context import Context
from stages.progress import NullProgress
from tests.test_stages.small_vit import NAME, cached, tune


class Tells(NullProgress):
    """Prints the epoch of every batch."""

    def advance(self, n=1, **fields):
        if n and "epoch" in fields:
            print(fields["epoch"], flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    weights, listed, caches, result = sys.argv[1:]
    config, images = BackboneConfig(name=NAME, weights=weights, image_size=32), pickle.loads(Path(listed).read_bytes())
    data = cached(config, images, Path(caches))
    tune(config, data, images, Path(result), context=Context(Tells()), mixup=0.8, ema=0.9, beta="dynamic", workers=1)
