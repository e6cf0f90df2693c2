"""What the exporters, the packers and the tools around them say when they refuse, message by message."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from exporters.awq.pack import pack_awq
from exporters.compressed_tensors.pack import unpack_zeros
from exporters.container import NIBBLES, container_bits
from exporters.driver import export, get_exporter
from exporters.gguf.metadata import model_metadata
from exporters.gguf.names import architecture_of, architecture_of_file, gguf_names, permuted_heads_of_file
from exporters.gguf.pack import unpack_q4_0
from exporters.gguf.pack_k import unpack_q4_k
from exporters.gguf.vocab import read_vocabulary
from exporters.gptq.pack import decode_zeros
from exporters.hf_folder import cast_dense, missing_judge, read_section
from exporters.hf_plan import refuse_float
from exporters.onnx.pack import choose_block, float_center, unpack_uint4
from exporters.plan import ExportOptions
from exporters.verify import verify
from exporters.words import pack_rows, unpack_rows
from l4q.checkpoint import L4QCheckpoint
from l4q.errors import L4QError, UnsupportedError, UsageError, VerificationError
from runtime_tests.browser import find_browser
from runtime_tests.conftest import CheckpointMaker
from runtime_tests.engines.host import RemoteEngine
from runtime_tests.evaluation import find_target
from runtime_tests.run_eval import evaluate
from runtime_tests.serving.runtimes import runtime_of
from runtime_tests.start_files import byte_tokenizer

BYTES = np.zeros((7, 2), dtype=np.uint8)
WORDS = np.zeros((1, 2), dtype=np.int32)
LLAMA = "LlamaForCausalLM"
EVAL: dict[str, Any] = {"tasks": " , ", "text": None}

PACKERS: dict[str, tuple[type[L4QError], Callable[[], object]]] = {
    "a packed axis must fill whole words": (UsageError, lambda: pack_rows(BYTES, 4)),
    "a packed axis must fill whole words\n  got: 7 values": (UsageError, lambda: pack_awq(BYTES.T.copy())),
    "a code does not fit its bits": (UsageError, lambda: pack_rows(np.full((8, 1), 16, dtype=np.uint8), 4)),
    "packed words are cut off\n  got: 1 words": (UsageError, lambda: unpack_rows(WORDS, 3)),
    "packed words are cut off\n  got: 8 values": (UsageError, lambda: unpack_zeros(WORDS, 4, 16)),
    "unknown GPTQ checkpoint format": (UsageError, lambda: decode_zeros(BYTES, 4, "v3")),
    "not whole blocks": (UsageError, lambda: unpack_q4_0(BYTES)),
    "not whole superblocks": (UsageError, lambda: unpack_q4_k(BYTES)),
    "packed 4-bit array has the wrong length": (UsageError, lambda: unpack_uint4(BYTES[:, 0], (2, 2))),
    "unusable ONNX block size": (
        UsageError,
        lambda: choose_block(in_features=64, group_size=64, requested=24, where="layer"),
    ),
    "unknown export format": (UsageError, lambda: get_exporter("mlx")),
    "unknown gptq_format": (UsageError, lambda: ExportOptions(gptq_format="v9")),  # type: ignore[arg-type]
    "unknown architecture for GGUF": (UnsupportedError, lambda: architecture_of("FalconForCausalLM")),
    "unknown GGUF architecture": (UnsupportedError, lambda: architecture_of_file("falcon")),
    "GGUF architecture llama has no place for 1 tensor": (
        UnsupportedError,
        lambda: gguf_names(architecture_of(LLAMA), 2, ["model.odd.weight"]),
    ),
    "a dense tensor overflows float16": (
        UnsupportedError,
        lambda: cast_dense("model.norm.weight", torch.tensor([1e6]), "float16"),
    ),
    "unknown engine": (UsageError, lambda: RemoteEngine("mlx", "folder")),
    "nothing to evaluate": (UsageError, lambda: evaluate(EVAL)),
}


@pytest.mark.parametrize("message", PACKERS)
def test_what_cannot_be_packed_or_chosen(message: str) -> None:
    """Sizes that do not fit, and names that do not exist."""
    kind, act = PACKERS[message]
    with pytest.raises(kind) as raised:
        act()
    assert str(raised.value).startswith(message)


def test_what_a_gguf_file_cannot_say(glassllm_dir: Path, tmp_path: Path) -> None:
    """A config without a needed value, one llama.cpp's graph has no code for, a file without its head count."""
    llama = architecture_of(LLAMA)
    config = json.loads((glassllm_dir / "config.json").read_text())
    assert model_metadata(llama, config)
    with pytest.raises(UnsupportedError, match=r"llama\.cpp's graph of this architecture cannot run"):
        model_metadata(llama, {**config, "hidden_act": "relu"})
    del config["rms_norm_eps"]
    with pytest.raises(UnsupportedError, match=r"config\.json lacks a value GGUF needs"):
        model_metadata(llama, config)
    writer = gguf.GGUFWriter(tmp_path / "empty.gguf", "llama")
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    reader = gguf.GGUFReader(tmp_path / "empty.gguf")
    with pytest.raises(UnsupportedError, match="metadata key missing"):
        permuted_heads_of_file(llama, reader, "blk.0.attn_q.weight")


def test_tokenizers_gguf_cannot_take(tmp_path: Path) -> None:
    """A tokenizer.json that is a list, and one with more tokens than the embedding has rows."""
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(UsageError, match=r"tokenizer\.json is not a JSON object"):
        read_vocabulary(tmp_path, 1024)
    byte_tokenizer(tmp_path)
    with pytest.raises(UsageError, match="the tokenizer has more tokens than the embedding has rows"):
        read_vocabulary(tmp_path, 16)


def test_what_the_containers_and_kinds_refuse(glass_checkpoint: CheckpointMaker) -> None:
    """A width a format does not write, codes wider than it, float zero-points, and a bias where there is none."""
    plain = L4QCheckpoint.open(glass_checkpoint("none"))
    with pytest.raises(UnsupportedError, match="codes of this width cannot be written"):
        container_bits(plain, ExportOptions(container_bits=3), NIBBLES)
    with pytest.raises(UnsupportedError, match="the codes do not fit the container"):
        container_bits(plain, ExportOptions(container_bits=3))
    with pytest.raises(UnsupportedError, match="GPTQ packs 4-bit codes and zero-points into whole 32-bit words"):
        export(plain, "gptq", "never-written")
    with pytest.raises(UsageError, match="only a float zero-point has a group bias"):
        float_center(plain.quantized(plain.modules[0]))
    with pytest.raises(UnsupportedError, match="AWQ stores integer zero-points; a float zero-point does not fit"):
        refuse_float(L4QCheckpoint.open(glass_checkpoint("float")), "AWQ")


def test_folders_that_are_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another quantization, an absent package, a config that is no JSON, and no browser."""
    config = tmp_path / "config.json"
    config.write_text('{"quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(UsageError, match="not an AWQ folder"):
        read_section(tmp_path, "awq", "an AWQ")
    text = str(missing_judge("an AWQ", ImportError("no compressed_tensors")))
    assert "verifying an AWQ export needs the compressed-tensors package, whose decoder judges the bits" in text
    config.write_text("{")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UsageError, match=r"config\.json is not JSON"):
        find_target(tmp_path)
    monkeypatch.setenv("L4Q_BROWSER", "no-such-browser")
    with pytest.raises(UsageError, match="no Chromium found"):
        find_browser()


def test_a_file_no_decoder_reads(glass_checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    """A GGUF file cut in half is refused before a decoder sees it."""
    checkpoint = L4QCheckpoint.open(glass_checkpoint("none"))
    export(checkpoint, "gguf", tmp_path / "gguf")
    exporter = get_exporter("gguf")
    assert verify(checkpoint, exporter, tmp_path / "gguf", lambda name: None).passed
    file = next((tmp_path / "gguf").glob("*.gguf"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UsageError, match="the GGUF file is truncated or damaged"):
        verify(checkpoint, exporter, tmp_path / "gguf", lambda name: None)


def test_a_decoder_that_fails(glass_checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    """Whatever a foreign decoder raises is a failed verification."""

    def read_back(folder: Path, only: object = None) -> Iterator[tuple[str, Any]]:
        yield from np.load(folder / "absent.npz").items()

    decoder: Any = SimpleNamespace(read_back=read_back)
    with pytest.raises(
        VerificationError, match=r"a foreign decoder cannot read the exported files\n  got: FileNotFound"
    ):
        verify(L4QCheckpoint.open(glass_checkpoint("none")), decoder, tmp_path)


def test_an_onnx_folder_has_no_server(glass_checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    """ONNX Runtime is a library: serving its folder is refused with where to read on."""
    export(L4QCheckpoint.open(glass_checkpoint("none")), "onnx", tmp_path / "onnx", check="none")
    with pytest.raises(UnsupportedError, match="no OpenAI-compatible server runs a onnx folder here"):
        runtime_of(tmp_path / "onnx")
