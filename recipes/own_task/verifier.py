"""Checks a date and says what is wrong without giving the answer away. The model learns from these words."""

from __future__ import annotations

import re
from datetime import date

ISO = re.compile(r"(\d{4})-(\d{2})-(\d{2})")


def verify(problem, completion):
    """1 for the right date alone; 0.4, which is no success, for the right date with other words around it."""
    text = completion.strip()
    found = ISO.search(text)
    if found is None:
        return 0.0, "There is no date of the form YYYY-MM-DD: four digits, two digits, two digits, with dashes."
    year, month, day = map(int, found.groups())
    try:
        date(year, month, day)
    except ValueError:
        return 0.0, f"{found[0]} is no day of the calendar. The month stands in the middle, the day at the end."
    want = date.fromisoformat(problem.answer)
    if (year, month, day) == (want.year, want.day, want.month) and month != day:
        return 0.0, "Month and day have changed places. The month stands in the middle."
    wrong = [name for name, got, is_ in _parts(year, month, day, want) if got != is_]
    if wrong:
        return 0.0, f"Wrong: the {' and the '.join(wrong)}. Read the sentence again."
    if text != found[0]:
        return 0.4, "The date is right, but it must stand alone: no other words, no full stop."
    return 1.0


def _parts(year, month, day, want):
    return ("year", year, want.year), ("month", month, want.month), ("day", day, want.day)
