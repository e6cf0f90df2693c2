"""The child's side of tools.bench_train: build one method's model, run its steps, measure them."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn

from l4q.config import LoraConfig, QuantConfig
from l4q.kernels.select import kernels_for
from l4q.model import l4q_layers, wrap_linears
from tools.bench_cases import Case
from tools.bench_models import SHAPES, QATLinear, QATLoRALinear, random_llama, replace_linears
from tools.measure import peak_bytes, reset_peak, timed

GROUP_SIZE = 64
LORA = LoraConfig(rank=8, alpha=16.0)
QUANT = QuantConfig(bits=4, group_size=GROUP_SIZE, zero_point="integer")


def make_l4q(model: Any) -> Any:
    """Q(W0 + scaling * B A) by this project's layer."""
    wrap_linears(model, QUANT, LORA)
    return model


def make_lora(model: Any) -> Any:
    """Plain LoRA by peft, nothing quantized."""
    names = _linears(model)
    config = peft.LoraConfig(r=LORA.rank, lora_alpha=round(LORA.alpha), target_modules=names, lora_dropout=0.0)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=True)


def make_qat_lora(model: Any) -> Any:
    """Q(W0) with trained s and b, LoRA beside it, everything left to autograd."""
    model.requires_grad_(False)
    replace_linears(model, _linears(model), lambda linear: QATLoRALinear(linear, QUANT, LORA))
    return model


def make_qat(model: Any) -> Any:
    """LSQ: every quantized weight trains, with s and b."""
    model.requires_grad_(False)
    names = _linears(model)
    for name in names:
        model.get_submodule(name).weight.requires_grad_(True)
    replace_linears(model, names, lambda linear: QATLinear(linear, QUANT))
    return model


# the keys are bench_cases.METHODS
BUILDERS: dict[str, Callable[[Any], Any]] = {
    "l4q": make_l4q,
    "lora": make_lora,
    "qat-lora-naive": make_qat_lora,
    "qat-full": make_qat,
}


def measure_into(send: Connection, method: str, case: Case, assets: Path) -> None:
    """Measure one method and send {"step_seconds", "peak_bytes", "saved_bytes"} or {"error"} to the parent."""
    transformers.utils.logging.disable_progress_bar()
    if case.device == "cpu" and "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    try:
        send.send(measure(method, case, assets))
    except torch.OutOfMemoryError:
        send.send({"error": "out of memory"})
    finally:
        send.close()


def measure(method: str, case: Case, assets: Path) -> dict[str, Any]:
    """Build, run one untimed step that counts saved bytes, then the timed ones."""
    kernels_for(case.kernels, case.device)  # their compiler is no more the model's than torch is
    floor = reset_peak(case.device)
    transformers.set_seed(0)
    model = BUILDERS[method](_load(case, assets))
    for _, layer in l4q_layers(model):
        layer.kernels = case.kernels
    if case.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    ids = torch.randint(0, model.config.vocab_size, (case.batch, case.length), device=case.device)
    saved = SavedBytes(model)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    del loss
    gc.collect()
    step()  # optimizer states and library buffers exist from here on
    reset_peak(case.device)
    seconds = [timed(case.device, step)[1] for _ in range(case.steps)]
    return {"step_seconds": seconds, "peak_bytes": peak_bytes(case.device) - floor, "saved_bytes": saved.total}


class SavedBytes:
    """Counts the distinct storages that autograd keeps for the backward pass, parameters and buffers left out."""

    def __init__(self, model: nn.Module) -> None:
        self._own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        self.total = 0

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Called by autograd for every tensor it keeps."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own:
            self._own.add(storage.data_ptr())
            # A view keeps its whole storage alive.
            self.total += storage.nbytes()
        return tensor

    def unpack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Called by autograd when it wants the tensor back."""
        return tensor


def _load(case: Case, assets: Path) -> Any:
    dtype = getattr(torch, case.dtype)
    if case.model in SHAPES:
        return random_llama(SHAPES[case.model], dtype, case.device)
    model = transformers.AutoModelForCausalLM.from_pretrained(assets / case.model, dtype=dtype)
    return model.to(case.device)


def _linears(model: Any) -> list[str]:
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if type(module) is nn.Linear and module is not head]
