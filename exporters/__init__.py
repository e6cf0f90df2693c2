"""Exports of L4Q checkpoints: planned first, packed without requantization, read back by foreign decoders.

``export`` is the call; the other names are what it takes and returns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from l4q.lazy import lazy_attributes

if TYPE_CHECKING:
    from exporters.driver import ExportResult as ExportResult
    from exporters.driver import export as export
    from exporters.driver import get_exporter as get_exporter
    from exporters.driver import make_plan as make_plan
    from exporters.plan import Exporter as Exporter
    from exporters.plan import ExportOptions as ExportOptions
    from exporters.plan import ExportPlan as ExportPlan
    from exporters.plan import Fidelity as Fidelity
    from exporters.plan import PlannedTensor as PlannedTensor
    from exporters.plan import RuntimeSupport as RuntimeSupport
    from exporters.verify import VerifyReport as VerifyReport

# public name -> module that defines it; docs/api.md says what is stable
_EXPORTS = {
    "Exporter": "exporters.plan",
    "ExportOptions": "exporters.plan",
    "ExportPlan": "exporters.plan",
    "Fidelity": "exporters.plan",
    "PlannedTensor": "exporters.plan",
    "RuntimeSupport": "exporters.plan",
    "export": "exporters.driver",
    "ExportResult": "exporters.driver",
    "get_exporter": "exporters.driver",
    "make_plan": "exporters.driver",
    "VerifyReport": "exporters.verify",
}

__all__ = sorted(_EXPORTS)
__getattr__ = lazy_attributes("exporters", _EXPORTS)
