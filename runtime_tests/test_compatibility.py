"""docs/compatibility.md says what a run gives, and the plans of l4q-export say the same.

`make compatibility` runs every cell. Here run all that are cheap: every decoder except those of dense fields
(test_dense_fields.py has them), llama.cpp, ONNX Runtime, and a choice of GPTQ and AWQ rows in their Python loaders;
vLLM's formats run in test_vllm_formats.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from exporters.driver import get_exporter
from exporters.plan import ExportOptions
from l4q.errors import L4QError
from runtime_tests.compatibility import DENSE, FORMATS, READERS, STORED, Bench, Cell, Row, message_of, table_rows
from runtime_tests.converter_mistakes import Edit, flipped, relabel, tensors
from runtime_tests.engines.host import EngineError
from runtime_tests.hf_exports import edit_config
from tools.compatibility import COLUMNS, DOCUMENT, header, parse, render

LOADERS = ("transformers", "gptqmodel")
# GPTQModel's cells take 2 s each: every format and storage once
LOADED = {
    Row("GPTQ (v1)", "int4", "integer"),
    Row("GPTQ (v1)", "int3 in 4-bit fields", "none"),
    Row("GPTQ (v1)", "int3 dense", "integer"),
    Row("GPTQ (v1)", "int2 dense", "none"),
    Row("GPTQ v2", "int4", "integer"),
    Row("GPTQ v2", "int3 dense", "none"),
    Row("AWQ", "int4", "integer"),
    Row("AWQ", "int3 in 4-bit fields", "none"),
}
# the plan's word for a column's runtime
PLANNED = {"vllm": "vLLM", "transformers": "transformers", "gptqmodel": "GPTQModel"}


@pytest.fixture(scope="module")
def documented() -> dict[Row, dict[str, Cell]]:
    """The cells of the document."""
    return parse(DOCUMENT.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def bench(
    glassllm_dir: Path, wiki_text: str, judges: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Bench]:
    """Exports and workers of all tests here."""
    made = Bench(glassllm_dir, wiki_text, tmp_path_factory.mktemp("compatibility"))
    yield made
    made.close()


def is_cheap(row: Row, runtime: str) -> bool:
    """Whether a cell runs here."""
    if runtime == "vllm":
        return row.zero_point == "float" or runtime not in READERS[row.format]  # l4q-export answers
    if row.format in ("gptq", "awq") and runtime in LOADERS:
        return row in LOADED
    return not (runtime == "decoder" and row.stored == "int3 dense")


def test_the_document_is_complete(documented: dict[Row, dict[str, Cell]]) -> None:
    """Every row and column, the versions that are installed, and nothing edited by hand."""
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text.startswith(header()), "the versions or the words changed: run `make compatibility`"
    assert tuple(documented) == table_rows()
    assert render(documented) == text
    assert {cell.status for cells in documented.values() for cell in cells.values()} == {
        "ok",
        "refused",
        "not supported",
    }


@pytest.mark.parametrize("label", FORMATS)
def test_the_cells_are_as_documented(documented: dict[Row, dict[str, Cell]], bench: Bench, label: str) -> None:
    """A fresh run gives the documented status and message."""
    wanted = [(row, name) for row in table_rows() if row.label == label for name in COLUMNS if is_cheap(row, name)]
    found = {cell: bench.cell(*cell) for cell in wanted}
    assert found == {(row, name): documented[row][name] for row, name in wanted}
    assert "ok" in {cell.status for cell in found.values()}


@pytest.mark.parametrize("row", [row for row in table_rows() if row.zero_point != "float"], ids=str)
def test_plans_promise_what_was_found(documented: dict[Row, dict[str, Cell]], bench: Bench, row: Row) -> None:
    """A runtime that the plan calls fit is "ok" in the table, one that it rules out is "refused"."""
    if row.format == "awq" and row.stored in DENSE:
        assert {cell.status for cell in documented[row].values()} == {"refused", "not supported"}
        return
    options = ExportOptions(**FORMATS[row.label][1], **STORED[row.stored][1])
    plan = get_exporter(row.format).plan(bench.checkpoint(row), options)
    promised = {runtime.runtime: runtime.loads for runtime in plan.runtimes}
    for name, planned in PLANNED.items():
        if planned in promised:
            assert documented[row][name].status == ("ok" if promised[planned] else "refused"), name


DAMAGE: dict[str, tuple[Row, str, Edit]] = {
    "a code, GPTQModel": (Row("GPTQ (v1)", "int3 dense", "integer"), "gptqmodel", tensors("q_proj.qweight", flipped)),
    "a code, GPTQ in transformers": (Row("GPTQ v2", "int4", "integer"), LOADERS[0], tensors("v_proj.qweight", flipped)),
    "a code, AWQ in transformers": (Row("AWQ", "int4", "integer"), LOADERS[0], tensors("o_proj.qweight", flipped)),
    "v2 zero-points labelled v1": (
        Row("GPTQ v2", "int4", "integer"),
        "gptqmodel",
        relabel(checkpoint_format="gptq"),
    ),
    "a code, compressed-tensors in transformers": (
        Row("compressed-tensors", "int3 dense", "integer"),
        LOADERS[0],
        tensors("k_proj.weight_packed", flipped),
    ),
}


@pytest.mark.parametrize(("row", "runtime", "edit"), DAMAGE.values(), ids=DAMAGE)
def test_damage_makes_a_cell_wrong(bench: Bench, tmp_path: Path, row: Row, runtime: str, edit: Edit) -> None:
    """The twin: the loader takes the damaged folder without complaint, and the comparison notices."""
    folder = Path(shutil.copytree(bench.folder(row), tmp_path / "damaged"))
    edit(folder)
    cell = bench.judge(row, runtime, folder)
    assert cell.status == "wrong"
    assert "of 16 weights differ" in cell.message


@pytest.mark.parametrize(
    ("row", "other", "runtime"),
    [
        (Row("GGUF", "int4", "none"), Row("GGUF", "int4", "integer"), "llamacpp"),
        (Row("GGUF", "int4", "none"), Row("GGUF", "int4", "float"), "transformers"),
        (Row("ONNX", "int4", "none"), Row("ONNX", "int4", "integer"), "onnxruntime"),
    ],
    ids=["llama.cpp", "GGUF in transformers", "ONNX Runtime"],
)
def test_other_integers_make_a_cell_wrong(bench: Bench, row: Row, other: Row, runtime: str) -> None:
    """The twin of the runtimes with kernels of their own: the same model on another grid is out of bounds."""
    assert bench.judge(row, runtime, bench.folder(other)).status == "wrong"


def test_a_refusal_is_told_in_the_loaders_words(bench: Bench, tmp_path: Path) -> None:
    """A folder that a loader does not take is "refused", with its message in one line and no path of this machine."""
    row = Row("GPTQ (v1)", "int4", "integer")
    folder = Path(shutil.copytree(bench.folder(row), tmp_path / "damaged"))
    edit_config(lambda section: section.update(bits=7))(folder)
    cell = bench.judge(row, "transformers", folder)
    assert (cell.status, str(tmp_path) in cell.message) == ("refused", False)
    assert "[2,3,4,8] bits but found 7" in cell.message


def test_only_known_loaders_are_taken(bench: Bench) -> None:
    """The worker names the loaders it has."""
    with pytest.raises(EngineError, match=r"unknown loader 'other'.*gptqmodel.*transformers"):
        bench.engine("loaders", bench.folder(Row("GPTQ (v1)", "int4", "integer")), loader="other")


def test_messages_lose_frames_and_paths() -> None:
    """pydantic's frame, the folder and line breaks go; long messages end with dots."""
    error = L4QError(
        "the vllm engine failed in load: ValidationError: 1 validation error for VllmConfig\n"
        "  Value error, no kernel for\n  /tmp/x/out [type=value_error, input_value=...]"
    )
    assert message_of(error, Path("/tmp/x/out")) == "no kernel for FOLDER"  # noqa: S108
    assert message_of(L4QError("word " * 100), Path("/nowhere")).endswith("word ...")
