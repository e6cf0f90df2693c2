"""Every attack: which good folder it damages, how, and which entries must refuse the result."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from runtime_tests.attacks import configs, gguf_files, onnx_files, safetensors_files, starts, training, values
from runtime_tests.attacks.edit import Change
from runtime_tests.attacks.entries import EXPORTS


@dataclass(frozen=True, kw_only=True)
class Attack:
    """One damaged folder."""

    area: str
    name: str
    base: str
    """A key of `bases.build_bases`."""
    change: Change
    entries: tuple[str, ...]
    flags: tuple[str, ...] = ()
    """Further arguments of l4q-train."""

    @property
    def label(self) -> str:
        """Name in test reports."""
        return f"{self.area}: {self.name}"


L4Q = ("read", "inspect", *EXPORTS)
TRAIN = ("train", "train hub id")
DENSE = ("inspect", *TRAIN)
START = ("inspect", "import", "train")


def _table(area: str, base: str, changes: dict[str, Change], entries: tuple[str, ...]) -> list[Attack]:
    return [Attack(area=area, name=name, base=base, change=change, entries=entries) for name, change in changes.items()]


def _checkpoint(area: str, changes: dict[str, Change], also: tuple[str, ...] = ("inspect",)) -> list[Attack]:
    """Attacks on an L4Q checkpoint: read, and exported to two formats, which take turns."""
    return [
        replace(attack, entries=("read", *also, *(EXPORTS[(number + step) % len(EXPORTS)] for step in (0, 2))))
        for number, attack in enumerate(_table(area, "l4q", changes, ()))
    ]


def _nothing(folder: Path) -> None:
    """The attack is in the arguments."""


# config.json of a dense folder says nothing that l4q-inspect reads beyond its JSON and its limits
ATTACKS: tuple[Attack, ...] = (
    *_checkpoint("checkpoint header", safetensors_files.HEADERS),
    *_checkpoint("checkpoint index", safetensors_files.INDEXES),
    *_checkpoint("checkpoint config", configs.CONFIGS),
    *_checkpoint("checkpoint section", configs.SECTIONS, ()),
    *_table("checkpoint links", "l4q", configs.LINKS, ("read", "export awq", "export onnx")),
    *_checkpoint("checkpoint values", values.VALUES, ()),
    *_table("checkpoint tokenizer", "l4q", configs.TOKENIZERS, ("export gguf",)),
    *_table("model header", "dense", safetensors_files.HEADERS, DENSE),
    *_table("model index", "dense", safetensors_files.INDEXES, DENSE),
    *_table("model config", "dense", configs.CONFIGS, TRAIN),
    *_table("model tokenizer", "dense", configs.TOKENIZERS, TRAIN),
    *_table("model code", "dense", configs.CODE, TRAIN),
    *_table("start code", "gptq", configs.CODE, ("train", "import")),
    *_table("gptq header", "gptq", safetensors_files.HEADERS, ("import", "verify gptq")),
    *_table("gptq", "gptq", starts.GPTQ, ("import", "train")),
    *_table("awq", "awq", starts.AWQ, ("import", "train")),
    *_table("compressed-tensors", "compressed-tensors", starts.CT, ("import", "train")),
    *_table("gguf", "gguf", gguf_files.GGUF, ("inspect", "import", "train", "verify gguf")),
    *_table("gguf model", "gguf", gguf_files.GGUF_MODELS, ("import", "train")),
    *_table("onnx", "onnx", onnx_files.ONNX, ("inspect", "verify onnx")),
    *_table("training data", "data", training.DATA, ("records", "data")),
    *_table("onnx graph", "onnx", onnx_files.ONNX_NODES, ("verify onnx",)),
    *(
        Attack(area="options", name=name, base="dense", change=_nothing, entries=("train",), flags=flags)
        for name, flags in training.OPTIONS.items()
    ),
)

# The same entries on undamaged folders, which they must accept: otherwise a refusal would prove nothing.
GOOD: tuple[tuple[str, str], ...] = (
    *(("l4q", entry) for entry in L4Q if entry != "export gptq"),  # whose loader in vLLM wants symmetric weights
    ("none", "export gptq"),
    *(("dense", entry) for entry in DENSE),
    *((name, "import") for name in ("gptq", "awq", "compressed-tensors", "gguf")),
    *((name, f"verify {name}") for name in ("gptq", "awq", "compressed-tensors", "gguf", "onnx")),
    *((name, "inspect") for name in ("gptq", "awq", "compressed-tensors", "gguf", "onnx")),
    ("gptq", "train"),
    ("gguf", "train"),
)
