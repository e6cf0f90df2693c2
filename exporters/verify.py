"""Read an exported folder back with foreign decoders and compare every weight with the checkpoint, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from exporters.plan import Exporter
from l4q.checkpoint import L4QCheckpoint
from l4q.errors import VerificationError


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """Outcome of reading an export back."""

    exact: int
    """Modules whose foreign-decoded float32 weights equal the checkpoint's bit for bit."""
    total: int
    """Quantized modules of the checkpoint."""
    differing: tuple[str, ...] = ()
    """Modules that differ or are missing, each with what differs."""

    @property
    def passed(self) -> bool:
        """Whether every module is exact."""
        return self.exact == self.total and not self.differing


def verify(
    checkpoint: L4QCheckpoint, exporter: Exporter, folder: Path, on_tensor: Callable[[str], None] = lambda _: None
) -> VerifyReport:
    """Compare a folder with the checkpoint it was exported from.

    Args:
        checkpoint: The source.
        exporter: The format package whose `read_back` decodes the folder with foreign code.
        folder: The exported folder.
        on_tensor: Called with each module's name after it was compared.
    """
    differing: list[str] = []
    seen: set[str] = set()
    for module, decoded in _guarded(exporter.read_back(folder)):
        if module not in checkpoint.modules or module in seen:
            differing.append(f"{module}: not a quantized module of the checkpoint, or decoded twice")
            continue
        seen.add(module)
        problem = compare_bits(decoded, checkpoint.quantized(module).dequantize())
        if problem:
            differing.append(f"{module}: {problem}")
        on_tensor(module)
    differing += [f"{module}: missing from the export" for module in checkpoint.modules if module not in seen]
    exact = len(checkpoint.modules) - len({line.partition(":")[0] for line in differing} & set(checkpoint.modules))
    return VerifyReport(exact=exact, total=len(checkpoint.modules), differing=tuple(differing))


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
