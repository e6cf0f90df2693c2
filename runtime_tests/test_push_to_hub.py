"""l4q-export --push-to-hub against a server on this machine that keeps what arrives."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from exporters.cli import command
from exporters.driver import export, get_exporter
from exporters.hub import HubError, push, repositories
from exporters.verify import verify
from l4q.checkpoint import L4QCheckpoint
from l4q.errors import UsageError
from runtime_tests.conftest import CheckpointMaker
from runtime_tests.hub_server import RESET, TOKEN, Hub, serve


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A running stand-in."""
    with serve() as running:
        yield running


@pytest.fixture
def checkpoint(glass_checkpoint: CheckpointMaker) -> Path:
    """glassllm, symmetric."""
    return glass_checkpoint("none", group_size=32)


def environment(hub: Hub, token: str = TOKEN) -> dict[str, str]:
    """Of a process whose hub is the stand-in; without Xet, whose protocol is not the hub's own."""
    own = {"HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return {**os.environ, **own, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}


def run_export(hub: Hub, *arguments: object, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    """The real l4q-export in a process of its own."""
    words = [sys.executable, "-c", "from exporters.cli import main; main()", *map(str, arguments)]
    env = environment(hub, token)
    return subprocess.run(words, env=env, capture_output=True, text=True, check=False, timeout=300)


def digest(folder: Path) -> dict[str, str]:
    """sha256 of each file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_every_byte_arrives(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    """Two formats go to two private repositories, large files in parts; each file has the sha256 of the local one."""
    out = tmp_path / "out"
    finished = run_export(
        hub,
        checkpoint,
        "--to",
        "onnx",
        "gguf",
        "--out",
        out,
        "--push-to-hub",
        "me/king-{format}",
        "--private",
        "--json",
    )
    assert finished.returncode == 0, finished.stderr
    for name in ("onnx", "gguf"):
        assert hub.sha256(f"me/king-{name}") == digest(out / name)
        assert hub.visibility[f"me/king-{name}"] == "private"
        assert json.loads(finished.stdout)[name]["pushed"].startswith(f"{hub.url}/me/king-{name}/commit/")
    assert any("/complete/" in request for request in hub.requests)
    arrived = tmp_path / "arrived"
    arrived.mkdir()
    for path, content in hub.branches["me/king-gguf", "main"].items():
        (arrived / path).write_bytes(content)
    opened = L4QCheckpoint.open(checkpoint)
    assert verify(opened, get_exporter("gguf"), arrived).passed
    file = next(arrived.glob("*.gguf"))
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    assert digest(arrived) != digest(out / "gguf")


def test_a_refused_token_leaves_the_export(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    """Exit code 69 and one message that says how to push again; the local folder is complete and verified."""
    out = tmp_path / "out"
    words = (checkpoint, "--to", "gguf", "--out", out, "--push-to-hub", "me/king", "--revision", "v1")
    finished = run_export(hub, *words, token="hf_other")
    assert finished.returncode == 69
    assert "the export is complete, but could not be pushed to the hub" in finished.stderr
    assert "401" in finished.stderr
    assert f"hf upload me/king {out / 'gguf'} --revision v1" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not hub.branches
    assert verify(L4QCheckpoint.open(checkpoint), get_exporter("gguf"), out / "gguf").passed


# what fails -> (part of the request's path, status, what the message says of it)
FAULTS = {
    "server error in the commit": ("/commit/", 500, "500"),
    "connection reset in the commit": ("/commit/", RESET, "Error"),
    "upload refused": ("/lfs/", 403, "403"),
    "bytes that did not arrive": ("/verify", 422, "422"),
}
PUSHES = """
import json, sys
from pathlib import Path
from exporters.hub import HubError, push
for line in sys.stdin:
    try:
        print(json.dumps(push(Path(line.strip()), "me/king", revision="v1")), flush=True)
    except HubError as error:
        print(json.dumps({"error": str(error), "code": error.exit_code}), flush=True)
"""


def test_failures_on_the_way(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    """Whatever breaks, the error is of one kind and nothing is committed; then the same push works, on a branch."""
    folder = export(checkpoint, "gguf", tmp_path / "gguf").folder
    before = digest(folder)
    words = [sys.executable, "-c", PUSHES]
    child = subprocess.Popen(words, env=environment(hub), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    to_child, from_child = child.stdin, child.stdout
    assert to_child is not None
    assert from_child is not None

    def push_once() -> object:
        to_child.write(f"{folder}\n")
        to_child.flush()
        return json.loads(from_child.readline())

    with child:
        for label, (path, status, said) in FAULTS.items():
            hub.faults = {path: status}
            answer = push_once()
            assert isinstance(answer, dict), label
            assert answer["code"] == 69, label
            assert said in answer["error"], (label, answer)
            assert f"hf upload me/king {folder} --revision v1" in answer["error"], label
            assert not hub.branches["me/king", "v1"], label
        hub.faults = {}
        assert str(push_once()).startswith(f"{hub.url}/me/king/commit/")
        to_child.close()
    assert hub.sha256("me/king", "v1") == before == digest(folder)
    assert not hub.branches["me/king", "main"]


def test_names_are_checked_before_anything_is_written(checkpoint: Path, tmp_path: Path) -> None:
    """Two formats into one repository, a name the hub forbids, and options of a push without one are usage errors."""
    assert repositories("me/king-{format}", ["gguf", "onnx"]) == {"gguf": "me/king-gguf", "onnx": "me/king-onnx"}
    with pytest.raises(UsageError, match=r"(?s)several formats cannot share one repository.*me/king-\{format\}"):
        repositories("me/king", ["gguf", "onnx"])
    with pytest.raises(UsageError, match="not a name of a repository on the hub"):
        repositories("me/king/queen", ["gguf"])
    words = [str(checkpoint), "--to", "gguf", "--out", str(tmp_path / "out"), "--private"]
    refused = CliRunner().invoke(command, words)
    assert isinstance(refused.exception, UsageError)
    assert "--private and --revision say how to push" in str(refused.exception)
    assert not (tmp_path / "out").exists()


def test_without_a_network(hub: Hub, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub's offline mode, which other commands are run in, is named as the reason."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"(?s)could not be pushed.*offline"):
        push(checkpoint, "me/king")
