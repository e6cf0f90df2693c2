"""Every runtime on the same tokens as the torch float32 oracle: parity as a call, a command and a pytest fixture.

``parity`` does what `l4q-parity` does; ``run_parity`` and ``assert_parity`` are its halves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from l4q.lazy import lazy_attributes

if TYPE_CHECKING:
    from runtime_tests.check import parity as parity
    from runtime_tests.parity_runs import ParityOptions as ParityOptions
    from runtime_tests.parity_runs import ParityReport as ParityReport
    from runtime_tests.parity_runs import ParityRow as ParityRow
    from runtime_tests.parity_runs import assert_parity as assert_parity
    from runtime_tests.parity_runs import run_parity as run_parity
    from runtime_tests.targets import ParityTarget as ParityTarget
    from runtime_tests.targets import detect as detect

# public name -> module that defines it; docs/api.md says what is stable
_EXPORTS = {
    "parity": "runtime_tests.check",
    "ParityOptions": "runtime_tests.parity_runs",
    "ParityReport": "runtime_tests.parity_runs",
    "ParityRow": "runtime_tests.parity_runs",
    "assert_parity": "runtime_tests.parity_runs",
    "run_parity": "runtime_tests.parity_runs",
    "ParityTarget": "runtime_tests.targets",
    "detect": "runtime_tests.targets",
}

__all__ = sorted(_EXPORTS)
__getattr__ = lazy_attributes("runtime_tests", _EXPORTS)
