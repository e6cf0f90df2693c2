"""L4Q checkpoints and wrapped models in Hugging Face's libraries: transformers, PEFT and TRL."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig as PeftLora
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from trl import SFTConfig, SFTTrainer

from l4q import LoraConfig, QuantConfig, freeze, freeze_model, prepare, save_l4q, wrap_linears
from l4q.checkpoint import L4QCheckpoint
from l4q.errors import UnsupportedError
from l4q.hf import PackedLinear
from l4q.train_options import OptimOptions
from l4q.trainer import parameter_groups
from runtime_tests.conftest import CheckpointMaker
from runtime_tests.engines.torch_engine import Engine
from runtime_tests.tiny_llama import tiny_llama

PROJECT = Path(__file__).resolve().parent.parent
PROMPT = "The king of the country"
GRID: dict[str, Any] = {"zero_point": "integer", "group_size": 32}
ADAPTER: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "r": 4}


@pytest.fixture
def checkpoint(glass_checkpoint: CheckpointMaker) -> Path:
    """glassllm with integer zero-points; its down_proj layers are dense, for 32 does not divide 341."""
    return glass_checkpoint(**GRID)


@pytest.fixture
def ids(checkpoint: Path) -> torch.Tensor:
    """The prompt's token ids, int64 [1, tokens]."""
    return torch.tensor([AutoTokenizer.from_pretrained(checkpoint)(PROMPT).input_ids])


@pytest.fixture
def model(checkpoint: Path) -> Any:
    """The checkpoint as AutoModelForCausalLM loads it."""
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


def logprobs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """float32 [tokens, vocab] of one sequence."""
    with torch.inference_mode():
        return torch.log_softmax(model(ids).logits[0].float(), dim=-1)


def packed_layers(model: nn.Module) -> Iterator[PackedLinear]:
    """The layers that hold integers."""
    return (module for module in model.modules() if isinstance(module, PackedLinear))


def test_loaded_checkpoint_is_the_oracle(checkpoint: Path, model: Any, ids: torch.Tensor) -> None:
    """from_pretrained gives the oracle's log-probabilities; with one scale doubled, the twin, it does not."""
    expected = torch.from_numpy(Engine(str(checkpoint)).prompt_logprobs(ids[0].tolist()))
    assert len(list(packed_layers(model))) == len(L4QCheckpoint.open(checkpoint).modules)
    assert torch.allclose(logprobs(model, ids), expected, atol=1e-4)
    next(packed_layers(model)).scales.data[0, 0] *= 2
    assert not torch.allclose(logprobs(model, ids), expected, atol=1e-4)


def test_the_integration_can_be_imported_first() -> None:
    """Before transformers, which it then imports: the quantizer is known all the same."""
    code = "import l4q.hf; from transformers.quantizers import auto; print(auto.AUTO_QUANTIZER_MAPPING['l4q'].__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT, check=False)
    assert done.stdout == "L4QHfQuantizer\n", done.stderr


def test_pipeline_and_generate(checkpoint: Path, model: Any, ids: torch.Tensor) -> None:
    """pipeline("text-generation") on the folder and generate on the model continue as the oracle does."""
    expected, _ = Engine(str(checkpoint)).generate(ids[0].tolist(), 8)
    generated = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert generated[0, ids.shape[1] :].tolist() == expected
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    write = pipeline("text-generation", model=str(checkpoint), tokenizer=tokenizer)
    text = write(PROMPT, max_new_tokens=8, do_sample=False, return_full_text=False)[0]["generated_text"]
    assert text == tokenizer.decode(expected, clean_up_tokenization_spaces=False)


def test_saved_again_it_is_the_same(model: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    """save_pretrained of a loaded checkpoint loads to the same bits."""
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(logprobs(again, ids), logprobs(model, ids))


def test_peft_trains_saves_and_loads_an_adapter(
    checkpoint: Path, model: Any, ids: torch.Tensor, tmp_path: Path
) -> None:
    """get_peft_model wraps every linear; a step moves the adapter and no integer; the saved adapter loads again."""
    before = logprobs(model, ids)
    codes = [layer.codes.clone() for layer in packed_layers(model)]
    tuned = get_peft_model(model, PeftLora(**ADAPTER))
    assert torch.equal(logprobs(tuned, ids), before)
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        tuned(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    after = logprobs(tuned, ids)
    assert not torch.allclose(after, before, atol=1e-3)
    assert all(torch.equal(layer.codes, own) for layer, own in zip(packed_layers(tuned), codes, strict=True))
    tuned.save_pretrained(str(tmp_path / "adapter"))
    fresh = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    assert torch.equal(logprobs(PeftModel.from_pretrained(fresh, tmp_path / "adapter"), ids), after)


def test_merging_an_adapter_is_refused_until_dequantized(model: Any, ids: torch.Tensor) -> None:
    """An adapter cannot be merged into integers, and the model is unharmed; merged into the float model it can be."""
    tuned = get_peft_model(model, PeftLora(**ADAPTER, init_lora_weights=False))
    expected = logprobs(tuned, ids)
    for safe in (False, True):
        with pytest.raises(UnsupportedError, match=r"no float weight to read, change or merge an adapter into"):
            tuned.merge_and_unload(safe_merge=safe)
    assert torch.equal(logprobs(tuned, ids), expected)
    unloaded: Any = tuned.unload()
    plain = unloaded.dequantize()
    assert not list(packed_layers(plain))
    torch.manual_seed(0)
    merged = get_peft_model(plain, PeftLora(**ADAPTER, init_lora_weights=False))
    expected = logprobs(merged, ids)
    assert torch.allclose(logprobs(merged.merge_and_unload(), ids), expected, atol=1e-4)


def test_backward_keeps_no_float_weight(model: Any) -> None:
    """The gradient of the input is torch's own, and nothing of the weight's shape is kept for it; F.linear keeps it."""
    layer = next(packed_layers(model))
    kept: list[tuple[int, ...]] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    x = torch.randn(3, layer.in_features, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        (got,) = torch.autograd.grad(layer(x).square().sum(), x)
        assert (layer.out_features, layer.in_features) not in kept
        (expected,) = torch.autograd.grad(F.linear(x, layer.dequantize()).square().sum(), x)
        assert (layer.out_features, layer.in_features) in kept
    assert torch.equal(got, expected)


def sft_config(folder: Path) -> SFTConfig:
    """Four steps on the CPU, nothing reported or saved."""
    return SFTConfig(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        max_length=32,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )


@pytest.fixture
def texts(wiki_text: str) -> Any:
    """Eight short texts as a datasets.Dataset."""
    return datasets.Dataset.from_dict({"text": [wiki_text[start : start + 200] for start in range(0, 1600, 200)]})


def test_trl_trains_a_wrapped_model_and_it_freezes(glassllm_dir: Path, texts: Any, tmp_path: Path) -> None:
    """SFTTrainer moves A, B, s and b with our learning rates; the frozen checkpoint is the trained model."""
    quant = QuantConfig(**GRID)
    model = AutoModelForCausalLM.from_pretrained(glassllm_dir, dtype=torch.float32)
    wrap_linears(model, quant, LoraConfig(rank=4), skip_indivisible=True)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(model, OptimOptions(lr=1e-3)))
    tokenizer = AutoTokenizer.from_pretrained(glassllm_dir)
    trainer = SFTTrainer(
        model,
        args=sft_config(tmp_path / "sft"),
        train_dataset=texts,
        processing_class=tokenizer,
        optimizers=(optimizer, None),
    )
    trainer.train()
    moved = {name.rpartition(".")[2] for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    assert moved == {"lora_A", "lora_B", "scales", "offsets"}
    save_l4q(model, tmp_path / "checkpoint", quant=quant, side_files_from=glassllm_dir)
    saved = L4QCheckpoint.open(tmp_path / "checkpoint")
    weights = dict(freeze_model(model))
    assert all((saved.quantized(name).codes == weight.codes).all() for name, weight in weights.items())
    ids = torch.tensor([tokenizer(PROMPT).input_ids])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype=torch.float32)
    assert torch.allclose(logprobs(loaded, ids), logprobs(model.eval(), ids), atol=1e-5)


def test_trl_trains_an_adapter_on_a_checkpoint(checkpoint: Path, model: Any, texts: Any, tmp_path: Path) -> None:
    """SFTTrainer with a peft_config trains an adapter on the frozen integers."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    trainer = SFTTrainer(
        model,
        args=sft_config(tmp_path / "sft"),
        train_dataset=texts,
        processing_class=tokenizer,
        peft_config=PeftLora(**ADAPTER),
    )
    trainer.train()
    trained = [p for name, p in trainer.model.named_parameters() if "lora_B" in name]
    assert len(trained) > len(list(packed_layers(trainer.model)))
    assert all(p.abs().sum() > 0 for p in trained)


def test_python_of_the_page_runs(
    glassllm_dir: Path, wiki_text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every Python block of docs/huggingface.md works on a small model, with two training steps instead of 100."""
    tiny_llama(tmp_path / "my" / "model", vocab_size=1024)
    for path in glassllm_dir.glob("tokenizer*"):
        shutil.copy(path, tmp_path / "my" / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "my" / "model")
    prepare(model)
    freeze(model, tmp_path / "RUN" / "checkpoint", side_files_from=tmp_path / "my" / "model")
    (tmp_path / "my_texts.txt").write_text(wiki_text[:4000])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    page = (Path(__file__).resolve().parent.parent / "docs" / "huggingface.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(block.replace("max_steps=100", "max_steps=2, report_to='none', use_cpu=True, bf16=False"), {})  # noqa: S102 -- our own page
    assert L4QCheckpoint.open("checkpoint").quant == QuantConfig()
