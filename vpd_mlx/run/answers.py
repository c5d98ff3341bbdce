"""Which held-out problems a person is shown with the answers before and after training: chosen by a rule that is printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["CHANGES", "Answered", "choose", "pairs", "rule"]

MOST_SHOWN = 5
CHANGES = {
    (False, True): "wrong, then right",
    (True, False): "right, then wrong",
    (False, False): "wrong both times",
    (True, True): "right both times",
}
"""(right before, right after) -> in words, in the order in which they are shown."""


@dataclass(frozen=True)
class Answered:
    """One held-out problem: rows of `answers.jsonl`, before training and by the adapter that is handed over."""

    before: Mapping[str, Any]
    after: Mapping[str, Any]

    @property
    def problem(self) -> str:
        """The problem's id."""
        return str(self.before.get("problem", "?"))

    @property
    def expected(self) -> str:
        """The right answer, empty where the data have none."""
        return str(self.before.get("expected") or self.after.get("expected") or "")

    @property
    def change(self) -> str:
        """One of `CHANGES`."""
        return CHANGES[bool(self.before.get("success")), bool(self.after.get("success"))]

    @property
    def taught(self) -> str:
        """What the teacher read before training, or after it where it had nothing before; empty if it never had anything."""
        return str(self.before.get("teacher_prompt") or self.after.get("teacher_prompt") or "")


def pairs(rows: Sequence[Mapping[str, Any]], step: int) -> list[Answered]:
    """Every problem that was answered both before training and in the evaluation after `step` steps, in evaluation's order."""
    after = {str(r.get("problem")): r for r in rows if r.get("step") == step}
    return [Answered(r, after[name]) for r in rows if r.get("step") == 0 and (name := str(r.get("problem"))) in after]


def choose(answers: Sequence[Answered], most: int = MOST_SHOWN) -> list[Answered]:
    """At most `most` problems, at least four: one of each change that occurs, the others to those furthest below their share.

    Of each change they are the first in the order of evaluation, so that no answer is picked for what it says.
    """
    kinds = {c: found for c in CHANGES.values() if (found := [a for a in answers if a.change == c])}
    places, total = dict.fromkeys(kinds, 1), min(max(most, len(CHANGES)), len(answers))
    for _ in range(total - len(kinds)):
        open_ = [c for c in kinds if places[c] < len(kinds[c])]
        places[max(open_, key=lambda c: total * len(kinds[c]) / len(answers) - places[c])] += 1
    return [a for change, found in kinds.items() for a in found[: places[change]]]


def rule(answers: Sequence[Answered], chosen: Sequence[Answered]) -> str:
    """How `chosen` were chosen among `answers`, in words."""
    changes = [a.change for a in answers]
    counted = [
        f"{sum(a.change == c for a in chosen)} of {changes.count(c)} {c}" for c in CHANGES.values() if c in changes
    ]
    how = "Chosen in proportion, at least one of each kind, the first of each in the order of evaluation."
    return f"{len(chosen)} of {len(answers)} held-out problems: {', '.join(counted)}. {how}"
