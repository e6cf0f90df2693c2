"""SECURITY.md's promises that are not about single files: no code, no network, no secrets, no open ports."""

from __future__ import annotations

import ast
import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporters.driver import EXPORTERS, export, get_exporter
from exporters.environment import minimal_environment
from l4q.checkpoint import L4QCheckpoint
from l4q.checkpoint_files import CHECKPOINT_MANIFEST
from l4q.config import LoraConfig, QuantConfig
from l4q.data_chat import chat_segments
from l4q.errors import L4QError, UnsupportedError, UsageError
from l4q.model_folder import check_config
from l4q.starts.patterns import matches_pattern
from l4q.train_model import load_model
from l4q.train_options import TrainOptions
from runtime_tests.attacks.bases import build_bases, chat_template, copy_base
from runtime_tests.attacks.edit import config, set_item
from runtime_tests.engines.host import _environment
from runtime_tests.serving.runtimes import RUNTIMES, server_environment

PROJECT = Path(__file__).resolve().parent.parent
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "GITHUB_TOKEN")
FORBIDDEN = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
PACKAGES = ("l4q", "exporters", "runtime_tests", "tools")

MODEL_CODE = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM
pathlib.Path({marker!r}).write_text("ran")
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""

WATCHED = """
import sys
seen = []
def watch(event, arguments):
    if event == "socket.getaddrinfo" or (event == "socket.connect" and isinstance(arguments[1], tuple)):
        seen.append((event, str(arguments)))
        raise OSError("no network in this test")
sys.addaudithook(watch)
from l4q.cli_common import status
def run(module, *words):
    command = __import__(module, fromlist=["command"]).command
    sys.argv = ["l4q", *words]
    return status(command)
codes = []
{calls}
print("RESULT", codes, len(seen), seen[:3])
"""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Good folders of every kind."""
    return build_bases(tmp_path_factory.mktemp("bases"))


def sources(*packages: str) -> list[Path]:
    """Python files of the project."""
    return [path for package in packages for path in (PROJECT / package).rglob("*.py")]


def unsafe(path: Path) -> list[str]:
    """Imports and calls that could run code out of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [name for name in names if name.partition(".")[0] in FORBIDDEN]
        if isinstance(node, ast.Call):
            word = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            found += [word] if word in ("eval", "exec", "torch.load", "yaml.load", "os.system") else []
            found += [f"{word} allow_pickle"] if keywords.get("allow_pickle") == "True" else []
            found += [f"{word} trust_remote_code"] if keywords.get("trust_remote_code") == "True" else []
            found += [f"{word} without allow_pickle"] if word == "np.load" and "allow_pickle" not in keywords else []
            found += [f"{word} shell"] if keywords.get("shell") == "True" else []
    return found


def test_no_code_can_come_out_of_a_file() -> None:
    """No pickle, no eval, no torch.load, no shell and no trust_remote_code=True anywhere."""
    checked = [path for path in sources(*PACKAGES) if not path.name.startswith("test_")]  # tests run our own pages
    assert {str(path): unsafe(path) for path in checked if unsafe(path)} == {}


def test_the_search_for_unsafe_calls_finds_them(tmp_path: Path) -> None:
    """The twin of the test above."""
    path = tmp_path / "bad.py"
    path.write_text("import pickle\neval('1')\nnp.load('x')\ntorch.load('x')\nf(trust_remote_code=True, shell=True)\n")
    assert len(unsafe(path)) == 6


def served(text: str) -> list[str]:
    """Commands of a text that start a server, with continued lines joined."""
    joined = text.replace("\\\n", " ")
    starts = re.compile(r"vllm serve |vllm\.entrypoints\.openai\.api_server|llama-server -|llamacpp_server exports")
    return [line.strip() for line in joined.splitlines() if starts.search(line) and "--" in line]


def test_servers_bind_to_this_machine() -> None:
    """Every command that starts a server says --host 127.0.0.1, in documents and in the cards of exports."""
    documents = [*PROJECT.glob("*.md"), *(PROJECT / "docs").glob("*.md")]
    commands = [line for path in documents for line in served(path.read_text(encoding="utf-8"))]
    commands += [line for name in EXPORTERS for line in served(get_exporter(name).usage())]
    assert len(commands) >= 8
    assert [line for line in commands if "--host 127.0.0.1" not in line] == []
    everywhere = [path for path in [*sources(*PACKAGES), *documents] if path != Path(__file__).resolve()]
    assert [path for path in everywhere if "0.0.0.0" in path.read_text(encoding="utf-8")] == []  # noqa: S104
    assert served("vllm serve x \\\n  --port 1") == ["vllm serve x    --port 1"]


def test_other_processes_see_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines, servers and foreign decoders get an allow-list of variables, and no way to the hub's token."""
    for name in SECRETS:
        monkeypatch.setenv(name, "secret")
    found = [minimal_environment(), _environment("vllm", 1), *(server_environment(name, 1) for name in RUNTIMES)]
    for environment in found:
        assert "secret" not in environment.values()
        assert environment["HF_HUB_OFFLINE"] == environment["HF_HUB_DISABLE_IMPLICIT_TOKEN"] == "1"
        assert "PATH" in environment


def watched(calls: str) -> tuple[str, str]:
    """Run commands in a process that refuses and counts connections; the line of results, and everything printed."""
    environment = {key: value for key, value in minimal_environment().items() if "OFFLINE" not in key}
    done = subprocess.run(
        [sys.executable, "-c", WATCHED.format(calls=calls)],
        capture_output=True,
        text=True,
        cwd=PROJECT,
        env={**environment, "OMP_NUM_THREADS": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1"},
        timeout=600,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    return (lines or [""])[0], done.stdout + done.stderr


def test_local_files_need_no_network(bases: dict[str, Path], tmp_path: Path) -> None:
    """Training, inspecting, exporting and importing local files opens no connection, although none is forbidden."""
    words: dict[str, list[object]] = {
        "l4q.cli_train": [bases["dense"], "--data", bases["text"], "--out", tmp_path / "run", "--steps", "1",
                          "--max-length", "16", "--group-size", "32"],
        "exporters.inspect.cli": [bases["gguf"]],
        "exporters.cli": [bases["l4q"], "--to", "gguf", "--out", tmp_path / "exports"],
        "l4q.cli_import": [next(bases["gguf"].glob("*.gguf")), "--out", tmp_path / "imported"],
    }  # fmt: skip
    lines = [f"codes.append(run({module!r}, *{[str(word) for word in given]!r}))" for module, given in words.items()]
    result, printed = watched("\n".join(lines))
    assert result == "RESULT [0, 0, 0, 0] 0 []", printed


def test_the_watch_sees_connections() -> None:
    """The twin: a connection of Python's own is refused and counted."""
    attempt = "import socket\ntry:\n    socket.create_connection(('192.0.2.1', 9), 1)\nexcept OSError:\n    pass"
    result, printed = watched(attempt)
    assert not result.startswith("RESULT [] 0"), printed
    assert result.startswith("RESULT []"), printed


def own_code(folder: Path, marker: Path) -> Path:
    """Give a dense folder a model class of its own, which leaves a mark when it is imported."""
    (folder / "modeling_own.py").write_text(MODEL_CODE.format(marker=str(marker)))
    classes = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    config(auto_map=classes, model_type="own", architectures=["OwnModel"])(folder)
    return folder


def test_code_of_a_model_runs_only_if_asked_for(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without --trust-remote-code the model is refused and its code does not run; with it, it runs and is announced."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, marker = copy_base(bases["dense"], tmp_path / "own"), tmp_path / "marker"
    options: dict[str, Any] = {
        "model": str(own_code(folder, marker)),
        "data": (bases["text"],),
        "out": tmp_path / "run",
    }
    with pytest.raises(UnsupportedError, match=r"(?s)Python code of its own.*--trust-remote-code"):
        load_model(TrainOptions(**options))
    assert not marker.exists()
    with caplog.at_level(logging.WARNING, logger="l4q"):
        model, _ = load_model(TrainOptions(**options, trust_remote_code=True))
    assert type(model).__name__ == "OwnModel"
    assert marker.exists()
    assert "runs (--trust-remote-code)" in caplog.text
    with pytest.raises(UsageError, match="trust_remote_code"):
        TrainOptions(**options, trust_remote_code=True, fsdp=True)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "chat template"),
        ("{{ messages.append(1) }}", "chat template"),
        ("{{ 1 / 0 }}", "chat template fails"),
        ("{{ ''.join([1]) }}", "chat template fails"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "chat template"),
        ("{% include 'x' %}", "chat template"),
        ("{{ raise_exception('no') }}", "refuses the conversation"),
    ],
)
def test_templates_are_rendered_in_a_sandbox(
    bases: dict[str, Path], template: str, message: str, tmp_path: Path
) -> None:
    """What a template may not do, and what fails in it, ends in one error."""
    from transformers import AutoTokenizer

    folder = copy_base(bases["dense"], tmp_path / "model")
    chat_template(folder, template)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(L4QError, match=message):
        chat_segments(turns, AutoTokenizer.from_pretrained(folder), "here")


@pytest.mark.parametrize("name", EXPORTERS)
def test_subnormal_scales_are_exact_everywhere(bases: dict[str, Path], name: str, tmp_path: Path) -> None:
    """The least fp16 number is a scale like others: every foreign decoder gives the checkpoint's bits."""
    folder = copy_base(bases["none" if name in ("gptq", "gguf") else "l4q"], tmp_path / "model")
    set_item("model.layers.0.self_attn.q_proj.scales", (0, 0), 2.0**-24)(folder)
    (folder / CHECKPOINT_MANIFEST).unlink()
    checkpoint = L4QCheckpoint.open(folder)
    assert checkpoint.quantized("model.layers.0.self_attn.q_proj").scales.min() == np.float16(2.0**-24)
    report = export(checkpoint, name, tmp_path / "out").verified
    assert report is not None
    assert report.passed


def test_patterns_of_a_config_end(tmp_path: Path) -> None:
    """Usual patterns work; those with a choice of ways inside a repeat, which never end, are refused unmatched."""
    assert matches_pattern(r".*\.(q|k|v)_proj", "model.layers.0.self_attn.q_proj", "here")
    assert not matches_pattern(r"model\.layers\.(1[0-9]|2[0-3])\..*", "model.layers.3.mlp", "here")
    assert matches_pattern("model[+-9][*-,]?", "model.", "here")  # ranges whose letters have the numbers of operators
    for pattern in (
        r"(a+)+$",
        r"(a|aa)*b",
        r"(a?a?)*b",
        r"(.*)*x",
        "(?!" + ".+" * 9 + "k)",
        r"((",
        "a" * 2000,
        ".*" * 5,
        7,
    ):
        with pytest.raises(UsageError, match="a pattern of the quantization config is not used"):
            matches_pattern(pattern, "a" * 40, "here")
    with pytest.raises(UsageError, match="names of at most"):
        matches_pattern("a", "a" * 300, "here")


def test_errors_are_short_and_plain() -> None:
    """A hostile name neither floods nor steers the terminal."""
    error = UsageError("a name\x1b[2J", where="x" * 10**6, got="\x07bell\u202e")
    assert len(str(error)) < 2500
    assert not set(str(error)) & {"\x1b", "\x07", "\u202e"}


def test_ordinary_configs_pass(glassllm_dir: Path, smollm2_dir: Path) -> None:
    """The limits refuse none of the real models, nor what other architectures write."""
    for folder in (glassllm_dir, smollm2_dir):
        check_config(json.loads((folder / "config.json").read_text()), folder, tensors=40)
    mamba = {"time_step_limit": [0.0, float("inf")], "num_hidden_layers": 48, "layer_norm_epsilon": 1e-5}
    check_config({"text_config": mamba, "intermediate_size": [4096, 8192], "num_key_value_heads": None}, "x", tensors=1)


def test_lora_sizes_are_bounded() -> None:
    """Values that would fill the memory or poison every weight are refused."""
    for changes in ({"rank": 10**9}, {"alpha": float("nan")}, {"alpha": float("inf")}):
        with pytest.raises(UsageError, match="unsupported value"):
            LoraConfig(**changes)
    with pytest.raises(UsageError, match="group_size"):
        QuantConfig(group_size=-1.0)  # type: ignore[arg-type]
