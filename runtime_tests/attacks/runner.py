"""Runs entries on attacked folders, each in a process of its own with bounded memory and processor time.

    python -m runtime_tests.attacks.runner BASES_JSON

The process imports everything once and then forks for every line {"entry", "folder", "scratch", "flags"} on stdin; the
answer is a line {"outcome", "code", "stderr", "seconds", "grown"} on stdout. Outcomes: "refused" (an exit code of l4q's
errors), "accepted", "unexpected", "signal N", "timeout".
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

from runtime_tests.attacks.entries import ENTRIES, train

MEMORY = 1 << 30
"""Bytes of address space beyond what the forked process begins with."""
GROWTH = 400 << 20
"""Resident bytes an entry may add; a good tiny model takes less than a quarter."""
CPU_SECONDS = 30
WALL_SECONDS = 300
REFUSALS = (2, 3, 4)
WARM = (
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.tokenization_auto",
    "transformers.modeling_gguf_pytorch_utils",
    "transformers.trainer",
    "l4q.train",
    "l4q.importing",
    "l4q.importing.run",
    "l4q.starts.gguf",
    "l4q.starts.gptq",
    "l4q.starts.awq",
    "l4q.starts.compressed_tensors",
    "exporters.run",
    "exporters.gptq",
    "exporters.awq",
    "exporters.compressed_tensors",
    "exporters.gguf",
    "exporters.onnx",
    "exporters.inspect.show",
    "exporters.inspect.folder",
    "exporters.inspect.gguf_file",
    "exporters.inspect.onnx_file",
    "onnx.reference",
    "compressed_tensors.compressors.pack_quantized",
    "compressed_tensors.entrypoints.convert.converters.autoawq",
)


def run_forked(entry: str, folder: Path, bases: dict[str, Path], scratch: Path, flags: list[str]) -> dict[str, Any]:
    """Fork, limit, run one entry, and say how it ended."""
    scratch.mkdir(parents=True, exist_ok=True)
    log = scratch.with_suffix(".log")
    began, (reader, writer) = time.monotonic(), os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, str(_status_kib("VmRSS")).encode())  # of the parent's pages only some count as its own
        _limited_child(entry, folder, bases, scratch, flags, log)
    os.close(writer)
    before = int(os.read(reader, 32) or b"0")
    os.close(reader)
    timed_out = not _wait(child, began + WALL_SECONDS)
    if timed_out:
        os.kill(child, signal.SIGKILL)
    _, waited, usage = os.wait4(child, 0)
    stderr = log.read_text(encoding="utf-8", errors="replace")
    grown = max(0, usage.ru_maxrss - before) << 10
    code = os.waitstatus_to_exitcode(waited)
    return {
        "outcome": "timeout" if timed_out else _outcome(code),
        "code": code,
        "stderr": stderr[-8000:],
        "seconds": usage.ru_utime + usage.ru_stime,
        "grown": grown,
    }


def _limited_child(
    entry: str, folder: Path, bases: dict[str, Path], scratch: Path, flags: list[str], log: Path
) -> None:
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        nothing = os.open(os.devnull, os.O_RDWR)
        for target, source in ((0, nothing), (1, nothing), (2, descriptor)):
            os.dup2(source, target)
        size = (_status_kib("VmSize") << 10) + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        chosen = ENTRIES[entry]
        code = train(folder, bases, scratch, flags=tuple(flags)) if flags else chosen(folder, bases, scratch)
    except BaseException as error:  # what a user would see as a traceback
        os.write(2, f"{type(error).__name__}: {error}"[:2000].encode(errors="replace"))
        code = 1
    finally:
        sys.stderr.flush()
        os._exit(code)


def _outcome(code: int) -> str:
    if code < 0:
        return f"signal {signal.Signals(-code).name}"
    return "accepted" if code == 0 else "refused" if code in REFUSALS else "unexpected"


def _wait(child: int, deadline: float) -> bool:
    """Wait without reaping; False at the deadline."""
    pause = 0.002
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)
    return True


def _status_kib(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    return 0


def main() -> None:
    """Answer until stdin ends."""
    bases = {name: Path(path) for name, path in json.loads(sys.argv[1]).items()}
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch loads: threads do not survive a fork
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print while they are imported
    for name in WARM:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a forked process would copy the pages of whatever its collector looks at
    for line in sys.stdin:
        asked = json.loads(line)
        answer = run_forked(
            asked["entry"], Path(asked["folder"]), bases, Path(asked["scratch"]), asked.get("flags", [])
        )
        replies.write(json.dumps(answer) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
