"""The child process of `host.RemoteEngine`: serve one engine over JSON lines.

    request  {"id": 1, "op": "load", "engine": "/path/x_engine.py", "model": "/path", "options": {...}}
             {"id": 2, "op": "prompt_logprobs", "token_ids": [...], "array": "/tmp/.../2.npy"}
             {"id": 3, "op": "generate", "token_ids": [...], "max_new_tokens": 16}
             {"id": 4, "op": "info"}   {"id": 5, "op": "close"}
    reply    {"id": 1, "ok": true, "result": ...}   or   {"id": 1, "ok": false, "error": "ValueError: ...", "trace": ""}

The file runs as a script, without the project being importable, and uses the standard library and numpy only. Replies
leave through a private copy of fd 1; fd 1 itself then points at stderr, so that nothing an engine prints, from Python
or from C, can land in the stream. End of input means that the parent is gone: its scratch folder
(the only argument) is removed and the whole process group ends at once.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np


class Session:
    """The engine that is currently loaded, if any."""

    def __init__(self) -> None:
        self._engine: Any = None

    def load(self, request: Mapping[str, Any]) -> None:
        """Close the engine before and load another."""
        self.close(request)
        self._engine = _import_file(Path(request["engine"])).Engine(request["model"], **request["options"])

    def prompt_logprobs(self, request: Mapping[str, Any]) -> str:
        """Write the float32 [tokens, vocab] answer to the file the parent named."""
        array = np.ascontiguousarray(self._loaded().prompt_logprobs(request["token_ids"]), dtype=np.float32)
        np.save(request["array"], array)
        return str(request["array"])

    def generate(self, request: Mapping[str, Any]) -> list[Any]:
        """[new token ids, seconds]."""
        token_ids, seconds = self._loaded().generate(request["token_ids"], request["max_new_tokens"])
        return [[int(token) for token in token_ids], float(seconds)]

    def info(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The engine's facts."""
        return dict(self._loaded().info())

    def close(self, request: Mapping[str, Any]) -> None:
        """Free the engine's model."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def _loaded(self) -> Any:
        if self._engine is None:
            raise RuntimeError("no model is loaded")
        return self._engine


def main() -> None:
    """Answer requests until one says close or the parent goes away."""
    replies = _take_stdout()
    requests: queue.Queue[bytes] = queue.Queue()
    threading.Thread(target=_read_requests, args=(_take_stdin(), requests, sys.argv[1]), daemon=True).start()
    session = Session()
    operations: dict[str, Callable[[Mapping[str, Any]], Any]] = {
        "load": session.load,
        "prompt_logprobs": session.prompt_logprobs,
        "generate": session.generate,
        "info": session.info,
        "close": session.close,
    }
    while True:
        request = json.loads(requests.get())
        reply: dict[str, Any] = {"id": request["id"], "ok": True}
        try:
            reply["result"] = operations[request["op"]](request)
        except Exception as error:  # the engine's failure is the answer; the parent decides what to do with it
            text = f"{type(error).__name__}: {error}"
            reply = {"id": request["id"], "ok": False, "error": text, "trace": traceback.format_exc()}
            reply["missing"] = isinstance(error, ModuleNotFoundError)
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()
        if request["op"] == "close":
            return


def _take_stdout() -> BinaryIO:
    private = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return private


def _take_stdin() -> BinaryIO:
    private = os.fdopen(os.dup(0), "rb")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    return private


def _read_requests(stream: BinaryIO, requests: queue.Queue[bytes], scratch: str) -> None:
    for line in stream:
        requests.put(line)
    # Also reached while the main thread computes or hangs. The parent starts this process as its own group's leader.
    shutil.rmtree(scratch, ignore_errors=True)
    os.killpg(os.getpgid(0), signal.SIGKILL)


def _import_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"not a Python file: {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
