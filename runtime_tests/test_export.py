"""The export driver and its command line: plan first, appear complete or not at all, refuse what cannot be exact."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from exporters.card import PARITY_BEGIN, update_parity
from exporters.cli import FORMATS, command
from exporters.driver import EXPORTERS, export, get_exporter, make_plan
from exporters.manifest import read_manifest
from exporters.plan import Exporter, ExportOptions
from exporters.verify import compare_bits, verify
from l4q.checkpoint import L4QCheckpoint
from l4q.config import QuantConfig
from l4q.errors import InexactError, UnsupportedError, UsageError, VerificationError
from runtime_tests.tiny_llama import tiny_checkpoint

KINDS = ("none", "integer")


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> L4QCheckpoint:
    """A tiny llama that every format takes; integer zeros with free fp16 scales, as hard as it gets for GGUF."""
    quant = QuantConfig(group_size=64, zero_point=request.param)
    return tiny_checkpoint(tmp_path_factory.mktemp(f"tiny-{request.param}"), quant)


@pytest.mark.parametrize("name", FORMATS)
def test_every_module_is_exact(name: str, checkpoint: L4QCheckpoint, tmp_path: Path) -> None:
    """Each format verifies 14 of 14 modules with a foreign decoder and says so in card and manifest."""
    seen: list[str] = []
    result = export(checkpoint, name, tmp_path / name, progress=lambda stage, total, tensor: seen.append(stage))
    assert result.verified is not None
    assert (result.verified.exact, result.verified.total) == (14, 14)
    assert seen.count("write") == len(result.plan.tensors)
    assert seen.count("verify") == 14
    card = (tmp_path / name / "README.md").read_text()
    assert "14 of 14" in card
    manifest = read_manifest(tmp_path / name)
    assert manifest is not None
    assert manifest["format"] == name
    assert manifest["quantized_tensors"] == 14


@pytest.mark.parametrize("name", FORMATS)
def test_exports_are_deterministic(name: str, checkpoint: L4QCheckpoint, tmp_path: Path) -> None:
    """The same checkpoint and options give the same bytes in every file."""
    first, second = (digest(export(checkpoint, name, tmp_path / run / name).folder) for run in ("a", "b"))
    assert first == second


def digest(folder: Path) -> dict[str, str]:
    """sha256 of each file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def safetensors_parts(*parts: str) -> Callable[[Path], dict[str, tuple[Path, int]]]:
    """Where the parts of one module start, from the safetensors header; a symmetric one lacks some."""

    def find(folder: Path) -> dict[str, tuple[Path, int]]:
        path = folder / "model.safetensors"
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        names = {part: f"model.layers.1.mlp.up_proj.{part}" for part in parts}
        return {
            part: (path, 8 + size + header[name]["data_offsets"][0]) for part, name in names.items() if name in header
        }

    return find


def gguf_parts(folder: Path) -> dict[str, tuple[Path, int]]:
    """A block's scale (first byte) and last nibbles, at the offset gguf's own reader reports."""
    from gguf import GGUFReader

    path = next(folder.glob("*.gguf"))
    tensor = next(t for t in GGUFReader(path).tensors if t.name == "blk.1.ffn_up.weight")
    return {"scale": (path, tensor.data_offset), "nibble": (path, tensor.data_offset + tensor.n_bytes - 1)}


def onnx_parts(folder: Path) -> dict[str, tuple[Path, int]]:
    """The external data of one DequantizeLinear node's constants, where the model file says it is."""
    import onnx

    model = onnx.load(folder / "model.onnx", load_external_data=False)
    node = next(n for n in model.graph.node if n.op_type == "DequantizeLinear" and "1.mlp.up_proj" in n.input[0])
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    parts = {}
    for part, name in zip(("codes", "scale", "zero"), node.input, strict=False):
        entries = {entry.key: entry.value for entry in constants[name].external_data}
        if "offset" in entries:
            parts[part] = (folder / entries["location"], int(entries["offset"]))
    return parts


PARTS = {
    "gptq": safetensors_parts("qweight", "qzeros", "scales"),
    "awq": safetensors_parts("qweight", "qzeros", "scales"),
    "compressed-tensors": safetensors_parts("weight_packed", "weight_scale", "weight_zero_point"),
    "gguf": gguf_parts,
    "onnx": onnx_parts,
}


@pytest.mark.parametrize("name", FORMATS)
def test_verification_notices_one_flipped_bit(name: str, checkpoint: L4QCheckpoint, tmp_path: Path) -> None:
    """The twin: one changed bit in codes, scale or zero-point of one module is found and the module named."""
    folder = export(checkpoint, name, tmp_path / name).folder
    exporter = get_exporter(name)
    assert verify(checkpoint, exporter, folder).passed
    parts = PARTS[name](folder)
    assert len(parts) >= 2
    for part, (path, offset) in parts.items():
        pristine = path.read_bytes()
        content = bytearray(pristine)
        content[offset] ^= 1
        path.write_bytes(bytes(content))
        assert "model.layers.1.mlp.up_proj" in complaint(checkpoint, exporter, folder), part
        path.write_bytes(pristine)
    assert verify(checkpoint, exporter, folder).passed


def complaint(checkpoint: L4QCheckpoint, exporter: Exporter, folder: Path) -> str:
    """What verification says of a damaged folder: one differing module, or a decoder's refusal."""
    try:
        report = verify(checkpoint, exporter, folder)
    except VerificationError as error:
        return str(error)
    assert (report.exact, len(report.differing)) == (13, 1)
    return report.differing[0]


@pytest.mark.parametrize("name", FORMATS)
def test_a_lying_writer_leaves_nothing(
    name: str, checkpoint: L4QCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If what was written does not decode to the checkpoint, the export fails with code 4 and no folder appears."""
    exporter = import_module(EXPORTERS[name])
    honest = exporter.write

    def lying(source: L4QCheckpoint, *rest: object) -> None:
        class Shifted:
            """The checkpoint with one module's codes off by one."""

            def __getattr__(self, attribute: str) -> object:
                return getattr(source, attribute)

            def packed(self, module: str) -> object:
                weight = source.packed(module)
                if module.endswith("1.self_attn.q_proj"):
                    weight.packed[2, 1] ^= 1 << 4  # the code of column 3
                return weight

        honest(Shifted(), *rest)

    monkeypatch.setattr(exporter, "write", lying)
    with pytest.raises(VerificationError, match="13 of 14 modules"):
        export(checkpoint, name, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_existing_target_is_kept(checkpoint: L4QCheckpoint, tmp_path: Path) -> None:
    """An existing folder is refused before any work, and replaced only when asked."""
    target = tmp_path / "gptq"
    target.mkdir()
    (target / "mine.txt").write_text("keep me")
    with pytest.raises(UsageError, match="already exists"):
        export(checkpoint, "gptq", target)
    assert (target / "mine.txt").read_text() == "keep me"
    export(checkpoint, "gptq", target, overwrite=True)
    assert not (target / "mine.txt").exists()
    assert (target / "model.safetensors").exists()


def test_inexact_export_asks_first(tmp_path: Path) -> None:
    """Free fp16 scales times zeros do not fit Q4_1: refused before writing, rounded only with leave."""
    quant = QuantConfig(zero_point="integer", scale_grid="fp16")
    source = tiny_checkpoint(tmp_path / "tiny", quant)
    options = ExportOptions(gguf_type="Q4_1")
    with pytest.raises(InexactError, match="cannot hold"):
        export(source, "gguf", tmp_path / "gguf", options)
    assert not (tmp_path / "gguf").exists()
    rounded = export(source, "gguf", tmp_path / "gguf", ExportOptions(gguf_type="Q4_1", allow_rounding=True))
    assert rounded.verified is None
    assert rounded.plan.rounded
    assert not verify(source, get_exporter("gguf"), rounded.folder).passed
    assert not make_plan(source, "gguf", ExportOptions()).rounded  # left to itself the exporter takes Q5_0


def test_float_zero_points_are_refused_by_gptq(tmp_path: Path) -> None:
    """GPTQ holds integers only; the message names what would work."""
    source = tiny_checkpoint(tmp_path / "tiny", QuantConfig(zero_point="float"))
    with pytest.raises(UnsupportedError, match=r"(?s)float.*(GGUF|gguf)"):
        export(source, "gptq", tmp_path / "gptq")
    assert not (tmp_path / "gptq").exists()


@pytest.mark.parametrize("name", FORMATS)
def test_unknown_architecture(name: str, checkpoint: L4QCheckpoint, tmp_path: Path) -> None:
    """GGUF and ONNX need to know the architecture and list those they know; the vLLM formats do not care."""
    folder = tmp_path / "ckpt"
    shutil.copytree(checkpoint.path, folder)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"], config["model_type"] = ["MysteryForCausalLM"], "mystery"
    (folder / "config.json").write_text(json.dumps(config))
    if name in {"gptq", "awq", "compressed-tensors"}:
        assert make_plan(L4QCheckpoint.open(folder), name, ExportOptions()).quantized
        return
    with pytest.raises(UnsupportedError, match="LlamaForCausalLM"):
        export(L4QCheckpoint.open(folder), name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def run_cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The real command in a process of its own."""
    words = [sys.executable, "-c", "from exporters.cli import main; main()", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)


def test_cli_exports_and_reports(checkpoint: L4QCheckpoint, tmp_path: Path) -> None:
    """Exit code 0, one folder per format, the result as JSON on stdout and nothing else there."""
    finished = run_cli("--to", "gptq", "gguf", checkpoint.path, "--out", tmp_path / "out", "--json")
    assert finished.returncode == 0, finished.stderr
    summary = json.loads(finished.stdout)
    assert set(summary) == {"gptq", "gguf"}
    assert summary["gguf"]["verified"] == {"exact": 14, "checked": 14, "total": 14}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"gptq", "gguf"}


def test_cli_dry_run_writes_nothing(checkpoint: L4QCheckpoint, tmp_path: Path) -> None:
    """--dry-run prints per tensor what would be written, and which runtimes would load it."""
    arguments = [str(checkpoint.path), "--to", "gptq", "--to", "onnx", "--out", str(tmp_path / "out"), "--dry-run"]
    plain = CliRunner(env={"COLUMNS": "200"}).invoke(command, arguments)
    assert plain.exit_code == 0
    assert "model.layers.*.self_attn.q_proj" in plain.output
    assert "vLLM" in plain.output
    as_json = CliRunner().invoke(command, [*arguments, "--json"])
    assert len(json.loads(as_json.stdout)["gptq"]["tensors"]) > 14
    assert not (tmp_path / "out").exists()


def _poison(folder: Path) -> None:
    from safetensors import safe_open

    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as handle:
        metadata = handle.metadata()
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.scales"][0, 0] = float("nan")
    save_file(tensors, path, metadata=metadata)


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])


BAD_INPUT: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (shutil.rmtree, "config.json not found"),
    "truncated": (_truncate, "not valid safetensors"),
    "NaN scale": (_poison, "up_proj.scales"),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("damage", BAD_INPUT)
def test_cli_bad_input(damage: str, name: str, checkpoint: L4QCheckpoint, tmp_path: Path) -> None:
    """Bad input is exit code 2 with one message and no traceback, and nothing is left in the output folder."""
    harm, message = BAD_INPUT[damage]
    folder = tmp_path / "ckpt"
    shutil.copytree(checkpoint.path, folder)
    harm(folder)
    with pytest.raises(UsageError, match=message):
        export(L4QCheckpoint.open(folder), name, tmp_path / "out" / name)
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_cli_exit_codes(checkpoint: L4QCheckpoint, tmp_path: Path) -> None:
    """2 for bad input and 3 for what a format cannot hold, each with one clear message on stderr."""
    missing = run_cli(tmp_path / "nothing", "--to", "gptq", "--out", tmp_path / "out")
    assert (missing.returncode, missing.stdout) == (2, "")
    assert "config.json not found" in missing.stderr
    assert "Traceback" not in missing.stderr
    source = tiny_checkpoint(tmp_path / "tiny", QuantConfig(zero_point="float"))
    refused = run_cli(source.path, "--to", "gptq", "--out", tmp_path / "out")
    assert refused.returncode == 3
    assert "Traceback" not in refused.stderr
    assert run_cli(checkpoint.path, "--to", "floppy", "--out", tmp_path / "out").returncode == 2
    assert not (tmp_path / "out").exists()


def test_help_is_light() -> None:
    """`l4q-export --help` loads neither torch nor any format's library."""
    script = (
        "import sys; sys.argv = ['l4q-export', '--help']\n"
        "from l4q.cli_common import status; from exporters.cli import command\n"
        "assert status(command) == 0\n"
        "heavy = {'torch', 'transformers', 'onnx_ir', 'gguf', 'compressed_tensors', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, capture_output=True)


def test_cli_formats_match_the_registry() -> None:
    """The literal list that keeps --help light is the registry's."""
    assert set(FORMATS) == set(EXPORTERS)


def test_compare_bits_sees_what_equality_does_not() -> None:
    """-0.0 and another dtype count as different; equal NaN bits as equal."""
    zeros = np.zeros((2, 2), np.float32)
    assert compare_bits(zeros, zeros) is None
    assert "1 of 4" in str(compare_bits(np.array([[0, -0.0], [0, 0]], np.float32), zeros))
    assert "float64" in str(compare_bits(zeros.astype(np.float64), zeros))


def test_card_section_is_replaced(checkpoint: L4QCheckpoint, tmp_path: Path) -> None:
    """Measured parity replaces the placeholder once, again when measured again, and nothing else changes."""
    folder = export(checkpoint, "gptq", tmp_path / "gptq").folder
    before = (folder / "README.md").read_text()
    assert update_parity(folder, "run one")
    assert update_parity(folder, "run two")
    after = (folder / "README.md").read_text()
    assert "run two" in after
    assert "run one" not in after
    assert after.split(PARITY_BEGIN)[0] == before.split(PARITY_BEGIN)[0]
    (folder / "README.md").write_text("a card of someone else")
    assert not update_parity(folder, "third")
