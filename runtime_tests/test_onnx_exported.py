"""Architectures outside the hand-built graph: exported from transformers, rewritten, judged by onnx, ORT and torch."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner

import exporters.onnx as onnx_exporter
from exporters.cli import command
from exporters.driver import make_plan
from exporters.onnx.family import FAMILIES, parse_config
from exporters.onnx.hollow import hollow_decoder
from exporters.onnx.rewrite import find_product
from exporters.plan import ExportOptions
from l4q.checkpoint import L4QCheckpoint
from l4q.config import QuantConfig
from l4q.errors import UnsupportedError, UsageError
from runtime_tests.architectures import wrong_modules
from runtime_tests.engines.onnxruntime_engine import Engine
from runtime_tests.onnx_models import (
    Exported,
    corrupted,
    export_onnx,
    open_session,
    run_session,
    torch_logits,
    torch_model,
)
from runtime_tests.tiny_archs import GEMMA3_ROPE, INTEGER, NONE, TinyArch, tiny_arch_checkpoint

LOGIT_TOLERANCE = 1e-4
"""Logits of order 1 to 10; measured 6e-6."""

ARCHS: Mapping[str, TinyArch] = {
    # Tied; its MLP multiplies two-dimensional activations, with Relu behind a bias.
    "opt": TinyArch(family="OPT", model_type="opt", changes={"ffn_dim": 160, "word_embed_proj_dim": 96}, quant=INTEGER),
    # Fused q/k/v, partial rotation, biases, parallel residual.
    "gpt_neox": TinyArch(family="GPT-NeoX", model_type="gpt_neox", quant=NONE),
    # Grouped keys, norms behind each block and on whole q and k; float zero-points need group sums in the graph.
    "olmo2": TinyArch(
        family="OLMo 2", model_type="olmo2", quant=QuantConfig(bits=4, group_size=32, zero_point="float")
    ),
}
LLAMA = TinyArch(family="llama", model_type="llama", changes={"tie_word_embeddings": True}, quant=INTEGER)


@pytest.fixture(scope="module", params=ARCHS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Each architecture, exported once with default options."""
    root = tmp_path_factory.mktemp("exported")
    checkpoint = tiny_arch_checkpoint(ARCHS[request.param], root / "checkpoint")
    return Exported.make(checkpoint, root / "onnx")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> L4QCheckpoint:
    """A tiny tied llama, which both graphs cover."""
    return tiny_arch_checkpoint(LLAMA, tmp_path_factory.mktemp("llama") / "checkpoint")


def token_batch(rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Random ids below 323 and a mask of ones, both int64 [rows, length]."""
    ids = np.random.default_rng(0).integers(3, 323, (rows, length))
    return ids, np.ones_like(ids)


def test_weights_read_back_bit_for_bit(exported: Exported) -> None:
    """onnx's reference evaluator decodes the file's nodes to the trained weights; onnx's checker accepts the file."""
    assert wrong_modules(exported.checkpoint, onnx_exporter, exported.folder) == ()
    onnx.checker.check_model(str(exported.folder / "model.onnx"), full_check=True)


def test_every_linear_is_fused(exported: Exported) -> None:
    """One MatMulNBits per quantized linear and no DequantizeLinear, Relu after a two-dimensional product included."""
    engine = Engine(str(exported.folder), threads=1)
    info = engine.info()
    engine.close()
    assert (info["matmulnbits"], info["dequantize_linear"]) == (len(exported.checkpoint.modules), 0)


def test_logits_equal_transformers_also_in_padded_batches(exported: Exported) -> None:
    """A batch of two gives transformers' logits, and a left-padded row those it gives alone."""
    ids, mask = token_batch(2, 19)
    logits, _ = run_session(exported.session, ids, mask)
    expected = torch_logits(exported.model, ids)
    assert np.abs(expected).max() > 0.3
    assert np.abs(logits - expected).max() < LOGIT_TOLERANCE
    padded = mask.copy()
    padded[1, :5] = 0
    logits, _ = run_session(exported.session, ids, padded)
    alone = torch_logits(exported.model, ids[1:, 5:])
    assert np.isfinite(logits).all()
    assert np.abs(logits[1:, 5:] - alone).max() < LOGIT_TOLERANCE
    ignored, _ = run_session(exported.session, ids, mask)
    assert np.abs(ignored[1:, 5:] - alone).max() > 10 * LOGIT_TOLERANCE


def test_cached_steps_equal_the_full_forward(exported: Exported) -> None:
    """Prompt, chunk and single steps through the cache, starting from none, give one forward's logits."""
    ids, mask = token_batch(2, 14)
    mask[0, :3] = 0
    full, _ = run_session(exported.session, ids, mask)
    cache: list[np.ndarray] | None = None
    parts = []
    for start, stop in [(0, 8), (8, 11), (11, 12), (12, 13), (13, 14)]:
        logits, cache = run_session(exported.session, ids[:, start:stop], mask[:, :stop], cache)
        parts.append(logits)
    assert np.abs(np.concatenate(parts, axis=1) - full)[mask.astype(bool)].max() < LOGIT_TOLERANCE


@pytest.mark.parametrize("fault", ["nibble", "scale", "row swap"])
def test_a_corrupted_weight_is_noticed(exported: Exported, fault: str) -> None:
    """One wrong code, scale or row order in one layer moves the logits, and its weights, by more than the tolerance."""
    module = exported.checkpoint.modules[1]
    wrong = corrupted(exported.checkpoint.quantized(module))[fault]
    decoded = dict(onnx_exporter.read_back(exported.folder))[module]
    assert not np.array_equal(decoded, wrong.dequantize())
    ids, mask = token_batch(2, 19)
    expected = torch_logits(torch_model(exported.checkpoint, {module: wrong}), ids)
    assert np.abs(run_session(exported.session, ids, mask)[0] - expected).max() > LOGIT_TOLERANCE


def test_the_file_is_standard_and_tells_nothing_of_this_machine(exported: Exported) -> None:
    """Default domain only, our names outside, and none of torch's stack traces with their paths."""
    raw = (exported.folder / "model.onnx").read_bytes()
    model = onnx.load_from_string(raw)
    assert {node.domain for node in model.graph.node} == {""}
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 23)]
    assert [value.name for value in model.graph.input][:3] == ["input_ids", "attention_mask", "past_key_values.0.key"]
    assert [value.name for value in model.graph.output][-1] == "present.1.value"
    assert not any(word in raw for word in (b"site-packages", b".py", str(Path.cwd()).encode()))
    assert {entry.key: entry.value for entry in model.metadata_props}["l4q.graph"] == "exported"


def test_both_graphs_of_a_llama_agree(llama: L4QCheckpoint, tmp_path: Path) -> None:
    """The exported graph of an architecture we build has the same bits, the same logits, and equal bytes each time."""
    built = export_onnx(llama, tmp_path / "built", onnx_graph="auto", onnx_scales="float16")
    folders = [export_onnx(llama, tmp_path / n, onnx_graph="exported", onnx_scales="float16") for n in ("a", "b")]
    assert [open_session(f).get_modelmeta().custom_metadata_map["l4q.graph"] for f in (built, folders[0])] == [
        "built",
        "exported",
    ]
    assert wrong_modules(llama, onnx_exporter, folders[0]) == ()
    ids, mask = token_batch(2, 19)
    first, second = (run_session(open_session(folder), ids, mask)[0] for folder in (built, folders[0]))
    assert np.abs(first - second).max() < LOGIT_TOLERANCE
    for name in ("model.onnx", "model.onnx.data", "genai_config.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    sizes = [(folder / "genai_config.json").read_bytes() for folder in (built, folders[0])]
    assert sizes[0] == sizes[1]


def test_the_plan_says_where_the_graph_comes_from(llama: L4QCheckpoint) -> None:
    """An exported graph is a note of the plan; finer blocks reach it as they reach the built one."""
    plans = {graph: onnx_exporter.plan(llama, ExportOptions(onnx_graph=graph)) for graph in ("auto", "exported")}
    assert not any("torch.onnx" in note for note in plans["auto"].notes)
    assert any("transformers' LlamaForCausalLM by torch.onnx" in note for note in plans["exported"].notes)
    assert plans["auto"].tensors == plans["exported"].tensors
    with pytest.raises(UsageError, match="the ONNX block size does not divide the group size"):
        onnx_exporter.plan(llama, ExportOptions(onnx_graph="exported", onnx_block_size=64))


def test_a_hollow_model_holds_no_weights() -> None:
    """A 7B model's parameters, tied ones once, take one float each while its forward is followed."""
    config = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000}
    decoder = hollow_decoder(parse_config({"model_type": "llama", **config, "tie_word_embeddings": True}))
    parameters = dict(decoder.named_parameters())
    assert sum(value.numel() for value in parameters.values()) > 6e9
    stored = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in parameters.values()}
    assert sum(stored.values()) == 4 * len(parameters)
    assert decoder.lm_head.weight is decoder.model.embed_tokens.weight


def changed(checkpoint: L4QCheckpoint, **values: object) -> L4QCheckpoint:
    """The same tensors under a changed config.json."""
    other = L4QCheckpoint.open(checkpoint.path)
    other.config = {**other.config, **values}
    return other


@pytest.mark.parametrize(
    ("changes", "graph", "message"),
    [
        ({"hidden_act": "gelu"}, "built", r"(?s)hidden_act.*gelu.*silu"),
        ({"architectures": ["OPTForCausalLM"]}, "built", r"(?s)does not know this architecture.*OPTForCausalLM"),
        ({"architectures": ["OPTForCausalLM"]}, "exported", r"(?s)another class.*OPTForCausalLM.*LlamaForCausalLM"),
        ({"architectures": ["OPTForCausalLM"]}, "auto", r"(?s)neither ONNX graph.*another class.*does not know"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "auto", r"one rotation"),
        ({"num_key_value_heads": 4}, "exported", r"(?s)cannot be exported.*LlamaForCausalLM.*RuntimeError"),
    ],
)
def test_models_that_cannot_be_exported_are_refused(
    changes: dict[str, object], graph: str, message: str, llama: L4QCheckpoint
) -> None:
    """The plan stops with the reason before anything is written."""
    with pytest.raises(UnsupportedError, match=message):
        onnx_exporter.plan(changed(llama, **changes), ExportOptions(onnx_graph=graph))  # type: ignore[arg-type]


def test_a_refusal_names_the_architectures_that_are_built(llama: L4QCheckpoint) -> None:
    """Where neither graph covers the model, the message lists what the built one knows."""
    with pytest.raises(UnsupportedError) as caught:
        onnx_exporter.plan(changed(llama, architectures=["FalconForCausalLM"]), ExportOptions())
    assert all(name in str(caught.value) for name in FAMILIES)


def test_gemma3s_two_rotations_are_not_length_dependent() -> None:
    """A config with one rotation per kind of layer passes the check that refuses dynamic ones, nested or not."""
    from exporters.onnx.hollow import check_rope

    check_rope(parse_config({"model_type": "gemma3_text", "rope_parameters": GEMMA3_ROPE}))
    nested = {**GEMMA3_ROPE, "full_attention": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
    with pytest.raises(UnsupportedError, match="dynamic"):
        check_rope(parse_config({"model_type": "gemma3_text", "rope_parameters": nested}))


TURN = ("Transpose", ["w"], ["t"], {"perm": [1, 0]})


@pytest.mark.parametrize(
    ("nodes", "found"),
    [
        ([TURN, ("MatMul", ["x", "t"], ["y"], {})], True),
        ([("Gemm", ["x", "w", "b"], ["y"], {"transB": 1})], True),
        ([("Gemm", ["x", "w", "b"], ["y"], {"transB": 1, "alpha": 2.0})], False),
        ([("Gemm", ["x", "w"], ["y"], {})], False),
        ([("MatMul", ["x", "w"], ["y"], {})], False),
        ([TURN, ("MatMul", ["t", "x"], ["y"], {})], False),
        ([TURN, ("MatMul", ["x", "t"], ["y"], {}), ("Neg", ["t"], ["n"], {})], False),
        ([("Gemm", ["x", "w"], ["y"], {"transB": 1}), ("Neg", ["w"], ["n"], {})], False),
        ([("Gemm", ["w", "x"], ["y"], {"transB": 1})], False),
        ([], False),
    ],
)
def test_only_whole_products_are_replaced(nodes: list[tuple[str, list[str], list[str], dict]], found: bool) -> None:
    """A weight that is read in any other way than x times its transpose cannot hold integers."""
    values = {name: ir.Value(name=name, shape=ir.Shape([4, 4])) for name in "xwbtyn"}
    for op_type, inputs, outputs, attributes in nodes:
        ir.node(op_type, [values[i] for i in inputs], attributes, outputs=[values[o] for o in outputs])
    assert (find_product(values["w"]) is not None) == found


def test_a_missing_translator_is_named(llama: L4QCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without onnxscript the message says which extra to install; the built graph does without."""
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    make_plan(llama, "onnx", ExportOptions())
    with pytest.raises(UsageError, match=r"(?s)not installed.*onnxscript.*l4q\[onnx\]"):
        make_plan(llama, "onnx", ExportOptions(onnx_graph="exported"))


def test_the_command_offers_the_choice(llama: L4QCheckpoint, tmp_path: Path) -> None:
    """--onnx-graph takes three words, in the command and in the library."""
    arguments = [str(llama.path), "--to", "onnx", "--out", str(tmp_path / "out"), "--dry-run", "--onnx-graph"]
    done = CliRunner().invoke(command, [*arguments, "exported"])
    assert done.exit_code == 0, done.output
    assert "torch.onnx" in done.output
    refused = CliRunner().invoke(command, [*arguments, "imported"])
    assert refused.exit_code == 2
    assert "auto" in refused.output
    with pytest.raises(UsageError, match="onnx_graph"):
        ExportOptions(onnx_graph="imported")  # type: ignore[arg-type]
