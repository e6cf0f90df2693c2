"""Widths of fields: which are taken, which are refused with what words, and what the plan says of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporters.container import (
    NIBBLES,
    container_bits,
    container_notes,
    describe,
    why_exact,
    widen_packed,
)
from exporters.plan import ExportOptions
from l4q.checkpoint import L4QCheckpoint
from l4q.config import QuantConfig
from l4q.errors import UnsupportedError
from l4q.packed_weight import PackedWeight
from runtime_tests.random_models import build_model, random_weight, save_random
from runtime_tests.tiny_llama import SIZES, tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[int, L4QCheckpoint]:
    """By bits."""
    folder = tmp_path_factory.mktemp("bits")
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "head_dim": 16,
        "vocab_size": 32,
    }
    return {
        bits: tiny_checkpoint(folder / str(bits), QuantConfig(bits=bits, group_size=32), **sizes) for bits in (2, 3, 4)
    }


def test_widths_are_those_asked_for(checkpoints: dict[int, L4QCheckpoint]) -> None:
    """4 bits unless the user says otherwise; any width of the format that holds the codes."""
    for bits, checkpoint in checkpoints.items():
        assert container_bits(checkpoint, ExportOptions()) == 4
        for width in (2, 3, 4):
            if width >= bits:
                assert container_bits(checkpoint, ExportOptions(container_bits=width)) == width


def test_other_widths_are_refused(checkpoints: dict[int, L4QCheckpoint]) -> None:
    """Each refusal says what was asked, what there is, and what helps."""
    with pytest.raises(UnsupportedError) as caught:
        container_bits(checkpoints[2], ExportOptions(container_bits=3), NIBBLES)
    assert str(caught.value).splitlines() == [
        "codes of this width cannot be written",
        "  where: container_bits",
        "  got: 3",
        "  expected: one of [4]",
        "  do: leave --container-bits out: codes of 2 and 3 bits are held exactly by 4-bit fields",
    ]
    with pytest.raises(UnsupportedError) as caught:
        container_bits(checkpoints[4], ExportOptions(container_bits=3))
    assert str(caught.value).splitlines() == [
        "the codes do not fit the container",
        "  where: container_bits",
        "  got: bits [4]",
        "  expected: at most 3",
        "  do: leave --container-bits out, or train with fewer --bits",
    ]


def test_plans_say_what_the_fields_cost(checkpoints: dict[int, L4QCheckpoint], tmp_path: Path) -> None:
    """Nothing at 4 bits in 4; the width where it is more than the codes'; the words where it is not 4."""
    wide = "3-bit codes are stored in 4-bit fields: exact, but 4 bits on disk and in memory."
    dense = (
        "{} bits per code on disk. Without --container-bits the fields have 4 bits, for which vLLM has kernels "
        "everywhere."
    )
    assert container_notes(checkpoints[4], 4) == ()
    assert container_notes(checkpoints[3], 4) == (wide,)
    assert container_notes(checkpoints[3], 3) == ("3-bit fields are dense: 32 codes in 3 words, " + dense.format(3),)
    assert container_notes(checkpoints[2], 2) == ("2-bit fields are dense: 16 codes in 1 word, " + dense.format(2),)
    assert len(container_notes(checkpoints[2], 3)) == 2
    mixed = save_random(
        build_model("llama", {**SIZES, "num_hidden_layers": 1}), tmp_path, QuantConfig(group_size=32),
        lambda shape, index: random_weight(shape, QuantConfig(bits=2 + index % 3, group_size=32), index),
    )  # fmt: skip
    assert container_notes(mixed, 4) == ("2- and " + wide,)


def test_widths_in_words() -> None:
    """A plan's encoding and its reason."""
    assert (describe(4, 4), describe(3, 4)) == ("int4", "int3 in 4-bit fields")
    assert why_exact(2, 2) == "codes, zero-points and fp16 scales are stored as they are"
    assert why_exact(2, 4) == "4-bit fields hold every 2-bit code; fp16 scales are stored as they are"


def test_values_beyond_float16_are_refused() -> None:
    """The largest distance of a code from its zero-point, times the scale, may just reach 65504, on either side."""
    weight = random_weight((8, 32), QuantConfig(bits=2, zero_point="integer", group_size=32), seed=0)
    packed = PackedWeight.of(replace(weight, name="layer.3"))
    assert packed.zeros is not None
    for zero, distance, beyond in ((1, 2, 32768), (2, 2, 32768), (3, 3, 21856)):
        packed.zeros[:], packed.scales[:] = 1, 1
        packed.zeros[3], packed.scales[3] = zero, np.float16(65504 // distance // 16 * 16)
        assert widen_packed(packed, 4).bits == 4
        packed.scales[3] = beyond
        with pytest.raises(
            UnsupportedError, match=f"a weight can exceed float16.*\\n.*\\n  got: .*{distance * beyond:g}"
        ):
            widen_packed(packed, 4)
    packed.scales[3] = np.float16(65504 / 2)
    with pytest.raises(UnsupportedError) as caught:
        widen_packed(packed, 4)
    assert str(caught.value).splitlines() == [
        "a weight can exceed float16, in which the int4 kernels of vLLM and GPTQModel compute",
        "  where: layer.3",
        "  got: scale times code reaches 98256",
        "  expected: at most 65504",
        "  do: such scales are damage or divergence: train again, or export to gguf or onnx, which compute in float32",
    ]
