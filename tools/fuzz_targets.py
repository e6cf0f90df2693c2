"""What the fuzzer feeds: for every parser valid inputs to damage and a function that reads the damaged ones.

A target ends normally or in an `L4QError`; everything else is a defect.
"""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - only to spare the disk; mkdtemp makes a private folder in it


@dataclass(frozen=True, kw_only=True)
class Target:
    """One parser."""

    seeds: Callable[[], tuple[bytes, ...]]
    """Valid inputs."""
    read: Callable[[bytes], object]
    """Reads one input; its exceptions are judged by the caller."""


@lru_cache(maxsize=1)
def _bases() -> dict[str, Path]:
    from runtime_tests.attacks.bases import build_bases

    return build_bases(Path(tempfile.mkdtemp(prefix="l4q-fuzz-")))


@lru_cache(maxsize=1)
def scratch() -> Path:
    """A folder for the files a target reads, in memory where there is such a place."""
    return Path(tempfile.mkdtemp(prefix="l4q-fuzz-", dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None))


def _seeds(base: str, *names: str) -> Callable[[], tuple[bytes, ...]]:
    return lambda: tuple((_bases()[base] / name).read_bytes() for name in names)


@contextmanager
def _folder(base: str, name: str, content: bytes) -> Iterator[Path]:
    """A copy of a base in which one file is replaced; the copy stays for the next input."""
    import shutil

    folder = scratch() / f"{base}-{name}"
    if not folder.exists():
        shutil.copytree(_bases()[base], folder)
    (folder / name).write_bytes(content)
    yield folder


@lru_cache(maxsize=1)
def _small_checkpoint() -> bytes:
    """A safetensors file of three small quantized linears and two dense tensors, in L4Q's layout."""
    import torch
    from safetensors.torch import save

    tensors: dict[str, torch.Tensor] = {"model.norm.weight": torch.ones(8), "b": torch.ones(2, 3, dtype=torch.bfloat16)}
    metadata = {"format": "pt"}
    for number, (kind, part) in enumerate((("none", None), ("integer", "zeros"), ("float", "mins"))):
        name = f"layers.{number}.q_proj"
        tensors[f"{name}.codes"] = torch.arange(64, dtype=torch.uint8).reshape(4, 16)
        tensors[f"{name}.scales"] = torch.full((4, 1), 0.01, dtype=torch.float16)
        if part:
            dtype = torch.uint8 if part == "zeros" else torch.float16
            tensors[f"{name}.{part}"] = torch.full((4, 1), 8, dtype=dtype)
        record = {"bits": 4, "group_size": 32, "zero_point": kind, "shape": [4, 32]}
        metadata[name] = json.dumps(record)
    return bytes(save(tensors, metadata))


def _read_safetensors(content: bytes) -> None:
    from l4q.shards import ShardReader

    folder = scratch() / "safetensors"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(content)
    reader = ShardReader.open(folder)
    for name in reader.names:
        reader.tensor(name)
        reader.metadata(name)


def _read_checkpoint(content: bytes) -> None:
    from l4q.checkpoint import L4QCheckpoint

    folder = scratch() / "checkpoint"
    if not folder.exists():
        folder.mkdir()
        grids = {f"layers.{n}.q_proj": {"zero_point": kind} for n, kind in enumerate(("none", "integer", "float"))}
        common = {"bits": 4, "group_size": 32, "zero_point": "none"}
        section = {"quant_method": "l4q", "format_version": 1, **common}
        section["modules"] = {name: {**common, **grid} for name, grid in grids.items() if grid["zero_point"] != "none"}
        (folder / "config.json").write_text(json.dumps({"quantization_config": section, "num_hidden_layers": 3}))
    (folder / "model.safetensors").write_bytes(content)
    checkpoint = L4QCheckpoint.open(folder)
    for module in checkpoint.modules:
        checkpoint.quantized(module).dequantize()
    for name in checkpoint.dense_names:
        checkpoint.dense(name)


def _read_index(content: bytes) -> None:
    from l4q.shard_index import read_index

    folder = scratch() / "index"
    if not folder.exists():
        folder.mkdir()
        for name in ("a.safetensors", "b.safetensors"):
            (folder / name).write_bytes(_small_checkpoint())
    (folder / "index.json").write_bytes(content)
    read_index(folder, "index.json", "a.safetensors")


def _index_seeds() -> tuple[bytes, ...]:
    pairs = {"a.weight": "a.safetensors", "b.weight": "b.safetensors"}
    return (json.dumps({"metadata": {"total_size": 7}, "weight_map": pairs}).encode(),)


def _read_config(content: bytes) -> None:
    from l4q.config import QuantConfig
    from l4q.guards import foreign
    from l4q.model_folder import check_config, read_config
    from l4q.module_grids import module_grids
    from l4q.starts import DECODERS, quantization_section

    folder = scratch() / "config"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(content)
    check_config(read_config(folder), folder, tensors=30)
    section = quantization_section(folder)
    method = str(section.get("quant_method")) if section else None
    if section and method == "l4q":
        QuantConfig.from_dict(section)
        module_grids(section)
    elif section and method in DECODERS:
        with foreign("the section cannot be read"):  # as FolderStart does
            importlib.import_module(DECODERS[method]).check(section, "config.json")


def _config_seeds() -> tuple[bytes, ...]:
    return tuple((_bases()[base] / "config.json").read_bytes() for base in ("l4q", "gptq", "awq", "compressed-tensors"))


def _read_tokenizer(content: bytes) -> None:
    from exporters.gguf.vocab import read_vocabulary

    folder = scratch() / "tokenizer"
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_bytes(content)
    read_vocabulary(folder, 320)


def _read_gguf(content: bytes) -> None:
    from exporters.inspect.counts import count
    from exporters.inspect.gguf_file import open_source
    from l4q.starts.gguf import GgufStart

    path = scratch() / "fuzzed.gguf"
    path.write_bytes(content)
    count(open_source(path))
    start = GgufStart.open(path)
    start.rope_scaling()


def _small_gguf() -> tuple[bytes, ...]:
    """Files of some tensors of every linear type, and of every kind of value."""
    import gguf
    import numpy as np

    path = scratch() / "seed.gguf"
    found = []
    for kinds in (("Q4_0", "Q4_1"), ("Q8_0", "F32"), ("Q4_K", "F16")):
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_name("seed")
        writer.add_block_count(2)
        writer.add_head_count(4)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_token_list(["a", "b", "c"])
        writer.add_array("x.scores", [1.0, 2.0])
        writer.add_bool("x.flag", True)
        for kind in kinds:
            of = gguf.GGMLQuantizationType[kind]
            block, size = gguf.GGML_QUANT_SIZES[of]
            row = 256 // block * size
            raw = (np.arange(2 * row) % 0x7B).astype(np.uint8).reshape(2, row)  # no fp16 number of it is NaN
            plain = {"F32": np.float32, "F16": np.float16}.get(kind)
            writer.add_tensor(
                f"blk.{kind}.weight", np.ones((2, 256), plain) if plain else raw, raw_dtype=None if plain else of
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        found.append(path.read_bytes())
    return tuple(found)


def _read_onnx(content: bytes) -> None:
    from exporters.inspect.counts import count
    from exporters.inspect.onnx_file import open_source

    path = scratch() / "model.onnx"
    path.write_bytes(content)
    count(open_source(path))


def _small_onnx() -> tuple[bytes, ...]:
    """DequantizeLinear and MatMulNBits models with data inside and beside the file."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    (scratch() / "model.onnx.data").write_bytes(bytes(range(256)) * 4)
    codes = helper.make_tensor("w.weight", TensorProto.INT8, (32, 4), bytes(range(128)), raw=True)
    outside = TensorProto(name="v.weight", data_type=TensorProto.INT8, dims=(32, 4))
    outside.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "model.onnx.data"), ("offset", "128"), ("length", "128")):
        outside.external_data.add(key=key, value=value)
    packed = helper.make_tensor("p", TensorProto.UINT8, (4, 1, 16), bytes(64), raw=True)
    scales = numpy_helper.from_array(np.ones((1, 4), np.float32), "s")
    found = []
    for tensor in (codes, outside):
        node = helper.make_node("DequantizeLinear", [tensor.name, "s"], ["y"], block_size=32, axis=0)
        bits = helper.make_node(
            "MatMulNBits", ["x", "p", "s"], ["z"], domain="com.microsoft", N=4, K=32, bits=4, block_size=32
        )
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (4, 32)) for name in ("x", "y")]
        graph = helper.make_graph([node, bits], "seed", values[:1], values[1:], [tensor, scales, packed])
        found.append(helper.make_model(graph, producer_name="seed").SerializeToString())
    return tuple(found)


def _start_seeds(base: str) -> Callable[[], tuple[bytes, ...]]:
    """One module and one norm of a quantized folder."""

    def seeds() -> tuple[bytes, ...]:
        from safetensors.torch import load_file, save

        found = load_file(_bases()[base] / "model.safetensors")
        kept = {name: found[name] for name in found if "0.self_attn.k_proj" in name or name == "model.norm.weight"}
        return (bytes(save(kept, {"format": "pt"})),)

    return seeds


def _read_start(base: str) -> Callable[[bytes], None]:
    def read(content: bytes) -> None:
        from l4q.starts import open_start

        with _folder(base, "model.safetensors", content) as folder:
            start = open_start(str(folder))
            if start is not None:
                for module in start.modules()[:2]:
                    start.grid(module)
                for name in sorted(start.names())[:4]:
                    start.tensor(name)

    return read


def _read_records(suffix: str) -> Callable[[bytes], None]:
    def read(content: bytes) -> None:
        from l4q.data_records import read_records

        path = scratch() / f"fuzzed{suffix}"
        path.write_bytes(content)
        for _ in read_records(path):
            pass

    return read


def _record_seeds() -> tuple[bytes, ...]:
    records = [
        {"text": "a plain text"},
        {"prompt": "a", "completion": "b"},
        {"instruction": "a", "input": "b", "output": "c"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ]
    return ("\n".join(map(json.dumps, records)).encode(), *(json.dumps(record).encode() for record in records))


def _list_seeds() -> tuple[bytes, ...]:
    return tuple(b"[" + seed + b"]" for seed in _record_seeds()[1:])


def _read_rule(content: bytes) -> None:
    from l4q.config import QuantConfig
    from l4q.rules import Override, grids_of

    override = Override.parse(content.decode("utf-8", errors="replace"))
    grids_of(["model.layers.0.self_attn.q_proj", "lm_head"], QuantConfig(), [override])


def _rule_seeds() -> tuple[bytes, ...]:
    return (
        b"*.q_proj:bits=3,group_size=32,zero_point=none",
        b"model.layers.[0-9].*:zero_point=float",
        b"*:scale_grid=fp16",
    )


def _read_pattern(content: bytes) -> None:
    from l4q.starts.patterns import matches_pattern

    matches_pattern(content.decode("utf-8", errors="replace"), "model.layers.10.mlp.experts.3.down_proj", "pattern")


def _pattern_seeds() -> tuple[bytes, ...]:
    return (rb".*\.(q|k|v)_proj", rb"model\.layers\.(1[0-9]|2[0-3])\..*mlp.*", rb"(?!lm_head).+", rb"(a|b)?c{1,3}[^.]+")


TARGETS: dict[str, Target] = {
    "safetensors": Target(seeds=lambda: (_small_checkpoint(),), read=_read_safetensors),
    "checkpoint": Target(seeds=lambda: (_small_checkpoint(),), read=_read_checkpoint),
    "index": Target(seeds=_index_seeds, read=_read_index),
    "config": Target(seeds=_config_seeds, read=_read_config),
    "tokenizer": Target(seeds=_seeds("l4q", "tokenizer.json"), read=_read_tokenizer),
    "gguf": Target(seeds=_small_gguf, read=_read_gguf),
    "onnx": Target(seeds=_small_onnx, read=_read_onnx),
    "gptq": Target(seeds=_start_seeds("gptq"), read=_read_start("gptq")),
    "compressed-tensors": Target(seeds=_start_seeds("compressed-tensors"), read=_read_start("compressed-tensors")),
    "jsonl": Target(seeds=_record_seeds, read=_read_records(".jsonl")),
    "json": Target(seeds=_list_seeds, read=_read_records(".json")),
    "rules": Target(seeds=_rule_seeds, read=_read_rule),
    "patterns": Target(seeds=_pattern_seeds, read=_read_pattern),
}
