"""GPTQ's `dynamic` rules: modules left dense, and modules whose group size is not the common one.

A key is "-:" (leave dense) or "+:" (other settings) and a regular expression on the module's name; the first that
matches holds. vLLM asks with the name of the fused layer (qkv_proj, gate_up_proj), GPTQModel with the module's own, so
a "+:" rule matches both.

Sources: gptqmodel 7.7.0, quantization/config.py (dynamic_get); vllm 0.32, layers/quantization/utils/gptq_utils.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from exporters.hf_plan import fused_members, group_sizes, skipped_linears
from l4q.checkpoint import L4QCheckpoint

SKIP, CHANGE = "-:", "+:"


def dynamic_rules(checkpoint: L4QCheckpoint) -> dict[str, dict[str, Any]]:
    """The rules of a checkpoint whose fused layers are each of one kind; empty if all modules are alike."""
    rules: dict[str, dict[str, Any]] = {f"{SKIP}^{re.escape(name)}$": {} for name in skipped_linears(checkpoint)}
    common = group_sizes(checkpoint)[0]
    for layer, members in fused_members(checkpoint).items():
        size = checkpoint.info(members[0]).stated_group_size
        if size != common:
            names = "|".join(map(re.escape, dict.fromkeys((*members, layer))))
            rules[f"{CHANGE}^(?:{names})$"] = {"group_size": size}
    return rules


def stated_group_size(module: str, section: Mapping[str, Any]) -> int | None:
    """The group size a config gives to a module; None if it says that the module is dense."""
    for key, changes in (section.get("dynamic") or {}).items():
        if re.match(key[len(SKIP) :], module):
            return None if key.startswith(SKIP) else int(changes.get("group_size", section["group_size"]))
    return int(section["group_size"])
