"""L4Q checkpoints whose headers are good and whose values or records are not."""

from __future__ import annotations

import json
from typing import Any

import torch

from runtime_tests.attacks.edit import Change, drop, header, record, set_item, tensors

MODULE = "model.layers.0.self_attn.q_proj"
NORM = "model.norm.weight"
NAN, INF = float("nan"), float("inf")


def _replace(part: str, tensor: torch.Tensor) -> Change:
    return tensors(lambda found: found.update({f"{MODULE}.{part}": tensor}))


def _said(**changes: Any) -> Change:
    return record(MODULE, lambda values: values.update(changes))


def _record_text(text: str) -> Change:
    return header(lambda entries: entries["__metadata__"].update({MODULE: text}))


def _rename(new: str) -> Change:
    """Give a module another name, in its tensors and in its record."""

    def change(entries: dict[str, Any]) -> None:
        entries["__metadata__"][new] = entries["__metadata__"].pop(MODULE)
        for part in ("codes", "scales", "zeros"):
            entries[f"{new}.{part}"] = entries.pop(f"{MODULE}.{part}")

    return header(change)


def _codes(change: Any) -> Change:
    name = f"{MODULE}.codes"
    return tensors(lambda found: found.update({name: change(found[name]).contiguous()}))


def _scales(change: Any) -> Change:
    return tensors(lambda found: change(found[f"{MODULE}.scales"]))


VALUES: dict[str, Change] = {
    "scale NaN": set_item(f"{MODULE}.scales", (0, 0), NAN),
    "scale infinite": set_item(f"{MODULE}.scales", (1, 0), INF),
    "scale minus infinity": set_item(f"{MODULE}.scales", (1, 1), -INF),
    "scale negative": set_item(f"{MODULE}.scales", (3, 1), -0.01),
    "scale 0": set_item(f"{MODULE}.scales", (0, 1), 0.0),
    "scale -0": set_item(f"{MODULE}.scales", (0, 1), -0.0),
    "all scales NaN": _scales(lambda scales: scales.fill_(NAN)),
    "zero-point 0": set_item(f"{MODULE}.zeros", (0, 0), 0),
    "zero-point 16": set_item(f"{MODULE}.zeros", (0, 0), 16),
    "zero-point 255": set_item(f"{MODULE}.zeros", (5, 1), 255),
    "norm NaN": set_item(NORM, (3,), NAN),
    "norm infinite": set_item(NORM, (3,), INF),
    "embedding NaN": set_item("model.embed_tokens.weight", (7, 7), NAN),
    "embedding minus infinity": set_item("model.embed_tokens.weight", (7, 7), -INF),
    "no scales": drop(f"{MODULE}.scales"),
    "no zero-points": drop(f"{MODULE}.zeros"),
    "no codes": drop(f"{MODULE}.codes"),
    "mins beside zero-points": _replace("mins", torch.zeros(128, 4, dtype=torch.float16)),
    "sub_scales without a K grid": _replace("sub_scales", torch.ones(128, 4, dtype=torch.uint8)),
    "codes as int8": _codes(lambda codes: codes.view(torch.int8)),
    "codes transposed": _codes(lambda codes: codes.T[:32]),
    "codes of three dimensions": _codes(lambda codes: codes[None]),
    "codes a scalar": _replace("codes", torch.tensor(3, dtype=torch.uint8)),
    "codes empty": _replace("codes", torch.zeros(0, 64, dtype=torch.uint8)),
    "scales in float32": _replace("scales", torch.ones(128, 4)),
    "scales of fewer groups": _replace("scales", torch.ones(128, 2, dtype=torch.float16)),
    "record missing": header(lambda entries: entries["__metadata__"].pop(MODULE)),
    "record not JSON": _record_text("{"),
    "record a list": _record_text("[1, 2]"),
    "record null": _record_text("null"),
    "record nested 100,000 deep": _record_text("[" * 100_000),
    "record shape infinite": _record_text(
        json.dumps({"shape": [INF, 128], "bits": 4, "group_size": 32, "zero_point": "integer"})
    ),
    "record shape fractions": _said(shape=[128.0, 128.0]),
    "record shape booleans": _said(shape=[True, True]),
    "record shape negative": _said(shape=[-128, -128]),
    "record shape 10**18": _said(shape=[10**18, 10**18]),
    "record shape of one size": _said(shape=[128]),
    "record shape as text": _said(shape="12"),
    "record bits 3": _said(bits=3),
    "record bits 1000": _said(bits=1000),
    "record group_size 64": _said(group_size=64),
    "record group_size 0": _said(group_size=0),
    "record zero_point float": _said(zero_point="float"),
    "record of a K grid": _said(scale_grid="q4_k"),
    "module without a name": _rename(""),
    "module named ../../x": _rename("../../x"),
    "module named by control characters": _rename("a\x1b[31m\x07\r\nb"),
    "module named by 5,000 digits": _rename("model.layers." + "9" * 5000 + ".q_proj"),
    "module named by superscript digits": _rename("model.layers.²³.q_proj"),
    "module named by markup": _rename("[/red][link=file:///]x"),
}
