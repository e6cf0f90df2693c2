"""One server process on this machine: started, waited for, and stopped without leftovers."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from l4q.errors import L4QError

HOST = "127.0.0.1"
TAIL_CHARS = 4000
POLL_S = 0.1
STOP_TIMEOUT_S = 60.0


class ServerError(L4QError):
    """A server that did not start, died, or left processes behind; the message ends with the tail of its log."""

    exit_code = 4


class Server:
    """A server process and its children, from start to `stop`; a context manager.

    The constructor returns once `GET url/health` answers 200. The process leads its own process group, so that its
    workers (vLLM's engine is one) can be found and ended with it.

    Args:
        command: Program and arguments; the server must listen on `url`.
        url: Base address, for example "http://127.0.0.1:8000".
        environment: Everything the process sees.
        cwd: Its working directory.
        timeout_s: Longest wait for health, in seconds.

    Raises:
        ServerError: The process ended, or was not healthy in time; it is stopped.
    """

    def __init__(
        self,
        command: list[str],
        *,
        url: str,
        environment: Mapping[str, str],
        cwd: Path | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        self.url = url
        self.killed = False
        """True if `stop` had to kill what ignored SIGTERM."""
        self._scratch = Path(tempfile.mkdtemp(prefix="l4q-server-"))
        self._log = self._scratch / "log"
        started = time.monotonic()
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=dict(environment),
                cwd=cwd,
                start_new_session=True,
            )
        # also runs at interpreter exit, for a caller that never stops it
        self._finalizer = weakref.finalize(self, _kill, self._process, self._scratch)
        try:
            self._wait_until_healthy(timeout_s)
        except BaseException:  # KeyboardInterrupt too
            self._finalizer()
            raise
        self.seconds_to_start = time.monotonic() - started

    @property
    def group(self) -> int:
        """Process group of the server and its children."""
        return self._process.pid

    def tail(self) -> str:
        """The end of what the server printed."""
        text = self._log.read_text(encoding="utf-8", errors="replace") if self._log.exists() else ""
        return text[-TAIL_CHARS:].strip()

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """SIGTERM, then SIGKILL after `timeout_s`; safe to call twice.

        Raises:
            ServerError: A process of the group survived even that.
        """
        if not self._finalizer.alive:
            return
        self._process.terminate()
        self.killed = not self._wait_until_gone(timeout_s)
        self._finalizer()  # nothing to kill in the good case
        if not self._wait_until_gone(STOP_TIMEOUT_S):
            raise ServerError("a server left processes behind", where=f"process group {self.group}")

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _wait_until_healthy(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not healthy(self.url):
            code = self._process.poll()
            if code is not None:
                raise self._failed(f"ended with exit code {code} before it was healthy")
            if time.monotonic() > deadline:
                raise self._failed(f"was not healthy within {timeout_s:g} s")
            time.sleep(POLL_S)

    def _wait_until_gone(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while self._process.poll() is None or group_members(self.group):
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)
        return True

    def _failed(self, what: str) -> ServerError:
        tail = self.tail()
        return ServerError(
            f"the server {what}",
            where=self.url,
            got=f"last lines of its log:\n{tail}" if tail else "an empty log",
            expected=f"200 from {self.url}/health",
        )


def healthy(url: str) -> bool:
    """Whether GET url/health answers 200."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy on the way
    with (
        suppress(urllib.error.URLError, ConnectionError, TimeoutError),
        direct.open(f"{url}/health", timeout=5) as reply,
    ):
        return bool(reply.status == 200)
    return False


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def group_members(group: int) -> list[int]:
    """Processes of a process group that still run; one that only waits to be reaped has ended."""
    with suppress(ProcessLookupError):
        os.killpg(group, 0)
        members = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # it ended meanwhile
                # proc(5): pid (name) state ppid pgrp; the name may hold blanks and parentheses
                state, _, pgrp = path.read_text().rpartition(")")[2].split()[:3]
                if int(pgrp) == group and state not in "ZX":
                    members.append(int(path.parent.name))
        return members
    return []


def _kill(process: subprocess.Popen[bytes], scratch: Path) -> None:
    """Kill the server's group, reap the server and drop its log."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    shutil.rmtree(scratch, ignore_errors=True)
