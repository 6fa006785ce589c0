"""`serve`: a real server, asked over the loopback by one and by many, well and badly; killed, and ended.

The tests of one server stand in the order in which it lives; what needs a clock is asked of its application alone.
"""

import asyncio
import io
import json
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image
from starlette.requests import Request

from pipeline.deciding import Serving
from pipeline.serving.app import application
from pipeline.serving.backend import Backend
from pipeline.serving.bodies import image_of
from stages.config import ScoreConfig
from stages.detection import Detector
from stages.detection.deciding import DecidingDetector
from stages.detection.sources import BackboneSource
from stages.export import GoldenSamples, export_detector
from stages.inputs.images import decode_image
from stages.train import train_probe
from tests.test_docs.pages import page_with
from tests.test_pipeline.command import refused
from tests.test_pipeline.hanging import HANGS, hangs_while_loading
from tests.test_pipeline.served import ROOT, Served

LIMITS = ("--max-bytes", 200_000, "--max-pixels", 4_000_000, "--timeout", 20)


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


@pytest.fixture(scope="module")
def server(bundle):
    server = Served(bundle, *LIMITS)
    yield server
    server.kill()


@pytest.fixture(scope="module")
def detector(bundle):
    return Detector.load(bundle)


@pytest.fixture(scope="module")
def scored(detector, images):
    return detector.score(images, nearest=3)


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


def drawn(width, height):
    with io.BytesIO() as file:
        Image.new("RGB", (width, height)).save(file, "PNG")
        return file.getvalue()


# ------------------------------------------------------------------------------------------------------- what it says


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


def test_features_are_rows(server, detector, few):
    features = few.train.read("cls")[:3]
    body = json.dumps({"features": features.tolist()})
    status, answer = server.ask("POST", "/score", body, "application/json; charset=utf-8")
    assert status == 200
    expected = detector.score_features(features)
    assert [row["score"] for row in answer["rows"]] == pytest.approx(expected.score.tolist(), abs=1e-5)
    assert [row["decision"] for row in answer["rows"]] == expected.decision.tolist()


def test_it_says_what_it_is(server):
    assert server.said.startswith("serve: ")
    assert server.host == "127.0.0.1"
    assert server.ask("GET", "/healthz") == (200, {"status": "ok", "workers_lost": 0})
    status, info = server.ask("GET", "/info")
    assert status == 200
    assert info["about"] == {"study": "few"}
    assert info["runtime"] == "torch"
    assert info["takes"] == {"images": True, "features": ["cls"]}
    assert info["limits"] == {"bytes": 200_000, "pixels": 4_000_000, "seconds": 20}


JSON = "application/json"
TWO_FILES = form("a", b"x")[0].removesuffix(b"--b0undary--\r\n") + form("b", b"y")[0]
BAD = {
    "nothing": (b"", None, 400, "empty file"),
    "text": (b"no image", None, 400, "not an image"),
    "truncated": (drawn(90, 90)[:60], None, 400, "truncated"),
    "too many pixels": (drawn(4001, 1000), None, 400, "too large: 4001 × 1000 pixels, 4000000 are the most"),
    "too many bytes": (bytes(200_001), None, 413, "too large: 200000 bytes are the most"),
    "chunks without end": ([bytes(1000)] * 202, None, 413, "too large: 200000 bytes are the most"),
    "a form of text": (*form("a", b"no image"), 400, "not an image"),
    "several files": (TWO_FILES, form("a", b"")[1], 400, "form: Too many files"),
    "a form without a boundary": (b"abc", "multipart/form-data", 400, "form: Missing boundary"),
    "half a form": (form("a", b"abc")[0][:40], form("a", b"")[1], 400, "form: no file in it"),
    "damaged JSON": (b"{", JSON, 400, "no JSON"),
    "JSON without end": (b"[" * 90_000, JSON, 400, "no JSON"),
    "other JSON": (b"[1]", JSON, 400, 'no features: give {"features"'),
    "features of another size": (b'{"features": [[1, 2]]}', JSON, 400, "features: cls has shape [1, 2]"),
    "features of no shape": (b'{"features": [[1], [1, 2]]}', JSON, 400, "features: cls is no array of numbers"),
    "features of words": (b'{"features": {"cls": {}}}', JSON, 400, "features: cls is no array of numbers"),
    "features of texts": (b'{"features": [["1", "2"]]}', JSON, 400, "features: cls is no array of numbers"),
    "features of truths": (b'{"features": [[' + b"0.5," * 1279 + b"true]]}", JSON, 400, "cls is no array of numbers"),
    "more than features": (
        b'{"features": [[1]], "nearest": 3}',
        JSON,
        400,
        "'nearest' is not known: give features, and",
    ),
    "features that are not finite": (b'{"features": [[' + b"NaN," * 1279 + b"1]]}", JSON, 400, "no finite"),
    "names that are no text": (b'{"features": {"cls": [], "\\ud800": []}}', JSON, 400, "features: ? is none of"),
    "a name without end": (b'{"features": {"' + b"x" * 90_000 + b'": []}}', JSON, 400, "features: cls is missing"),
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
    status, answer = server.score(images[0], "/score?nearst=3")
    assert (status, answer["error"]) == (400, "'nearst' is not known in a query: nearest is")
    status, answer = server.score(images[0], "/score?nearest=1&nearest=2")
    assert (status, answer["error"]) == (400, "nearest: given 2 times, must be given once")
    assert server.score(images[0], "/score/")[0] == 404
    for method in ("GET", "OPTIONS", "PUT"):
        status, answer = server.ask(method, "/score")
        assert (status, answer["error"].partition(":")[0]) == (405, "Method Not Allowed")
    status, answer = server.ask("GET", "/predict")
    assert (status, answer["error"]) == (404, "Not Found: POST /score, GET /info and GET /healthz are answered")


# ----------------------------------------------------------------------------------------------------- as documents say


def told(line):
    """What comes after ``python -m pipeline`` in what make would run."""
    make = ["env", "-i", shutil.which("make"), "--dry-run", "--no-print-directory", "FAISS=cpu"]
    shown = subprocess.run([*make, *shlex.split(line)[1:]], cwd=ROOT, capture_output=True, text=True, check=True)
    *_, last = shown.stdout.splitlines()
    return shlex.split(last.partition(" -m pipeline ")[2])


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_it_is_shipped_in_the_five_commands_of_the_readme(server):
    """Demo and export are run in test_demo.py; the server here has another port, and another detector."""
    lines = page_with("ship it").code("ship it").splitlines()
    demo, export, info, serve, ask = (line.partition("  #")[0] for line in lines)
    assert told(demo) == ["run", "pipeline/experiments/demo.toml", "--set", "work=runs/demo"]
    assert told(export) == ["export", "pipeline/experiments/demo.toml", "-o", "demo.ood"]
    assert told(info) == ["info", "demo.ood"]
    assert told(serve) == ["serve", "demo.ood"]
    assert f"{Serving.host}:{Serving.port}" in ask
    here = ask.replace(f"{Serving.host}:{Serving.port}", f"{server.host}:{server.port}")
    shown = subprocess.run([*shlex.split(here), "--silent"], cwd=ROOT, capture_output=True, text=True, check=True)
    answer = json.loads(shown.stdout)
    assert answer["decision"] in ("ID", "OOD", "unknown")
    assert len(answer["nearest"]) == 3


# ------------------------------------------------------------------------------------------------------- many, and long


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


def test_a_port_that_is_taken_and_a_file_that_is_none_are_said_before_work(bundle, server, tmp_path):
    assert refused("serve", bundle, "--port", server.port).endswith(": Address already in use: give another")
    assert refused("serve", tmp_path / "no.ood").endswith("no.ood: cannot be read: No such file or directory")
    (tmp_path / "no.ood").write_bytes(bundle.read_bytes()[:-1])
    assert ": damaged, or changed: truncated" in refused("serve", tmp_path / "no.ood")


def test_a_worker_that_dies_is_replaced(server, images, scored):
    server.worker().kill()
    wait_for(server, workers_lost=1)
    status, answer = server.score(images[0])  # it waits for the next
    assert status == 200
    assert_is(answer, scored, 0)
    said = {"status": "ok", "workers_lost": 1, "last_lost": "died (SIGKILL)"}
    assert server.ask("GET", "/healthz") == (200, said)


def wait_for(server, **wanted):
    """Until it says so of its health; meanwhile it answers."""
    return wait_until(server, lambda said: said.items() >= wanted.items())


def wait_until(server, holds):
    for _ in range(1200):
        _, said = server.ask("GET", "/healthz")
        if holds(said):
            return said
        time.sleep(0.05)
    raise AssertionError(said)


def wait_for_recovery(server, lost):
    """Until it is well again after it lost so many workers, or more: a busy machine may not load one in time."""
    said = wait_until(server, lambda said: said["status"] == "ok" and said["workers_lost"] >= lost)
    return said["workers_lost"]


def test_the_end_waits_for_requests(server, images, scored):
    """And nothing else was said of all that was asked."""
    head = f"POST /score HTTP/1.1\r\nHost: here\r\nExpect: 100-continue\r\nContent-Length: {len(images[0])}\r\n\r\n"
    with socket.create_connection((server.host, server.port), 60) as client:
        client.sendall(head.encode())
        assert client.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"  # it is at work on it
        server.tell(signal.SIGINT)
        while server.takes_connections():
            time.sleep(0.02)
        client.sendall(images[0])
        with client.makefile("rb") as answered:
            status, _, answer = answered.read().partition(b"\r\n\r\n")
    assert status.startswith(b"HTTP/1.1 200 OK\r\n")
    assert_is(json.loads(answer), scored, 0)
    assert server.finish() == (0, "serve: the worker died (SIGKILL); another takes its place\n")


def test_a_worker_that_hangs_is_replaced(bundle, images, scored):
    """In its network, for who asks for many neighbours; as a whole; and while it takes the place of another."""
    server = Served(bundle, command=("tests.test_pipeline.hanging", bundle, 1))
    try:
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda _: server.score(images[0], f"/score?nearest={HANGS}"), range(3)))
        assert found == [(503, {"error": "no answer within 1 s"})] * 3
        assert wait_for(server, workers_lost=1)["last_lost"].startswith("hung: the network for ")
        lost = wait_for_recovery(server, 1)
        server.worker().suspend()
        status, answer = server.score(images[0])
        assert (status, answer) == (503, {"error": "no answer within 1 s"})
        assert wait_for(server, workers_lost=lost + 1)["last_lost"] == "hung: nothing was heard of it for 2 s"
        lost = wait_for_recovery(server, lost + 1)
        hangs_while_loading(bundle).touch()
        server.worker().kill()
        assert wait_for(server, workers_lost=lost + 1)["status"] == "starting"
        assert server.score(images[0]) == (503, {"error": "no answer within 1 s"})
        said = [wait_for(server, workers_lost=lost + more)["last_lost"] for more in (2, 3)]
        first, second = (int(each.removeprefix("hung: it has not loaded the detector in ")[:-2]) for each in said)
        assert 2 * first - 1 <= second <= 2 * first + 1  # a machine that is busier than it was is waited for at last
        hangs_while_loading(bundle).unlink()
        wait_for(server, status="ok")
        for _ in range(60):  # a second is not long for its first images
            status, answer = server.score(images[0])
            if status == 200:
                break
        assert_is(answer, scored, 0)
        server.tell(signal.SIGTERM)
        assert server.finish()[0] == 0
    finally:
        server.kill()


def test_what_a_lost_worker_had_is_told_so(bundle, images):
    """Of one that is killed while it is at work."""
    server = Served(bundle, command=("tests.test_pipeline.hanging", bundle, 30))
    try:
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(server.score, images[0], f"/score?nearest={HANGS}")
            while not answer.running():
                time.sleep(0.01)
            time.sleep(1)
            server.worker().kill()
            reason = "the worker died (SIGKILL), and another takes its place: ask again"
            assert answer.result() == (503, {"error": reason})
    finally:
        server.kill()


# --------------------------------------------------------------------------------------------------- what needs a clock


def asked_alone(pieces, **limits):
    """Status and JSON of the application where there is no worker; the body is never whole unless its last is."""
    sent, pieces = [], list(pieces)

    async def receive():
        if not pieces:
            await asyncio.sleep(60)
        body, more = pieces.pop(0)
        return {"type": "http.request", "body": body, "more_body": more}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/score", "query_string": b"", "headers": []}
    asked = Serving(**limits)
    asyncio.run(application(Backend(print, asked), asked)(scope, receive, send))
    return sent[0]["status"], json.loads(sent[1]["body"])


def test_a_body_that_does_not_come_is_not_waited_for():
    status, answer = asked_alone([(b"\x89PNG", True)], timeout=0.05)
    assert (status, answer) == (408, {"error": "the body did not come in time"})


def test_an_answer_that_does_not_come_is_not_waited_for(images):
    status, answer = asked_alone([(images[0], False)], timeout=0.2)
    assert (status, answer) == (503, {"error": "no answer within 0.2 s"})


def test_no_upload_is_kept(monkeypatch, tmp_path):
    """Of a form so large that Starlette would put it into a temporary file, for which there is no folder here."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    body, kind = form("new.png", bytes(3 << 20))
    request = Request({"type": "http", "headers": [(b"content-type", kind.encode())]})
    assert asyncio.run(image_of(request, body)) == bytes(3 << 20)
