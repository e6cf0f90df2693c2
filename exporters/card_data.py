"""The metadata on top of a model card: what the Hugging Face hub files a model by.

What is not known from the checkpoint is taken over, key by key, from the front matter of a README.md in the
checkpoint's folder, or else in the folder of the model that training started from (or its copy in the hub's cache).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporters.plan import ExportPlan
from l4q.checkpoint import L4QCheckpoint
from l4q.files import find_side_files

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

CARD_NAME = "README.md"
LICENCE_KEYS = ("license", "license_name", "license_link")
CARRIED = ("base_model", *LICENCE_KEYS, "language", "datasets")
"""Keys taken over."""
LIBRARIES = dict.fromkeys(("gptq", "awq", "compressed-tensors"), "transformers")
"""library_name by format; the hub knows GGUF and ONNX by their tags."""
LICENSES = {
    r"Apache License\s+Version 2\.0": "apache-2.0",
    r"MIT License|Permission is hereby granted, free of charge": "mit",
    r"GNU AFFERO GENERAL PUBLIC LICENSE\s+Version 3": "agpl-3.0",
    r"GNU GENERAL PUBLIC LICENSE\s+Version 3": "gpl-3.0",
    r"BSD 3-Clause": "bsd-3-clause",
}
"""First words of a licence's text -> the hub's name of it."""
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def card_data(checkpoint: L4QCheckpoint, plan: ExportPlan) -> ModelCardData:
    """The metadata of an export's card; the same checkpoint and plan give the same."""
    from huggingface_hub import ModelCardData

    known = _carried(checkpoint)
    bits = checkpoint.quant.bits
    tags = [plan.format, "l4q", f"{bits}-bit", "quantized", "quantization-aware-training"]
    if "base_model" in known:
        known["base_model_relation"] = "quantized"
    return ModelCardData(
        library_name=LIBRARIES.get(plan.format),
        pipeline_tag="text-generation",
        tags=[*tags, str(checkpoint.config.get("model_type", "")) or "text-generation"],
        **known,
    )


def title(checkpoint: L4QCheckpoint) -> str:
    """The model's name without a path."""
    return Path(str(checkpoint.config.get("_name_or_path") or checkpoint.architecture)).name


def trained_on(checkpoint: L4QCheckpoint) -> str | None:
    """Names of the files a run was fine-tuned on, from the run's own record; None outside a run folder."""
    paths = _run_options(checkpoint).get("data")
    return ", ".join(Path(str(path)).name for path in paths) if paths else None


def front_matter(path: Path) -> dict[str, Any]:
    """The metadata of a model card; {} if there is no card or nothing readable on top of it."""
    from huggingface_hub import metadata_load

    try:
        return metadata_load(path) or {}
    except Exception:  # somebody else's card: whatever YAML it holds must not stop an export
        return {}


def _carried(checkpoint: L4QCheckpoint) -> dict[str, Any]:
    """What cards say: the checkpoint's own first, then those of the start; a licence comes from one card as a whole."""
    found = _wanted(front_matter(checkpoint.path / CARD_NAME))
    for name in _start_names(checkpoint):
        card = _wanted(front_matter(_start_card(name)))
        if HUB_ID.fullmatch(name) and not Path(name).exists():
            card["base_model"] = name  # and not what that model derives from
        found = {key: value for key, value in card.items() if not ("license" in found and key in LICENCE_KEYS)} | found
    return found if "license" in found else {**_licence(checkpoint), **found}


def _wanted(metadata: dict[str, Any]) -> dict[str, Any]:
    return {key: metadata[key] for key in CARRIED if metadata.get(key)}


def _start_card(name: str) -> Path:
    """Where the card of a start would be: in its folder, or in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    own = Path(name) / CARD_NAME
    cached = try_to_load_from_cache(name, CARD_NAME) if HUB_ID.fullmatch(name) and not own.exists() else None
    return Path(cached) if isinstance(cached, str) else own


def _start_names(checkpoint: L4QCheckpoint) -> list[str]:
    """What training started from, as a folder or an id of the hub."""
    named = (_run_options(checkpoint).get("model"), checkpoint.config.get("_name_or_path"))
    return list(dict.fromkeys(str(name) for name in named if name))


def _run_options(checkpoint: L4QCheckpoint) -> dict[str, Any]:
    """The options that the run's folder records beside its checkpoint; {} outside of one."""
    try:
        record = json.loads((checkpoint.path.resolve().parent / "config.json").read_text(encoding="utf-8"))
        options = record["options"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return options if isinstance(options, dict) else {}


def _licence(checkpoint: L4QCheckpoint) -> dict[str, str]:
    """The licence by its text, which travels with the checkpoint."""
    for path in find_side_files(checkpoint.path):
        if path.name.startswith("LICENSE"):
            text = path.read_text(encoding="utf-8", errors="replace")
            named = next((name for words, name in LICENSES.items() if re.search(words, text)), None)
            return {"license": named} if named else {"license": "other", "license_link": path.name}
    return {}
