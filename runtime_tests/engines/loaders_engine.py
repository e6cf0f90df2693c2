"""Other people's Python loaders on a CPU: GPTQModel for GPTQ and AWQ, and transformers for everything it reads.

Linears are GPTQModel's pure torch kernels, and everything is cast to float32 after loading, so that what is left of the
answers is the weights and not a kernel's arithmetic (GPTQModel's AWQ layer still multiplies in float16). `info` reports
the sha256 of every linear's weight as the loader itself dequantizes it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

PACKAGES = {"gptqmodel": ("gptqmodel",), "transformers": ("transformers", "compressed-tensors", "optimum", "gptqmodel")}


class Engine:
    """A folder as one of the loaders of PACKAGES reads it."""

    def __init__(self, model: str, loader: str = "transformers") -> None:
        if loader not in PACKAGES:
            raise ValueError(f"unknown loader {loader!r}, expected one of {sorted(PACKAGES)}")
        self._loader = loader
        folder = Path(model)
        loaded = _gptqmodel(folder) if loader == "gptqmodel" else _transformers(folder)
        # transformers' own float() refuses quantized models; the integers stay integers here, too
        self._model = torch.nn.Module.float(loaded).eval()
        self.prompt_logprobs([0])  # compressed-tensors' weights are unpacked by the first forward

    @torch.inference_mode()
    def prompt_logprobs(self, token_ids: list[int]) -> np.ndarray:
        """float32 [len(token_ids), vocab]: row t = log p(. | token_ids[: t + 1])."""
        logits = self._model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0]  # [tokens, vocab]
        return torch.log_softmax(logits.double(), dim=-1).float().numpy()

    @torch.inference_mode()
    def generate(self, token_ids: list[int], max_new_tokens: int) -> tuple[list[int], float]:
        """Greedy new ids of the loader's own `generate`, and its seconds."""
        started = time.perf_counter()
        prompt = torch.tensor([token_ids])
        output = self._model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        return output[0, len(token_ids) :].tolist(), time.perf_counter() - started

    def info(self) -> dict[str, str | int | float]:
        """Versions, the class of the first quantized linear, and the digests of all linears as JSON."""
        kinds = sorted({type(module).__name__ for _, module in _linears(self._model) if hasattr(module, "qweight")})
        return {
            "runtime": self._loader,
            "version": importlib.metadata.version(self._loader),
            "packages": json.dumps({name: importlib.metadata.version(name) for name in PACKAGES[self._loader]}),
            "kernels": ", ".join(kinds),
            "digests": json.dumps({name: _digest(_weight(module)) for name, module in _linears(self._model)}),
        }

    def close(self) -> None:
        """Drop the model."""
        del self._model


def _gptqmodel(folder: Path) -> Any:
    package = import_module("gptqmodel")  # in this worker's path only, where no type checker finds it
    backend = package.BACKEND.AWQ_TORCH if _method(folder) == "awq" else package.BACKEND.GPTQ_TORCH
    return package.GPTQModel.load(str(folder), backend=backend, device="cpu", dtype=torch.float16).model


def _transformers(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

    files = sorted(folder.glob("*.gguf"))
    if files:
        return AutoModelForCausalLM.from_pretrained(folder, gguf_file=files[0].name, dtype=torch.float32)
    # GPTQModel's kernels take 16-bit models only
    chosen: dict[str, dict[str, Any]] = {
        "gptq": {"dtype": torch.float16, "quantization_config": GPTQConfig(bits=4, backend="gptq_torch")},
        "awq": {"dtype": torch.float16, "quantization_config": AwqConfig(backend="torch_awq")},
    }
    return AutoModelForCausalLM.from_pretrained(folder, **chosen.get(_method(folder), {"dtype": torch.float32}))


def _method(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return str(config.get("quantization_config", {}).get("quant_method"))


def _linears(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    for name, module in model.named_modules():
        if hasattr(module, "qweight") or isinstance(module, torch.nn.Linear):
            yield name, module


def _weight(module: Any) -> torch.Tensor:
    """float32 [out, in] by the loader's own arithmetic, in float32."""
    if not hasattr(module, "qweight"):
        return module.weight.detach()
    if hasattr(module, "dequantize_weight"):
        return module.dequantize_weight().T
    awq = import_module("gptqmodel.quantization.awq.utils.packing_utils")
    return awq.dequantize_gemm(module.qweight, module.qzeros, module.scales.float(), module.bits, module.group_size).T


def _digest(weight: torch.Tensor) -> str:
    return hashlib.sha256(np.ascontiguousarray(weight.float().numpy()).tobytes()).hexdigest()
