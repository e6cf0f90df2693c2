"""K grids beside overrides: one kind of layer on q4_k in a model on the fp16 grid, and the reverse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from exporters import gguf as gguf_exporter
from exporters.plan import ExportOptions
from exporters.verify import compare_bits
from l4q.checkpoint import L4QCheckpoint
from l4q.config import LoraConfig, QuantConfig
from l4q.errors import UsageError
from l4q.model import l4q_layers, save_l4q, trained_grid, wrap_linears
from l4q.rules import Override
from runtime_tests.gguf_models import export_gguf
from runtime_tests.random_models import build_model
from runtime_tests.test_gguf_export import wrong_modules
from runtime_tests.test_k_grids import MIXED, Q4_K

FP16 = QuantConfig(group_size=32, zero_point="float")


@pytest.mark.parametrize(
    ("quant", "override"),
    [(FP16, "up_proj:scale_grid=q4_k,group_size=32,zero_point=float"), (Q4_K, "*self_attn*:scale_grid=fp16")],
)
def test_k_grid_and_overrides(quant: QuantConfig, override: str, tmp_path: Path) -> None:
    """Every layer is on its own grid in training, checkpoint, transformers and GGUF, bit for bit."""
    model = build_model("llama", MIXED)
    wrap_linears(model, quant, LoraConfig(rank=2), init="asymm", overrides=[Override.parse(override)])
    grids = {name: layer.quant for name, layer in l4q_layers(model)}
    on_k = {name for name, grid in grids.items() if grid == Q4_K}
    assert on_k == {name for name in grids if ("up_proj" in name if quant == FP16 else "mlp" in name)}
    ids = torch.arange(30)[None] * 7 % 320
    with torch.no_grad():
        trained = model(ids).logits
    save_l4q(model, tmp_path / "l4q", quant=trained_grid(model))
    checkpoint = L4QCheckpoint.open(tmp_path / "l4q")
    for name, layer in l4q_layers(model):
        assert (checkpoint.info(name).k_grid == "q4_k") == (name in on_k)
        assert compare_bits(checkpoint.quantized(name).dequantize(), layer.quantized_weight().numpy()) is None
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "l4q", dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, trained)
    export_gguf(checkpoint, tmp_path / "gguf")
    assert wrong_modules(checkpoint, tmp_path / "gguf") == []
    kinds = {tensor.name: tensor.encoding for tensor in gguf_exporter.plan(checkpoint, ExportOptions()).quantized}
    assert kinds == {name: "Q4_K" if name in on_k else "Q4_1" for name in grids}


def test_a_k_grid_that_fits_no_layer_of_its_override() -> None:
    """Rows of 192 columns cannot be asked onto q4_k."""
    override = Override.parse("o_proj:scale_grid=q4_k,group_size=32,zero_point=float")
    with pytest.raises(UsageError, match="fits none of the layers"):
        wrap_linears(build_model("llama", MIXED), FP16, LoraConfig(rank=2), overrides=[override])
