"""Text that comes from files, made fit to be shown, and numbers as text."""

from __future__ import annotations

import math
from html import escape

CELL = 120
LONG = 1000


def shown(value: object, limit: int = CELL) -> str:
    """At most `limit` characters of a value's text, the middle left out; what cannot be printed becomes �.

    The replaced characters are controls, lone surrogates and those that turn the direction of writing.
    """
    text = str(value)
    if len(text) > limit:
        text = f"{text[: limit - limit // 2 - 1]}…{text[-(limit // 2) :]}"
    return "".join(
        c if c.isprintable() else " " if c in "\t\r\n" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def html(value: object, limit: int = CELL) -> str:
    """The same, escaped for HTML text and quoted attributes."""
    return escape(shown(value, limit), quote=True)


def significant(value: float) -> str:
    """A number with three significant digits, never in powers of ten: 0.0123, 4.56, 789, 12345."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def count_or_figure(value: float) -> str:
    """An integer in full, any other number as `significant`."""
    return str(value) if isinstance(value, int) else significant(value)
