"""Chromium without a window, driven over a pipe: what a page logs, asks for, shows and answers to keys.

The DevTools protocol: JSON messages, each ended by a NUL byte, in on descriptor 3, out on descriptor 4.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATIENCE_S = 60.0  # for one answer, on a machine that is busy with other things
QUIET = ("--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update")
# No sandbox: CI runs as root, where Chromium refuses to have one; only pages made here are opened.
FLAGS = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars", *QUIET)
# Becomes the program in its arguments with the first two of them, descriptors, as 3 and 4.
START = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
for place, end in enumerate(ends, start=3):
    os.dup2(end, place)
os.execv(sys.argv[3], sys.argv[3:])
"""
CODES = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Escape": 27}


class Browser:
    """One tab. `errors` holds what went wrong in it, `requests` what it asked for, data URIs apart."""

    def __init__(self) -> None:
        program = next((found for found in map(shutil.which, NAMES) if found), None)
        assert program, f"none of {', '.join(NAMES)} is installed; leave these tests out with -m 'not browser'"
        self.home = tempfile.mkdtemp()
        to_child, self.write = os.pipe()
        self.read, from_child = os.pipe()
        command = [sys.executable, "-c", START, str(to_child), str(from_child), program, *FLAGS]
        self.process = subprocess.Popen(
            [*command, f"--user-data-dir={self.home}", "--remote-debugging-pipe"],
            pass_fds=(to_child, from_child),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_child)
        os.close(from_child)
        self.buffer, self.last, self.session = b"", 0, ""
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.loaded = False
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.write)  # which ends it
        self.process.wait(PATIENCE_S)
        os.close(self.read)
        shutil.rmtree(self.home, ignore_errors=True)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """One command and its answer; events that come before it are noted."""
        self.last += 1
        message = {"id": self.last, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            got = self._next()
            if got.get("id") == self.last:
                assert "error" not in got, got
                return got["result"]

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE_S
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.read], [], [], max(deadline - time.monotonic(), 0))
            assert ready, f"the browser has not answered for {PATIENCE_S:.0f} s"
            content = os.read(self.read, 1 << 20)
            assert content, f"the browser has ended ({self.process.poll()})"
            self.buffer += content
        message, _, self.buffer = self.buffer.partition(b"\0")
        got = json.loads(message)
        self._note(got.get("method", ""), got.get("params", {}))
        return got

    def _note(self, event: str, said: dict[str, Any]) -> None:
        if event == "Page.loadEventFired":
            self.loaded = True
        elif event == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(said["exceptionDetails"]))
        elif (event == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning", "assert")) or (
            event == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning")
        ):
            self.errors.append(json.dumps(said))
        elif event == "Network.requestWillBeSent" and not said["request"]["url"].startswith("data:"):
            self.requests.append(said["request"]["url"])

    def open(self, page: Path | str, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Loads a file or an address at a window's size in CSS pixels; below 600 as on a phone, with touch."""
        phone = width < 600
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
        self.send("Emulation.setDeviceMetricsOverride", **metrics)
        self.send("Emulation.setTouchEmulationEnabled", enabled=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.loaded = False
        self.send("Page.navigate", url=page if isinstance(page, str) else page.resolve().as_uri())
        while not self.loaded:
            self._next()

    def run(self, script: str) -> Any:
        """The value of an expression in the page, awaited."""
        got = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in got, got
        return got["result"].get("value")

    def press(self, key: str) -> None:
        event = {"key": key, "code": key, "windowsVirtualKeyCode": CODES[key]}
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, **event)

    def point(self, x: float, y: float) -> None:
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def picture(self, path: Path, *, whole: bool = False) -> None:
        """A PNG of what is shown, or of the whole page."""
        content = self.send("Page.captureScreenshot", captureBeyondViewport=whole, format="png")["data"]
        path.write_bytes(base64.b64decode(content))
