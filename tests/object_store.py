"""An object store on this machine: moto's S3 server behind a proxy that can cut connections.

    store = ObjectStore()          a process of its own, on 127.0.0.1
    store.environment              what a process needs to find it, as users set it
    with store.cut(after=1000):    connections end when the store has sent so many bytes

"""

import os
import socket
import subprocess
import sys
import threading
import urllib.request
from contextlib import contextmanager, suppress

_SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
server.stop()
"""
BUCKET = "bucket"


class ObjectStore:
    """The store, its proxy, and one bucket."""

    def __init__(self):
        quiet = {"PYTHONWARNINGS": "ignore", "MOTO_S3_DEFAULT_KEY_BUFFER_SIZE": str(1 << 28)}
        self._server = subprocess.Popen(
            [sys.executable, "-c", _SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | quiet,
        )
        self.port = int(self._server.stdout.readline())
        self.proxy = CuttingProxy(self.port)
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.proxy.port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "2",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "no_proxy": "127.0.0.1",
        }
        self.make_bucket(BUCKET)

    def make_bucket(self, name):
        """A bucket more."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/{name}", method="PUT")
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request).close()

    @contextmanager
    def cut(self, after, times=None):
        """Cut connections when the store has sent so many bytes on them; all of them, or some."""
        self.proxy.after, self.proxy.left = after, times
        try:
            yield self.proxy
        finally:
            self.proxy.after = self.proxy.left = None

    def close(self):
        """End it."""
        self.proxy.close()
        self._server.stdin.close()
        self._server.wait(10)
        self._server.stdout.close()


class CuttingProxy:
    """Forwards a port of this machine; cuts a connection after some bytes of the server where that is asked for.

    Attributes:
        after: bytes of the server that are let through on one connection; None: all.
        left: how many connections are cut from now on; None: all.
        n_cut: how many were.
        requests: first lines of all requests.
    """

    def __init__(self, target):
        self.after = self.left = None
        self.n_cut, self.requests = 0, []
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._target))
            for source, sink, down in ((client, server, False), (server, client, True)):
                threading.Thread(target=self._forward, args=(source, sink, down), daemon=True).start()

    def _forward(self, source, sink, down):
        sent = 0
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if not down:
                    sent = 0
                    if data.split(b" ", 1)[0] in (b"GET", b"PUT", b"POST", b"HEAD", b"DELETE"):
                        self.requests.append(data.split(b"\r\n", 1)[0].decode())
                elif self.after is not None and self.left != 0 and sent + len(data) > self.after:
                    sink.sendall(data[: max(self.after - sent, 0)])
                    self.n_cut += 1
                    self.left = None if self.left is None else self.left - 1
                    break
                sink.sendall(data)
                sent += len(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self):
        """No more connections."""
        self._listener.close()
