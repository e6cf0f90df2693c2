"""Read an exported folder back with foreign decoders and compare weights with the checkpoint, bit for bit.

Every module by default; a sample of them for models so large that decoding all takes too long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from exporters.plan import Exporter
from l4q.checkpoint import L4QCheckpoint
from l4q.errors import VerificationError

VerifyMode = Literal["full", "sample", "none"]
"""How much of an export is read back: every module, a sample that depends on the model's layout alone, or nothing."""
SAMPLE_STEP = 8
"""A sample holds every 8th module of a kind, and the last one."""


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """Outcome of reading an export back."""

    exact: int
    """Modules whose foreign-decoded float32 weights equal the checkpoint's bit for bit."""
    checked: int
    """Modules that were looked for: all, or the sample."""
    total: int
    """Quantized modules of the checkpoint."""
    differing: tuple[str, ...] = ()
    """Modules that differ or are missing, each with what differs."""

    @property
    def passed(self) -> bool:
        """Whether every module that was looked for is exact."""
        return self.exact == self.checked and not self.differing


def sample_modules(checkpoint: L4QCheckpoint, step: int = SAMPLE_STEP) -> tuple[str, ...]:
    """The modules a sample looks at, in model order: of every kind the first, each `step`-th after it, and the last.

    A kind is a layer's own name (q_proj) with its shape and grid: what differs in any of them is packed differently.
    """
    kinds: dict[tuple[object, ...], list[str]] = {}
    for module in checkpoint.modules:
        info = checkpoint.info(module)
        leaf = module.rpartition(".")[2]
        kind = (leaf, info.out_features, info.in_features, info.group_size, info.bits, info.zero_point, info.k_grid)
        kinds.setdefault(kind, []).append(module)
    chosen = {module for modules in kinds.values() for module in (*modules[::step], modules[-1])}
    return tuple(module for module in checkpoint.modules if module in chosen)


def verify(
    checkpoint: L4QCheckpoint,
    exporter: Exporter,
    folder: Path,
    on_tensor: Callable[[str], None] = lambda _: None,
    *,
    sample: tuple[str, ...] | None = None,
) -> VerifyReport:
    """Compare a folder with the checkpoint it was exported from.

    Args:
        checkpoint: The source.
        exporter: The format package whose `read_back` decodes the folder with foreign code.
        folder: The exported folder.
        on_tensor: Called with each module's name after it was compared.
        sample: Decode these modules only (`sample_modules`); None decodes all, and notices modules too many.
    """
    wanted = checkpoint.modules if sample is None else sample
    differing: list[str] = []
    seen: set[str] = set()
    for module, decoded in _guarded(exporter.read_back(folder, sample)):
        if module not in wanted or module in seen:
            differing.append(f"{module}: not a quantized module of the checkpoint, or decoded twice")
            continue
        seen.add(module)
        problem = compare_bits(decoded, checkpoint.quantized(module).dequantize())
        if problem:
            differing.append(f"{module}: {problem}")
        on_tensor(module)
    differing += [f"{module}: missing from the export" for module in wanted if module not in seen]
    exact = len(wanted) - len({line.partition(":")[0] for line in differing} & set(wanted))
    return VerifyReport(exact=exact, checked=len(wanted), total=len(checkpoint.modules), differing=tuple(differing))


def compare_bits(got: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> str | None:
    """None if two float32 arrays have the same bits, else one line that says where and by how much they differ."""
    if got.dtype != np.float32 or got.shape != expected.shape:
        return f"decoded {got.dtype} {got.shape}, expected float32 {expected.shape}"
    different = got.view(np.uint32) != expected.view(np.uint32)
    count = int(np.count_nonzero(different))
    if not count:
        return None
    row, column = (int(index) for index in np.argwhere(different)[0])
    return (
        f"{count} of {got.size} weights differ, first at [{row}, {column}]: "
        f"got {got[row, column]!r}, expected {expected[row, column]!r}"
    )


def _guarded(
    decoded: Iterator[tuple[str, npt.NDArray[np.float32]]],
) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Pass foreign decoders' results on; an exception inside one is a failed verification, whatever its type."""
    while True:
        try:
            item = next(decoded)
        except StopIteration:
            return
        except (ValueError, KeyError, IndexError, TypeError, RuntimeError, OSError) as error:
            raise VerificationError(
                "a foreign decoder cannot read the exported files", got=f"{type(error).__name__}: {error}"
            ) from error
        yield item
