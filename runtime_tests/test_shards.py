"""Shards whose layout is decided first are, byte for byte, the files that the safetensors library writes."""

from __future__ import annotations

import errno
import json
import os
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from l4q.direct import DirectFile
from l4q.errors import UsageError
from l4q.file_table import FileTable, file_facts
from l4q.shard_layout import DTYPE_BYTES, INDEX, SINGLE, ShardLayout, TensorSpec, Unit, plan_shards
from l4q.shard_writer import PlannedWriter, ShardWriter, dtype_word, write_shards
from l4q.shards import ShardReader

Pieces = Iterator[tuple[str, torch.Tensor]]

TENSORS = {
    f"layers.{number}.{name}": torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(number)).to(dtype)
    for number in (2, 10, 1)
    for name, shape, dtype in (
        ("scales", (6, 3), torch.float16),
        ("codes", (5, 7), torch.uint8),
        ("words", (4, 3), torch.int32),
        ("dense", (3, 5), torch.bfloat16),
        ("wide", (3,), torch.int64),
        ('ü "quoted"', (2, 2), torch.float32),
        ("double", (2,), torch.float64),
        ("number", (), torch.float32),
        ("flag", (3,), torch.bool),
    )
}


def units() -> list[Unit]:
    """Three units of nine tensors, each with its line of metadata, longer and shorter ones."""
    found: dict[str, list[TensorSpec]] = {}
    for name, tensor in TENSORS.items():
        spec = TensorSpec(name=name, dtype=dtype_word(tensor), shape=tuple(tensor.shape))
        found.setdefault(name.rpartition(".")[0], []).append(spec)
    return [Unit(name=name, tensors=tuple(specs), metadata={name: "é" * len(name)}) for name, specs in found.items()]


def produce(unit: str) -> Pieces:
    """A unit's tensors out of order, one of them row by row."""
    names = [name for name in TENSORS if name.startswith(f"{unit}.")]
    random.Random(unit).shuffle(names)
    for name in names:
        if name.endswith("codes"):
            yield from ((name, row) for row in TENSORS[name])
        else:
            yield name, TENSORS[name]


def add_units(writer: ShardWriter | PlannedWriter) -> None:
    """Add all of them."""
    for unit in units():
        writer.add({tensor.name: TENSORS[tensor.name] for tensor in unit.tensors}, unit.metadata)


def fill(folder: Path, max_bytes: int) -> FileTable:
    """Write all units where the plan says they belong."""
    with PlannedWriter(folder, units(), max_bytes) as writer:
        add_units(writer)
        return writer.close()


def collect(folder: Path, max_bytes: int) -> FileTable:
    """Write all units as they come."""
    with ShardWriter(folder, max_bytes) as writer:
        add_units(writer)
        return writer.close()


def by_library(folder: Path, layout: ShardLayout) -> bytes:
    """The bytes of safetensors' own writer; its metadata's order is random, so it is put in order."""
    tensors = {tensor.name: TENSORS[tensor.name] for tensor in layout.tensors}
    metadata = {"format": "pt"} | {key: value for unit in layout.units for key, value in unit.metadata.items()}
    save_file(tensors, folder / "own", metadata=metadata)
    data = (folder / "own").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return data[:8] + text.ljust(size) + data[8 + size :]


@pytest.mark.parametrize("max_bytes", [1, 500, 10_000])
def test_files_are_the_librarys(tmp_path: Path, max_bytes: int) -> None:
    """One file or several, planned or collected as they come: the library's bytes; a swapped tensor is noticed."""
    layouts = plan_shards(units(), max_bytes)
    written: list[Path] = []
    (tmp_path / "planned").mkdir()
    write_shards(tmp_path / "planned", layouts, produce, on_shard=written.append)
    (tmp_path / "collected").mkdir()
    (tmp_path / "filled").mkdir()
    tables = [collect(tmp_path / "collected", max_bytes), fill(tmp_path / "filled", max_bytes)]
    assert tables == [{path.name: file_facts(path) for path in written}] * 2
    assert [path.name for path in written] == [layout.file_name for layout in layouts]
    for layout in layouts:
        expected = by_library(tmp_path, layout)
        assert (tmp_path / "planned" / layout.file_name).read_bytes() == expected
        assert (tmp_path / "collected" / layout.file_name).read_bytes() == expected
        assert (tmp_path / "filled" / layout.file_name).read_bytes() == expected
        assert len(expected) == layout.nbytes
    names = {path.name for path in (tmp_path / "planned").iterdir()}
    assert names == {layout.file_name for layout in layouts} | ({INDEX} if len(layouts) > 1 else set())
    assert names == {path.name for path in (tmp_path / "collected").iterdir()}
    assert names == {path.name for path in (tmp_path / "filled").iterdir()}
    swapped = {**TENSORS, "layers.2.words": TENSORS["layers.1.words"]}
    read = {name: t for layout in layouts for name, t in load_file(tmp_path / "planned" / layout.file_name).items()}
    assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())
    assert not all(torch.equal(read[name], tensor) for name, tensor in swapped.items())


def test_reader_agrees_with_the_library(tmp_path: Path) -> None:
    """Every tensor, whole and in ranges of rows, shape and dtype are those that the library reads."""
    write_shards(tmp_path, plan_shards(units()), produce)
    reader = ShardReader.open(tmp_path)
    with safe_open(tmp_path / SINGLE, framework="pt") as handle:
        assert reader.names == set(handle.keys())
        for name in reader.names:
            whole = handle.get_tensor(name)
            assert torch.equal(reader.tensor(name), whole)
            assert reader.tensor(name).dtype == whole.dtype
            assert reader.shape(name) == tuple(whole.shape)
            assert reader.dtype(name) == handle.get_slice(name).get_dtype()
            assert reader.metadata(name) == handle.metadata()
            if whole.ndim:
                assert torch.equal(reader.tensor(name, slice(1, 3)), whole[1:3])
    assert np.array_equal(reader.numpy("layers.1.words", slice(2, None)), TENSORS["layers.1.words"][2:].numpy())


def test_finished_shards_are_left_alone(tmp_path: Path) -> None:
    """A shard that an earlier run completed is neither produced nor touched, and the index names it all the same."""
    layouts = plan_shards(units(), 1)
    write_shards(tmp_path, layouts, produce)
    index, kept = (tmp_path / INDEX).read_text(), tmp_path / layouts[1].file_name
    kept.write_bytes(b"whatever an earlier run left")
    (tmp_path / layouts[0].file_name).unlink()
    seen: list[str] = []

    def recorded(unit: str) -> Pieces:
        seen.append(unit)
        yield from produce(unit)

    write_shards(tmp_path, layouts, recorded, finished=lambda layout: layout is layouts[1])
    assert seen == [layouts[0].units[0].name, layouts[2].units[0].name]
    assert kept.read_bytes() == b"whatever an earlier run left"
    assert (tmp_path / INDEX).read_text() == index


def _without_last(unit: str) -> Pieces:
    yield from list(produce(unit))[:-1]


def _twice(unit: str) -> Pieces:
    yield from (pair for pair in produce(unit) for _ in range(2))


def _another_name(unit: str) -> Pieces:
    yield from ((f"{name}.x", tensor) for name, tensor in produce(unit))


def _another_dtype(unit: str) -> Pieces:
    yield from ((name, tensor.to(torch.int16)) for name, tensor in produce(unit))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (_without_last, "not the planned size"),
        (_twice, "not the planned size"),
        (_another_name, "not in the plan"),
        (_another_dtype, "not the planned dtype"),
    ],
)
def test_a_wrong_producer_leaves_no_shard(tmp_path: Path, wrong: object, message: str) -> None:
    """Tensors that are not as planned stop the writer, and no file has a final name."""
    with pytest.raises(UsageError, match=message):
        write_shards(tmp_path, plan_shards(units()), wrong)  # type: ignore[arg-type]
    assert not list(tmp_path.glob("*.safetensors"))


def test_one_name_twice_is_refused() -> None:
    """Two units with a tensor of the same name have no layout."""
    with pytest.raises(UsageError, match="written twice"):
        plan_shards([*units(), units()[0]])


def test_dtype_table_covers_what_is_written() -> None:
    """Every dtype's word is the library's, and its size torch's."""
    for tensor in TENSORS.values():
        assert DTYPE_BYTES[dtype_word(tensor)] == tensor.element_size()
    with pytest.raises(UsageError, match="complex64"):
        dtype_word(torch.zeros(1, dtype=torch.complex64))


def test_a_shard_that_cannot_be_completed_is_the_writers_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Completing happens in a thread of its own; what fails there is raised by the next shard, or by `close`."""

    def full(file: DirectFile, data: np.ndarray, position: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(DirectFile, "write", full)
    with pytest.raises(OSError, match="No space left"):
        collect(tmp_path, 10_000)  # one shard, which `close` completes
    with pytest.raises(OSError, match="No space left"), ShardWriter(tmp_path, 1) as writer:
        add_units(writer)


def test_what_is_not_planned_is_refused(tmp_path: Path) -> None:
    """Another order, dtype, shape or line of metadata, one unit too many, and one too few."""
    planned = units()

    def tensors(unit: Unit) -> dict[str, torch.Tensor]:
        return {tensor.name: TENSORS[tensor.name] for tensor in unit.tensors}

    first, other = tensors(planned[0]), planned[0].metadata
    wrong: list[tuple[dict[str, torch.Tensor], Mapping[str, str]]] = [
        (tensors(planned[1]), planned[1].metadata),
        ({name: tensor.to(torch.uint8) for name, tensor in first.items()}, other),
        ({name: tensor[None] for name, tensor in first.items()}, other),
        (first, {"layers.2": "something else"}),
    ]
    for number, (values, metadata) in enumerate(wrong):
        (tmp_path / str(number)).mkdir()
        refused = pytest.raises(UsageError, match="not the planned tensors")
        with PlannedWriter(tmp_path / str(number), planned) as writer, refused:
            writer.add(values, metadata)
    with PlannedWriter(tmp_path, planned) as writer:
        add_units(writer)
        with pytest.raises(UsageError, match="nothing more"):
            writer.add(first, other)
    with PlannedWriter(tmp_path, planned) as writer:
        writer.add(first, other)
        with pytest.raises(UsageError, match="a planned tensor was not written"):
            writer.close()
