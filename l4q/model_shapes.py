"""Whether the tensors of a checkpoint are those config.json describes, as far as names tell without transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from l4q.errors import UsageError

LAYER = re.compile(r"model\.layers\.([0-9]{1,9})\.(.+)")
EMBEDDING = "model.embed_tokens.weight"
MIXED = re.compile(r"expert|layer_types|moe|sparse|shared|first_k|interleave|block_types|pattern|hybrid|every")
"""Keys of architectures whose layers need not be alike."""


def check_shapes(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: object) -> None:
    """Refuse tensors that cannot be the config's: another embedding, other layers, a layer that lacks what others have.

    Only names of the Hugging Face decoders, `model.layers.N`, are looked at, and only what the config states.

    Args:
        config: Content of config.json.
        shapes: Shape by name of all dense tensors, and of the codes of quantized linears.
        where: For messages.

    Raises:
        UsageError: See above.
    """
    layers: dict[int, set[str]] = {}
    for name in shapes:
        found = LAYER.match(name)
        if found:
            # a linear left dense is the same part
            layers.setdefault(int(found[1]), set()).add(found[2].removesuffix(".weight"))
    count = config.get("num_hidden_layers")
    if not layers or not isinstance(count, int):
        return
    if sorted(layers) != list(range(count)):
        got = f"tensors of {len(layers)} layers, {min(layers)} to {max(layers)}"
        raise _other(where, got, f"layers 0 to {count - 1}, as num_hidden_layers says")
    sizes, embedding = (config.get("vocab_size"), config.get("hidden_size")), shapes.get(EMBEDDING)
    if None not in sizes and embedding != sizes:
        got = f"{EMBEDDING} {list(embedding)}" if embedding else f"no {EMBEDDING}"
        raise _other(where, got, f"[vocab_size, hidden_size] {list(sizes)}")
    if not any(MIXED.search(key) for key in config):
        parts = set[str]().union(*layers.values())
        for at, own in sorted(layers.items()):
            if parts - own:
                raise _other(where, f"no model.layers.{at}.{min(parts - own)}", "in every layer what the others have")


def _other(where: object, got: str, expected: str) -> UsageError:
    return UsageError(
        "the tensors are not those of config.json",
        where=where,
        got=got,
        expected=expected,
        remedy="files are missing or belong to another model: copy the whole folder again",
    )
