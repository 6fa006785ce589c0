"""A page in headless Chromium, driven through the DevTools protocol over two pipes: what it shows, says and asks for.

python -m tests.test_pipeline.browser PAGE.html PICTURE.png [WIDTH [HEIGHT]]
"""

import base64
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from PIL import Image

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
_PATIENCE_S = 120

# What is wrong with the layout, in words; an empty list where nothing is.
_LOOK = """(() => {
  for (const details of document.querySelectorAll("details")) details.open = true;
  const wrong = [], width = window.innerWidth;
  if (document.scrollingElement.scrollWidth > width) {
    const wide = [...document.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > width + 1
      && !e.closest(".wide, pre") && !e.closest("svg svg, svg *"));
    const named = wide.slice(0, 3).map(element => element.outerHTML.slice(0, 80));
    wrong.push(`wider than ${width}: ${document.scrollingElement.scrollWidth}, ${named}`);
  }
  for (const image of document.images)
    if (!image.complete || !image.naturalWidth) wrong.push(`no picture: ${image.alt}`);
  for (const element of document.querySelectorAll("table, figure > svg, img")) {
    const box = element.getBoundingClientRect();
    if (!box.width || !box.height) wrong.push(`nothing to see: ${element.outerHTML.slice(0, 80)}`);
  }
  return wrong;
})()"""


class Tab:
    """One open page.

    Attributes:
        errors: what was logged as an error, or thrown.
        requests: addresses that were asked for.
    """

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._to, self._from = to_browser, from_browser
        self._buffer, self._number, self._loaded = b"", 0, False
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        """One command and its answer; events that come before it are noted."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def show(self, page: Path, width: int, height: int = 900) -> None:
        """Open a file in a window of this size and wait until it is loaded."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self._loaded = False
        self.call("Page.navigate", url=page.absolute().as_uri())
        while not self._loaded:
            self._next()

    def evaluate(self, script: str) -> Any:
        """Value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def look(self) -> list[str]:
        """Everything that is wrong with the layout, all folded parts open."""
        return list(self.evaluate(_LOOK))

    def picture(self) -> bytes:
        """PNG of the window."""
        return base64.b64decode(self.call("Page.captureScreenshot")["data"])

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._from, 1 << 20)
            assert part, "the browser has gone"
            self._buffer += part
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, event: str | None, params: dict[str, Any]) -> None:
        if event == "Page.loadEventFired":
            self._loaded = True
        elif event == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.errors.append(params["exceptionDetails"]["text"])
        elif event == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(str([argument.get("value") for argument in params["args"]]))
        elif event == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"]["text"])


@contextmanager
def opened() -> Iterator[Tab]:
    """A fresh browser that is gone afterwards, with an empty profile."""
    assert CHROMIUM is not None
    read_here, write_there = os.pipe()
    read_there, write_here = os.pipe()
    profile = tempfile.mkdtemp(prefix="browser-")
    # The browser reads its commands from descriptor 3 and answers on 4.
    command = f'exec "$0" "$@" 3<&{read_there} 4>&{write_there}'
    process = subprocess.Popen(
        ["bash", "-c", command, CHROMIUM, *_FLAGS, f"--user-data-dir={profile}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(read_there, write_there),
    )
    os.close(read_there)
    os.close(write_there)
    try:
        yield Tab(write_here, read_here)
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE_S)
        process.kill()
        process.wait()
        os.close(read_here)
        os.close(write_here)
        shutil.rmtree(profile, ignore_errors=True)


def main() -> None:
    """Write a picture of the top of a page, of few colours: small enough to be kept."""
    page, picture, *size = sys.argv[1:]
    with opened() as tab:
        tab.show(Path(page), *map(int, size or ["1280"]))
        shown = Image.open(io.BytesIO(tab.picture())).convert("RGB")
    shown.quantize(64).save(picture, optimize=True)


if __name__ == "__main__":
    main()
