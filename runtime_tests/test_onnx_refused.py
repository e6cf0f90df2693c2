"""What the ONNX export refuses: models its graph does not cover, options that do not fit, damaged folders."""

from __future__ import annotations

from pathlib import Path

import pytest

import exporters.onnx as onnx_exporter
from exporters.plan import ExportOptions
from l4q.checkpoint import L4QCheckpoint, save_checkpoint
from l4q.errors import UnsupportedError, UsageError
from runtime_tests.onnx_models import CASES, export_onnx, make_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> L4QCheckpoint:
    """A tiny llama on the integer grid."""
    return make_checkpoint(CASES["integer-untied-llama3"], tmp_path_factory.mktemp("source") / "checkpoint")


def with_config(checkpoint: L4QCheckpoint, **changes: object) -> L4QCheckpoint:
    """The same tensors under a changed config.json."""
    changed = L4QCheckpoint.open(checkpoint.path)
    changed.config = {**changed.config, **changes}
    return changed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, r"(?s)GPT2LMHeadModel.*LlamaForCausalLM.*Qwen3ForCausalLM"),
        ({"hidden_act": "gelu"}, r"(?s)hidden_act.*gelu.*silu"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, r"(?s)rope_type.*dynamic"),
        ({"num_hidden_layers": 3}, r"(?s)missing: model\.layers\.2\.input_layernorm\.weight"),
        ({"num_hidden_layers": 1}, r"(?s)not part of this architecture: .*model\.layers\.1\.mlp\.up_proj\.weight"),
        ({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}, r"missing: .*self_attn\.k_norm\.weight"),
    ],
)
def test_models_the_graph_does_not_cover_are_refused(
    changes: dict[str, object], message: str, checkpoint: L4QCheckpoint
) -> None:
    """The plan stops and names what is in the way, before anything is written."""
    with pytest.raises(UnsupportedError, match=message):
        onnx_exporter.plan(with_config(checkpoint, **changes), ExportOptions(onnx_graph="built"))


def test_a_config_transformers_refuses_is_an_error(checkpoint: L4QCheckpoint) -> None:
    """An unknown model type is named without the list of all known ones; a value of the wrong type is a usage error."""
    with pytest.raises(UnsupportedError, match=r"(?s)does not know the model type.*nonesuch") as refusal:
        onnx_exporter.plan(with_config(checkpoint, model_type="nonesuch"), ExportOptions())
    assert len(str(refusal.value)) < 1500
    with pytest.raises(UsageError, match=r"(?s)transformers refuses config\.json.*hidden_size"):
        onnx_exporter.plan(with_config(checkpoint, hidden_size="wide"), ExportOptions())


def test_a_block_size_that_does_not_divide_is_refused(checkpoint: L4QCheckpoint) -> None:
    """onnx_block_size 64 on groups of 32 names the first module and what would fit."""
    with pytest.raises(UsageError, match=r"(?s)does not divide.*model\.layers\.0\..*block 64, group_size 32"):
        onnx_exporter.plan(checkpoint, ExportOptions(onnx_block_size=64))


def test_float64_tensors_are_refused(checkpoint: L4QCheckpoint, tmp_path: Path) -> None:
    """A dense tensor that float32 would round is named with its dtype."""
    dense = {name: checkpoint.dense(name) for name in checkpoint.dense_names}
    dense["model.norm.weight"] = dense["model.norm.weight"].double()
    weights = [(module, checkpoint.quantized(module)) for module in checkpoint.modules]
    save_checkpoint(
        tmp_path / "c", config=checkpoint.config, weights=weights, dense=dense.items(), quant=checkpoint.quant
    )
    with pytest.raises(UnsupportedError, match=r"dtype that float32 cannot hold: model\.norm\.weight F64"):
        onnx_exporter.plan(L4QCheckpoint.open(tmp_path / "c"), ExportOptions())


def test_damaged_folders_are_refused(checkpoint: L4QCheckpoint, tmp_path: Path) -> None:
    """A missing model file and missing external data are errors that name the file."""
    with pytest.raises(UsageError, match=r"(?s)model\.onnx cannot be read.*export again"):
        list(onnx_exporter.read_back(tmp_path))
    folder = export_onnx(checkpoint, tmp_path / "onnx")
    (folder / "model.onnx.data").unlink()
    with pytest.raises(UsageError, match=r"external data cannot be read"):
        list(onnx_exporter.read_back(folder))


def test_truncated_data_does_not_read_back(checkpoint: L4QCheckpoint, tmp_path: Path) -> None:
    """External data cut short is an error, not a shorter weight."""
    folder = export_onnx(checkpoint, tmp_path / "onnx")
    data = (folder / "model.onnx.data").read_bytes()
    (folder / "model.onnx.data").write_bytes(data[: len(data) // 2])
    with pytest.raises(UsageError, match=r"external data cannot be read"):
        list(onnx_exporter.read_back(folder))
