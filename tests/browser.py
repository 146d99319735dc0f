"""A headless Chromium, driven through its debugging pipe: pages as people see them, at a width and in a scheme."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SECONDS = 60.0  # for an answer
# Chromium reads commands from descriptor 3 and answers to 4.
LAUNCHER = """
import fcntl, os, sys
for place, own in enumerate([fcntl.fcntl(int(pipe), fcntl.F_DUPFD, 10) for pipe in sys.argv[1:3]], 3):
    os.dup2(own, place)
os.execv(sys.argv[3], sys.argv[3:])
"""


def found() -> str | None:
    """The browser of this machine."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser with one page."""
    program = found()
    assert program is not None
    to_browser, ours = os.pipe()
    theirs, from_browser = os.pipe()
    launcher = (sys.executable, "-c", LAUNCHER, str(to_browser), str(from_browser))
    with TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--hide-scrollbars")
        process = subprocess.Popen(
            [*launcher, program, *options, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        with open(ours, "wb", buffering=0) as commands, open(theirs, "rb", buffering=0) as answers:  # noqa: PTH123
            try:
                opened = Browser(commands, answers)
                yield opened
                opened.call("Browser.close")
                process.wait(SECONDS)
            finally:
                process.kill()
                process.wait()


class Browser:
    """One page in a browser.

    Attributes:
        complaints: errors and warnings of the console, exceptions, and requests that failed, since `open`.
    """

    def __init__(self, commands: Any, answers: Any) -> None:
        self._commands, self._answers = commands, answers
        self._number, self._rest, self._session = 0, b"", None
        self.complaints: list[str] = []
        self._loaded = False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Ask the browser (Chrome DevTools Protocol), and note what it tells meanwhile."""
        self._number += 1
        session = {"sessionId": self._session} if self._session else {}
        message = {"id": self._number, "method": method, "params": parameters} | session
        self._commands.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        ended = time.monotonic() + SECONDS
        while b"\0" not in self._rest:
            more = self._answers.read(1 << 20)
            assert more, "the browser has ended"
            assert time.monotonic() < ended
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        told = json.loads(message)
        about = told.get("params", {})
        match told.get("method"):
            case "Page.loadEventFired":
                self._loaded = True
            case "Runtime.exceptionThrown":
                self.complaints.append(str(about["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if about["type"] in ("error", "warning", "assert"):
                self.complaints.append(str(about["args"]))
            case "Log.entryAdded" if about["entry"]["level"] in ("error", "warning"):
                self.complaints.append(about["entry"]["text"])
            case "Network.requestWillBeSent" if not about["request"]["url"].startswith(("file:", "data:", "about:")):
                self.complaints.append(f"asks for {about['request']['url']}")
        return told

    def open(self, page: Path, width: int, height: int = 800, dark: bool = False, media: str = "screen") -> None:
        """Show a page.

        Args:
            page: the file.
            width: of the window, in CSS pixels.
            height: of the window.
            dark: whether the system is.
            media: `screen` or `print`.
        """
        self.complaints, self._loaded = [], False
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", media=media, features=scheme)
        self.call("Page.navigate", url=page.absolute().as_uri())
        while not self._loaded:
            self._next()

    def run(self, script: str) -> Any:
        """The value of an expression, or of its promise, in the page."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def move(self, x: float, y: float) -> None:
        """Move the pointer."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def picture(self, path: Path) -> None:
        """Write the whole page as a picture."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        path.write_bytes(base64.b64decode(shot["data"]))
