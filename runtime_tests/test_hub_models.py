"""Dense models by hub id, downloaded from a stand-in on this machine: checked like a folder, small files first."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from l4q.checkpoint import L4QCheckpoint
from l4q.shard_layout import INDEX, SINGLE
from l4q.starts.hub import dense_folder
from runtime_tests.attacks.edit import config
from runtime_tests.attacks.entries import STEPS
from runtime_tests.attacks.safetensors_files import HEADERS
from runtime_tests.start_files import byte_tokenizer, hub_cache
from runtime_tests.tiny_llama import tiny_llama

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TEXT = "All models are wrong. " * 40
RUN = """
import sys
from l4q.cli_common import status
from l4q.cli_train import command
for model in {models!r}:
    sys.argv = ["l4q-train", model, *{words!r}, "--out", model.replace("/", "-")]
    print("RESULT", model, status(command), flush=True)
"""


class Handler(BaseHTTPRequestHandler):
    """What huggingface_hub 2.4 asks when it downloads: the commit, the list of files, each file's facts and bytes."""

    repositories: dict[str, Path]
    requests: list[str]

    def do_GET(self) -> None:
        """Answer, or 404."""
        words = self.path.partition("?")[0].strip("/").split("/")
        if words[:2] == ["api", "models"]:
            folder = self.repositories.get("/".join(words[2:4]))
            facts = json.dumps(self.facts(folder, words[4:])).encode()
            self.reply(404 if folder is None else 200, facts, "RepoNotFound" if folder is None else "")
            return
        folder = self.repositories.get("/".join(words[:2]))
        self.requests.append("/".join([*words[:2], *words[4:]]))
        if folder is None:
            self.reply(404, b"", "RepoNotFound")
            return
        path = folder / "/".join(words[4:])
        found = path.is_file()
        self.reply(200 if found else 404, path.read_bytes() if found else b"", "" if found else "EntryNotFound")

    do_HEAD = do_GET

    def facts(self, folder: Path | None, asked: list[str]) -> Any:
        """Of a repository: its commit, or its files."""
        if folder is None:
            return {"error": "Repository not found"}
        if asked[:1] == ["tree"]:
            files = sorted(folder.iterdir())
            return [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name} for f in files]
        return {"id": folder.name, "sha": COMMIT, "siblings": []}

    def reply(self, status: int, data: bytes, error: str = "") -> None:
        """Headers and, unless they alone were asked for, the bytes."""
        self.send_response(status)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        headers |= {"X-Error-Code": error} if error else {}
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr."""


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with a tokenizer."""
    folder = tmp_path_factory.mktemp("good")
    tiny_llama(folder, vocab_size=320, num_hidden_layers=1)
    byte_tokenizer(folder)
    return folder


@pytest.fixture
def hub(good: Path, tmp_path: Path) -> Iterator[tuple[str, dict[str, Path], list[str]]]:
    """Address, repositories and requests of a stand-in that has the good model."""
    handler = type("Bound", (Handler,), {"repositories": {"org/good": good}, "requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", handler.repositories, handler.requests  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()


def damaged(good: Path, folder: Path, change: Any) -> Path:
    """A copy of the good model that somebody has changed."""
    folder.mkdir()
    for path in good.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    change(folder)
    return folder


def renamed(folder: Path, *, name: str) -> None:
    """Give the weights another name."""
    (folder / SINGLE).rename(folder / name)


def train(address: str, models: list[str], folder: Path) -> tuple[dict[str, int], str]:
    """Exit code of l4q-train by model, in one process whose hub is the stand-in; and its stderr."""
    (folder / "text.txt").write_text(TEXT)
    words = ["--data", "text.txt", *STEPS]
    own = {"HF_ENDPOINT": address, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    project = str(Path(__file__).resolve().parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", RUN.format(models=models, words=words)],
        env={**os.environ, **own, "NO_PROXY": "127.0.0.1", "PYTHONPATH": project, "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("RESULT")]
    return {model: int(code) for _, model, code in lines}, done.stderr


def test_what_a_hub_id_brings_is_checked(
    hub: tuple[str, dict[str, Path], list[str]], good: Path, tmp_path: Path
) -> None:
    """config.json before any weights are downloaded, headers before they are read; the good twin trains."""
    address, repositories, requests = hub
    repositories |= {
        "org/layers": damaged(good, tmp_path / "layers", config(num_hidden_layers=10**9)),
        "org/code": damaged(good, tmp_path / "code", config(auto_map={"AutoConfig": "own.Own"})),
        "org/header": damaged(good, tmp_path / "header", next(iter(HEADERS.values()))),
        "org/pickle": damaged(good, tmp_path / "pickle", partial(renamed, name="pytorch_model.bin")),
    }
    codes, stderr = train(address, ["org/good", *list(repositories)[1:], "org/absent"], tmp_path)
    assert codes == {
        "org/good": 0, "org/layers": 2, "org/code": 3, "org/header": 2, "org/pickle": 2, "org/absent": 2
    }, stderr  # fmt: skip
    assert stderr.count("error: ") == 5
    assert "at most as many layers" not in stderr  # refused by the limit alone, before tensors could be counted
    downloaded = {path for path in requests if path.endswith((SINGLE, ".bin"))}
    assert downloaded == {f"org/good/{SINGLE}", f"org/header/{SINGLE}", f"org/pickle/{SINGLE}"}
    assert L4QCheckpoint.open(tmp_path / "org-good" / "checkpoint").config["_name_or_path"] == "org/good"
    written = [path for path in (tmp_path / "org-good").rglob("*.json") if str(tmp_path / "hf") in path.read_text()]
    assert written == []


def test_shards_of_a_hub_id_are_those_of_its_index(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index names the weight files; without all of them, or for an unknown id, there is no folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert dense_folder("org/absent") is None
    sharded = damaged(
        good, tmp_path / "sharded", lambda folder: (folder / SINGLE).rename(folder / "model-a.safetensors")
    )
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": "model-a.safetensors"}}))
    snapshot = hub_cache(sharded, "org/sharded", tmp_path / "cache")
    assert dense_folder("org/sharded") == snapshot
    (snapshot / "model-a.safetensors").unlink()
    assert dense_folder("org/sharded") is None
