"""Where the time of an extraction goes: how busy its threads are, and with what."""

import shutil
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from stages.extract import ExtractOptions, extract_set
from stages.extraction.encoder import Encoder
from stages.extraction.reader import Reader
from stages.extraction.shards import make_shards
from stages.extraction.writer import Writer
from stages.inputs.images import list_images
from stages.machine import usable_cores
from stages.networks.backbone import Backbone
from stages.progress import NullProgress
from tests.bench.gpu.feeding import as_many, forward_rate, stage_one
from tests.bench.gpu.step import Bench
from tests.bench.gpu.subjects import jpegs, named_network, network, placed

WATCHED: tuple[tuple[type, str], ...] = (
    (Reader, "read"),
    (Encoder, "encode"),
    (Backbone, "encode"),
    (Writer, "add_rows"),
    (Writer, "commit"),
)


def shares(bench: Bench, name: str, large: bool = False) -> None:
    """Extract with threads that decode and, on a GPU, with processes; say what each thread's time went to."""
    config = named_network(bench, name, large)
    backbone = placed(network(config), config, bench.device)
    stage_one(bench, backbone, jpegs(bench, bench.sizes.jpegs), "full")  # warms up
    pace = stage_one(bench, backbone, jpegs(bench, bench.sizes.jpegs), "full")
    limit = forward_rate(bench, backbone, backbone.encode)
    for processes in (0, usable_cores())[: 2 if bench.device == "cuda" else 1]:
        n = bench.sizes.listed if processes else as_many(bench, pace)  # many: processes take seconds to start
        how = f"{processes} processes" if processes else f"{max(2, usable_cores())} threads"
        seconds, first_s, spent = watched(bench, backbone, n, processes)
        bench.measure(f"{how}: extraction", n / seconds, "images/s")
        bench.measure(f"{how}: first images after", first_s, "s")
        if n > backbone.batch:
            bench.measure(f"{how}: the same without them", (n - backbone.batch) / (seconds - first_s), "images/s")
        bench.measure(f"{how}: the GPU computes, of the time", n / limit / seconds)
        say(bench, how, spent, seconds)


def say(bench: Bench, how: str, spent: "Spent", seconds: float) -> None:
    """What threads did, as shares of their time."""
    decoding = spent[Reader, "read"]
    if decoding.calls:  # not in another process
        bench.measure(f"{how}: threads decode, of their time", decoding.wall / (seconds * max(2, usable_cores())))
        bench.measure(f"{how}: of which on a core, not waiting for one or for Python's lock", decoding.share_on_core)
    passes, launching = spent[Encoder, "encode"], spent[Backbone, "encode"]
    all_s = seconds * len(passes.threads)
    stored = spent[Writer, "add_rows"].wall
    bench.measure(f"{how}: threads that run passes", len(passes.threads))
    bench.measure(f"{how}: they launch passes, of their time", launching.wall / all_s)
    bench.measure(f"{how}: they copy, and wait for the GPU", (passes.wall - launching.wall) / all_s)
    bench.measure(f"{how}: they put rows into shards", stored / all_s)
    bench.measure(f"{how}: they wait for images, or for a turn", max(0.0, 1 - (passes.wall + stored) / all_s))
    bench.measure(f"{how}: launching a pass, median", 1e3 * statistics.median(launching.calls), "ms")
    bench.measure(f"{how}: launching a pass, longest", 1e3 * max(launching.calls), "ms")
    bench.measure(f"{how}: of launching on a core", launching.share_on_core)
    bench.measure(f"{how}: writing shards, of the time", spent[Writer, "commit"].wall / seconds)


class Calls:
    """What calls of a function took: seconds, each and on a core, and which threads called it."""

    def __init__(self) -> None:
        self.calls: list[float] = []
        self.on_core = 0.0
        self.threads: set[int] = set()

    @property
    def wall(self) -> float:
        """Seconds in all."""
        return sum(self.calls)

    @property
    def share_on_core(self) -> float:
        """Of these, how many computed."""
        return self.on_core / self.wall


Spent = dict[tuple[type, str], Calls]


def watched(bench: Bench, backbone: Backbone, n: int, processes: int) -> tuple[float, float, Spent]:
    """Seconds of an extraction, until its first images, and what its functions took."""
    samples, spec = list_images(str(jpegs(bench, n))), backbone.feature_spec("float16", "full")
    root, first = bench.scratch / f"watched-{processes}", First()
    options = ExtractOptions(mapper=lambda _, tasks: make_shards(tasks, backbone, processes=processes), progress=first)
    with ExitStack() as stack:
        spent = {place: stack.enter_context(timed(*place)) for place in WATCHED}
        start = time.perf_counter()
        extract_set("bench", samples, spec, root, lambda: backbone, options=options)
        seconds = time.perf_counter() - start
    shutil.rmtree(root)
    return seconds, first.at - start, spent


class First(NullProgress):
    """Remembers when the first images were done."""

    at = 0.0

    def advance(self, n: int = 1, **fields: object) -> None:
        """See `Progress`."""
        if n:
            self.at = self.at or time.perf_counter()


@contextmanager
def timed(owner: type, name: str) -> Iterator[Calls]:
    """What a method takes within."""
    function, calls, lock = getattr(owner, name), Calls(), threading.Lock()

    def call(*args: Any, **kwargs: Any) -> Any:
        start, on_core = time.perf_counter(), time.thread_time()
        try:
            return function(*args, **kwargs)
        finally:
            with lock:
                calls.calls.append(time.perf_counter() - start)
                calls.on_core += time.thread_time() - on_core
                calls.threads.add(threading.get_ident())

    setattr(owner, name, call)
    try:
        yield calls
    finally:
        setattr(owner, name, function)
