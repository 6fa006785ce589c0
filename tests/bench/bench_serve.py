"""How near a served detector comes to `Detector` in process, and whether it loses a request. ``make bench-serve``.

On the loopback alone, clients on the same cores. The same JPEG files of 500 x 375 pixels in turn: `Detector.score` in
this process, while the server waits; and HTTP, a connection a client, while this process only asks. What HTTP and the
copies between processes cost is told by files of the same size that are no images. Then good and bad requests, each of
which has one right status, and the memory of the process that computes after each round. It takes a minute.
"""

import argparse
import io
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import psutil
from PIL import Image
from rich.console import Console

import pipeline.__main__  # noqa: F401  the process is set up as the command line sets it up
from pipeline.deciding import Serving
from stages.detection import Detector
from tests.bench.bench_extract import write_jpegs
from tests.bench.timing import RUNS, in_turn, rates, row
from tests.test_pipeline.command import done
from tests.test_pipeline.served import Served
from tests.test_pipeline.tiny import STUDY, draw

ROUNDS = 2


class Request(NamedTuple):
    """What is posted, and the status that is right."""

    body: bytes
    kind: str
    status: int


def main() -> None:
    """Measure and print; exits 1 where a request was lost or answered otherwise."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--bundle", type=Path, metavar="FILE.ood", help="a detector of images; by default a small one")
    parser.add_argument("--experts", type=int, default=0, help="of the small one; 0: the backbone's own features")
    parser.add_argument("--images", type=int, default=256, help="of the comparison; of few the ends weigh")
    parser.add_argument("--clients", type=int, default=32, help="that ask at once")
    parser.add_argument("--requests", type=int, default=1000, help="good and bad ones, in each of two rounds")
    parser.add_argument("--patience", type=float, nargs="*", default=[Serving.patience], help="servers with these")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        bundle = given.bundle or small_bundle(folder, given.experts)
        write_jpegs(folder / "jpeg", given.images)
        images = [path.read_bytes() for path in sorted((folder / "jpeg").iterdir())]
        if not given.bundle:  # whose network is known
            say_start(bundle, sorted((folder / "jpeg").iterdir())[:3])
        with ExitStack() as ended:
            servers = {}
            for patience in given.patience:
                servers[patience] = Served(bundle, "--patience", patience)
                ended.callback(end, servers[patience])
            detector = Detector.load(bundle, device="auto")
            for patience, server in servers.items():
                compare(server, detector, images, given.clients, patience)
            say_cost_of_http(server, images, given.clients)
            wrong = mixed_rounds(server, images, given.requests, given.clients)
    sys.exit(1 if wrong else 0)


def say_start(bundle: Path, images: Sequence[Path]) -> None:
    """What `Detector.load` costs beyond the network's own load, in a process of its own; of a small bundle alone."""
    command = [sys.executable, "-m", "tests.test_pipeline.starting", bundle, "224", *images]
    said = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    took = f"{said['beyond_s']:.1f} s beyond the {said['network_s']:.1f} s of its network's own load"
    loads = ", ".join(said["laboratory"]) or "no library of the laboratory"
    print(f"Detector.load: {took}, of these {said['golden_s']:.1f} s for its golden images; loads {loads}")


def end(server: Served) -> None:
    """As it is ended by whoever runs it."""
    server.tell(signal.SIGTERM)
    server.finish()


def small_bundle(folder: Path, experts: int) -> Path:
    """A detector of digits by EfficientNet-Lite0 at 224 px, with so many experts that are copies of its end."""
    draw(folder / "images" / "train", "sklearn:digits[0-2]/train", 24)
    draw(folder / "images" / "test", "sklearn:digits[0-2]/test", 8)
    draw(folder / "images" / "threes", "sklearn:digits[3]/test", 6, nested=False)
    draw(folder / "images" / "photos", "sklearn:photos", 4)
    text = STUDY.replace("photos.tar", "photos").replace("image_size = 32", "image_size = 224")
    (folder / "small.toml").write_text(text.replace("experts = 2", f"experts = {experts or 2}"))
    done("extract", folder / "small.toml")
    if experts:
        done("train", folder / "small.toml")
    variant = "default" if experts else "none"
    done("export", folder / "small.toml", "-o", folder / "small.ood", "--variant", variant)
    return folder / "small.ood"


def compare(server: Served, detector: Detector, images: Sequence[bytes], clients: int, patience: float) -> None:
    """Rates of the same images, in process and over HTTP."""
    requests = [Request(image, "image/jpeg", 200) for image in images]
    table = rates(f"median of {RUNS} runs each, in turn; {len(images)} JPEG files, {clients} clients")
    here = psutil.Process()
    alone, asked = Spent(here), Spent(server.worker(), server.command(), here)
    limit, ours = in_turn(
        len(images),
        lambda: alone.during(detector.score, images),
        lambda: asked.during(answers, server, requests, clients),
    )
    row(table, f"Detector in process, served; patience {patience:g} s", "images/s", limit, ours)
    Console().print(table)
    n = len(images) * (RUNS + 1)
    (ours_ms,), (worker, command, client) = ([1e3 * own / n for own in each.seconds] for each in (alone, asked))
    print(f"CPU of an image in process: {ours_ms:.1f} ms")
    print(f"served: worker {worker:.1f} ms, connections {command:.1f} ms; and the clients {client:.1f} ms")


class Spent:
    """CPU seconds that processes spend while something is done; both kinds of time.

    Attributes:
        seconds: of each, so far.
    """

    def __init__(self, *processes: psutil.Process) -> None:
        self._processes = processes
        self.seconds = [0.0] * len(processes)

    def during(self, function: Callable[..., object], *arguments: object) -> None:
        """Do it."""
        before = self._now()
        function(*arguments)
        self.seconds = [own + b - a for own, a, b in zip(self.seconds, before, self._now(), strict=True)]

    def _now(self) -> list[float]:
        times = [process.cpu_times() for process in self._processes]
        return [own.user + own.system for own in times]


def say_cost_of_http(server: Served, images: Sequence[bytes], clients: int) -> None:
    """Of requests as large as those of images, of which nothing is decoded."""
    requests = [Request(b"none" + image[4:], "image/jpeg", 400) for image in images]
    answers(server, requests, clients)
    start = time.perf_counter()
    answers(server, requests, clients)
    each = (time.perf_counter() - start) / len(requests)
    kib = sum(map(len, images)) / len(images) / 1024
    print(f"of that, HTTP and the copies of {kib:.0f} KiB from process to process: {1e3 * each:.2f} ms an image")


def answers(server: Served, requests: Sequence[Request], clients: int) -> list[int]:
    """Status of each, in order; 0 where there was no answer, or one that is no JSON."""

    def ask(own: Sequence[Request]) -> list[int]:
        connection = server.connection()
        found = []
        for request in own:
            try:
                connection.request("POST", "/score", request.body, {"Content-Type": request.kind})
                response = connection.getresponse()
                json.loads(response.read())
                found.append(response.status)
            except (OSError, ValueError) as error:
                print(f"lost: {type(error).__name__}: {error}")
                connection.close()
                found.append(0)
        connection.close()
        return found

    with ThreadPoolExecutor(clients) as pool:
        shares = list(pool.map(ask, [requests[client::clients] for client in range(clients)]))
    statuses = [0] * len(requests)
    for client, share in enumerate(shares):
        statuses[client::clients] = share
    return statuses


def mixed_requests(images: Sequence[bytes], n: int) -> list[Request]:
    """Half of them good, the other half of every bad kind."""
    with io.BytesIO() as file:
        Image.new("L", (Serving.max_pixels // 5000 + 1, 5000)).save(file, "PNG")
        large = file.getvalue()
    binary, json_ = "application/octet-stream", "application/json"
    bad = [
        Request(b"", binary, 400),
        Request(b"no image", binary, 400),
        Request(images[0][: len(images[0]) // 2], binary, 400),
        Request(large, binary, 400),
        Request(bytes(Serving.max_bytes + 1), binary, 413),
        Request(b"{", json_, 400),
        Request(b'{"features": [[1, 2]]}', json_, 400),
        Request(b"--x\r\n", "multipart/form-data; boundary=x", 400),
    ]
    good = [Request(image, binary, 200) for image in images]
    return [bad[k // 2 % len(bad)] if k % 2 else good[k // 2 % len(good)] for k in range(n)]


def mixed_rounds(server: Served, images: Sequence[bytes], n: int, clients: int) -> int:
    """Ask them all, some rounds; how many were lost, or answered by another status than the right one."""
    requests, wrong = mixed_requests(images, n), 0
    for number in range(ROUNDS):
        found = answers(server, requests, clients)
        others = sum(status != request.status for status, request in zip(found, requests, strict=True))
        counted = ", ".join(f"{count} x {status}" for status, count in sorted(Counter(found).items()))
        memory = server.worker().memory_info().rss / 2**20
        print(f"round {number + 1}: {counted}; {found.count(0)} lost, {others} not as they should be; {memory:.0f} MiB")
        wrong += others
    return wrong


if __name__ == "__main__":
    main()
