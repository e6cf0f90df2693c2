"""The good folders that attacks damage: a tiny llama with a tokenizer, as L4Q checkpoint, dense, in every format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from exporters.driver import export
from exporters.plan import ExportOptions
from l4q.checkpoint import L4QCheckpoint
from l4q.config import QuantConfig
from runtime_tests.start_files import byte_tokenizer
from runtime_tests.tiny_llama import tiny_checkpoint

FORMATS = ("gptq", "awq", "compressed-tensors", "gguf", "onnx")
TRAINING_TEXT = "All models are wrong, and some of them are made to mislead. " * 20


def build_bases(folder: Path) -> dict[str, Path]:
    """Base folders by name: "l4q", "dense", "data", and the exports by format; gptq is made of a symmetric grid."""
    made: dict[str, Path] = {}
    for name, zero_point in (("integer", "integer"), ("none", "none")):
        grid = QuantConfig(group_size=32, zero_point=zero_point, scale_grid="fp16")  # type: ignore[arg-type]
        tiny_checkpoint(folder / name, grid)
        byte_tokenizer(folder / name / "l4q")
        made[name] = folder / name / "l4q"
    made["l4q"] = made["integer"]
    made["dense"] = folder / "integer" / "plain"
    byte_tokenizer(made["dense"])
    for name in FORMATS:
        source = L4QCheckpoint.open(made["none" if name in ("gptq", "gguf") else "l4q"])
        export(source, name, folder / "exports" / name, ExportOptions(), check="none")
        made[name] = folder / "exports" / name
    made["data"] = folder / "data"
    made["data"].mkdir()
    (folder / "good.txt").write_text(TRAINING_TEXT)
    made["text"] = folder / "good.txt"
    return made


def copy_base(source: Path, target: Path) -> Path:
    """A copy of a base that an attack may damage."""
    shutil.copytree(source, target)
    return target


def chat_template(folder: Path, template: str) -> None:
    """Give a folder's tokenizer a chat template."""
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "chat_template": template}))
