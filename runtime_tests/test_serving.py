"""SmolLM2's exports behind real servers, by the commands of docs/serving.md, asked through the real openai client.

Two vLLM servers start together and a third later: 22 s of CPU time each, most of it imports.
"""

from __future__ import annotations

import json
import os
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from exporters.cli import command as export_command
from l4q.errors import UnsupportedError, VerificationError
from runtime_tests.conftest import CheckpointMaker
from runtime_tests.engines.host import COMMON_ENV, PROJECT, THREAD_VARIABLES
from runtime_tests.serving.client import Client
from runtime_tests.serving.judge import CHATS, Expected, expect, judge
from runtime_tests.serving.page import NOT_RUN, block, blocks, server_script
from runtime_tests.serving.runtimes import RUNTIMES, runtime_of, serve
from runtime_tests.serving.server import HOST, Server, free_port, group_members
from tools.serve_check import command as serve_check_command

pytestmark = pytest.mark.slow_engine

NEW_TOKENS = 16
PAGE_NAME = "my-model"
PYTHON_BLOCKS = ("onnxruntime", "genai", "transformers")
RUN = {"export", "serve-check", "vllm", "client", "llamacpp", *PYTHON_BLOCKS}


@pytest.fixture(scope="module")
def site(smollm2_checkpoint: CheckpointMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's folder after the page's first command: RUN/checkpoint and exports/*, plus one damaged export."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "RUN").mkdir()
    (folder / "RUN" / "checkpoint").symlink_to(smollm2_checkpoint("none"))
    words = shlex.split(block("export"))
    assert words[0] == "l4q-export"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        export_command.main([*words[1:], "--no-verify"], standalone_mode=False)  # test_parity_smollm2 verifies
    shutil.copytree(folder / "exports" / "gguf", folder / "exports" / "damaged")
    damage_row(next((folder / "exports" / "damaged").glob("*.gguf")))
    return folder


def damage_row(path: Path) -> None:
    """One output row of one layer in a GGUF file: its Q4_0 scales 64 times too large."""
    tensor = next(tensor for tensor in gguf.GGUFReader(path, "r+").tensors if tensor.name == "blk.3.ffn_down.weight")
    rows = tensor.data.reshape(576, -1, 18)  # [out, blocks, bytes]: fp16 scale, 16 bytes of codes
    rows[7, :, :2] = (np.ascontiguousarray(rows[7, :, :2]).view(np.float16) * 64).view(np.uint8)
    assert isinstance(tensor.data, np.memmap)
    tensor.data.flush()


@pytest.fixture(scope="module")
def expected(site: Path) -> list[Expected]:
    """The oracle's greedy answers; with what it is sure of, a test can be sure of something."""
    answers = expect(site / "RUN" / "checkpoint", NEW_TOKENS)
    assert sum(margin > 0.2 for one in answers for margin in one.margins) > 40
    assert answers[0].text == "The capital of France is Paris, France."
    return answers


def page_server(name: str, site: Path) -> Server:
    """The server of a block of the page, started by a shell in the reader's folder."""
    port = free_port()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    threads = dict.fromkeys(THREAD_VARIABLES, "1")
    return Server(
        ["bash", "-euo", "pipefail", "-c", server_script(name, port)],
        url=f"http://{HOST}:{port}",
        environment={**COMMON_ENV, **threads, "PATH": path, "HOME": str(site), "PYTHONPATH": str(PROJECT)},
        cwd=site,
    )


def run_python(name: str, site: Path, changes: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a Python block of the page in the reader's folder."""
    text = block(name)
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    (site / f"{name}.py").write_text(text)
    monkeypatch.chdir(site)
    runpy.run_path(str(site / f"{name}.py"))


def test_vllm_serves_gptq_by_the_pages_command(
    site: Path, expected: list[Expected], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Models, template, streaming, logprobs, four at once: all the oracle's; SIGTERM ends it and its engine."""
    runtime = RUNTIMES["vllm"]
    with page_server("vllm", site) as server:
        assert len(group_members(server.group)) > 1  # the API and the engine
        client = Client(server.url, fields=runtime.request_fields)
        report = judge(client, PAGE_NAME, expected, NEW_TOKENS, runtime.noise)
        client.close()
        capsys.readouterr()
        run_python("client", site, {"http://127.0.0.1:8000": server.url}, monkeypatch)
        assert capsys.readouterr().out == expected[0].text + "\n"
    assert report.problems == ()
    assert report.tokens_equal == report.tokens
    assert group_members(server.group) == []
    assert not server.killed


@pytest.fixture(scope="module")
def vllm_servers(site: Path) -> Iterator[dict[str, Server]]:
    """AWQ and compressed-tensors, started together."""
    names = ("awq", "compressed-tensors")
    with ExitStack() as stack, ThreadPoolExecutor(len(names)) as pool:
        waiting = [pool.submit(serve, site / "exports" / name) for name in names]
        yield {name: stack.enter_context(future.result()) for name, future in zip(names, waiting, strict=True)}


@pytest.mark.parametrize("name", ["awq", "compressed-tensors"])
def test_vllm_serves_the_other_formats(name: str, vllm_servers: dict[str, Server], expected: list[Expected]) -> None:
    """The same checks by `serve`, which names the model after its folder."""
    runtime = RUNTIMES["vllm"]
    client = Client(vllm_servers[name].url, fields=runtime.request_fields)
    report = judge(client, name, expected, NEW_TOKENS, runtime.noise)
    client.close()
    assert report.problems == ()
    assert report.tokens_equal == report.tokens


def test_one_row_of_difference_is_noticed_in_vllm(vllm_servers: dict[str, Server], site: Path, tmp_path: Path) -> None:
    """The twin: of a checkpoint that differs from the export in one row of one layer, it is not the server."""
    twin = tmp_path / "twin"
    shutil.copytree(site / "RUN" / "checkpoint", twin)
    shard = twin / "model.safetensors"
    with safe_open(shard, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(shard)
    tensors["model.layers.3.mlp.down_proj.scales"][7] *= 64
    save_file(tensors, shard, metadata)
    runtime = RUNTIMES["vllm"]
    client = Client(vllm_servers["awq"].url, fields=runtime.request_fields)
    report = judge(client, "awq", expect(twin, 8, CHATS[:1]), 8, runtime.noise)
    client.close()
    assert report.problems


def test_serve_check_passes_the_export_and_catches_a_damaged_row(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page's check through llama.cpp's server: 0 problems in the export, and exit code 4 for its twin."""
    monkeypatch.chdir(site)
    words = shlex.split(block("serve-check"))
    assert words[:3] == ["python", "-m", "tools.serve_check"]
    capsys.readouterr()
    with pytest.raises(VerificationError, match="1 of 2 servers do not answer like the checkpoint") as raised:
        serve_check_command.main([*words[3:], "exports/damaged", "--new-tokens=8", "--json"], standalone_mode=False)
    intact, damaged = json.loads(capsys.readouterr().out)
    assert intact["problems"] == []
    assert intact["tokens_equal"] > 20
    assert intact["worst_dlogprob"] < intact["noise"] < damaged["worst_dlogprob"]
    assert damaged["problems"]
    assert raised.value.exit_code == 4
    assert "exports/damaged" in str(raised.value)


def test_llamacpp_serves_by_the_pages_command(site: Path, expected: list[Expected]) -> None:
    """The page's command listens where it says and calls the model what it says; SIGTERM ends it."""
    with page_server("llamacpp", site) as server:
        client = Client(server.url, fields=RUNTIMES["llamacpp"].request_fields)
        assert client.models() == [PAGE_NAME]
        assert client.prompt_ids(CHATS[0]) == list(expected[0].prompt_ids)
        assert client.chat(CHATS[0], NEW_TOKENS).text == expected[0].text
        client.close()
    assert group_members(server.group) == []
    assert not server.killed


@pytest.mark.parametrize("name", PYTHON_BLOCKS)
def test_programs_of_the_page_print_the_oracles_text(
    name: str,
    site: Path,
    expected: list[Expected],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Copied as they are; transformers' program prints the answer of two folders."""
    capsys.readouterr()
    run_python(name, site, {}, monkeypatch)
    printed = capsys.readouterr().out.splitlines()
    assert printed == [expected[0].text] * (2 if name == "transformers" else 1)


def test_every_block_of_the_page_is_run_or_says_that_it_is_not() -> None:
    """No command without a mark, no mark without a test, no twin names; "not run here" beside what is not run."""
    marks = [one.mark for one in blocks()]
    assert sorted(mark for mark in marks if mark != NOT_RUN) == sorted(f"run={name}" for name in RUN)
    text = (PROJECT / "docs" / "serving.md").read_text(encoding="utf-8").lower()
    assert 0 < marks.count(NOT_RUN) <= text.count("not run here")


def test_an_onnx_folder_has_no_server(site: Path) -> None:
    """It is refused before anything starts, with the formats that have one."""
    with pytest.raises(UnsupportedError, match="a gptq, awq, compressed-tensors or gguf export"):
        runtime_of(site / "exports" / "onnx")
