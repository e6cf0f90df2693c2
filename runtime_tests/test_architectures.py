"""Model families in GGUF and ONNX: foreign decoders, the real runtimes, damage that must show, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import pytest
import torch
from transformers import AutoConfig

from exporters import gguf as gguf_exporter
from exporters import onnx as onnx_exporter
from exporters.gguf.families import ARCHITECTURES
from exporters.gguf.metadata import model_metadata
from exporters.onnx.family import FAMILIES, read_spec
from exporters.plan import ExportOptions, GgufEmbeddings
from l4q.checkpoint import L4QCheckpoint
from l4q.errors import UnsupportedError, UsageError
from l4q.shards import ALL
from runtime_tests import architectures as table_module
from runtime_tests.architectures import DOCUMENT, FORMATS, IDS, KL_LIMIT, MEAN_LIMIT, Cell, write_export
from runtime_tests.engines.llamacpp_engine import Engine as LlamaEngine
from runtime_tests.engines.onnxruntime_engine import Engine as OnnxEngine
from runtime_tests.onnx_models import open_session, run_session, torch_logits
from runtime_tests.random_models import build_model, dequantized_model, model_logprobs, random_weight, save_random
from runtime_tests.tiny_archs import LONG_ROPE, NONE, SIZES, TINY_ARCHS, tiny_arch_checkpoint

Damage = Callable[[L4QCheckpoint], None]
REFUSED_IN_GGUF = ("qwen2-wide", "gemma2-scaled")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, L4QCheckpoint]:
    """One checkpoint per tiny architecture; do not write into them."""
    root = tmp_path_factory.mktemp("archs")
    return {name: tiny_arch_checkpoint(arch, root / name) for name, arch in TINY_ARCHS.items()}


@pytest.fixture(scope="module")
def table(
    checkpoints: dict[str, L4QCheckpoint], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Cell]]:
    """Every cell of docs/architectures.md, run."""
    root = tmp_path_factory.mktemp("table")
    return {
        name: {form: cell(checkpoint, root / name / form) for form, cell in FORMATS.items()}
        for name, checkpoint in checkpoints.items()
    }


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", TINY_ARCHS)
def test_runtime_computes_the_trained_model(name: str, form: str, table: dict[str, dict[str, Cell]]) -> None:
    """Bits read back by foreign code, transformers' log-probabilities and greedy tokens in the real runtime."""
    cell = table[name][form]
    assert cell.status == ("refused" if form == "gguf" and name in REFUSED_IN_GGUF else "ok"), cell


def test_document_is_current(table: dict[str, dict[str, Cell]]) -> None:
    """docs/architectures.md says what a run gives; `python -m runtime_tests.architectures` writes it anew."""
    assert DOCUMENT.read_text(encoding="utf-8") == table_module.render(table)
    broken = {**table, "llama": {**table["llama"], "gguf": Cell(mean=1.0)}}
    assert DOCUMENT.read_text(encoding="utf-8") != table_module.render(broken)


def test_every_table_row_has_a_model(checkpoints: dict[str, L4QCheckpoint]) -> None:
    """Both exporters' tables hold exactly the architectures that are run here."""
    covered = {checkpoint.architecture for checkpoint in checkpoints.values()}
    assert covered == set(ARCHITECTURES) == set(FAMILIES)


@pytest.mark.parametrize(
    ("cell", "status"),
    [
        (Cell(), "ok"),
        (Cell(wrong_modules=("m",)), "wrong"),
        (Cell(mean=MEAN_LIMIT), "wrong"),
        (Cell(mean=float("nan")), "wrong"),
        (Cell(kl=KL_LIMIT), "wrong"),
        (Cell(greedy_equal=False), "wrong"),
        (Cell(refused="no"), "refused"),
    ],
)
def test_one_failed_judge_makes_a_cell_wrong(cell: Cell, status: str) -> None:
    """No judge can be outvoted, and not-a-number is not small."""
    assert cell.status == status


def setting(**values: Any) -> Damage:
    """Other values in config.json."""

    def apply(checkpoint: L4QCheckpoint) -> None:
        checkpoint.config = {**checkpoint.config, **values}

    return apply


def dense(ending: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    """Other values in the dense tensors of one ending."""

    def apply(checkpoint: L4QCheckpoint) -> None:
        read = checkpoint.dense

        def altered(name: str, rows: slice = ALL) -> torch.Tensor:
            return change(read(name, rows)) if name.endswith(ending) else read(name, rows)

        checkpoint.dense = altered  # type: ignore[method-assign]

    return apply


def swap_halves(values: torch.Tensor) -> torch.Tensor:
    """Gate and up exchanged."""
    first, second = values.chunk(2, dim=-2)
    return torch.cat((second, first), dim=-2)


SAME_ROPE = {kind: {"rope_type": "default", "rope_theta": 5e5} for kind in ("sliding_attention", "full_attention")}
DAMAGES: dict[str, tuple[str, Damage]] = {
    "attention cap": ("gemma2", setting(attn_logit_softcapping=50.0)),
    "logit cap": ("gemma2", setting(final_logit_softcapping=30.0)),
    "window": ("gemma2", setting(sliding_window=12)),
    "norm without 1": ("gemma2", dense("post_feedforward_layernorm.weight", lambda values: values - 1)),
    "one rope for all": ("gemma3", setting(rope_parameters=SAME_ROPE)),
    "swapped experts' halves": ("mixtral", dense("mlp.experts.gate_up_proj", swap_halves)),
    "experts per token": ("qwen3-moe", setting(num_experts_per_tok=2)),
    "no bias": ("qwen2", dense("k_proj.bias", torch.zeros_like)),
    "q norm": ("qwen3", dense("q_norm.weight", lambda values: values.flip(0))),
    "longrope's long factors": ("phi3-long", setting(rope_parameters={**LONG_ROPE, "long_factor": [3.0] * 8})),
    "rotary share": (
        "phi3-partial",
        setting(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}),
    ),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_forgotten_detail_is_noticed(
    damage: str, form: str, checkpoints: dict[str, L4QCheckpoint], tmp_path: Path
) -> None:
    """Each family's own trait, exported wrongly, makes its cell wrong by a wide margin."""
    name, apply = DAMAGES[damage]
    damaged = L4QCheckpoint.open(checkpoints[name].path)
    apply(damaged)
    cell = FORMATS[form](checkpoints[name], tmp_path / "out", damaged)
    assert cell.status == "wrong"
    assert cell.mean > 10 * MEAN_LIMIT


@pytest.mark.parametrize("name", ["gemma2", "phi3-partial", "mixtral"])
def test_left_padded_batches_are_right(name: str, checkpoints: dict[str, L4QCheckpoint], tmp_path: Path) -> None:
    """A padded row of a batch gives the logits it gives alone, and not so when the mask is ignored."""
    write_export(checkpoints[name], onnx_exporter, tmp_path / "onnx")
    session = open_session(tmp_path / "onnx")
    ids = np.array([IDS[:30], IDS[20:50]])
    mask = np.ones_like(ids)
    mask[1, :6] = 0
    alone = torch_logits(dequantized_model(checkpoints[name]), ids[1:, 6:])
    assert np.abs(run_session(session, ids, mask)[0][1:, 6:] - alone).max() < 1e-4
    assert np.abs(run_session(session, ids, np.ones_like(ids))[0][1:, 6:] - alone).max() > 1e-2


def test_longrope_takes_the_factors_of_the_length(tmp_path: Path) -> None:
    """Up to the original context both runtimes rotate by the short factors; llama.cpp decides by its context size."""
    limits = {"original_max_position_embeddings": 256, "max_position_embeddings": 512}
    checkpoint = tiny_arch_checkpoint(TINY_ARCHS["phi3-long"], tmp_path / "l4q", **limits)
    expected = model_logprobs(dequantized_model(checkpoint), IDS)
    notes = write_export(checkpoint, gguf_exporter, tmp_path / "gguf", gguf_type="F32")
    assert any("-c 256" in note for note in notes)
    differences = []
    for context in (256, 512):
        llama = LlamaEngine(str(tmp_path / "gguf"), kv="f32", n_threads=1, n_ctx=context)
        differences.append(np.abs(llama.prompt_logprobs(IDS) - expected).mean())
        llama.close()
    assert differences[0] < MEAN_LIMIT
    assert differences[1] > 10 * MEAN_LIMIT
    notes = write_export(checkpoint, onnx_exporter, tmp_path / "onnx")
    assert any("passes 256 tokens" in note for note in notes)
    engine = OnnxEngine(str(tmp_path / "onnx"), threads=1)
    assert np.abs(engine.prompt_logprobs(IDS) - expected).mean() < MEAN_LIMIT
    engine.close()


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    """A tiny architecture's config.json with changes."""
    arch = TINY_ARCHS[name]
    stock = AutoConfig.for_model(arch.model_type, **{**SIZES, **arch.changes}).to_dict()
    return {**stock, **changes}


@pytest.mark.parametrize(
    ("architecture", "config", "message"),
    [
        ("Qwen2ForCausalLM", config_of("qwen2", head_dim=32), r"(?s)head_dim.*got: 32.*one of \(16,\)"),
        ("Gemma2ForCausalLM", config_of("gemma2", query_pre_attn_scalar=144), r"query_pre_attn_scalar 144"),
        ("Gemma2ForCausalLM", config_of("gemma2", layer_types=["full_attention"] * 3), r"layer_types"),
        ("Gemma2ForCausalLM", config_of("gemma2", attn_logit_softcapping=None), r"attn_logit_softcapping"),
        ("Gemma2ForCausalLM", config_of("gemma2", hidden_activation="gelu"), r"(?s)hidden_activation.*tanh"),
        ("Gemma3ForCausalLM", config_of("gemma3", final_logit_softcapping=30.0), r"final_logit_softcapping"),
        ("Gemma3ForCausalLM", config_of("gemma3", use_bidirectional_attention=True), r"use_bidirectional_attention"),
        ("LlamaForCausalLM", config_of("llama", rope_parameters={"rope_type": "longrope"}), r"rope_type longrope"),
        ("Phi3ForCausalLM", config_of("phi3", rope_parameters={"rope_type": "yarn"}), r"rope_type yarn"),
        ("Qwen3MoeForCausalLM", config_of("qwen3-moe", norm_topk_prob=False), r"norm_topk_prob"),
        ("Qwen3MoeForCausalLM", config_of("qwen3-moe", mlp_only_layers=[0]), r"mlp_only_layers"),
        ("Qwen3MoeForCausalLM", config_of("qwen3-moe", decoder_sparse_step=2), r"decoder_sparse_step"),
        ("MixtralForCausalLM", config_of("mixtral", num_local_experts=None), r"(?s)lacks a value.*num_experts"),
    ],
)
def test_gguf_refuses_what_llama_cpp_would_do_otherwise(
    architecture: str, config: dict[str, Any], message: str
) -> None:
    """A config that contradicts what llama.cpp's graph takes for granted is an error that names the field."""
    with pytest.raises(UnsupportedError, match=message):
        model_metadata(ARCHITECTURES[architecture], config)


@pytest.mark.parametrize(
    ("architecture", "config", "message"),
    [
        ("Gemma3ForCausalLM", config_of("gemma3", use_bidirectional_attention=True), r"use_bidirectional_attention"),
        ("Gemma2ForCausalLM", config_of("gemma2", hidden_activation="gelu"), r"(?s)hidden_act.*gelu_pytorch_tanh"),
        ("Qwen3MoeForCausalLM", config_of("qwen3-moe", mlp_only_layers=[0]), r"mlp_only_layers"),
        ("Qwen3MoeForCausalLM", config_of("qwen3-moe", decoder_sparse_step=2), r"decoder_sparse_step"),
    ],
)
def test_onnx_refuses_what_its_graph_lacks(architecture: str, config: dict[str, Any], message: str) -> None:
    """The graph's limits are errors that name the field and what is known."""
    with pytest.raises(UnsupportedError, match=message):
        read_spec(architecture, config)


@pytest.mark.parametrize("exporter", [gguf_exporter, onnx_exporter])
def test_unknown_architectures_list_the_known(exporter: Any, checkpoints: dict[str, L4QCheckpoint]) -> None:
    """An architecture outside the table is refused with every architecture inside."""
    changed = L4QCheckpoint.open(checkpoints["llama"].path)
    changed.config = {**changed.config, "architectures": ["FalconForCausalLM"]}
    with pytest.raises(UnsupportedError, match="FalconForCausalLM") as caught:
        exporter.plan(changed, ExportOptions())
    assert all(name in str(caught.value) for name in ARCHITECTURES)


def test_untied_gemma2_has_no_place_in_gguf(tmp_path: Path) -> None:
    """llama.cpp's gemma2 has no output matrix of its own, so an untied one is refused by the tensor's name."""
    checkpoint = tiny_arch_checkpoint(TINY_ARCHS["gemma2"], tmp_path / "l4q", tie_word_embeddings=False)
    with pytest.raises(UnsupportedError, match=r"(?s)no place for 1 tensor.*lm_head\.weight"):
        gguf_exporter.plan(checkpoint, ExportOptions())


@pytest.mark.parametrize(("choice", "encoding", "limit"), [("f16", "F16", 1e-5), ("q8_0", "Q8_0", 1e-2)])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_gguf_embeddings_on_request(
    name: str,
    choice: GgufEmbeddings,
    encoding: str,
    limit: float,
    checkpoints: dict[str, L4QCheckpoint],
    tmp_path: Path,
) -> None:
    """token_embd and output take the asked type, the rest stays, and llama.cpp's answer moves by that rounding only."""
    checkpoint = checkpoints[name]
    write_export(checkpoint, gguf_exporter, tmp_path / "out", gguf_type="F32", gguf_embeddings=choice)
    (file,) = (tmp_path / "out").iterdir()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    changed = [target for target, tensor in tensors.items() if tensor.tensor_type.name == encoding]
    assert sorted(changed) == (["output.weight", "token_embd.weight"] if name == "llama" else ["token_embd.weight"])
    plan = gguf_exporter.plan(checkpoint, ExportOptions(gguf_type="F32", gguf_embeddings=choice))
    assert {tensor.target: tensor.nbytes for tensor in plan.tensors} == {
        target: int(tensor.n_bytes) for target, tensor in tensors.items()
    }
    stored = tensors["token_embd.weight"]
    values = gguf.quants.dequantize(stored.data, stored.tensor_type)
    original = checkpoint.dense("model.embed_tokens.weight").numpy()
    assert 0 < np.abs(values - original).max() < np.abs(original).max() / 100
    engine = LlamaEngine(str(tmp_path / "out"), kv="f32", n_threads=1)
    got = engine.prompt_logprobs(IDS)
    engine.close()
    expected = model_logprobs(dequantized_model(checkpoint), IDS)
    assert table_module.divergence(expected, got) < limit


def test_values_beyond_float16_are_refused(checkpoints: dict[str, L4QCheckpoint], tmp_path: Path) -> None:
    """An embedding that float16 would turn into infinity is an error with its magnitude."""
    changed = L4QCheckpoint.open(checkpoints["llama"].path)
    dense("embed_tokens.weight", lambda values: values * 1e9)(changed)
    with pytest.raises(UnsupportedError, match=r"(?s)float16 cannot hold.*embed_tokens.*at most 65504"):
        write_export(changed, gguf_exporter, tmp_path / "out", gguf_embeddings="f16")


def test_q8_0_embeddings_need_whole_blocks(tmp_path: Path) -> None:
    """Rows of 80 columns cannot be Q8_0, and an unknown choice is an error."""
    sizes = {"hidden_size": 80, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 32}
    model = build_model("llama", {**SIZES, **sizes})
    model.save_pretrained(tmp_path / "plain")
    checkpoint = save_random(
        model,
        tmp_path / "l4q",
        NONE,
        lambda shape, seed: random_weight(shape, NONE, seed),
        dense_linears=("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"),
    )
    with pytest.raises(UnsupportedError, match=r"(?s)blocks of 32.*80 columns.*f16"):
        gguf_exporter.plan(checkpoint, ExportOptions(gguf_embeddings="q8_0"))
    with pytest.raises(UsageError, match="gguf_embeddings"):
        ExportOptions(gguf_embeddings="q4_0")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["llama3", "gemma3"])
def test_half_precision_scales_are_as_exact(name: str, checkpoints: dict[str, L4QCheckpoint], tmp_path: Path) -> None:
    """float16 scales decode to the same bits, fuse as before and save bytes; a changed scale is noticed."""
    checkpoint = checkpoints[name]
    folder = tmp_path / "onnx"
    write_export(checkpoint, onnx_exporter, folder, onnx_scales="float16")
    assert table_module.wrong_modules(checkpoint, onnx_exporter, folder) == ()
    engine = OnnxEngine(str(folder), threads=1)
    assert engine.info()["matmulnbits"] == len(checkpoint.modules)
    expected = model_logprobs(dequantized_model(checkpoint), IDS)
    assert np.abs(engine.prompt_logprobs(IDS) - expected).mean() < MEAN_LIMIT
    engine.close()
    model = onnx.load(folder / "model.onnx")
    module = checkpoint.modules[3]
    (scales,) = (tensor for tensor in model.graph.initializer if tensor.name == f"{module}.scales")
    plans = [onnx_exporter.plan(checkpoint, ExportOptions(onnx_scales=kind)) for kind in ("float32", "float16")]
    saved = [plan.quantized[3].nbytes for plan in plans]
    assert scales.data_type == onnx.TensorProto.FLOAT16
    assert saved[0] - saved[1] == len(scales.raw_data)
    changed = np.frombuffer(scales.raw_data, np.uint8).copy()
    changed[0] ^= 1
    scales.raw_data = changed.tobytes()
    onnx.save(model, folder / "model.onnx")
    assert table_module.wrong_modules(checkpoint, onnx_exporter, folder) == (module,)
