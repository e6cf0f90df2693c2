"""What reading back, importing and inspecting say about folders that contradict themselves, message by message."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from exporters.driver import get_exporter
from exporters.plan import ExportOptions
from l4q.checkpoint import L4QCheckpoint
from l4q.errors import InexactError, L4QError, UnsupportedError, UsageError, VerificationError
from l4q.importing import ImportOptions, import_model
from runtime_tests.conftest import CheckpointMaker
from runtime_tests.import_sources import UP, exported, make_source
from runtime_tests.start_files import edit_section, edit_tensors

Damage = Callable[[Path], object]


def section(**changes: Any) -> Damage:
    """A change of the quantization config, in both of GPTQ's places."""

    def change(folder: Path) -> None:
        edit_section(folder, **changes)
        if (folder / "quantize_config.json").is_file():
            config = json.loads((folder / "config.json").read_text())
            (folder / "quantize_config.json").write_text(json.dumps(config["quantization_config"]))

    return change


def without(part: str) -> Damage:
    """One tensor of a module is gone."""
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.pop(f"{UP}.{part}"))


def changed(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    """One tensor of a module is another."""

    def replace(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{UP}.{part}"] = change(tensors[f"{UP}.{part}"]).contiguous()

    return lambda folder: edit_tensors(folder, replace)


def legacy(folder: Path) -> None:
    """quantize_config.json alone says something else."""
    path = folder / "quantize_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "damp_percent": 0.5}))


READ_BACK: dict[str, tuple[str, str, Damage]] = {
    "gptq incomplete": ("gptq", "a quantized module is incomplete", without("scales")),
    "gptq legacy": ("gptq", "quantize_config.json contradicts config.json, and readers differ", legacy),
    "gptq dynamic": (
        "gptq",
        "the config's dynamic rules say that a quantized module is dense",
        section(dynamic={r"-:.*up_proj$": {}}),
    ),
    "gptq sym": ("gptq", "the config says sym: true, but a zero-point is not the midpoint", section(sym=True)),
    "gptq shape": ("gptq", "the tensors of a module disagree in shape", changed("scales", lambda t: t[:1])),
    "gptq order": (
        "gptq",
        "g_idx is not k // group_size although desc_act is false",
        changed("g_idx", lambda t: t + 1),
    ),
    "awq ignored": (
        "awq",
        "a quantized module stands in modules_to_not_convert",
        section(modules_to_not_convert=["mlp.up_proj"]),
    ),
    "awq zeros": ("awq", "the config says zero_point: false, but a zero-point is not 8", section(zero_point=False)),
    "awq shape": ("awq", "the tensors of a module disagree in shape", changed("qzeros", lambda t: t[:1])),
    "ct parts": ("compressed-tensors", "the tensors of a module are not those of its scheme", without("weight_scale")),
    "ct ignored": (
        "compressed-tensors",
        "a quantized module stands in the config's ignore list",
        section(ignore=["re:.*up_proj"]),
    ),
    "ct scales": (
        "compressed-tensors",
        "the scales contradict the config's group size",
        changed("weight_scale", lambda t: t[:, :1]),
    ),
}
IMPORTED: dict[str, tuple[str, type[L4QError], str, Damage]] = {
    "incomplete": ("gptq", UsageError, "a quantized module is incomplete", without("scales")),
    "groups": (
        "gptq",
        UsageError,
        "the groups of a module do not divide its columns",
        changed("scales", lambda t: t.repeat(2, 1)[:5]),
    ),
    "kind": ("gptq", UnsupportedError, "unknown GPTQ checkpoint_format", section(checkpoint_format="v3")),
    "zeros": (
        "awq",
        UsageError,
        "the config says zero_point: false, but the zero-points are not 8",
        section(zero_point=False),
    ),
    "lost": (
        "awq",
        UsageError,
        "the source's tensors are not those of its architecture",
        lambda folder: edit_tensors(folder, lambda tensors: tensors.pop("model.norm.weight")),
    ),
    "shape": (
        "awq",
        UsageError,
        "a tensor has another shape than its architecture says",
        lambda folder: edit_tensors(
            folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(3, dtype=torch.float16)})
        ),
    ),
    "none": (
        "awq",
        UsageError,
        "the folder's config says it is quantized, but no tensor is",
        lambda folder: edit_tensors(folder, lambda tensors: [tensors.pop(n) for n in list(tensors) if "qweight" in n]),
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Exports of one small model with integer zero-points."""
    base = tmp_path_factory.mktemp("folders")
    checkpoint = make_source(base, {"bits": 4, "group_size": 32, "zero_point": "integer"})
    return {name: exported(checkpoint, name, base / name) for name in ("gptq", "awq", "compressed-tensors")}


@pytest.mark.parametrize("case", READ_BACK)
def test_an_export_that_contradicts_itself(folders: dict[str, Path], tmp_path: Path, case: str) -> None:
    """Verification reads the folder as a runtime would, and names what does not agree."""
    name, message, damage = READ_BACK[case]
    shutil.copytree(folders[name], tmp_path / "export")
    assert len(dict(get_exporter(name).read_back(tmp_path / "export"))) > 1
    damage(tmp_path / "export")
    with pytest.raises(VerificationError, match=message):
        dict(get_exporter(name).read_back(tmp_path / "export"))


@pytest.mark.parametrize("case", IMPORTED)
def test_a_source_that_contradicts_itself(folders: dict[str, Path], tmp_path: Path, case: str) -> None:
    """An import stops before anything is written."""
    name, kind, message, damage = IMPORTED[case]
    shutil.copytree(folders[name], tmp_path / "source")
    damage(tmp_path / "source")
    with pytest.raises(kind, match=message):
        import_model(ImportOptions(source=str(tmp_path / "source"), out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_layers_that_no_grid_holds(folders: dict[str, Path], tmp_path: Path) -> None:
    """One layer with scales of more digits than fp16 is refused by name; all of them, as a whole."""
    cases: dict[str, tuple[type[L4QError], str]] = {
        UP: (InexactError, r"1 of \d+ modules cannot be taken over exactly"),
        "": (UnsupportedError, "no module of the source is on a grid of L4Q"),
    }
    for number, (start, (kind, message)) in enumerate(cases.items()):
        source = tmp_path / str(number)
        shutil.copytree(folders["awq"], source)

        def widen(tensors: dict[str, torch.Tensor], start: str = start) -> None:
            for name in tensors:
                if name.startswith(start) and name.endswith(".scales"):
                    tensors[name] = tensors[name].float() * (1 + 2**-16)

        edit_tensors(source, widen)
        with pytest.raises(kind, match=message):
            import_model(ImportOptions(source=str(source), out=tmp_path / "out"))


def test_a_split_vllm_cannot_make(glass_checkpoint: CheckpointMaker) -> None:
    """Three ranks for four heads are refused in the plan."""
    checkpoint = L4QCheckpoint.open(glass_checkpoint("none"))
    exporter = get_exporter("compressed-tensors")
    with pytest.raises(UnsupportedError, match="vLLM cannot split this export over 3 ranks"):
        exporter.plan(checkpoint, ExportOptions(tensor_parallel=3))


def test_checkpoints_that_lack_something(glass_checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    """A checkpoint without its last norm, without a module's record, and without a module's scales."""
    shutil.copytree(glass_checkpoint("none"), tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys() if name != "model.norm.weight"}  # noqa: SIM118
        metadata = file.metadata()
    save_file(kept, path, metadata=metadata)
    with pytest.raises(UnsupportedError, match="the checkpoint's tensors do not match the ONNX graph"):
        get_exporter("onnx").plan(L4QCheckpoint.open(tmp_path / "checkpoint"), ExportOptions())
    save_file(kept, path, metadata={key: value for key, value in metadata.items() if key != UP})
    with pytest.raises(UsageError, match="a quantized module has no valid record in its shard's metadata"):
        L4QCheckpoint.open(tmp_path / "checkpoint")
    del kept[f"{UP}.scales"]
    save_file(kept, path, metadata=metadata)
    with pytest.raises(UsageError, match=r"tensor model\.layers\.0\.mlp\.up_proj\.scales is missing"):
        L4QCheckpoint.open(tmp_path / "checkpoint")
