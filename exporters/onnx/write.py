"""Write an ONNX folder: model.onnx, its external data, the configs and the tokenizer."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from exporters.files import copy_side_files, write_json
from exporters.onnx.builder import Array, Pieces
from exporters.onnx.contrib import GRAPH_KEY
from exporters.onnx.genai import CONFIG_NAME, genai_config
from exporters.onnx.optimized import ACCURACY_OPTION, OPTIMIZED_NAME, write_optimized
from exporters.onnx.source import choose_source
from exporters.plan import NOTHING_DONE, ExportOptions, ExportPlan, FileRecord
from l4q.ahead import made_ahead
from l4q.checkpoint import L4QCheckpoint
from l4q.direct import DirectFile, append
from l4q.durable import sync_file
from l4q.prefix_hash import Advance, ignore

MODEL_NAME = "model.onnx"
DATA_NAME = "model.onnx.data"
ACCURACY_KEY = "l4q.accuracy_level"
"""Key of model.onnx's metadata that records the chosen accuracy level."""
INLINE_BYTES = 256
"""Smaller tensors stay in model.onnx, where shape inference needs them."""
PAGE_BYTES = 4096
"""Tensors over 1 MiB start on a page, as memory mapping wants them (ONNX ExternalData.md)."""


def write(
    checkpoint: L4QCheckpoint,
    plan: ExportPlan,
    folder: Path,
    options: ExportOptions,
    on_tensor: Callable[[str], None],
    record: FileRecord = NOTHING_DONE,
) -> None:
    """Write the planned folder, reading one module at a time; a complete model with its data is kept.

    Raises:
        UnsupportedError: As `exporters.onnx.plan.plan`.
        VerificationError: As `exporters.onnx.optimized.write_optimized`.
    """
    source = choose_source(checkpoint, options.onnx_graph)
    if not all(record.finished(name) for name in (MODEL_NAME, DATA_NAME)):
        metadata = {
            ACCURACY_KEY: str(options.onnx_accuracy_level),
            GRAPH_KEY: source.kind,
            "l4q.zero_point": checkpoint.quant.zero_point,
            "l4q.bits": str(checkpoint.quant.bits),
            "l4q.group_size": str(checkpoint.quant.group_size),
        }
        _save(source.build(options, metadata), plan, folder, on_tensor, record)
        for name in (MODEL_NAME, DATA_NAME):
            sync_file(folder / name)
            record.add(folder / name)
    name, shared = MODEL_NAME, False
    if options.onnx_runtime_optimized:
        name = OPTIMIZED_NAME
        shared = write_optimized(folder, options.onnx_accuracy_level, len(checkpoint.modules))
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    write_json(folder / "config.json", {**config, "dtype": "float32"})
    level = {ACCURACY_OPTION: str(options.onnx_accuracy_level)}
    described = genai_config(checkpoint, source.sizes, filename=name, session_options=level, shares_buffer=shared)
    write_json(folder / CONFIG_NAME, described)
    copy_side_files(checkpoint, folder)


def _save(
    model: ir.Model, plan: ExportPlan, folder: Path, on_tensor: Callable[[str], None], record: FileRecord
) -> None:
    """Write model.onnx and its external data, whose tensors are made one after another."""
    data = _DataFile(record, plan.nbytes)
    values = [value.const_value for value in model.graph.initializers.values()]
    lazy = [tensor for tensor in values if isinstance(tensor, Pieces)]
    for tensor in lazy:
        tensor.put = data.put
    waiting = {tensor.target: tensor.name for tensor in plan.tensors}

    def report(tensor: ir.TensorProtocol, _: object) -> None:
        name = waiting.pop(tensor.name or "", None)
        if name is not None:
            on_tensor(name)

    with closing(data), _read_ahead([tensor for tensor in lazy if tensor.nbytes > INLINE_BYTES]):
        ir.save(
            model,
            folder / MODEL_NAME,
            external_data=DATA_NAME,
            size_threshold_bytes=INLINE_BYTES,
            alignment=PAGE_BYTES,
            callback=report,
        )
    for name in waiting.values():  # tensors small enough to live in model.onnx itself
        on_tensor(name)


@contextmanager
def _read_ahead(tensors: list[Pieces]) -> Iterator[None]:
    """Make the tensors' pieces ahead of their writing, as long as they are written in this order."""
    made = ((tensor, piece) for tensor, read in [(tensor, tensor.pieces) for tensor in tensors] for piece in read())
    with made_ahead(made, lambda item: item[1].nbytes) as items:
        groups = groupby(items, key=lambda item: id(item[0]))
        upcoming = deque(tensors)

        def ready(tensor: Pieces, read: Callable[[], Iterable[Array]]) -> Iterable[Array]:
            if not upcoming or upcoming[0] is not tensor:
                return read()
            upcoming.popleft()
            return (piece for _, piece in next(groups)[1])

        for tensor in tensors:
            tensor.pieces = partial(ready, tensor, tensor.pieces)
        yield


class _DataFile:
    """The external data in the making: the library opens it, under a name of its own, and fills it from the start."""

    def __init__(self, record: FileRecord, nbytes: int) -> None:
        self._record = record
        self._nbytes = nbytes
        self._target: DirectFile | None = None
        self._advance: Advance = ignore

    def put(self, file: BinaryIO, data: npt.NDArray[np.uint8]) -> None:
        """Write bytes where the file stands, and say so."""
        if self._target is None:
            self._target = DirectFile(Path(file.name), self._nbytes)
            self._advance = self._record.follow(Path(file.name), DATA_NAME)
        end = append(file, data, self._target)
        self._advance(end, end - data.nbytes, data)

    def close(self) -> None:
        """Close what was opened beside the library's file."""
        if self._target is not None:
            self._target.close()
