"""What training cost: the general checks of `retain` before the first step, and by the adapter that is handed over."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vpd_mlx.common.stats import Paired, paired
from vpd_mlx.common.text import number, percent
from vpd_mlx.tasks.general import TEXT

__all__ = ["Retained", "cost", "retained"]

HARM = 1.1  # perplexity after by that before: less is significant on any text, and no loss that an answer shows


@dataclass(frozen=True)
class Retained:
    """One check: its first and last row in `general.jsonl`, and the change paired by prompt or passage, up is better."""

    before: Mapping[str, Any]
    after: Mapping[str, Any]
    change: Paired

    @property
    def check(self) -> str:
        """The check's name."""
        return str(self.before.get("check"))

    @property
    def items(self) -> int:
        """Prompts, or passages of a text."""
        return self.change.problems

    @property
    def verdict(self) -> str:
        """`worse` where something was lost; `better` and `within noise` as of any paired difference."""
        if self.check == TEXT and self.change.verdict == "worse" and math.exp(-self.change.difference) < HARM:
            return "within noise"
        return self.change.verdict

    @property
    def words(self) -> tuple[str, str, str]:
        """(before, after, what changed) as people read them."""
        was, now = (number(row.get("value")) for row in (self.before, self.after))
        if self.check == TEXT:
            ratio = math.exp(min(-self.change.difference, 700))
            return _perplexity(was), _perplexity(now), f"{ratio:,.2f} times" if ratio < 1000 else f"{ratio:.1e} times"
        return percent(was), percent(now), f"{self.change.worse} lost, {self.change.better} gained"

    @property
    def lost(self) -> list[tuple[str, str, str]]:
        """(prompt, answer before, answer after) where it was right before and is wrong now."""
        scores, later = (_mapping(row.get("by_item")) for row in (self.before, self.after))
        answers, now = (_mapping(row.get("answers")) for row in (self.before, self.after))
        if not answers:
            return []
        return [
            (p, str(answers.get(p, "")), str(now.get(p, ""))) for p in scores if scores[p] > later.get(p, scores[p])
        ]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _perplexity(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}" if value < 1e6 else f"{value:.1e}"


def retained(rows: Sequence[Mapping[str, Any]]) -> list[Retained]:
    """Rows of `general.jsonl` as a change for each check that was made twice."""
    by_check: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_check.setdefault(str(row.get("check")), []).append(row)
    out = []
    for first, *later in by_check.values():
        change = paired(_scores(first), _scores(later[-1])) if later else None
        if change is not None:
            out.append(Retained(first, later[-1], change))
    return out


def _scores(row: Mapping[str, Any]) -> dict[str, float]:
    return {str(k): v for k, value in _mapping(row.get("by_item")).items() if (v := number(value)) is not None}


def cost(found: Sequence[Retained]) -> str:
    """What training cost, in a sentence; empty if nothing was checked."""
    if not found:
        return ""
    worse = [f"{r.check} {r.words[0]} before, {r.words[1]} after" for r in found if r.verdict == "worse"]
    if worse:
        return f"training cost general abilities: {'; '.join(worse)}"
    names = ", ".join(r.check for r in found)
    return f"training cost nothing that these checks can tell ({names})"
