"""What the exporters, importers and l4q-inspect say about single tensors, rows and rotations, message by message."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch

from exporters import gguf as gguf_exporter
from exporters import judge
from exporters.awq import plan as plan_awq
from exporters.driver import get_exporter
from exporters.gguf.encode import Subject, choose_encoding
from exporters.inspect.open import open_source
from exporters.plan import ExportOptions
from l4q.config import QuantConfig
from l4q.errors import L4QError, UnsupportedError, UsageError, VerificationError
from l4q.importing import ImportOptions, import_model
from l4q.starts import open_start
from runtime_tests.import_sources import UP, exported, gptq_source, make_source, reorder
from runtime_tests.mixed_models import MIXES, mixed_checkpoint
from runtime_tests.random_models import random_weight
from runtime_tests.start_files import edit_section, edit_tensors
from runtime_tests.tiny_llama import tiny_checkpoint

DOWN = "model.layers.0.mlp.down_proj"
K_GRID = QuantConfig.from_dict({"scale_grid": "q4_k", "zero_point": "float", "bits": 4, "group_size": 32})


def test_what_plans_refuse(tmp_path: Path) -> None:
    """Options without room, block types that lack a grid's scales, embedding rows of half a block, mixed groups."""
    with pytest.raises(UsageError, match="no room for weights\n  where: max_shard_bytes\n  got: 0\n  expected: >= 1"):
        ExportOptions(max_shard_bytes=0)
    subject = Subject.of(random_weight((4, 256), K_GRID, 0))
    assert choose_encoding(subject, "auto").name == "Q4_K"
    message = "Q4_0 has one fp16 scale per block; the scales of q4_k are fp16 numbers times integers"
    with pytest.raises(UnsupportedError, match=f"{message}(?s:.*)do: use --gguf-type auto"):
        choose_encoding(subject, "Q4_0")
    dense = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    narrow = tiny_checkpoint(tmp_path, QuantConfig(group_size=32), dense_linears=dense, hidden_size=80)
    gguf_exporter.plan(narrow, ExportOptions(gguf_embeddings="f16"))
    with pytest.raises(UnsupportedError, match=r"Q8_0 rows must fill blocks of 32 columns(?s:.*)got: 80 columns"):
        gguf_exporter.plan(narrow, ExportOptions(gguf_embeddings="q8_0"))
    mixed = mixed_checkpoint(MIXES["groups"], tmp_path / "mixed")
    with pytest.raises(UnsupportedError, match=r"AWQ's config holds one group size(?s:.*)expected: group_size 64"):
        plan_awq(mixed, ExportOptions())


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF export of a small model."""
    base = tmp_path_factory.mktemp("gguf")
    return exported(make_source(base, {"bits": 4, "group_size": 32, "zero_point": "none"}), "gguf", base / "export")


def renamed(name: str) -> Callable[[bytes], bytes]:
    """A tensor has another name; lists that name it do not change."""

    def change(raw: bytes) -> bytes:
        before, after = raw.rsplit(name.encode(), 1)
        return before + name.encode()[::-1] + after

    return change


def retyped(name: str, sizes: int, kind: gguf.GGMLQuantizationType) -> Callable[[bytes], bytes]:
    """A tensor has another type of as many bytes."""

    def change(raw: bytes) -> bytes:
        place = raw.rindex(name.encode()) + len(name) + 4 + 8 * sizes
        return raw[:place] + struct.pack("<I", kind) + raw[place + 4 :]

    return change


def verify_gguf(path: Path) -> None:
    """What l4q-export does after writing."""
    dict(get_exporter("gguf").read_back(path.parent))


def start_gguf(path: Path) -> None:
    """What l4q-train does first."""
    start = open_start(str(path))
    assert start is not None
    start.load(torch.float32)


def import_gguf(path: Path) -> None:
    """l4q-import."""
    import_model(ImportOptions(source=str(path), out=path.parent / "imported", overwrite=True))


NORM = "output_norm.weight"
GGUF: dict[str, tuple[str, Callable[[Path], None], Callable[[bytes], bytes]]] = {
    "the file lacks quantized tensors it lists": (
        r"got: blk\.0\.ffn_up\.weight",
        verify_gguf,
        renamed("blk.0.ffn_up.weight"),
    ),
    "the GGUF file lacks tensors": (r"got: \['model\.norm\.weight'\]\n  do: copy it again", start_gguf, renamed(NORM)),
    "a tensor cannot be dequantized": (
        rf"where: .*{NORM}\n  got: NotImplementedError",
        import_gguf,
        retyped(NORM, 1, gguf.GGMLQuantizationType.I32),
    ),
}


@pytest.mark.parametrize("message", GGUF)
def test_gguf_files_that_are_damaged(gguf_file: Path, tmp_path: Path, message: str) -> None:
    """A tensor under another name, and one of a type without a decoder."""
    details, read, damage = GGUF[message]
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_file.read_bytes())
    read(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UsageError, match=f"{message}(?s:.*){details}"):
        read(path)


def test_a_plan_of_another_tensor(tmp_path: Path) -> None:
    """A tensor of more bytes than planned is noticed when it is written."""
    checkpoint = tiny_checkpoint(tmp_path, QuantConfig(group_size=32))
    plan = gguf_exporter.plan(checkpoint, ExportOptions())
    last = plan.tensors[-1]
    short = replace(plan, tensors=(*plan.tensors[:-1], replace(last, nbytes=last.nbytes - 32)))
    (tmp_path / "out").mkdir()
    message = f"a tensor is not as large as planned\n  got: {last.nbytes} bytes\n  expected: {last.nbytes - 32}"
    with pytest.raises(UsageError, match=message):
        gguf_exporter.write(checkpoint, short, tmp_path / "out", ExportOptions(), lambda name: None)


def test_a_source_that_changes_meanwhile(tmp_path: Path) -> None:
    """A module that gets activation order between two readings: l4q-inspect and l4q-import both notice."""
    _, source = gptq_source(tmp_path)
    entry = next(entry for entry in open_source(source).entries if entry.name == UP)
    assert entry.values is not None
    assert entry.values().codes.shape == entry.shape

    def change(module: str) -> None:
        if module != UP:
            reorder(source)

    with pytest.raises(VerificationError, match=rf"an imported module is not the source's\n  where: .*{UP}"):
        import_model(ImportOptions(source=str(source), out=tmp_path / "out"), change)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match=rf"a module changed while it was read\n  where: .*{UP}"):
        entry.values()


def test_folders_that_no_model_can_be_made_of(tmp_path: Path) -> None:
    """A GPTQ folder of an unknown model type or activation, with a word for sym, or zero-points of other groups."""
    _, source = gptq_source(tmp_path)
    text = (source / "config.json").read_text()
    cases: dict[str, tuple[type[L4QError], str]] = {
        "transformers cannot read config.json": (UsageError, text.replace('"llama"', '"nonsense"')),
        "transformers cannot build this model": (UnsupportedError, text.replace('"silu"', '"nonsense"')),
    }
    for message, (kind, changed) in cases.items():
        (source / "config.json").write_text(changed)
        start = open_start(str(source))
        assert start is not None
        with pytest.raises(kind, match=f"{message}(?s:.*)nonsense"):
            start.load(torch.float32)
    (source / "config.json").write_text(text)
    edit_section(source, sym="yes")
    start = open_start(str(source))
    assert start is not None
    with pytest.raises(UsageError, match=rf"sym is neither true nor false\n  where: .*{UP}\n  got: 'yes'"):
        start.values(UP)
    edit_section(source, sym=False)
    edit_tensors(source, lambda tensors: tensors.update({f"{DOWN}.scales": tensors[f"{DOWN}.scales"].reshape(-1)}))
    start = open_start(str(source))
    assert start is not None
    with pytest.raises(UsageError, match=rf"the tensors of a quantized module do not fit together\n  where: .*{DOWN}"):
        start.values(DOWN)
    edit_tensors(source, lambda tensors: tensors.update({f"{UP}.qzeros": tensors[f"{UP}.qzeros"][:2].clone()}))
    start = open_start(str(source))
    assert start is not None
    message = rf"zero-points and scales have different groups\n  where: .*{UP}\.qzeros\n  got: 2\n  expected: 3"
    with pytest.raises(UsageError, match=message):
        start.values(UP)


def test_a_missing_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without compressed-tensors nobody can judge 3-bit fields; 4-bit ones need no newer version."""
    monkeypatch.setattr(judge, "JUDGE", "no-such-package")
    assert not judge.needs_newer_judge(4)
    message = "verifying 3-bit fields needs the compressed-tensors package, whose decoder judges the bits"
    with pytest.raises(UsageError, match=f"{message}(?s:.*)do: pip install 'compressed-tensors>=0.18'"):
        judge.needs_newer_judge(3)
