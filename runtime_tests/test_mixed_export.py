"""Several grids in one model, dense modules and a quantized head, in every format that can hold them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from exporters.card import CARD_NAME
from exporters.driver import export
from exporters.manifest import read_manifest
from l4q.checkpoint import L4QCheckpoint
from l4q.checkpoint_files import CHECKPOINT_MANIFEST
from l4q.config import LoraConfig, QuantConfig
from l4q.errors import UnsupportedError
from l4q.model import wrap_linears
from l4q.rules import Override
from l4q.starts import open_start
from runtime_tests.engines.host import RemoteEngine
from runtime_tests.hf_exports import edit_config, section, support, write_export, wrong_modules
from runtime_tests.mixed_models import MIXES, Mix, mixed_checkpoint
from runtime_tests.random_models import dequantized_model, model_logprobs
from runtime_tests.test_vllm_formats import TOKENS, failed

GROUPS = MIXES["groups"]
FORMATS = {
    "groups": ("gptq", "compressed-tensors", "gguf", "onnx"),
    "zero-points": ("gptq", "awq", "compressed-tensors", "gguf", "onnx"),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, L4QCheckpoint]:
    """Both mixes, frozen."""
    base = tmp_path_factory.mktemp("mixes")
    return {name: mixed_checkpoint(mix, base / name) for name, mix in MIXES.items()}


@pytest.mark.parametrize(("name", "format_name"), [(name, f) for name, formats in FORMATS.items() for f in formats])
def test_foreign_decoders_return_every_module(
    checkpoints: dict[str, L4QCheckpoint], name: str, format_name: str, tmp_path: Path
) -> None:
    """Bit for bit, the head among them; the card and the manifest say which modules are on another grid."""
    checkpoint = checkpoints[name]
    result = export(checkpoint, format_name, tmp_path / "out")
    assert result.verified is not None
    assert result.verified.exact == result.verified.total == len(checkpoint.modules)
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert manifest["quantization"]["modules"] == checkpoint.config["quantization_config"]["modules"]
    assert "modules on another grid: 3 bits" in (tmp_path / "out" / CARD_NAME).read_text()


def test_gptq_rules_name_the_module_and_the_fused_layer(checkpoints: dict[str, L4QCheckpoint], tmp_path: Path) -> None:
    """The common group size stands once, other sizes in dynamic rules; optimum, which reads none, is told apart."""
    plan = write_export(checkpoints["groups"], "gptq", tmp_path / "out")
    found = section(tmp_path / "out")
    assert (found["group_size"], found["lm_head"], found["sym"]) == (64, True, True)
    fused = r"model\.layers\.1\.self_attn"
    assert found["dynamic"] == {
        **{rf"-:^model\.layers\.0\.self_attn\.{letter}_proj$": {} for letter in "qkv"},
        "+:^(?:lm_head)$": {"group_size": 32},
        r"+:^(?:model\.layers\.0\.mlp\.down_proj)$": {"group_size": 128},
        r"+:^(?:model\.layers\.1\.mlp\.down_proj)$": {"group_size": 128},
        rf"+:^(?:{fused}\.k_proj|{fused}\.q_proj|{fused}\.v_proj|{fused}\.qkv_proj)$": {"group_size": -1},
    }
    assert support(plan, "vLLM")[0]
    assert support(plan, "transformers") == (False, "optimum reads no dynamic rules, so it takes one group size")


def test_compressed_tensors_gives_fused_members_one_scheme(
    checkpoints: dict[str, L4QCheckpoint], tmp_path: Path
) -> None:
    """A symmetric k_proj beside asymmetric q and v stores its midpoint as zero-point; the head is symmetric."""
    write_export(checkpoints["zero-points"], "compressed-tensors", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    zeros = tensors["model.layers.0.self_attn.k_proj.weight_zero_point"].numpy()
    assert (zeros.view(np.uint32) == 0x88888888).all()
    assert "lm_head.weight_zero_point" not in tensors
    groups = section(tmp_path / "out")["config_groups"].values()
    assert [group["targets"] for group in groups if group["weights"]["symmetric"]] == [["lm_head"]]


def _rename_group(section_: dict[str, Any]) -> None:
    rules = section_["dynamic"]
    rules[next(key for key in rules if "down_proj" in key)] = {"group_size": 64}


def _skip_too_much(section_: dict[str, Any]) -> None:
    section_["dynamic"] = {"-:.*down_proj": {}, **section_["dynamic"]}


def _swap_groups(section_: dict[str, Any]) -> None:
    first, second = list(section_["config_groups"].values())[:2]
    first["targets"], second["targets"] = second["targets"], first["targets"]


LIES: dict[str, tuple[str, str, Callable[[dict[str, Any]], object]]] = {
    "gptq: another group size": ("groups", "gptq", _rename_group),
    "gptq: rule removed": ("groups", "gptq", lambda found: found["dynamic"].pop("+:^(?:lm_head)$")),
    "gptq: a quantized module skipped": ("groups", "gptq", _skip_too_much),
    "ct: targets exchanged": ("groups", "compressed-tensors", _swap_groups),
    "ct: head ignored": ("zero-points", "compressed-tensors", lambda found: found["ignore"].append("lm_head")),
    "awq: head not declared": ("zero-points", "awq", lambda found: found.update(lm_head=False)),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_config_that_lies_about_a_module_is_detected(
    checkpoints: dict[str, L4QCheckpoint], lie: str, tmp_path: Path
) -> None:
    """The twins: intact tensors under a config that gives a module another grid, or none, do not pass."""
    name, format_name, change = LIES[lie]
    write_export(checkpoints[name], format_name, tmp_path / "out")
    assert wrong_modules(checkpoints[name], format_name, tmp_path / "out") == []
    edit_config(change)(tmp_path / "out")
    assert wrong_modules(checkpoints[name], format_name, tmp_path / "out")


def mix(*overrides: str, skip: tuple[str, ...] = (), head: bool = False) -> Mix:
    """A mix for a refusal."""
    return Mix(quant=QuantConfig(), overrides=overrides, skip=skip, quantize_head=head)


REFUSED: dict[str, tuple[Mix, tuple[str, ...], str]] = {
    "q on another group size": (
        mix("*.1.*.q_proj:group_size=32"),
        ("gptq", "compressed-tensors"),
        r"layers\.1\.self_attn\.qkv_proj \((?s:.)*q_proj group_size 32(?s:.)*gguf or onnx",
    ),
    "gate on another group size": (
        mix("*.gate_proj:group_size=-1"),
        ("gptq", "compressed-tensors"),
        r"layers\.0\.mlp\.gate_up_proj \(gate_proj group_size -1, up_proj group_size 64\); model\.layers\.1",
    ),
    "v dense": (
        mix(skip=("*.0.*.v_proj",)),
        ("gptq", "awq", "compressed-tensors"),
        r"layers\.0\.self_attn\.qkv_proj \(v_proj dense(?s:.)*--skip pattern for all members",
    ),
    "groups in AWQ": (
        mix("*.down_proj:group_size=32"),
        ("awq",),
        r"one group size(?s:.)*0\.mlp\.down_proj: group 32 of 256(?s:.)*gptq \(symmetric\), compressed-tensors",
    ),
    "one float zero-point": (
        mix("*.1.*.o_proj:zero_point=float"),
        ("gptq", "awq", "compressed-tensors"),
        r"1 modules, first model\.layers\.1\.self_attn\.o_proj(?s:.)*gguf",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_format_cannot_mix_is_refused_before_writing(case: str, tmp_path: Path) -> None:
    """The message names the modules and the formats that mix; GGUF and ONNX take each of these models."""
    refused, formats, message = REFUSED[case]
    checkpoint = mixed_checkpoint(refused, tmp_path / "c")
    for name in formats:
        with pytest.raises(UnsupportedError, match=message):
            export(checkpoint, name, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    for name in ("gguf", "onnx"):
        verified = export(checkpoint, name, tmp_path / name).verified
        assert verified is not None
        assert verified.passed


@pytest.mark.parametrize(("format_name", "loads"), [("gptq", False), ("awq", False), ("compressed-tensors", True)])
def test_a_head_that_vllm_would_have_to_pad(format_name: str, loads: bool, tmp_path: Path) -> None:
    """328 rows: vLLM's loader fails where rows are the packed or the second axis, and the plan says so."""
    checkpoint = mixed_checkpoint(mix(head=True), tmp_path / "c", vocab_size=328)
    plan = write_export(checkpoint, format_name, tmp_path / "out")
    assert support(plan, "vLLM") == (
        loads,
        "" if loads else "lm_head has 328 rows, and vLLM's loader of this format takes multiples of 64",
    )


def test_a_mixed_export_is_a_start_that_is_reproduced(checkpoints: dict[str, L4QCheckpoint], tmp_path: Path) -> None:
    """With overrides every module of a mixed folder starts bit for bit; without, all but the head with finer groups."""
    checkpoint = checkpoints["groups"]
    write_export(checkpoint, "gptq", tmp_path / "out")
    sizes = [Override.parse(text) for text in GROUPS.overrides]
    rules = tuple(Override(pattern=rule.pattern, group_size=rule.group_size) for rule in sizes if rule.group_size)
    for overrides, count in ((rules, 12), ((), 11)):
        report = wrap_linears(
            dequantized_model(checkpoint),
            GROUPS.quant,
            LoraConfig(rank=4),
            start=open_start(str(tmp_path / "out")),
            overrides=overrides,
            skip=GROUPS.skip,
            quantize_head=True,
        )
        assert len(report.reproduced) == count


def test_transformers_unpacks_every_scheme(checkpoints: dict[str, L4QCheckpoint], tmp_path: Path) -> None:
    """compressed-tensors through transformers: each module by its own config group, to the checkpoint's bits."""
    for name, checkpoint in checkpoints.items():
        write_export(checkpoint, "compressed-tensors", tmp_path / name, dtype="float32")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        with torch.no_grad():
            model(torch.arange(3, 20)[None])
        for module in checkpoint.modules:
            weight = model.get_submodule(module).weight.detach().numpy()
            assert np.array_equal(weight, checkpoint.quantized(module).dequantize()), module


def test_gguf_types_follow_the_modules(checkpoints: dict[str, L4QCheckpoint], tmp_path: Path) -> None:
    """Q4_0 for symmetric and 3-bit modules, Q4_1 for integer zero-points, the dense ones and the embedding in F32."""
    plan = export(checkpoints["zero-points"], "gguf", tmp_path / "out").plan
    encodings = {tensor.target: tensor.encoding for tensor in plan.tensors}
    assert (
        encodings["output.weight"] == encodings["blk.0.attn_k.weight"] == encodings["blk.1.ffn_down.weight"] == "Q4_0"
    )
    assert encodings["blk.0.attn_q.weight"] == "Q4_1"
    assert encodings["blk.1.attn_q.weight"] == encodings["token_embd.weight"] == "F32"


def test_onnx_blocks_follow_the_modules(checkpoints: dict[str, L4QCheckpoint], tmp_path: Path) -> None:
    """Every module's blocks are its own groups, the head's among them."""
    plan = export(checkpoints["groups"], "onnx", tmp_path / "out").plan
    blocks = Counter(tensor.encoding for tensor in plan.quantized)
    assert blocks == {"INT4 block 64": 6, "INT4 block 128": 5, "INT4 block 32": 1}
    assert next(tensor.encoding for tensor in plan.quantized if tensor.name == "lm_head") == "INT4 block 32"


def rows_of(checkpoint: L4QCheckpoint) -> np.ndarray:
    """Torch's log-probabilities of TOKENS on the dequantized weights."""
    return model_logprobs(dequantized_model(checkpoint), TOKENS).astype(np.float32)


@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize(("format_name", "engine"), [("gguf", "llamacpp"), ("onnx", "onnxruntime")])
def test_engines_run_the_mix(
    checkpoints: dict[str, L4QCheckpoint],
    name: str,
    format_name: str,
    engine: str,
    tmp_path: Path,
) -> None:
    """llama.cpp and ONNX Runtime lie within their bounds of the oracle; with one head row damaged they do not."""
    checkpoint = checkpoints[name]
    expected = rows_of(checkpoint)
    worker = RemoteEngine(engine, export(checkpoint, format_name, tmp_path / "out").folder)
    try:
        assert failed(expected, np.array(worker.prompt_logprobs(TOKENS)), format_name) == []
        if engine == "onnxruntime":
            assert worker.info()["matmulnbits"] == len(checkpoint.modules)
        worker.reload(export(damaged(checkpoint, tmp_path / "c"), format_name, tmp_path / "bad").folder)
        assert failed(expected, np.array(worker.prompt_logprobs(TOKENS)), format_name)
    finally:
        worker.close()


def damaged(checkpoint: L4QCheckpoint, folder: Path) -> L4QCheckpoint:
    """A copy whose head's rows are turned by one: token t gets the logits of t - 1."""
    folder.mkdir()
    for path in checkpoint.path.iterdir():
        if path.name != CHECKPOINT_MANIFEST:  # an export would notice by it
            (folder / path.name).write_bytes(path.read_bytes())
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.codes"] = tensors["lm_head.codes"].roll(1, 0)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata=metadata)
    return L4QCheckpoint.open(folder)
