"""An object store on this machine: moto's S3 server behind a proxy that can be told to fail."""

import os
import socket
import subprocess
import sys
import threading
import urllib.request
from contextlib import contextmanager, suppress

BUCKET = "bucket"
_SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()  # until whoever started it ends
"""
_REFUSAL = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
_DENIED = b"HTTP/1.1 403 Forbidden\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"


class ObjectStore:
    """The store in a process of its own, its proxy, and one bucket.

    Attributes:
        proxy: what stands between.
        environment: by which a process finds the store behind its proxy, as users set it.
        direct: the store's own address, without the proxy, which is slow.
    """

    def __init__(self):
        self._server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        port = int(self._server.stdout.readline())
        self.proxy = Proxy(port)
        self.direct = f"http://127.0.0.1:{port}"
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.proxy.port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",  # s3fs tries again as well
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "NO_PROXY": "127.0.0.1",
        }
        request = urllib.request.Request(f"{self.direct}/{BUCKET}", method="PUT")
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request).close()

    def close(self):
        """End it."""
        self.proxy.close()
        self._server.kill()
        self._server.communicate()


class Proxy:
    """Forwards a port of this machine, and fails where it is told to.

    Attributes:
        refuse: whether every request is answered by 403.
        forget: name of a header of requests that never arrives, in lower case; None: all arrive.
        n_cut: how many connections were cut, see `cut`.
        requests: first lines of all requests.
    """

    def __init__(self, target):
        self.refuse, self.forget = False, None
        self.n_cut, self.requests = 0, []
        self._after = self._times = None
        self._cutting = threading.Lock()
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @contextmanager
    def cut(self, after, times=None):
        """Cut a connection when the store has sent so many bytes of an answer; so many times, or always."""
        self._after, self._times = after, times
        try:
            yield self
        finally:
            self._after = self._times = None

    def close(self):
        """No more connections."""
        self._listener.close()

    def _accept(self):
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client):
        with client, socket.create_connection(("127.0.0.1", self._target)) as server:
            answered = [0]  # bytes, of the answer to the last request
            up = threading.Thread(target=self._up, args=(client, server, answered), daemon=True)
            up.start()
            self._down(server, client, answered)
            up.join()

    def _up(self, client, server, answered):
        with _both_ended(client, server):
            while data := client.recv(1 << 16):
                if data.split(b" ", 1)[0] in (b"GET", b"HEAD", b"PUT", b"POST", b"DELETE"):
                    self.requests.append(data.split(b"\r\n", 1)[0].decode())
                    answered[0] = 0
                    if self.refuse:
                        body = b"" if data.startswith(b"HEAD") else _REFUSAL
                        client.sendall(_DENIED % len(body) + body)
                        return
                    if self.forget is not None:
                        lines = data.split(b"\r\n")
                        data = b"\r\n".join(line for line in lines if not line.lower().startswith(self.forget))
                server.sendall(data)

    def _down(self, server, client, answered):
        with _both_ended(client, server):
            while data := server.recv(1 << 16):
                if (after := self._cut_after(answered[0] + len(data))) is not None:
                    client.sendall(data[: max(after - answered[0], 0)])
                    return
                client.sendall(data)
                answered[0] += len(data)

    def _cut_after(self, sent):
        """After how many bytes an answer is cut that would have `sent`; None: not now. Answers come side by side."""
        with self._cutting:
            if self._after is None or self._times == 0 or sent <= self._after:
                return None
            self.n_cut += 1
            self._times = None if self._times is None else self._times - 1
            return self._after


@contextmanager
def _both_ended(*ends):
    try:
        with suppress(OSError):
            yield
    finally:
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
