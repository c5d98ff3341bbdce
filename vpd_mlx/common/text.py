"""Figures, durations, command lines and foreign text as people read them."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = [
    "duration",
    "figures",
    "interval",
    "json_text",
    "mlx_lm_command",
    "number",
    "one_line",
    "percent",
    "points",
    "points_range",
    "size",
    "steps",
    "visible",
    "without_surrogates",
]


def one_line(text: str) -> str:
    """The text with characters that would break a line, or move a terminal's cursor, written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def without_surrogates(text: str) -> str:
    """The text with lone surrogates, which neither files nor tokenizers accept, replaced by `?`."""
    return text.encode("utf-8", "replace").decode("utf-8")


HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def visible(value: Any) -> str:
    """Text without characters that move the cursor, change colours or reverse the writing direction.

    All that comes from a model, a verifier, a source of feedback or a file passes through here on its way to a terminal.
    """
    text = "" if value is None else str(value)
    shown = HIDDEN.sub(lambda m: f"\\x{ord(m[0]):02x}" if ord(m[0]) < 256 else f"\\u{ord(m[0]):04x}", text)
    return without_surrogates(shown)


def json_text(value: Any) -> str:
    """JSON for people and programs: letters of all tongues as they are, what `visible` takes away as JSON's escapes."""
    return HIDDEN.sub(lambda m: f"\\u{ord(m[0]):04x}", json.dumps(value, indent=2, ensure_ascii=False))


def number(value: Any) -> float | None:
    """A finite number as a float; None for everything else, the text `"nan"` included."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def percent(value: Any) -> str:
    """A share in 0..1 as per cent, `-` if it is not a number."""
    share = number(value)
    return "-" if share is None else f"{100 * share:.1f} %"


def points(value: float) -> str:
    """A difference of shares in percentage points, signed."""
    return f"{100 * value:+.1f}".replace("-", "−")


def points_range(low: float, high: float) -> str:
    """The interval of a difference, in percentage points."""
    return f"{points(low)} to {points(high)}"


def interval(row: Mapping[str, Any], key: str) -> tuple[float, float] | None:
    """The 95 % interval that was logged with a figure."""
    both = row.get(f"{key}_interval")
    if not isinstance(both, list | tuple) or len(both) != 2:
        return None
    low, high = number(both[0]), number(both[1])
    return None if low is None or high is None else (low, high)


def figures(row: Mapping[str, Any], key: str, form: Callable[[Any], str] = percent) -> tuple[str, str]:
    """(value, 95 % interval) of an evaluation's figure as text; the interval is empty if none was logged."""
    both = interval(row, key)
    return form(row.get(key)), "" if both is None else f"{100 * both[0]:.1f} to {100 * both[1]:.1f}"


def steps(count: int) -> str:
    """`1 step`, `2 steps`."""
    return f"{count} step" if count == 1 else f"{count} steps"


def duration(seconds: float) -> str:
    """Seconds as `12 s`, `3 min 05 s` or `2 h 10 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, rest = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def size(count: float) -> str:
    """Bytes in GB (2**30) or MB (2**20)."""
    return f"{count / 2**30:.2f} GB" if count >= 2**30 else f"{count / 2**20:.1f} MB"


def mlx_lm_command(program: str, model: str, adapters: Path | None = None, *options: str) -> str:
    """A command line that runs one of mlx-lm's programs on a model, quoted for a shell."""
    adapter = [] if adapters is None else ["--adapter-path", str(adapters)]
    return shlex.join(["python", "-m", "mlx_lm", program, "--model", model, *adapter, *options])
