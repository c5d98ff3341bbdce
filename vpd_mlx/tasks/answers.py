"""Finding the answer in a completion. If there are several, the last one counts: the model settled on it."""

from __future__ import annotations

import re

from vpd_mlx.common.thoughts import spoken

__all__ = ["boxed", "final_answer", "in_fence", "in_tag", "spoken"]

# Possessive: a line of 40,000 tildes must not be tried 40,000 times.
_FENCE = re.compile(r"^[ \t]*+(```++|~~~++)[^\n`]*+$", re.M)
_BRACES = re.compile(r"\\boxed\{|[{}]")


def in_tag(completion: str, tag: str) -> str | None:
    """The text between the last `<tag>` and `</tag>`, stripped."""
    start, end = f"<{tag}>", f"</{tag}>"
    head, found, _ = spoken(completion).rpartition(end)
    _, opened, inner = head.rpartition(start)
    return inner.strip() if found and opened else None


def boxed(text: str) -> str | None:
    r"""The content of the last complete `\boxed{}`, with balanced braces."""
    opened: list[tuple[int, bool]] = []  # where the content of a brace begins, and whether it is a box
    start, end = -1, -1
    for brace in _BRACES.finditer(text):
        if brace[0] != "}":
            opened.append((brace.end(), brace[0] != "{"))
        elif opened:
            at, box = opened.pop()
            if box and at > start:
                start, end = at, brace.start()
    return None if start < 0 else text[start:end].strip()


def final_answer(text: str) -> str | None:
    r"""The last `\boxed{}`, else the rest of the line after the last `####`."""
    found = boxed(text)
    if found is None and "####" in text:
        found = text.rpartition("####")[2].strip().partition("\n")[0].strip()
    return found or None


def in_fence(completion: str) -> str | None:
    """The last fenced block that is closed, or None."""
    text = spoken(completion)
    block, start, mark = None, None, ""
    for line in _FENCE.finditer(text):
        if start is None:
            start, mark = line.end() + 1, line[1]
        elif line[0].strip() == line[1] and line[1].startswith(mark):
            block, start = text[start : line.start()], None
    return block
