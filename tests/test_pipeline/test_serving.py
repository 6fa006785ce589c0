"""`serve`: a real server, asked over the loopback by one and by many, well and badly; killed, and ended."""

import http.client
import io
import json
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from PIL import Image

from stages.config import ScoreConfig
from stages.detection import Detector
from stages.detection.deciding import DecidingDetector
from stages.detection.sources import BackboneSource
from stages.export import GoldenSamples, export_detector
from stages.inputs.images import decode_image
from stages.train import train_probe
from tests.test_pipeline.command import refused

ROOT = Path(__file__).parents[2]
LIMITS = {"--max-bytes": 100_000, "--max-pixels": 10_000, "--timeout": 20}


@pytest.fixture(scope="module")
def images(few_images):
    """Bytes of image files."""
    reader = few_images.reader()
    return [reader.read(row) for row in range(40)]


@pytest.fixture(scope="module")
def bundle(backbone, few, images, tmp_path_factory):
    """A detector of a few digits."""
    folder = tmp_path_factory.mktemp("serving")
    source = BackboneSource(
        "pretrained", None, few, train_probe(few, folder), None, (), (), lambda: backbone, lambda: backbone
    )
    samples = GoldenSamples([("few", str(row)) for row in range(40)], [decode_image(each) for each in images], None)
    deciding = DecidingDetector(source, ScoreConfig(k=3), "knn+energy", "probe")
    export_detector(folder / "few.ood", deciding, samples, {"study": "few"})
    return folder / "few.ood"


class Server:
    """The command in a process of its own, and what it is asked."""

    def __init__(self, bundle, *options):
        command = [sys.executable, "-m", "pipeline", "serve", bundle, "--port", "0", *options]
        self.process = subprocess.Popen([*map(str, command)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        self.said = self.process.stderr.readline()
        self.host, port = self.said.partition("http://")[2].split(": ")[0].rsplit(":", 1)
        self.port = int(port)

    def ask(self, method, path, body=None, kind=None):
        """Status and JSON."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        try:
            connection.request(method, path, body, {"Content-Type": kind} if kind else {})
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def score(self, image, path="/score"):
        return self.ask("POST", path, image)

    def worker(self):
        (found,) = (own for each in psutil.Process(self.process.pid).children() for own in each.children())
        return found

    def end(self, number=signal.SIGTERM):
        """Exit status, and what it has said since it was ready."""
        self.process.send_signal(number)
        with self.process:
            return self.process.wait(60), self.process.stderr.read()


@pytest.fixture(scope="module")
def server(bundle):
    server = Server(bundle, *(word for option in LIMITS.items() for word in option))
    yield server
    server.process.kill()
    server.process.wait()


@pytest.fixture(scope="module")
def scored(bundle, images):
    return Detector.load(bundle).score(images, nearest=3)


def assert_is(answer, scored, row):
    assert answer["score"] == pytest.approx(scored.score[row], abs=1e-5)
    assert answer["p_value"] == scored.p_value[row]
    assert answer["decision"] == scored.decision[row]
    assert answer["prediction"] == scored.prediction[row]
    assert answer["threshold"] == scored.admits[row].threshold


def form(name, content, boundary="b0undary"):
    """Body and media type, as a browser makes them."""
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n'.encode()
    return head + content + f"\r\n--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"


def drawn(width, height, kind="PNG"):
    with io.BytesIO() as file:
        Image.new("RGB", (width, height)).save(file, kind)
        return file.getvalue()


def test_it_says_of_an_image_what_the_detector_says(server, images, scored):
    for row in (0, 20):
        status, answer = server.score(images[row])
        assert status == 200
        assert_is(answer, scored, row)
        assert "nearest" not in answer
    status, answer = server.ask("POST", "/score?nearest=3", *form("new.png", images[1]))
    assert status == 200
    assert_is(answer, scored, 1)
    assert [near["id"] for near in answer["nearest"]] == scored.nearest.ids[1].tolist()


def test_features_are_rows(server, bundle, few):
    own = {name: few.train.read(name)[:3] for name in ("cls",)}
    status, answer = server.ask(
        "POST", "/score", json.dumps({"features": own["cls"].tolist()}), "application/json; charset=utf-8"
    )
    assert status == 200
    expected = Detector.load(bundle).score_features(own)
    assert [row["score"] for row in answer["rows"]] == pytest.approx(expected.score.tolist(), abs=1e-5)
    assert [row["decision"] for row in answer["rows"]] == expected.decision.tolist()


def test_it_says_what_it_is(server):
    assert server.said.startswith("serve: ")
    assert server.host == "127.0.0.1"
    assert server.ask("GET", "/healthz") == (200, {"status": "ok"})
    status, info = server.ask("GET", "/info")
    assert status == 200
    assert info["about"] == {"study": "few"}
    assert info["takes"] == {"images": True, "features": ["cls"]}
    assert info["limits"] == {"bytes": 100_000, "pixels": 10_000, "seconds": 20}


JSON = "application/json"
BAD = {
    "nothing": (b"", None, 400, "empty file"),
    "text": (b"no image", None, 400, "not an image"),
    "truncated": (drawn(90, 90)[:60], None, 400, "truncated"),
    "too many pixels": (drawn(101, 100), None, 400, "too large: 101 × 100 pixels, 10000 are the most"),
    "too many bytes": (bytes(100_001), None, 413, "too large: 100000 bytes are the most"),
    "chunks without end": ((bytes(1000) for _ in range(102)), None, 413, "too large: 100000 bytes are the most"),
    "a form of text": (form("a", b"no image")[0], "multipart/form-data; boundary=b0undary", 400, "not an image"),
    "a form without a boundary": (b"abc", "multipart/form-data", 400, "form: Missing boundary"),
    "half a form": (form("a", b"abc")[0][:40], "multipart/form-data; boundary=b0undary", 400, "form: no file in it"),
    "damaged JSON": (b"{", JSON, 400, "no JSON"),
    "JSON without end": (b"[" * 90_000, JSON, 400, "no JSON"),
    "other JSON": (b"[1]", JSON, 400, 'no features: give {"features"'),
    "features of another size": (b'{"features": [[1, 2]]}', JSON, 400, "features: cls has shape [1, 2]"),
    "features of no shape": (b'{"features": [[1], [1, 2]]}', JSON, 400, "features: cls is no array of numbers"),
    "features of words": (b'{"features": {"cls": {}}}', JSON, 400, "features: cls is no array of numbers"),
    "features that are not finite": (b'{"features": [[' + b"NaN," * 1279 + b"1]]}", JSON, 400, "no finite"),
    "unknown features": (b'{"features": {"cls": [], "x": []}}', JSON, 400, "features: x is none of"),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_cannot_be_scored_is_told_why(server, bad):
    body, kind, status, reason = BAD[bad]
    found, answer = server.ask("POST", "/score", body, kind)
    assert (found, list(answer)) == (status, ["error"])
    assert reason in answer["error"]


def test_what_is_asked_wrongly_is_told_why(server, images):
    assert server.score(images[0], "/score?nearest=101")[0] == 400
    assert server.score(images[0], "/score?nearest=-1")[0] == 400
    assert server.ask("GET", "/score")[0] == 405
    status, answer = server.ask("GET", "/predict")
    assert (status, answer["error"]) == (404, "Not Found: POST /score, GET /info and GET /healthz are answered")


def test_many_at_once_are_answered_each_with_its_own(server, images, scored):
    """Good and bad images in one batch; memory does not grow."""

    def ask(number):
        return server.score(b"no image") if number % 5 == 4 else server.score(images[number % 40])

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(40)))
        before = server.worker().memory_info().rss
        answers = list(pool.map(ask, range(200)))
    for number, (status, answer) in enumerate(answers):
        if number % 5 == 4:
            assert status == 400
        else:
            assert status == 200
            assert_is(answer, scored, number % 40)
    assert server.worker().memory_info().rss < before + (20 << 20)


def test_no_upload_is_kept(server, images):
    """Of a form that Starlette would put in a temporary file."""
    read = Path(f"/proc/{server.worker().pid}/io")
    if not read.exists():
        pytest.skip("no /proc here")
    written = int(dict(line.split(": ") for line in read.read_text().splitlines())["write_bytes"])
    for _ in range(3):
        server.ask("POST", "/score", *form("new.png", images[0] + bytes(90_000)))
    assert int(dict(line.split(": ") for line in read.read_text().splitlines())["write_bytes"]) == written


def test_mistakes_are_said_before_it_answers(bundle, server, tmp_path):
    assert "give another" in refused("serve", bundle, "--port", server.port)
    assert "no such file" in refused("serve", tmp_path / "no.ood", "--port", 0).lower()


def test_a_worker_that_dies_is_replaced(server, images, scored):
    first = server.worker()
    first.kill()
    first.wait()
    status, answer = server.score(images[0])  # it waits for the next
    assert status == 200
    assert_is(answer, scored, 0)
    assert server.worker().pid != first.pid


def test_the_end_waits_for_requests(server, images):
    """The last test, since nobody answers any more; and nothing else was said of all that was asked."""
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(server.score, images[row]) for row in range(8)]
        time.sleep(0.05)  # until they are on their way
        status, said = server.end(signal.SIGINT)
    assert status == 0
    assert said == "serve: the worker died (SIGKILL); another takes its place\n"
    assert [each.result()[0] for each in asked] == [200] * 8
