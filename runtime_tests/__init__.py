"""Every runtime on the same tokens as the torch float32 oracle: parity as a call, a command and a pytest fixture.

``check_parity`` does what `l4q-parity` does; ``runtime_tests.parity`` has its parts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from l4q.lazy import lazy_attributes

if TYPE_CHECKING:
    from runtime_tests.check import check_parity as check_parity
    from runtime_tests.parity import ParityOptions as ParityOptions
    from runtime_tests.parity import ParityReport as ParityReport
    from runtime_tests.parity import ParityRow as ParityRow
    from runtime_tests.parity import assert_parity as assert_parity
    from runtime_tests.parity import run_parity as run_parity
    from runtime_tests.targets import ParityTarget as ParityTarget
    from runtime_tests.targets import detect as detect

# public name -> module that defines it; docs/api.md says what is stable
_EXPORTS = {
    "check_parity": "runtime_tests.check",
    "ParityOptions": "runtime_tests.parity",
    "ParityReport": "runtime_tests.parity",
    "ParityRow": "runtime_tests.parity",
    "assert_parity": "runtime_tests.parity",
    "run_parity": "runtime_tests.parity",
    "ParityTarget": "runtime_tests.targets",
    "detect": "runtime_tests.targets",
}

__all__ = sorted(_EXPORTS)
__getattr__ = lazy_attributes("runtime_tests", _EXPORTS)
