"""llama.cpp's own HTTP server, as the xllamacpp package carries it, on a GGUF file.

    python -m runtime_tests.serving.llamacpp_server exports/gguf --port 8080

It answers what `llama-server` answers (/health, /v1/models, /v1/chat/completions, /tokenize, ...). SIGTERM and Ctrl-C
end it.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Serve until told to stop."""
    parser = argparse.ArgumentParser(prog="python -m runtime_tests.serving.llamacpp_server", description=__doc__)
    parser.add_argument("model", type=Path, help="A .gguf file, or a folder with exactly one.")
    parser.add_argument("--host", default="127.0.0.1", help="Address to listen on (default %(default)s).")
    parser.add_argument("--port", type=int, default=8080, help="Port to listen on (default %(default)s).")
    parser.add_argument("--alias", default=None, help="Name of the model in the API (default: the file's stem).")
    parser.add_argument("--context", type=int, default=4096, help="Tokens per request (default %(default)s).")
    parser.add_argument("--parallel", type=int, default=4, help="Requests served at once (default %(default)s).")
    parser.add_argument("--threads", type=int, default=-1, help="Compute threads (default: one per core).")
    arguments = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    server = start(arguments)
    print(f"listening on {server.listening_address}", flush=True)
    while True:
        signal.pause()


def start(arguments: argparse.Namespace) -> Any:
    """Load the model and listen; the server lives as long as the object returned."""
    import xllamacpp

    path = find_model(arguments.model)
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.model_alias = {arguments.alias or path.stem}
    params.hostnames = [arguments.host]
    params.port = arguments.port
    params.n_ctx = arguments.context * arguments.parallel  # llama.cpp divides it among the slots
    params.n_parallel = arguments.parallel
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = arguments.threads
    return xllamacpp.Server(params)


def find_model(path: Path) -> Path:
    """The file itself, or the one .gguf file of a folder.

    Exits with a message if there is none, or more than one.
    """
    files = sorted(path.glob("*.gguf")) if path.is_dir() else [path]
    if len(files) != 1 or not files[0].is_file():
        sys.exit(f"{path}: expected a .gguf file or a folder with exactly one, found {[file.name for file in files]}")
    return files[0]


if __name__ == "__main__":
    main()
