"""How vLLM and llama.cpp are served, and what their answers may differ from the oracle's by: `RUNTIMES`, `serve`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporters.environment import INHERITED
from l4q.errors import UnsupportedError
from runtime_tests.engines.host import COMMON_ENV, ENGINE_ENV, PROJECT, THREAD_VARIABLES
from runtime_tests.serving.server import HOST, Server, free_port
from runtime_tests.targets import detect


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What every server is asked for."""

    context: int = 512
    """Tokens per request, prompt and answer together."""
    parallel: int = 4
    """Requests served at once."""
    threads: int = 1
    """Compute threads."""
    timeout_s: float = 600.0
    """Longest wait for health, in seconds."""
    pythons: Mapping[str, str] = field(default_factory=dict)
    """Runtime -> interpreter that has it; the current one by default."""


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """One server program."""

    command: Callable[[Path, int, ServeOptions], list[str]]
    """(folder, port, options) -> arguments after the interpreter."""
    noise: float
    """Largest difference of a chosen token's logprob from the oracle's that the arithmetic explains, in nats."""
    reason: str
    """Why that much."""
    environment: Mapping[str, str] = field(default_factory=dict)
    request_fields: Mapping[str, Any] = field(default_factory=dict)
    """What a request says beyond OpenAI's fields, for token ids and repeatable answers."""


def _vllm(folder: Path, port: int, options: ServeOptions) -> list[str]:
    sizes = {"max-model-len": options.context, "max-num-seqs": options.parallel}
    flags = ["--dtype=float16", "--enforce-eager", "--no-enable-prefix-caching", "--seed=0"]
    where = ["--model", str(folder), "--served-model-name", folder.name, "--host", HOST, "--port", str(port)]
    return ["-m", "vllm.entrypoints.openai.api_server", *where, *flags, *(f"--{k}={v}" for k, v in sizes.items())]


def _llamacpp(folder: Path, port: int, options: ServeOptions) -> list[str]:
    sizes = {"context": options.context, "parallel": options.parallel, "threads": options.threads}
    where = [str(folder), "--alias", folder.name, "--host", HOST, "--port", str(port)]
    return [
        "-m",
        "runtime_tests.serving.llamacpp_server",
        *where,
        *(f"--{key}={value}" for key, value in sizes.items()),
    ]


# engine of runtime_tests.targets.detect -> its server
RUNTIMES: dict[str, Runtime] = {
    "vllm": Runtime(
        command=_vllm,
        noise=0.1,
        reason="fp16 activations: up to 0.04 on SmolLM2 with any 4-bit format and with none",
        environment=ENGINE_ENV["vllm"],
        request_fields={"return_token_ids": True},
    ),
    "llamacpp": Runtime(
        command=_llamacpp,
        noise=0.4,
        reason="the block kernels round activations to int8: up to 0.25 on SmolLM2",
        environment={"PYTHONPATH": str(PROJECT)},
        # a prompt found in the cache is computed in other batches, which rounds differently
        request_fields={"cache_prompt": False},
    ),
}


def runtime_of(folder: Path) -> str:
    """The key of RUNTIMES for an exported folder.

    Raises:
        UsageError: The folder is missing or no export.
        UnsupportedError: Its format has no server here.
    """
    target = detect(folder)[0]
    if target.engine not in RUNTIMES:
        raise UnsupportedError(
            f"no OpenAI-compatible server runs a {target.format} folder here",
            where=folder,
            expected="a gptq, awq, compressed-tensors or gguf export",
            remedy="see docs/serving.md for how to run it in a program",
        )
    return target.engine


def server_environment(runtime: str, threads: int) -> dict[str, str]:
    """The variables a server sees: a few of ours and the tables', nothing else."""
    inherited = {name: os.environ[name] for name in INHERITED if name in os.environ}
    threading = dict.fromkeys(THREAD_VARIABLES, str(threads))
    return {**inherited, **COMMON_ENV, **threading, **RUNTIMES[runtime].environment}


def serve(folder: Path, options: ServeOptions | None = None) -> Server:
    """Start the server of an export on a free port of 127.0.0.1; its API calls the model by the folder's name.

    Raises:
        UsageError: The folder is missing or no export.
        UnsupportedError: Its format has no server here.
        ServerError: The server did not become healthy.
    """
    options = options or ServeOptions()
    name = runtime_of(folder)
    port = free_port()
    return Server(
        [options.pythons.get(name, sys.executable), *RUNTIMES[name].command(folder.resolve(), port, options)],
        url=f"http://{HOST}:{port}",
        environment=server_environment(name, options.threads),
        timeout_s=options.timeout_s,
    )
