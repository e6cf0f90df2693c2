"""A real Chromium without a window, driven through its debugging pipe: what a page does, says and looks like.

The protocol is JSON messages ended by NUL on two file descriptors (3 in, 4 out), so no port and no other package:
https://chromedevtools.github.io/devtools-protocol/ .
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from l4q.errors import UsageError

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe",
    "--no-first-run", "--disable-extensions", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--hide-scrollbars", "about:blank",
)  # fmt: skip
# Moves two inherited pipes to the descriptors the protocol asks for, whatever their numbers, and becomes the browser.
MOVE_PIPES = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
for end, place in zip(ends, (3, 4)):
    os.dup2(end, place)
os.execv(sys.argv[3], sys.argv[3:])
"""
TIMEOUT_S = 120.0
# events that mean the page complained or asked for something
WATCHED = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded", "Network.requestWillBeSent")


def find_browser() -> str:
    """Path of an installed Chromium, or what L4Q_BROWSER names.

    Raises:
        UsageError: There is none.
    """
    named = os.environ.get("L4Q_BROWSER")
    found = next(filter(None, map(shutil.which, (named,) if named else NAMES)), None)
    if found is None:
        raise UsageError(
            "no Chromium found",
            where="PATH",
            got=named or "none of " + ", ".join(NAMES),
            remedy="run `make browser`, or set L4Q_BROWSER to a Chromium or Chrome",
        )
    return found


class Browser:
    """One browser process with one tab; use it as a context manager.

    Raises:
        UsageError: No Chromium is installed.
    """

    def __init__(self, profile: Path) -> None:
        """Start it with a profile folder of its own."""
        to_child, self._write = os.pipe()
        self._read, from_child = os.pipe()
        moved = [sys.executable, "-IS", "-c", MOVE_PIPES, str(to_child), str(from_child)]
        words = [find_browser(), f"--user-data-dir={profile}", *ARGUMENTS]
        with (profile.parent / f"{profile.name}.log").open("wb") as log:
            self._process = subprocess.Popen(
                [*moved, *words], pass_fds=(to_child, from_child), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        for handle in (to_child, from_child):
            os.close(handle)
        self._buffer = b""
        self._count = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        """What the page did since the last `open`."""
        try:
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
        except (UsageError, OSError):
            self.close()
            raise

    def __enter__(self) -> Browser:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process."""
        self.close()

    def close(self) -> None:
        """Close the pipes, on which Chromium ends by itself; stop it if it does not."""
        for handle in (self._write, self._read):
            os.close(handle)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def open(self, path: Path, *, width: int = 1200, height: int = 900, scheme: str = "light") -> None:
        """Load a file at a window size in a colour scheme, and wait until it is loaded."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        reply = self.call("Page.navigate", url=path.resolve().as_uri())
        if "errorText" in reply:
            raise UsageError("the browser cannot open the page", where=path, got=reply["errorText"])
        self._until(lambda: any(event["method"] == "Page.loadEventFired" for event in self.events))

    def complaints(self) -> list[dict[str, Any]]:
        """Console messages, exceptions, log entries and requests (but the page's own) since the last `open`."""
        seen = [event for event in self.events if event["method"] in WATCHED]
        return [event for event in seen if event["params"].get("type") != "Document"]

    def evaluate(self, script: str) -> Any:
        """The JSON value of a JavaScript expression in the page.

        Raises:
            UsageError: It threw.
        """
        reply = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in reply:
            raise UsageError("the script failed in the page", got=reply["exceptionDetails"])
        return reply["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release a key, "Tab" or "Enter"."""
        code = {"Tab": 9, "Enter": 13}[key]
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            more = text if kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **more)

    def screenshot(self, path: Path, *, full: bool = True) -> Path:
        """Save the page as PNG, from top to bottom or only what the window shows."""
        reply = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=full)
        path.write_bytes(base64.b64decode(reply["data"]))
        return path

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol and its result.

        Raises:
            UsageError: The browser refused it or ended.
        """
        self._count += 1
        number = self._count
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        replies: list[dict[str, Any]] = []
        self._until(lambda: bool(replies), number, replies)
        if "error" in replies[0]:
            raise UsageError("the browser refused a command", where=method, got=replies[0]["error"])
        result: dict[str, Any] = replies[0]["result"]
        return result

    def _until(self, done: Any, number: int = 0, replies: list[dict[str, Any]] | None = None) -> None:
        """Read messages until `done()`, keeping events and the reply to `number`."""
        deadline = time.monotonic() + TIMEOUT_S
        while not done():
            ready, _, _ = select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(self._read, 1 << 20) if ready else b""
            if not data:
                raise UsageError("the browser does not answer", got=f"exit status {self._process.poll()}")
            *messages, self._buffer = (self._buffer + data).split(b"\0")
            for message in map(json.loads, messages):
                if "method" in message:
                    self.events.append(message)
                elif message.get("id") == number and replies is not None:
                    replies.append(message)
