"""The export benchmark: peers do the same work as we, memory is what it says, and the last line has its shape."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from exporters.driver import EXPORTERS, export
from l4q.checkpoint import L4QCheckpoint
from l4q.errors import L4QError, UsageError
from tools import fetch_peers
from tools.bench_export import Settings, available_peers, command, measure
from tools.bench_export_jobs import ExportCost, PeerCost, Worker, copy_once, export_once
from tools.bench_export_models import MODELS, copy_tokenizer, write_random
from tools.bench_export_peers import PEERS, Peer, gptqmodel_gptq, run_peer
from tools.bench_export_report import FormatCosts, export_table, peer_table, summary
from tools.bench_float import first_modules, write_float

MODEL = MODELS["tiny"]
MIB = 1 << 20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Path:
    """The tiny model, random codes."""
    folder = tmp_path_factory.mktemp("bench") / "checkpoint"
    write_random(MODEL, folder, smollm2_dir)
    return folder


def peer_named(format_name: str, name: str) -> Peer:
    """One of the benchmark's peers."""
    return next(peer for peer in PEERS if (peer.format, peer.name) == (format_name, name))


def test_random_checkpoints_have_the_published_shapes(checkpoint: Path) -> None:
    """The tiny one is what its table says; the three others have their models' published numbers of weights."""
    opened = L4QCheckpoint.open(checkpoint)
    assert sum(np.prod(opened.quantized(name).shape) for name in opened.modules) == MODEL.linear_weights
    assert {opened.dense_dtype(name) for name in opened.dense_names} == {"BF16"}
    weights = {name: model.linear_weights for name, model in MODELS.items()}
    assert weights["smollm2"] == 106_168_320
    assert weights["llama-1b"] == 973_078_528
    assert weights["llama-7b"] == 6_476_005_376


def test_the_tokenizer_is_cut_to_the_vocabulary(checkpoint: Path, smollm2_dir: Path, tmp_path: Path) -> None:
    """Every id it gives is a row of the embedding, and text comes back; the whole tokenizer's ids are larger."""
    text = "The quick brown fox: 1234, größer!"
    cut = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    ids = cut.encode(text).ids
    assert max(ids) < MODEL.vocab == cut.get_vocab_size()
    assert cut.decode(ids) == text
    assert max(Tokenizer.from_file(str(smollm2_dir / "tokenizer.json")).encode(text).ids) >= MODEL.vocab
    with pytest.raises(UsageError, match=r"(?s)tokenizer is missing.*make assets"):
        copy_tokenizer(tmp_path, tmp_path / "out", 10)


def test_peers_in_the_environment_write_the_same_integers(checkpoint: Path, tmp_path: Path) -> None:
    """compressed-tensors packs our very words, llama.cpp's and gguf-py's Q4_0 agree; another layer's do not match."""
    opened = L4QCheckpoint.open(checkpoint)
    modules = first_modules(opened, 1)
    assert len(modules) == len(MODEL.linears)
    export(opened, "compressed-tensors", tmp_path / "ours", check="none")
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    for name in ("compressed-tensors", "gguf-py", "llama.cpp", "onnxruntime"):
        peer = next(peer for peer in PEERS if peer.name == name)
        out = tmp_path / name
        out.mkdir()
        seconds, weights = run_peer(peer, opened, modules, out)
        assert seconds > 0
        assert weights == MODEL.linear_weights // MODEL.layers
    theirs = load_file(tmp_path / "compressed-tensors" / "model.safetensors")
    for module in modules:
        words = f"{module}.weight_packed"
        assert np.array_equal(theirs[words], ours[words])
        assert not np.array_equal(theirs[words], ours[words.replace("layers.0", "layers.1")])
    readers = [gguf.GGUFReader(tmp_path / name / "model.gguf") for name in ("gguf-py", "llama.cpp")]
    for left, right in zip(*(reader.tensors for reader in readers), strict=True):
        assert left.name == right.name
        assert np.array_equal(left.data, right.data)
    assert len(list((tmp_path / "onnxruntime").glob("*.onnx"))) == len(modules)


def test_gptqmodel_writes_the_same_integers(checkpoint: Path, judges: Path, tmp_path: Path) -> None:
    """Its GPTQ and AWQ words, zero-points and scales are those of our exports."""
    script = (
        "import sys; from pathlib import Path; from l4q.checkpoint import L4QCheckpoint\n"
        "from tools.bench_export_peers import PEERS, run_peer\n"
        "opened = L4QCheckpoint.open(sys.argv[1])\n"
        "for peer in PEERS:\n"
        "    if peer.name == 'gptqmodel':\n"
        "        out = Path(sys.argv[2]) / peer.format; out.mkdir()\n"
        "        run_peer(peer, opened, list(opened.modules)[:2], out)\n"
    )
    project = Path(__file__).resolve().parent.parent
    environment = {
        "PYTHONPATH": f"{judges / 'gptqmodel'}:{project}",
        "GPTQMODEL_DISABLE_PACK_EXT": "1",
        "HF_HUB_OFFLINE": "1",
        "HOME": str(tmp_path),
        "PATH": "/usr/bin:/bin",
    }
    done = subprocess.run(
        [sys.executable, "-c", script, str(checkpoint), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    opened = L4QCheckpoint.open(checkpoint)
    for name in ("gptq", "awq"):
        export(opened, name, tmp_path / f"ours-{name}", check="none")
        ours = load_file(tmp_path / f"ours-{name}" / "model.safetensors")
        theirs = load_file(tmp_path / name / "model.safetensors")
        assert {key.rpartition(".")[2] for key in theirs} >= {"qweight", "qzeros", "scales"}
        for key, value in theirs.items():
            assert np.array_equal(value, ours[key]), key
        module = opened.modules[0]
        flipped = theirs[f"{module}.qweight"] ^ 1
        assert not np.array_equal(flipped, ours[f"{module}.qweight"])


def test_the_sixteen_bit_model_is_the_dequantized_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    """Every linear, rounded to float16 once; a kept number of layers drops the others."""
    opened = L4QCheckpoint.open(checkpoint)
    write_float(opened, tmp_path / "all")
    write_float(opened, tmp_path / "one", layers=1)
    whole, part = (load_file(tmp_path / name / "model.safetensors") for name in ("all", "one"))
    for module in opened.modules:
        assert np.array_equal(whole[f"{module}.weight"], opened.quantized(module).dequantize().astype(np.float16))
    assert set(part) == {name for name in whole if "layers.1." not in name}
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config["num_hidden_layers"] == 1
    assert "quantization_config" not in config


def _die() -> None:
    import os

    os._exit(3)


def test_a_process_answers_in_turns_and_its_death_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    """An export in it reports bytes that are there and a memory peak; a dead process is an L4QError."""
    with Worker() as worker:
        cost = worker.ask(export_once, checkpoint, "gptq", tmp_path / "out", check=False)
        assert cost.nbytes == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
        assert cost.seconds > 0
        assert cost.peak > 0
        plain, synced = worker.ask(copy_once, tmp_path / "out", tmp_path / "copy")
        assert 0 < plain <= synced
        assert not (tmp_path / "copy").exists()
        with pytest.raises(L4QError, match="process that did _die died"):
            worker.ask(_die)


def test_a_peer_that_fails_is_named_and_left_out(checkpoint: Path, tmp_path: Path) -> None:
    """GPTQModel without its folder cannot be imported; ours is measured, and the other peer too."""
    lost = Peer(format="gguf", name="lost", work=gptqmodel_gptq, warm=False)
    settings = Settings(
        model=MODEL,
        checkpoint=checkpoint,
        warm_up=checkpoint,
        scratch=tmp_path,
        formats=("gguf",),
        peers=(lost, peer_named("gguf", "llama.cpp")),
        build=tmp_path,
        peer_layers=1,
        repetitions=2,
        verify=False,
    )
    costs = measure(settings, lambda text: None)["gguf"]
    assert set(costs.failed) == {"lost"}
    assert "gptqmodel" in costs.failed["lost"]
    assert len(costs.exports) == len(costs.peers["llama.cpp"]) == 2


def test_the_last_line(tmp_path: Path, smollm2_dir: Path) -> None:
    """--quick prints a table per question and ends with one JSON object of the documented shape."""
    options = ["--model", "tiny", "--quick", "--repetitions", "1", "--to", "gguf", "--peer-layers", "1"]
    paths = ["--scratch", str(tmp_path), "--assets", str(smollm2_dir.parent), "--report", str(tmp_path / "all.json")]
    result = CliRunner().invoke(command, [*options, *paths], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    last = json.loads(result.stdout.splitlines()[-1])
    assert set(last) == {"gguf"}
    assert set(last["gguf"]) == {"wall_vs_cp", "peak_mib", "speedup_vs"}
    assert {"gguf-py", "llama.cpp"} <= set(last["gguf"]["speedup_vs"])
    assert all(value > 0 for value in (last["gguf"]["wall_vs_cp"], *last["gguf"]["speedup_vs"].values()))
    assert json.loads((tmp_path / "all.json").read_text())["formats"]["gguf"]["exports"]
    assert [path.name for path in tmp_path.iterdir()] == ["all.json"]
    assert result.stdout.count("|---") == 15


def test_ratios_are_of_medians() -> None:
    """By hand: 2 s against 0.5 s of cp and 0.5 s of fsync, and a peer that needs 1 s for a tenth of the weights."""
    exports = [
        ExportCost(seconds=seconds, nbytes=1, peak=peak * MIB, private=0)
        for seconds, peak in ((2.0, 5), (1.0, 7), (9.0, 6))
    ]
    peer = [PeerCost(seconds=1.0, weights=MODEL.linear_weights // 10)]
    costs = FormatCosts(exports=exports, copies=[(0.5, 1.0)], peers={"other": peer})
    assert summary(costs, MODEL) == {"wall_vs_cp": 2.0, "peak_mib": 7.0, "speedup_vs": {"other": 5.0}}
    assert len(export_table({"gptq": costs})) == len(peer_table({"gptq": costs}, MODEL)) == 3


def test_peers_that_are_not_installed_are_named(tmp_path: Path) -> None:
    """Those of the environment stay; every format has one; --quick leaves out what has to be compiled first."""
    found, missing = available_peers(tuple(EXPORTERS), tmp_path, quick=False)
    assert {peer.name for peer in missing} == {"gptqmodel", "gptqmodel-native", "auto-round", "auto-round-iters0"}
    assert {peer.format for peer in (*found, *missing)} == set(EXPORTERS)
    _, quick = available_peers(("gptq",), tmp_path, quick=True)
    assert {peer.name for peer in quick} == {"gptqmodel", "auto-round"}


def test_peers_are_pinned_and_appear_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No version floats; a failed installation leaves nothing."""
    assert all("==" in requirement for wanted in fetch_peers.PEERS.values() for requirement in wanted)
    monkeypatch.setattr(fetch_peers, "PEERS", {"tiny": (str(tmp_path / "missing"),)})
    with pytest.raises(UsageError, match=r"(?s)pip could not install.*missing"):
        fetch_peers.install("tiny", tmp_path / "peers")
    assert [path.name for path in (tmp_path / "peers").iterdir()] == [".lock"]
