"""A served detector whose network never returns for who asks for `HANGS` neighbours, as a command: BUNDLE TIMEOUT.

While a file is beside the bundle that is named as it, with ``.hangs``, a worker does not come so far.
"""

import socket
import sys
import time
from functools import partial
from pathlib import Path

from pipeline.deciding import Serving
from pipeline.serving.supervisor import serve_bundle
from pipeline.serving.worker import answer_all
from stages.detection import Detector

HANGS = 77


def hangs_while_loading(bundle: str | Path) -> Path:
    """The file that says so."""
    return Path(bundle).with_suffix(".hangs")


def work(bundle: str, asked: Serving, channel: socket.socket) -> None:
    """What a worker does."""
    while hangs_while_loading(bundle).exists():
        time.sleep(0.1)
    detector = Detector.load(bundle)
    whole = detector.score_prepared

    def score_prepared(pixels, nearest=0):
        while nearest == HANGS:
            time.sleep(60)
        return whole(pixels, nearest)

    detector.score_prepared = score_prepared
    answer_all(detector, asked, channel)


if __name__ == "__main__":
    asked = Serving(port=0, timeout=float(sys.argv[2]), silent=1, slower=1)
    serve_bundle(sys.argv[1], asked, partial(work, sys.argv[1], asked))
