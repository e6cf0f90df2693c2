"""Peak memory and step times, the same way in every benchmark of this folder."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


def resident_bytes() -> int:
    """Memory of this process that is in RAM now; where the system does not tell, the largest it has been."""
    return _status("VmRSS") or peak_resident_bytes()


def private_bytes() -> int:
    """Memory in RAM that no file backs, so that it cannot be dropped; where the system does not tell, all of it."""
    return _status("RssAnon") or resident_bytes()


def peak_resident_bytes() -> int:
    """Largest resident size since the process started, or since the last `reset_peak`.

    Linux's VmHWM is preferred to getrusage's ru_maxrss, which a child inherits from the process that started it.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak(device: str) -> int:
    """Start a new peak measurement; returns the bytes in use now, on the device or of the process.

    A system that cannot reset its record goes on with the old one, which can only be too large.
    """
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())
    if CLEAR_REFS.exists():
        try:
            CLEAR_REFS.write_text("5")
        except OSError:
            return resident_bytes()
    return resident_bytes()


def peak_bytes(device: str) -> int:
    """Peak since `reset_peak`: torch's allocations on a GPU, the process's resident size on a CPU."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated())
    return peak_resident_bytes()


def timed(device: str, work: Any) -> tuple[Any, float]:
    """(result of `work()`, seconds), waiting for the device before and after."""
    synchronize(device)
    began = time.perf_counter()
    result = work()
    synchronize(device)
    return result, time.perf_counter() - began


def synchronize(device: str) -> None:
    """Wait until the GPU has done what was asked of it; nothing to do on a CPU."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()


def _status(field: str) -> int:
    if not STATUS.exists():
        return 0
    for line in STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return 0
