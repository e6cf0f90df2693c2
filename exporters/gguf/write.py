"""The GGUF file: header and metadata first, then one tensor after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import gguf.quants
import numpy as np
import numpy.typing as npt

from exporters.gguf.encode_packed import encode_pieces
from exporters.gguf.families import Architecture
from exporters.gguf.metadata import FILE_TYPES, QUANTIZED_KEY, model_metadata, rope_tensors
from exporters.gguf.modelfile import write_modelfile
from exporters.gguf.names import architecture_of, permute_rows, permuted_heads, stack_targets
from exporters.gguf.plan import ROPE_SOURCE, file_name, main_encoding, model_name
from exporters.gguf.vocab import Vocabulary, read_vocabulary
from exporters.plan import NOTHING_DONE, ExportOptions, ExportPlan, FileRecord, PlannedTensor
from l4q.ahead import made_ahead
from l4q.checkpoint import L4QCheckpoint
from l4q.direct import DirectFile, append
from l4q.durable import sync_file
from l4q.errors import UnsupportedError, UsageError
from l4q.prefix_hash import Advance

Data = npt.NDArray[np.generic]

PIECE_BYTES = 4 << 20
"""Stored bytes of a dense tensor that are converted at a time: few, so that caches and the allocator keep them."""


def write(
    checkpoint: L4QCheckpoint,
    plan: ExportPlan,
    folder: Path,
    options: ExportOptions,
    on_tensor: Callable[[str], None],
    record: FileRecord = NOTHING_DONE,
) -> None:
    """Write the planned file into `folder`, one tensor as it is stored in memory at a time, and Ollama's Modelfile.

    Equal checkpoints give equal bytes: the metadata has no times or paths. A file that `record` knows is kept.
    """
    path = folder / file_name(checkpoint, plan.tensors)
    vocabulary = read_vocabulary(checkpoint.path, int(checkpoint.config["vocab_size"]))
    if not record.finished(path.name):
        _write_file(path, checkpoint, plan, vocabulary, on_tensor, record)
        sync_file(path)
        record.add(path)
    write_modelfile(checkpoint, folder, path.name, vocabulary)


def _write_file(
    path: Path,
    checkpoint: L4QCheckpoint,
    plan: ExportPlan,
    vocabulary: Vocabulary,
    on_tensor: Callable[[str], None],
    record: FileRecord,
) -> None:
    architecture = architecture_of(checkpoint.architecture)
    writer = gguf.GGUFWriter(path, architecture.name)
    try:
        _add_metadata(writer, checkpoint, plan, architecture, vocabulary)
        for tensor in plan.tensors:
            _add_info(writer, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        advance = record.follow(path, path.name)
        made = ((tensor, piece) for tensor in plan.tensors for piece in _pieces(checkpoint, architecture, tensor))
        with (
            DirectFile(path, plan.nbytes) as target,
            made_ahead(made, lambda item: item[1].nbytes) as items,
        ):
            for tensor, group in groupby(items, key=itemgetter(0)):
                pieces: Any = _Pieces((piece for _, piece in group), tensor.nbytes, target, advance)
                writer.write_tensor_data(pieces)
                on_tensor(tensor.name)
    finally:
        writer.close()


def _add_metadata(
    writer: gguf.GGUFWriter,
    checkpoint: L4QCheckpoint,
    plan: ExportPlan,
    architecture: Architecture,
    vocabulary: Vocabulary,
) -> None:
    writer.add_type("model")
    writer.add_name(model_name(checkpoint))
    writer.add_file_type(FILE_TYPES[main_encoding(plan.tensors)])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_array(QUANTIZED_KEY, [tensor.target for tensor in plan.quantized])
    for entry in (*model_metadata(architecture, checkpoint.config), *vocabulary.metadata):
        writer.add_key_value(entry.key, entry.value, entry.type)
    if vocabulary.special is not None:
        vocabulary.special.add_to_gguf(writer, quiet=True)


def _add_info(writer: gguf.GGUFWriter, tensor: PlannedTensor) -> None:
    kind = gguf.GGMLQuantizationType[tensor.encoding]
    # For a type other than uint8 the writer takes the logical shape as given.
    writer.add_tensor_info(tensor.target, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=kind)


class _Pieces:
    """What `GGUFWriter.write_tensor_data` asks of an array, for a tensor that never is in memory as a whole."""

    def __init__(self, pieces: Iterator[Data], nbytes: int, target: DirectFile, advance: Advance) -> None:
        self.nbytes = nbytes
        self._pieces = pieces
        self._target = target
        self._advance = advance

    def tofile(self, file: BinaryIO) -> None:
        """Write the tensor's bytes, and leave `file` behind them.

        Raises:
            UsageError: There are more or fewer than planned.
        """
        written = 0
        for piece in self._pieces:
            data = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
            end = append(file, data, self._target)
            written += data.nbytes
            self._advance(end, end - data.nbytes, data)
        if written != self.nbytes:
            raise UsageError("a tensor is not as large as planned", got=f"{written} bytes", expected=self.nbytes)


def _pieces(checkpoint: L4QCheckpoint, architecture: Architecture, tensor: PlannedTensor) -> Iterator[Data]:
    """The tensor's bytes in file order."""
    heads = permuted_heads(architecture, checkpoint.config, tensor.target)
    if tensor.name == ROPE_SOURCE:
        yield rope_tensors(checkpoint.config)[tensor.target]
    elif tensor.quantized:
        weight = checkpoint.packed(tensor.name)
        order = None if heads is None else permute_rows(np.arange(weight.out_features), heads)
        yield from encode_pieces(weight, tensor.encoding, order)
    elif heads is not None:
        data = dense_data(checkpoint.dense(tensor.name), tensor, architecture)
        yield permute_rows(data, heads)
    else:
        for rows in checkpoint.dense_row_slices(tensor.name, PIECE_BYTES):
            values = _part(checkpoint.dense(tensor.name, rows), stack_targets(architecture, tensor.name), tensor.target)
            yield dense_data(values, tensor, architecture)


def _part(values: Any, targets: tuple[str, ...], target: str) -> Any:
    """The rows of stacked experts that belong to one of their targets; the whole tensor when it is not a stack."""
    return values.chunk(len(targets), dim=-2)[targets.index(target)] if targets else values


def dense_data(values: Any, tensor: PlannedTensor, architecture: Architecture) -> Data:
    """A dense torch tensor in its planned encoding; BF16, which NumPy lacks, as uint16 bit patterns.

    Raises:
        UnsupportedError: A value is beyond float16.
    """
    import torch

    if architecture.norm_plus_one and tensor.target.endswith("_norm.weight"):
        values = values.float() + 1.0
    if tensor.encoding == "Q8_0":
        return gguf.quants.quantize(values.float().contiguous().numpy(), gguf.GGMLQuantizationType.Q8_0)
    if tensor.encoding == "BF16":
        bits: Data = values.contiguous().view(torch.int16).numpy().view(np.uint16)
        return bits
    dtype = {"F32": torch.float32, "F16": torch.float16}[tensor.encoding]
    plain: Data = values.to(dtype).contiguous().numpy()
    if tensor.encoding == "F16" and not np.isfinite(plain).all():
        raise UnsupportedError(
            "float16 cannot hold these values",
            where=tensor.name,
            got=f"magnitudes up to {values.abs().max().item():g}",
            expected="at most 65504",
            remedy="use --gguf-embeddings stored or q8_0",
        )
    return plain
