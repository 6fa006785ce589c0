"""A served detector in a process of its own, and what it is asked."""

import http.client
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]


class Served:
    """``python -m pipeline serve BUNDLE --port 0 OPTIONS``, or another command, once it answers.

    Attributes:
        said: its first line, on standard error.
        host, port: where it answers.
    """

    def __init__(self, bundle: Path, *options: object, command: Sequence[object] = ()) -> None:
        said = [sys.executable, "-m", *(command or ("pipeline", "serve", bundle, "--port", 0, *options))]
        self._process = subprocess.Popen(list(map(str, said)), cwd=ROOT, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        self.said = self._process.stderr.readline()
        self.host, port = self.said.partition("http://")[2].split(": ")[0].rsplit(":", 1)
        self.port = int(port)

    def connection(self) -> http.client.HTTPConnection:
        """One that is kept for several requests."""
        return http.client.HTTPConnection(self.host, self.port, timeout=60)

    def ask(
        self, method: str, path: str, body: bytes | str | Iterable[bytes] | None = None, kind: str | None = None
    ) -> tuple[int, Any]:
        """Status and JSON, by a connection of its own."""
        connection = self.connection()
        try:
            connection.request(method, path, body, {"Content-Type": kind} if kind else {})
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def score(self, image: bytes, path: str = "/score") -> tuple[int, Any]:
        """What it says of an image."""
        return self.ask("POST", path, image)

    def command(self) -> psutil.Process:
        """The process that holds the connections."""
        return psutil.Process(self._process.pid)

    def worker(self) -> psutil.Process:
        """The process that computes: it was forked from one that the command has started."""
        started = self.command().children()
        (found,) = (own for each in started for own in each.children())
        return found

    def tell(self, number: signal.Signals) -> None:
        """A signal to the command."""
        self._process.send_signal(number)

    def takes_connections(self) -> bool:
        """Whether anybody listens still."""
        try:
            socket.create_connection((self.host, self.port), 60).close()
        except OSError:
            return False
        return True

    def finish(self) -> tuple[int, str]:
        """Exit status, and what it has said since its first line."""
        assert self._process.stderr is not None
        with self._process:
            return self._process.wait(60), self._process.stderr.read()

    def kill(self) -> None:
        """End it, if it has not ended; its worker ends with it."""
        self._process.kill()
        self._process.wait()
        assert self._process.stderr is not None
        self._process.stderr.close()
