"""tools.compare_grids: the rotation changes no answer, and each figure is what the stored blocks decode to."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from exporters.gguf.encode import encoded_nbytes
from l4q.errors import UsageError
from l4q.evaluate import windows_perplexity
from runtime_tests.random_models import build_model
from runtime_tests.test_k_grids import MIXED
from runtime_tests.tiny_llama import SIZES
from tools.compare_grids import QUANTIZERS, Measured, command, decode
from tools.rotate import random_rotation, rotate_residual

WINDOWS = [[(7 * i + j) % 320 for j in range(24)] for i in range(2)]
LINEAR = "model.layers.0.mlp.up_proj"


def mixed_model() -> Any:
    """A llama with rows that fill superblocks and rows that do not, and norms that are not all ones."""
    model = build_model("llama", MIXED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def test_rotation_keeps_the_function() -> None:
    """Every weight of a block changes and no logit; a rotation that misses one layer is noticed."""
    model = mixed_model()
    turned = copy.deepcopy(model)
    rotate_residual(turned)
    ids = torch.tensor(WINDOWS)
    with torch.no_grad():
        expected, got = model(ids).logits, turned(ids).logits
        assert float((got - expected).abs().max()) < 1e-4 * float(expected.abs().max())
        before, after = (m.get_submodule(LINEAR).weight for m in (model, turned))
        assert float((before - after).abs().mean()) > 0.5 * float(before.abs().mean())
        turned.get_submodule(LINEAR).weight.copy_(before)
        assert float((turned(ids).logits - expected).abs().max()) > 1e-2 * float(expected.abs().max())


@pytest.mark.parametrize(
    ("name", "block", "bits", "fallback"),
    [
        ("l4q q4_k float", "Q4_K", 4.5, "Q4_1"),
        ("l4q q3_k none", "Q3_K", 3.4375, "Q4_0"),
        ("llama.cpp Q4_K", "Q4_K", 4.5, "Q4_1"),
        ("l4q fp16_s7 integer", "Q4_1", 5.0, "Q4_1"),
        ("llama.cpp Q4_0", "Q4_0", 4.5, "Q4_0"),
    ],
)
def test_figures_are_those_of_the_blocks(name: str, block: str, bits: float, fallback: str) -> None:
    """Bits, weight error and perplexity recomputed from the decoded blocks; the model is as before afterwards."""
    model = mixed_model()
    original = {key: value.clone() for key, value in model.state_dict().items()}
    row = Measured(model, WINDOWS).measure(name, QUANTIZERS[name])
    assert (row.block, row.fitting.bits) == (block, bits)
    assert all(torch.equal(value, original[key]) for key, value in model.state_dict().items())
    linears = {key: value for key, value in original.items() if "_proj" in key}
    error = size = nbytes = 0.0
    for key, weight in linears.items():
        kind, packed = QUANTIZERS[name](weight)
        assert kind == (fallback if "o_proj" in key else block)
        assert packed.nbytes == encoded_nbytes((weight.shape[0], weight.shape[1]), kind)
        values = decode((kind, packed))
        model.get_submodule(key.removesuffix(".weight")).weight.data.copy_(torch.from_numpy(values))
        error += float(np.square(values - weight.numpy(), dtype=np.float64).sum())
        size += float(weight.double().square().sum())
        nbytes += packed.nbytes
    assert row.whole.bits == pytest.approx(8 * nbytes / sum(weight.numel() for weight in linears.values()))
    assert row.whole.rms == pytest.approx((error / size) ** 0.5)
    assert row.whole.perplexity == windows_perplexity(model, WINDOWS).value
    assert row.fitting.perplexity != row.whole.perplexity


def test_finer_grids_err_less() -> None:
    """The table's order: 3 bits err more than 4, mins less than none, and our Q4_0 is close to llama.cpp's."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 768, generator=generator) @ random_rotation(768, 1).float()

    def error(name: str) -> float:
        return float((torch.from_numpy(decode(QUANTIZERS[name](weight))) - weight).norm() / weight.norm())

    assert error("l4q q3_k none") > 1.5 * error("l4q q4_k none") > 1.5 * error("l4q q4_k float")
    assert error("l4q fp16 none") == pytest.approx(error("llama.cpp Q4_0"), rel=0.1)
    assert error("l4q fp16 float") == pytest.approx(error("llama.cpp Q4_1"), rel=0.05)


def test_command(glassllm_dir: Path, tmp_path: Path) -> None:
    """The command prints one row per grid asked for; a model without rows of 256 columns is refused."""
    vocabulary = json.loads((glassllm_dir / "config.json").read_text())["vocab_size"]
    build_model("llama", {**MIXED, "vocab_size": vocabulary}).save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(glassllm_dir / name, tmp_path / "model")
    text = glassllm_dir.parent / "text" / "heldout.txt"
    common = ["--text", str(text), "--window", "16", "--windows", "1"]
    result = CliRunner().invoke(command, ["--model", str(tmp_path / "model"), *common, "--only", "q4_k", "--json"])
    assert result.exit_code == 0, result.output
    assert [row["grid"] for row in json.loads(result.stdout)] == ["l4q q4_k none", "l4q q4_k float"]
    with pytest.raises(UsageError, match="no layer's rows fill superblocks"):
        Measured(build_model("llama", {**SIZES, "intermediate_size": 160}), WINDOWS)
