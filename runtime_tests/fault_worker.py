"""A process with everything imported that forks one command line after another, so that many can be killed cheaply.

Requests and answers are JSON lines: {"start": {"argv", "root", "fault", "log"}} -> {"pid"},
{"wait": pid} -> {"status": exit code or minus the signal, "changes": n}. `FaultWorker` speaks for tests.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Self

from runtime_tests.fault_checks import tree
from runtime_tests.fault_hooks import Counter, Fault, install, prepare

COMMANDS = {
    "l4q-export": "exporters.cli",
    "l4q-train": "l4q.cli_train",
    "l4q-freeze": "l4q.cli_refreeze",
    "l4q-verify": "exporters.cli_verify",
}
WARM = (
    "accelerate", "compressed_tensors.compressors.pack_quantized.helpers", "exporters.awq", "exporters.check_folder",
    "exporters.compressed_tensors", "exporters.gguf", "exporters.gptq", "exporters.onnx", "exporters.run",
    "l4q.refreeze", "l4q.train", "transformers.models.llama.modeling_llama", "safetensors.torch",
)  # fmt: skip
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
DEADLINE_S = 300


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a command ended."""

    status: int
    """Exit code, or minus the number of the signal that killed it."""
    changes: int
    """Changes to its folder that it began."""
    text: str
    """What it printed, stdout and stderr."""
    left: dict[str, str] | None = None
    """With `Fault.disk`, the `tree` of the folder at the end."""
    mounted: bool = False
    """Whether that disk was a real one."""


class FaultWorker:
    """Starts the process; `run` or `start` commands in it; leaving its context ends it."""

    def __init__(self, scratch: Path) -> None:
        """Keep logs in `scratch`."""
        self._scratch = scratch
        self._number = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "runtime_tests.fault_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **ENVIRONMENT},
        )

    def run(self, argv: list[str], root: Path, fault: Fault = Fault()) -> Outcome:  # noqa: B008 - frozen
        """Run a command line to its end.

        Args:
            argv: Command and arguments; the command is a key of `COMMANDS`.
            root: Folder whose changes count.
            fault: What shall happen.
        """
        return self.wait(self.start(argv, root, fault))

    def start(self, argv: list[str], root: Path, fault: Fault = Fault()) -> tuple[int, Path]:  # noqa: B008
        """Start a command line; returns its process id and its log."""
        self._number += 1
        log = self._scratch / f"{self._number}.log"
        log.touch()  # there is one, however early the command is killed
        request = {"argv": argv, "root": str(root), "fault": asdict(fault), "log": str(log)}
        return int(self._ask({"start": request})["pid"]), log

    def wait(self, started: tuple[int, Path]) -> Outcome:
        """Wait for what `start` started."""
        answer = self._ask({"wait": started[0]})
        seen = started[1].with_suffix(".json")
        disk = json.loads(seen.read_text(encoding="utf-8")) if seen.exists() else {}
        return Outcome(**answer, **disk, text=started[1].read_text(encoding="utf-8", errors="replace"))

    def kill(self, started: tuple[int, Path]) -> Outcome:
        """Send SIGKILL to what `start` started, wherever it is."""
        os.kill(started[0], signal.SIGKILL)
        return self.wait(started)

    def go_on(self, started: tuple[int, Path]) -> None:
        """Let a process run on that stopped itself."""
        os.kill(started[0], signal.SIGCONT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate(timeout=60)

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def wait_until_stopped(pid: int) -> None:
    """Wait until a process has stopped itself (the action "stop")."""
    until = time.monotonic() + DEADLINE_S
    while time.monotonic() < until:
        if Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "T":
            return
        time.sleep(0.01)
    raise TimeoutError(f"process {pid} did not stop")


def _serve() -> None:
    for name in WARM:
        import_module(name)
    counters: dict[int, Counter] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            counter = Counter()
            pid = os.fork()
            if pid == 0:
                _run(request["start"], counter)
            counters[pid] = counter
            answer: dict[str, Any] = {"pid": pid}
        else:
            _, status = os.waitpid(request["wait"], 0)
            answer = {"status": os.waitstatus_to_exitcode(status), "changes": counters.pop(request["wait"]).value}
        print(json.dumps(answer), flush=True)


def _run(request: dict[str, Any], counter: Counter) -> None:
    """The forked process: run the command as its entry point does, and end without returning."""
    from l4q.cli_common import status

    code = 99
    try:
        signal.alarm(DEADLINE_S)
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT)
        empty = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((empty, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - the parent's is buffered
        sys.argv = list(request["argv"])
        command = import_module(COMMANDS[sys.argv[0]]).command
        root = Path(request["root"])
        asked = Fault(**request["fault"])
        fault = prepare(asked, root)
        install(fault, root, counter)
        code = status(command)
        if asked.disk:  # nobody else sees that disk
            seen = {"left": tree(root), "mounted": fault is asked}
            Path(request["log"]).with_suffix(".json").write_text(json.dumps(seen), encoding="utf-8")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
