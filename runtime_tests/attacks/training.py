"""Training files that are garbage, options out of range, and patterns that match nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from runtime_tests.attacks.edit import Change

TEXT, LINES, LIST = "train.txt", "train.jsonl", "train.json"


def _lines(*values: Any) -> Change:
    return lambda folder: (folder / LINES).write_text("\n".join(json.dumps(value) for value in values))


def _raw(content: bytes, name: str = LINES) -> Change:
    return lambda folder: (folder / name).write_bytes(content)


def _chat(*messages: Any) -> Change:
    return _lines({"messages": list(messages)})


def _turn(role: Any, content: Any = "x") -> dict[str, Any]:
    return {"role": role, "content": content}


def _pipe(folder: Path) -> None:
    os.mkfifo(folder / LINES)


# A folder with one of the three files; the entry finds it by its suffix
DATA: dict[str, Change] = {
    "lines empty": _raw(b""),
    "lines of spaces": _raw(b" \n\n \n"),
    "lines not UTF-8": _raw(b'{"text": "\xff"}'),
    "lines not JSON": _raw(b'{"text": "a"}\n{"text": '),
    "lines of random bytes": _raw(bytes(range(256)) * 64),
    "lines nested 100,000 deep": _raw(b'{"text": ' + b"[" * 100_000),
    "lines with an integer of 5,000 digits": _raw(b'{"text": ' + b"9" * 5000 + b"}"),
    "lines of numbers": _lines(1, 2),
    "lines of lists": _lines([1]),
    "lines of null": _lines(None),
    "text a number": _lines({"text": 1}),
    "text NaN": _raw(b'{"text": NaN}'),
    "text null": _lines({"text": None}),
    "half a surrogate pair": _raw(b'{"text": "a\\ud800b"}'),
    "unknown keys": _lines({"text": "a", "label": 1}),
    "prompt without completion": _lines({"prompt": "a"}),
    "completion a list": _lines({"prompt": "a", "completion": ["b"]}),
    "messages empty": _chat(),
    "messages as text": _lines({"messages": "hi"}),
    "message a number": _chat(1),
    "message of role root": _chat(_turn("root"), _turn("assistant")),
    "message role a list": _chat(_turn(["user"]), _turn("assistant")),
    "message content an object": _chat(_turn("user", {"a": 1}), _turn("assistant")),
    "message with other keys": _chat({"role": "user", "content": "a", "tool": 1}),
    "no answer": _chat(_turn("user")),
    "text a pipe": _pipe,
    "text a link to /dev/zero": lambda folder: os.symlink("/dev/zero", folder / TEXT),
    "list an object": _raw(b'{"text": "a"}', LIST),
    "list nested 100,000 deep": _raw(b"[" * 100_000, LIST),
    "list with a bad record": _raw(b'[{"text": "a"}, 3]', LIST),
    "unknown suffix": _raw(b"a", "train.csv"),
}

# Arguments of l4q-train
OPTIONS: dict[str, tuple[str, ...]] = {
    "group size 0": ("--group-size", "0"),
    "group size 2**70": ("--group-size", str(1 << 70)),
    "rank 0": ("--rank", "0"),
    "rank 10**12": ("--rank", str(10**12)),
    "alpha NaN": ("--alpha", "nan"),
    "dropout 1": ("--dropout", "1"),
    "dropout NaN": ("--dropout", "nan"),
    "learning rate NaN": ("--lr", "nan"),
    "learning rate infinite": ("--lr", "inf"),
    "learning rate negative": ("--lr", "-1"),
    "scale learning rate NaN": ("--scale-lr", "nan"),
    "weight decay infinite": ("--weight-decay", "inf"),
    "warm-up NaN": ("--warmup-ratio", "nan"),
    "gradient norm negative": ("--max-grad-norm", "-1"),
    "steps 10**30": ("--steps", str(10**30)),
    "epochs NaN": ("--epochs", "nan"),
    "epochs 1e300": ("--epochs", "1e300"),
    "batch of 10**30": ("--batch-size", str(10**30)),
    "batch of 0": ("--batch-size", "0"),
    "seed negative": ("--seed", "-1"),
    "seed 2**70": ("--seed", str(1 << 70)),
    "length 1": ("--max-length", "1"),
    "length 10**12": ("--max-length", str(10**12)),
    "calibration 0": ("--init", "calibrated", "--calibration", "0"),
    "override without field": ("--override", "*.q_proj"),
    "override of 5,000 digits": ("--override", f"*:bits={'9' * 5000}"),
    "override of an unknown field": ("--override", "*:__class__=x"),
    "override bits 1000": ("--override", "*:bits=1000"),
    "override that matches nothing": ("--override", "nothing.*:bits=3"),
    "skip that matches nothing": ("--skip", "nothing.*"),
    "target that matches nothing": ("--target-modules", "[!a-z]"),
}
