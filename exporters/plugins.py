"""Export formats that other packages bring, by the entry point group `l4q.exporters` (docs/api.md).

    [project.entry-points."l4q.exporters"]
    myformat = "mypackage.myformat"

The name is what `--to` takes; the value is a module, or an object, with the functions of `exporters.plan.Exporter`.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, cast

from l4q.errors import UsageError

if TYPE_CHECKING:
    from exporters.plan import Exporter

GROUP = "l4q.exporters"
FUNCTIONS = ("plan", "write", "read_back", "usage")


def plugin_formats() -> tuple[str, ...]:
    """Names of the installed formats, sorted; none of them is imported."""
    return tuple(sorted({point.name for point in entry_points(group=GROUP)}))


def load_plugin(name: str) -> Exporter | None:
    """The exporter that an installed package registers under this name; None if none does.

    Raises:
        UsageError: Two packages register the name, its import fails, or it lacks a function of an exporter.
    """
    points = list(entry_points(group=GROUP, name=name))
    if not points:
        return None
    owners = sorted({_owner(point) for point in points})
    if len(owners) > 1:
        raise UsageError(
            "two packages bring an export format of the same name",
            where=name,
            got=", ".join(owners),
            remedy="uninstall one of them",
        )
    try:
        found = points[0].load()
    except Exception as error:  # whatever somebody else's import raises
        raise UsageError(
            "a package's export format cannot be loaded",
            where=f"{name}, {points[0].value} of {owners[0]}",
            got=f"{type(error).__name__}: {error}",
            remedy=f"repair or uninstall {owners[0]}",
        ) from error
    missing = [function for function in FUNCTIONS if not callable(getattr(found, function, None))]
    if missing:
        raise UsageError(
            "a package's export format is incomplete",
            where=f"{name}, {points[0].value} of {owners[0]}",
            got=f"no {', '.join(missing)}",
            expected=f"the functions {', '.join(FUNCTIONS)} of exporters.plan.Exporter",
            remedy=f"repair or uninstall {owners[0]}",
        )
    return cast("Exporter", found)


def _owner(point: EntryPoint) -> str:
    return "an unknown package" if point.dist is None else f"{point.dist.name} {point.dist.version}"
