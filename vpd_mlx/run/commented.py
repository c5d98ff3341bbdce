"""What a person commented on while a run trained, with the answers before and after: from `human.jsonl` and the rollouts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vpd_mlx.common.text import number

if TYPE_CHECKING:
    from vpd_mlx.run.folder import LoggedRollout

__all__ = ["Commented", "commented"]

MOST_SHOWN = 300  # characters of a text


@dataclass(frozen=True)
class Commented:
    """A comment, the steps that were done when it was given, and (right, all) of the answers that it may have changed."""

    step: int
    problem: str
    prompt: str
    completion: str
    text: str
    scope: str
    before: tuple[int, int]
    after: tuple[int, int]


def commented(rows: Iterable[Mapping[str, Any]], rollouts: Iterable[LoggedRollout]) -> list[Commented]:
    """The comments given on the page, oldest first. One that was changed on its card counts as the last that was given."""
    last = {(r.get("problem"), r.get("completion")): r for r in rows if r.get("how") == "page" and r.get("feedback")}
    if not last:
        return []
    by_problem: dict[str | None, list[LoggedRollout]] = defaultdict(list)
    for rollout in rollouts:
        by_problem[rollout.problem].append(rollout)
        by_problem[None].append(rollout)
    return [
        _of(row, by_problem[None if row.get("scope") == "task" else str(row.get("problem"))]) for row in last.values()
    ]


def _of(row: Mapping[str, Any], answers: list[LoggedRollout]) -> Commented:
    step = int(number(row.get("step")) or 0)
    before, after = ([a.right for a in answers if (a.step > step) == later] for later in (False, True))
    problem, prompt, completion, text = (
        str(row.get(key) or "")[:MOST_SHOWN] for key in ("problem", "prompt", "completion", "feedback")
    )
    scope = row.get("scope")
    known = scope if scope in ("answer", "problem", "task") else "answer"
    tallies = (sum(before), len(before)), (sum(after), len(after))
    return Commented(step, problem, prompt, completion, text, str(known), *tallies)
