"""Regular expressions out of a model's config: compiled only if matching them cannot take for ever.

Python's matcher backtracks: "(a+)+$" against 40 letters runs for days. Such a pattern repeats something that repeats,
so these are refused; what is left costs a power of the name's length, which is bounded here.
"""

from __future__ import annotations

import re
import warnings
from re import _constants, _parser  # type: ignore[attr-defined]
from typing import Any

from l4q.errors import UsageError

LONGEST_PATTERN = 1000
LONGEST_NAME = 256
MOST_REPEATS = 4
"""Of unbounded repeats, such as .*, in one pattern."""
_REPEATS = (_constants.MAX_REPEAT, _constants.MIN_REPEAT, _constants.POSSESSIVE_REPEAT)


def matches_pattern(pattern: object, name: str, where: str) -> bool:
    """Whether a pattern from a config matches the beginning of a module's name.

    Raises:
        UsageError: It is no regular expression, or one that could take for ever.
    """
    if not isinstance(pattern, str) or len(pattern) > LONGEST_PATTERN:
        raise _refused(where, repr(pattern), f"text of at most {LONGEST_PATTERN} characters")
    if len(name) > LONGEST_NAME:
        raise _refused(where, name, f"module names of at most {LONGEST_NAME} characters")
    try:
        with warnings.catch_warnings():  # of "[[", which may mean something else one day
            warnings.simplefilter("ignore", FutureWarning)
            repeats = _unbounded(_parser.parse(pattern), inside=False)
            matcher = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise _refused(where, f"{pattern}: {error}", "a regular expression") from error
    if repeats is None or repeats > MOST_REPEATS:
        raise _refused(where, pattern, f"no repeat or choice inside a repeat, and at most {MOST_REPEATS} such as .*")
    return matcher.match(name) is not None


def _unbounded(content: Any, *, inside: bool) -> int | None:
    """Repeats of more than one time in a parsed pattern; None where a choice of ways lies inside one."""
    found = 0
    for part in content if isinstance(content, (_parser.SubPattern, list, tuple)) else ():
        operator = part[0] if isinstance(part, tuple) and len(part) == 2 else None
        if type(operator) is int:  # the letters of a range, [+-9], equal operators, which are numbers of another type
            operator = None
        if inside and operator in (*_REPEATS, _constants.BRANCH):  # (a+)+, (aa?)*, (a|aa)*: ways beyond number
            return None
        repeats = operator in _REPEATS and part[1][1] > 1
        below = _unbounded(part, inside=inside or repeats)
        if below is None:
            return None
        found += repeats + below
    return found


def _refused(where: str, got: object, expected: str) -> UsageError:
    return UsageError(
        "a pattern of the quantization config is not used",
        where=where,
        got=got,
        expected=expected,
        remedy="name the modules plainly in config.json, if you trust the model",
    )
