"""Formats numbers as text with few digits; missing values are dashes."""

import math
from collections.abc import Callable

from rgtg.types.base import Interval

NOTHING = "–"
_MINUS = "−"


def number(value: float) -> str:
    """A number with two decimals, or none from 100 on.

    >>> number(1234.5), number(-0.126), number(-0.001), number(float("nan"))
    ('1,234', '−0.13', '0.00', '–')
    """
    if not math.isfinite(value):
        return NOTHING
    text = f"{abs(value):,.0f}" if abs(value) >= 100 else f"{abs(value):.2f}"
    return f"{_MINUS}{text}" if value < 0 and float(text.replace(",", "")) else text


def signed(value: float) -> str:
    """A number with its sign.

    >>> signed(0.5), signed(-0.5)
    ('+0.50', '−0.50')
    """
    text = number(abs(value))
    return text if text == NOTHING else (_MINUS if value < 0 else "+") + text


def spread(value: Interval, form: Callable[[float], str] = number) -> str:
    """The two ends of an interval.

    >>> spread(Interval(mean=1, low=0.5, high=1.5, n=3))
    '0.50 to 1.50'
    """
    return "" if math.isnan(value.mean) else f"{form(value.low)} to {form(value.high)}"


def percent(value: float) -> str:
    """A share in percent.

    >>> percent(0.5).split()
    ['50', '%']
    """
    return NOTHING if math.isnan(value) else f"{value:.0%}".replace("%", "\u00a0%")


def p_value(value: float) -> str:
    """A p-value; very small ones all read the same.

    >>> p_value(0.00001), p_value(0.0312)
    ('< 0.001', '0.031')
    """
    return "< 0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"
