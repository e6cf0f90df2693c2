"""GPTQ, AWQ and compressed-tensors folders whose tensors or quantization configs lie."""

from __future__ import annotations

from typing import Any

import torch

from runtime_tests.attacks.edit import CONFIG, Change, drop, json_file, section, set_item, tensors

MODULE = "model.layers.0.self_attn.q_proj"
NAN, INF = float("nan"), float("inf")


def _change(part: str, change: Any) -> Change:
    """Replace a part of the module by what `change` makes of it."""

    def apply(found: dict[str, torch.Tensor]) -> None:
        found[f"{MODULE}.{part}"] = change(found[f"{MODULE}.{part}"]).contiguous()

    return tensors(apply)


def _add(part: str, tensor: torch.Tensor) -> Change:
    return tensors(lambda found: found.update({f"{MODULE}.{part}": tensor}))


def _weights(**changes: Any) -> Change:
    """Change the weights section of a compressed-tensors config."""

    def change(content: dict[str, Any]) -> None:
        for group in content["quantization_config"]["config_groups"].values():
            group["weights"].update(changes)

    return json_file(CONFIG, change)


def _targets(*targets: Any) -> Change:
    def change(content: dict[str, Any]) -> None:
        for group in content["quantization_config"]["config_groups"].values():
            group["targets"] = list(targets)

    return json_file(CONFIG, change)


SLOW = "(a|aa)*(m|mm|mo|o|d|e|l|.)*$"
_COMMON: dict[str, Change] = {
    "scale NaN": set_item(f"{MODULE}.scales", (0, 0), NAN),
    "scale infinite": set_item(f"{MODULE}.scales", (0, 0), INF),
    "scales as integers": _change("scales", lambda scales: scales.to(torch.int32)),
    "scales of one dimension": _change("scales", lambda scales: scales.reshape(-1)),
    "scales of no groups": _change("scales", lambda scales: scales[:0]),
    "scales of another width": _change("scales", lambda scales: scales[:, :-8]),
    "words as int64": _change("qweight", lambda words: words.to(torch.int64)),
    "words of one dimension": _change("qweight", lambda words: words.reshape(-1)),
    "words a scalar": _change("qweight", lambda words: words[0, 0]),
    "words cut": _change("qweight", lambda words: words[:-3]),
    "zero-points of another width": _change("qzeros", lambda words: words[:, :-1]),
    "zero-points of other groups": _change("qzeros", lambda words: words[:-1]),
    "zero-points as float": _change("qzeros", lambda words: words.float()),
    "no scales": drop(f"{MODULE}.scales"),
    "bits 1000": section(bits=1000),
    "bits as text": section(bits="4"),
    "bits a boolean": section(bits=True),
    "dense tensor NaN": set_item("model.norm.weight", (0,), NAN),
    "an extra tensor": tensors(lambda found: found.update({"model.layers.7.mlp.up_proj.weight": torch.ones(8, 8)})),
    "a missing tensor": drop("model.norm.weight"),
}
GPTQ: dict[str, Change] = {
    **_COMMON,
    "zero-points that contradict sym": set_item(f"{MODULE}.qzeros", (0, 0), 0x12345678),
    "g_idx out of range": _add("g_idx", torch.full((128,), 99, dtype=torch.int32)),
    "g_idx negative": _add("g_idx", torch.full((128,), -1, dtype=torch.int32)),
    "g_idx too long": _add("g_idx", torch.zeros(1 << 20, dtype=torch.int32)),
    "g_idx empty": _add("g_idx", torch.zeros(0, dtype=torch.int32)),
    "g_idx of two dimensions": _add("g_idx", torch.zeros(128, 2, dtype=torch.int32)),
    "g_idx NaN": _add("g_idx", torch.full((128,), NAN)),
    "checkpoint_format a list": section(checkpoint_format=["gptq"]),
    "dynamic a list": section(dynamic=[1]),
    "dynamic without end": section(dynamic={f"+:{SLOW}": {"bits": 4}}),
    "dynamic nested repeats": section(dynamic={"+:(.*)*(.*)*!": {"bits": 4}}),
    "dynamic not a pattern": section(dynamic={"+:((": {"bits": 4}}),
    "dynamic options a number": section(dynamic={"+:.*": 3}),
    "sym as text": section(sym="false"),
    "quant_method unknown": section(quant_method="quip"),
}
AWQ: dict[str, Change] = {
    **_COMMON,
    "no zero-points": drop(f"{MODULE}.qzeros"),
    "version a list": section(version=["gemm"]),
    "zero_point false with other points": section(zero_point=False),
}
CT: dict[str, Change] = {
    "scale NaN": set_item(f"{MODULE}.weight_scale", (0, 0), NAN),
    "scales of one dimension": _change("weight_scale", lambda scales: scales.reshape(-1)),
    "weight_shape 2**60": _change("weight_shape", lambda shape: torch.tensor([1 << 60, 1 << 60])),
    "weight_shape negative": _change("weight_shape", lambda shape: -shape),
    "weight_shape of one size": _change("weight_shape", lambda shape: shape[:1]),
    "weight_shape empty": _change("weight_shape", lambda shape: shape[:0]),
    "weight_shape swapped": _change("weight_shape", lambda shape: torch.tensor([64, 256])),
    "words as int8": _change("weight_packed", lambda words: words.to(torch.int8)),
    "words cut": _change("weight_packed", lambda words: words[:, :-1]),
    "words of fewer rows": _change("weight_packed", lambda words: words[:-8]),
    "zero-points cut": _change("weight_zero_point", lambda words: words[:-1]),
    "num_bits 1000": _weights(num_bits=1000),
    "num_bits as text": _weights(num_bits="4"),
    "num_bits a list": _weights(num_bits=[4]),
    "num_bits a boolean": _weights(num_bits=True),
    "strategy an object": _weights(strategy={}),
    "float type": _weights(type="float"),
    "config_groups a list": section(config_groups=[1]),
    "config_groups empty": section(config_groups={}),
    "config group a number": section(config_groups={"group_0": 1}),
    "targets numbers": _targets(1, 2),
    "target without end": _targets(f"re:{SLOW}"),
    "target not a pattern": _targets("re:(("),
    "no target": _targets("re:nothing"),
    "format unknown": section(format="marlin"),
}
