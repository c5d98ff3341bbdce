"""Figures, durations and foreign text as people read them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

__all__ = [
    "HIDDEN",
    "MINUS",
    "MOST",
    "clean",
    "duration",
    "figures",
    "interval",
    "number",
    "one_line",
    "percent",
    "percentage",
    "points",
    "shortened",
    "spread",
    "steps",
    "visible",
]


def one_line(text: str) -> str:
    """The text with what would break a line, or move a terminal's cursor, written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def percent(value: float | None) -> str:
    """A share as text, `-` where there is none."""
    return "-" if value is None else f"{100 * value:.1f} %"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, rest = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def clean(text: str) -> str:
    """The text with halves of characters, which no file and no tokenizer takes, replaced."""
    return text.encode("utf-8", "replace").decode("utf-8")


MINUS = "−"


def number(value: Any) -> float | None:
    """A finite number as a float; None for everything else, `"nan"` among it."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def interval(row: Mapping[str, Any], key: str) -> tuple[float, float] | None:
    """The 95 % interval that was logged with a figure."""
    both = row.get(f"{key}_interval")
    if not isinstance(both, list | tuple) or len(both) != 2:
        return None
    low, high = number(both[0]), number(both[1])
    return None if low is None or high is None else (low, high)


def percentage(value: Any) -> str:
    """A percentage in 0..1 as per cent."""
    v = number(value)
    return "-" if v is None else f"{100 * v:.1f} %"


def steps(count: int) -> str:
    """`1 step`, `2 steps`."""
    return f"{count} step" if count == 1 else f"{count} steps"


def spread(low: float, high: float) -> str:
    """An interval of shares as per cent."""
    return f"{100 * low:.1f} to {100 * high:.1f}"


def points(value: float) -> str:
    """A difference of shares in percentage points, signed."""
    return f"{100 * value:+.1f}".replace("-", MINUS)


def figures(row: Mapping[str, Any], key: str, form: Callable[[Any], str] = percentage) -> tuple[str, str]:
    """(value, 95 % interval) of an evaluation's figure as text; the interval is empty where there is none."""
    both = interval(row, key)
    return form(row.get(key)), "" if both is None else spread(*both)


HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def visible(value: Any) -> str:
    """Text that cannot move the cursor, change colours or turn the writing round."""
    text = "" if value is None else str(value)
    text = HIDDEN.sub(lambda m: f"\\x{ord(m[0]):02x}" if ord(m[0]) < 256 else f"\\u{ord(m[0]):04x}", text)
    return text.encode("utf-8", "replace").decode("utf-8")


MOST = 1200  # characters of one text; its two ends are kept


def shortened(value: Any, full: bool) -> str:
    """The text as a terminal may show it, its middle cut out unless `full`."""
    text = visible(value)
    if full or len(text) <= MOST:
        return text
    half = math.floor(MOST / 2)
    return f"{text[:half]}\n… {len(text) - 2 * half:,} characters, --full shows them …\n{text[-half:]}"
