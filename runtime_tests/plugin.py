"""pytest plugin (entry point `l4q`): the fixture `l4q_parity` asserts parity in somebody else's test suite.

    def test_exports(l4q_parity):
        l4q_parity("RUN/checkpoint", "exports/gguf", "exports/onnx", text="held_out.txt")

Nothing but pytest is imported until a test calls it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from runtime_tests.parity_runs import ParityReport


class ParityFixture(Protocol):
    """What the fixture `l4q_parity` is."""

    def __call__(self, checkpoint: str | Path, *exports: str | Path, text: str | Path, **choices: Any) -> ParityReport:
        """Compare exports with their checkpoint; `choices` are those of `runtime_tests.parity`."""


@pytest.fixture(scope="session")
def l4q_parity() -> ParityFixture:
    """Run exports in their runtimes and fail the test where one differs from the checkpoint: see `parity`."""

    def check(checkpoint: str | Path, *exports: str | Path, text: str | Path, **choices: Any) -> ParityReport:
        __tracebackhide__ = True
        from l4q.errors import VerificationError
        from runtime_tests.check import parity

        try:
            return parity(checkpoint, exports, text=text, **choices)
        except VerificationError as error:
            return pytest.fail(str(error), pytrace=False)

    return check
