"""Q4_K and Q3_K: gguf-py and llama.cpp decode our superblocks to the trained weights, and notice every damage."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gguf
import gguf.quants
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from exporters import awq, compressed_tensors, gptq, onnx
from exporters import gguf as gguf_exporter
from exporters.cli import command
from exporters.gguf.encode import encode, encoded_nbytes
from exporters.gguf.pack_k import SUPERBLOCK_BYTES, pack_q3_k, pack_q4_k, unpack_q3_k, unpack_q4_k
from exporters.plan import ExportOptions, Fidelity
from exporters.verify import verify
from l4q.checkpoint import L4QCheckpoint
from l4q.config import QuantConfig
from l4q.errors import UnsupportedError, UsageError
from l4q.weight import QuantizedWeight
from runtime_tests import random_models
from runtime_tests.engines.ggml_rows import dequantize_rows, quantize_rows
from runtime_tests.engines.llamacpp_engine import Engine
from runtime_tests.gguf_models import export_gguf, make_checkpoint, random_weight, same_bits, torch_logprobs
from runtime_tests.test_gguf_export import fields, gguf_file, wrong_modules
from runtime_tests.test_gguf_pack import choose, decode
from runtime_tests.test_k_grids import GRIDS, Q3_K, Q4_K
from runtime_tests.test_llamacpp_engine import divergence

TYPES = {"q4_k": "Q4_K", "q4_k-none": "Q4_K", "q3_k": "Q3_K"}
# 8 query heads of 24 columns: rows of o_proj, 192 wide, do not fill a superblock.
MIXED: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "head_dim": 24}
IDS = [int(token) for token in np.random.default_rng(0).integers(0, 320, 60)]

# llama.cpp rounds activations to int8 per 256 columns for K types: measured KL 1.3e-4 to 8.0e-4 on these models.
K_TYPE_KL = 0.002
DAMAGED_KL = 0.02
"""Measured 0.04 to 3.3 with one layer's d doubled."""


def random_fields(kind: str, rows: int, superblocks: int, seed: int) -> tuple[np.ndarray, ...]:
    """Arguments of a packer over the whole range of every field, negative and huge fp16 numbers among them."""
    rng = np.random.default_rng(seed)
    groups, limit, top = {"Q4_K": (8, 16, 64), "Q3_K": (16, 8, 32)}[kind]
    codes = rng.integers(0, limit, (rows, superblocks * 256), dtype=np.uint8)
    halves = [rng.uniform(-9, 9, (rows, superblocks)).astype(np.float16) for _ in range(2)]
    integers = [rng.integers(0, top, (rows, superblocks * groups), dtype=np.uint8) for _ in range(2)]
    if kind == "Q3_K":
        return codes, halves[0], integers[0]
    return codes, halves[0], integers[0], halves[1], integers[1]


def equation(kind: str, codes: np.ndarray, d: np.ndarray, sc: np.ndarray, *mins: np.ndarray) -> np.ndarray:
    """The block type's own equation in float32, in ggml's order of operations."""

    def spread(half: np.ndarray, integers: np.ndarray) -> np.ndarray:
        groups = integers.shape[1]
        values = np.repeat(half.astype(np.float32), groups // half.shape[1], axis=1) * integers.astype(np.float32)
        return np.repeat(values, codes.shape[1] // groups, axis=1)

    if kind == "Q3_K":
        return spread(d, sc) * (codes.astype(np.float32) - np.float32(4))
    return spread(d, sc) * codes.astype(np.float32) - spread(*mins)


PACKERS: dict[str, tuple[Any, Any]] = {"Q4_K": (pack_q4_k, unpack_q4_k), "Q3_K": (pack_q3_k, unpack_q3_k)}


@pytest.mark.parametrize("kind", PACKERS)
def test_llama_cpp_decodes_the_same(kind: str) -> None:
    """llama.cpp's own C dequantizer gives gguf-py's bits; the reading of its own Q4_K and Q3_K repacks to its bytes."""
    packed = PACKERS[kind][0](*random_fields(kind, 5, 3, 2))
    assert same_bits(dequantize_rows(packed, kind), decode(packed, kind))
    damaged = packed.copy()
    damaged[3, 50] ^= 16
    assert not same_bits(dequantize_rows(damaged, kind), decode(packed, kind))
    values = np.random.default_rng(0).normal(0, 0.02, (6, 768)).astype(np.float32)
    theirs = quantize_rows(values, kind)
    if kind == "Q4_K":
        assert np.array_equal(pack_q4_k(*unpack_q4_k(theirs)), theirs)
    else:
        codes, d, signed = unpack_q3_k(theirs)  # llama.cpp's d is negative, and so are some of its integers
        assert same_bits(decode(theirs, kind), equation(kind, codes, d, signed))


@pytest.mark.parametrize("kind", PACKERS)
@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 4), superblocks=st.integers(1, 4), seed=st.integers(0, 2**32 - 1))
def test_foreign_decoder_and_own_inverse(kind: str, rows: int, superblocks: int, seed: int) -> None:
    """gguf-py returns the equation's values bit for bit, for any fields; unpack returns what was packed."""
    pack, unpack = PACKERS[kind]
    packed_fields = random_fields(kind, rows, superblocks, seed)
    packed = pack(*packed_fields)
    assert packed.shape == (rows, superblocks * SUPERBLOCK_BYTES[kind])
    assert same_bits(decode(packed, kind), equation(kind, *packed_fields))
    for got, expected in zip(unpack(packed), packed_fields, strict=True):
        assert np.array_equal(got, expected)


def test_golden_bytes() -> None:
    """One superblock of each type, byte for byte as ggml-common.h and ggml-quants.c lay it out."""
    codes = (np.arange(256, dtype=np.uint8)[None] // 2) % 16
    half = np.full((1, 1), 0.5, np.float16)
    sc, mn = np.arange(10, 66, 7, dtype=np.uint8)[None], np.arange(63, 0, -8, dtype=np.uint8)[None]
    # sc 10 17 24 31 38 45 52 59, mn 63 55 47 39 31 23 15 7: the high pairs of groups 4..7 ride on groups 0..3
    scales = "8a91d8df" + "7f772f27" + "f67df47b"
    nibbles = "".join(f"{((j // 2) % 16) | ((j // 2) % 16) << 4:02x}" for j in range(32)) * 4
    assert pack_q4_k(codes, half, sc, -half, mn).tobytes().hex() == "003800b8" + scales + nibbles
    codes = np.tile(np.arange(8, dtype=np.uint8), 32)[None]
    sc = np.arange(16, dtype=np.uint8)[None] * 2
    # columns 4..7 of every eight have the high bit; sc + 32 = 32, 34 ... 62: low nibbles 0 2 .. e twice, high pairs 2 3
    expected = "00000000ffffffff" * 4 + "0055aaff" * 16 + "0022446688aaccee" + "fafafafa" + "0038"
    assert pack_q3_k(codes, half, sc).tobytes().hex() == expected


@pytest.mark.parametrize("name", GRIDS)
def test_decoder_notices_damage(name: str) -> None:
    """The checkpoint's weights exactly; a flipped code bit, integer, d or dmin, or two swapped rows change them."""
    kind, weight = TYPES[name], random_models.random_weight((4, 512), GRIDS[name], 1)
    packed = encode(weight, kind)
    assert packed.nbytes == encoded_nbytes(weight.shape, kind)
    assert same_bits(decode(packed, kind), weight.dequantize())
    places = {"Q4_K": (0, 2, 4, 13, 100), "Q3_K": (3, 40, 97, 105, 108)}[kind]
    for place in places:
        damaged = packed.copy()
        damaged[2, place] ^= 1
        assert not same_bits(decode(damaged, kind), weight.dequantize()), place
    assert not same_bits(decode(packed[[1, 0, 2, 3]], kind), weight.dequantize())


@pytest.mark.parametrize(
    ("grid", "kind"),
    [
        ({"zero_point": "none", "group_size": 256}, "Q4_K"),
        ({"zero_point": "integer", "group_size": 512}, "Q4_K"),
        ({"zero_point": "float", "group_size": 256}, "Q4_K"),
        ({"zero_point": "integer", "group_size": 256, "bits": 3}, "Q4_K"),
        ({"zero_point": "none", "group_size": 256, "bits": 3}, "Q3_K"),
        ({"zero_point": "none", "group_size": 512, "bits": 2}, "Q3_K"),
    ],
)
def test_whole_superblocks_fit_on_request(grid: dict[str, Any], kind: str) -> None:
    """A fp16-grid weight whose groups are whole superblocks is exact in a K type too, which auto leaves alone."""
    weight = random_weight((3, 512), scale_mask=0xFFFF, **grid)
    assert choose(weight).name not in SUPERBLOCK_BYTES
    assert choose(weight, kind).fidelity is Fidelity.EXACT
    assert same_bits(decode(encode(weight, kind), kind), weight.dequantize())


def test_k_types_refuse_other_weights() -> None:
    """Smaller groups, short rows, four bits or zero-points in Q3_K, and a dmin beyond fp16 are refused by name."""
    for weight, kind, message in (
        (random_weight((3, 512), group_size=64), "Q4_K", "groups of 64 columns are on the fp16 grid"),
        (random_weight((3, 192), group_size=192), "Q4_K", "in_features 192 is no multiple of 256"),
        (random_weight((3, 256), group_size=256), "Q3_K", "at most 3 bits"),
        (random_weight((3, 256), group_size=256, bits=3, zero_point="integer"), "Q3_K", "symmetric codes"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            choose(weight, kind)
    huge = QuantizedWeight(
        codes=np.zeros((1, 256), np.uint8), scales=np.full((1, 1), 60000, np.float16), bits=4, group_size=256
    )
    with pytest.raises(UnsupportedError, match="overflows fp16"):
        choose(huge, "Q4_K")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: np.full((1, 256), 16, np.uint8)}, "code out of range"),
        ({0: np.zeros((1, 128), np.uint8)}, "do not fill superblocks"),
        ({1: np.ones((1, 2), np.float16)}, "superblock numbers do not match"),
        ({3: np.ones((1, 1), np.float32)}, "superblock numbers do not match"),
        ({2: np.full((1, 8), 64, np.uint8)}, "group integer out of range"),
        ({4: np.ones((1, 16), np.uint8)}, "group integers do not match"),
    ],
)
def test_wrong_input_is_named(change: dict[int, Any], message: str) -> None:
    """Fields that no superblock holds are refused with what was found."""
    arguments = [change.get(place, field) for place, field in enumerate(random_fields("Q4_K", 1, 1, 0))]
    with pytest.raises(UsageError, match=message):
        pack_q4_k(*arguments)


@pytest.fixture(scope="module", params=list(GRIDS))
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, L4QCheckpoint, Path]:
    """A mixed checkpoint on each K grid, exported in its blocks and as F32."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = make_checkpoint(folder / "l4q", GRIDS[request.param], **MIXED)
    export_gguf(checkpoint, folder / "blocks")
    export_gguf(checkpoint, folder / "f32", gguf_type="F32")
    return request.param, checkpoint, folder


def test_mixed_file(exported: tuple[str, L4QCheckpoint, Path]) -> None:
    """K blocks where 256 divides the row, Q4_0 or Q4_1 elsewhere, each with its reason; all exact, labelled as K."""
    name, checkpoint, folder = exported
    plan = gguf_exporter.plan(checkpoint, ExportOptions())
    fallback = "Q4_1" if name == "q4_k" else "Q4_0"
    kinds = {tensor.name: tensor.encoding for tensor in plan.quantized}
    assert kinds == {m: fallback if m.endswith("o_proj") else TYPES[name] for m in checkpoint.modules}
    assert not plan.rounded
    assert all(("no multiple of 256" in t.reason) == t.name.endswith("o_proj") for t in plan.quantized)
    assert any(note.startswith("2 of 14 quantized tensors are off the K grid") for note in plan.notes)
    assert wrong_modules(checkpoint, folder / "blocks") == []
    assert wrong_modules(checkpoint, folder / "f32") == []
    assert gguf_file(folder / "blocks").name == f"l4q-{TYPES[name]}.gguf"
    label = {"Q4_K": gguf.LlamaFileType.MOSTLY_Q4_K_S, "Q3_K": gguf.LlamaFileType.MOSTLY_Q3_K_S}[TYPES[name]]
    assert fields(folder / "blocks")["general.file_type"] == label


def test_read_back_notices_damage(exported: tuple[str, L4QCheckpoint, Path], tmp_path: Path) -> None:
    """One flipped bit of the file is one wrong module."""
    _, checkpoint, folder = exported
    shutil.copytree(folder / "blocks", tmp_path / "bad")
    file = gguf_file(tmp_path / "bad")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    data = bytearray(file.read_bytes())
    data[tensors["blk.1.attn_k.weight"].data_offset + 104] ^= 1
    file.write_bytes(data)
    assert wrong_modules(checkpoint, tmp_path / "bad") == ["model.layers.1.self_attn.k_proj"]


def test_llama_cpp_runs_the_blocks(
    exported: tuple[str, L4QCheckpoint, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F32 gives torch's numbers, K blocks those within activation noise; one layer's doubled d is far outside."""
    _, checkpoint, folder = exported
    oracle = torch_logprobs(checkpoint, IDS)
    f32, blocks = (_logprobs(folder / name) for name in ("f32", "blocks"))
    assert np.abs(f32 - oracle).max() < 2e-4
    assert divergence(f32, blocks) < K_TYPE_KL
    assert np.abs(blocks - f32).max() > 1e-4  # the blocks' own kernels ran
    weights = {module: checkpoint.packed(module) for module in checkpoint.modules}
    weights["model.layers.0.self_attn.v_proj"].scales[:] *= np.float16(2)
    shutil.copytree(checkpoint.path, tmp_path / "bad")
    bad = L4QCheckpoint.open(tmp_path / "bad")
    monkeypatch.setattr(bad, "packed", weights.__getitem__)
    export_gguf(bad, tmp_path / "out")
    assert divergence(f32, _logprobs(tmp_path / "out")) > DAMAGED_KL


def _logprobs(folder: Path) -> np.ndarray:
    engine = Engine(str(folder), n_threads=1, kv="f32")
    try:
        return engine.prompt_logprobs(IDS)
    finally:
        engine.close()


def test_onnx_holds_every_k_grid(exported: tuple[str, L4QCheckpoint, Path], tmp_path: Path) -> None:
    """ONNX's float32 scales hold d * sc, judged by onnx.reference; float16 scales are refused."""
    name, checkpoint, _ = exported
    options = ExportOptions()
    plan = onnx.plan(checkpoint, options)
    assert not plan.rounded
    block = "block 16" if name == "q3_k" else "block 32"
    assert sum(block in tensor.encoding for tensor in plan.quantized) >= 12
    onnx.write(checkpoint, plan, tmp_path, options, lambda _: None)
    report = verify(checkpoint, onnx, tmp_path)
    assert report.passed, report.differing
    with pytest.raises(UnsupportedError, match=r"(?s)17 significant bits.*--onnx-scales float32"):
        onnx.plan(checkpoint, ExportOptions(onnx_scales="float16"))


@pytest.mark.parametrize("exporter", [gptq, awq, compressed_tensors], ids=["gptq", "awq", "compressed-tensors"])
@pytest.mark.parametrize("quant", [Q4_K, Q3_K], ids=["q4_k", "q3_k"])
def test_formats_of_fp16_scales_refuse(exporter: Any, quant: QuantConfig, tmp_path: Path) -> None:
    """Their scales are fp16, d * sc is not; the message names the formats that hold it."""
    checkpoint = make_checkpoint(tmp_path / "l4q", quant, **MIXED)
    with pytest.raises(UnsupportedError, match=r"(?s)stores fp16 scales.*export to gguf .*or onnx"):
        exporter.plan(checkpoint, ExportOptions())


def test_other_block_types_are_refused(tmp_path: Path) -> None:
    """--gguf-type Q4_1 for a K grid, or Q4_K for its fallback layers, names auto; the command line knows the types."""
    checkpoint = make_checkpoint(tmp_path / "l4q", Q4_K, **MIXED)
    with pytest.raises(UnsupportedError, match=r"(?s)Q4_1 has one fp16 scale per block.*--gguf-type auto"):
        gguf_exporter.plan(checkpoint, ExportOptions(gguf_type="Q4_1"))
    with pytest.raises(UnsupportedError, match="in_features 192 is no multiple of 256"):
        gguf_exporter.plan(checkpoint, ExportOptions(gguf_type="Q4_K"))
    arguments = [str(tmp_path / "l4q"), "--to", "gguf", "--out", str(tmp_path / "out"), "--gguf-type", "Q3_K"]
    result = CliRunner().invoke(command, arguments)
    assert isinstance(result.exception, UnsupportedError)
    assert not (tmp_path / "out").exists()
