"""End what an engine started and its process group does not hold: processes that made a session of their own.

Every process of an engine inherits MARKER in its environment, whatever group it moves to. Linux shows environments in
/proc; where there is no /proc, the group is all that can be ended.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

MARKER = "L4Q_ENGINE_SCRATCH"
ROUNDS = 20
PAUSE_S = 0.05


def marked(scratch: Path) -> list[int]:
    """Processes, zombies excepted, that carry the marker of that scratch folder."""
    wanted = f"{MARKER}={scratch}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # gone meanwhile, or somebody else's
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def end_marked(scratch: Path) -> None:
    """Kill them until none is left: one of them may fork while the list is read."""
    for _ in range(ROUNDS):
        strays = marked(scratch)
        if not strays:
            return
        for pid in strays:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(PAUSE_S)
