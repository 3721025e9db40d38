"""Numbers as people read them; the report, the figures and the terminal use the same words."""

import math
from typing import Any, TypeGuard

from agentsdpo.stats import Interval

MISSING = "–"
"""Stands where a number was not recorded."""


def is_number(value: Any) -> TypeGuard[float]:
    """Whether the value is a finite number (booleans are not)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def percent(rate: Any) -> str:
    """A fraction as percent with one decimal.

    >>> percent(0.9296), percent(None)
    ('93.0 %', '–')
    """
    return f"{100 * rate:.1f} %" if is_number(rate) else MISSING


def interval(value: Interval | None) -> str:
    """The ends of an interval of fractions, in percent.

    >>> interval(Interval(0.93, 0.8712, 0.963)), interval(None)
    ('[87.1, 96.3]', '')
    """
    if value is None or not (is_number(value.low) and is_number(value.high)):
        return ""
    return f"[{100 * value.low:.1f}, {100 * value.high:.1f}]"


def number(value: Any, digits: int = 3) -> str:
    """A count with thin groups, or a measured number with some significant digits.

    >>> number(12345), number(0.123456), number(5.0), number(123456.7), number(float("nan"))
    ('12 345', '0.123', '5', '123 457', '–')
    """
    if not is_number(value):
        return MISSING
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", " ")
    return f"{value:.{digits}g}"


def duration(seconds: Any) -> str:
    """Seconds in the two units that matter.

    >>> duration(7.25), duration(260), duration(8000), duration(None)
    ('7.2 s', '4 min 20 s', '2 h 13 min', '–')
    """
    if not is_number(seconds):
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
