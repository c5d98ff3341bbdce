"""What the browsers on a run's page show, as JSON: rollouts of training, and the answers to held-out problems over the run.

Both are bounded, and whatever a broken row holds, a field is text, a number or None.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from vpd_mlx.common.text import number
from vpd_mlx.run.folder import NO_CONTEXT, LoggedRollout, Run

__all__ = ["MOST_BYTES", "choose", "histories", "rollouts"]

MOST_BYTES = 8 << 20  # of rollouts in a page: a browser stays quick, and the file can be sent by mail
MOST_HISTORY = 4 << 20  # bytes of answers to held-out problems
FOLLOWED = 0.25  # of the rollouts are of problems that come back, at all their steps


def choose(entries: Sequence[LoggedRollout], most: int) -> list[LoggedRollout]:
    """At most `most` rollouts, whole groups: some of problems that the run came back to, at every step where it did, so that they
    can be followed; the others spread evenly over the run, the first and the last step's among them.
    """
    if len(entries) <= most:
        return list(entries)
    groups = [list(g) for _, g in groupby(entries, key=lambda e: (e.step, e.problem))]
    followed = _followed(groups, int(FOLLOWED * most))
    rest = [i for i in range(len(groups)) if i not in followed]
    left = most - sum(len(groups[i]) for i in followed)
    fit = max(1, int(left / (len(entries) / len(groups))))
    for count in range(min(fit, len(rest)), 1, -1):
        at = {rest[round(float(i))] for i in np.linspace(0, len(rest) - 1, count)}
        chosen = [e for i in sorted(at | followed) for e in groups[i]]
        if len(chosen) <= most:
            return chosen
    return groups[-1][:most]


def _followed(groups: Sequence[Sequence[LoggedRollout]], most: int) -> set[int]:
    """Where the groups of the problems stand that come back most often; at most `most` rollouts, problems whole.

    Neither the run's first group nor its last is among them: those are there anyway.
    """
    places: dict[str, list[int]] = defaultdict(list)
    for i, group in enumerate(groups):
        places[group[0].problem].append(i)
    found: set[int] = set()
    for own in sorted(places.values(), key=lambda p: -len(p)):
        more = {i for i in own if 0 < i < len(groups) - 1}
        if len(own) > 1 and sum(len(groups[i]) for i in found | more) <= most:
            found |= more
    return found


def rollouts(run: Run, most: int) -> list[dict[str, Any]]:
    """At most `most` rollouts, fewer if they take more than MOST_BYTES."""
    while True:
        rows = [_rollout(row) for row in run.read(choose(run.rollouts, most))]
        size = sum(len(json.dumps(r)) for r in rows)
        if len(rows) <= 1 or size <= MOST_BYTES:
            return rows
        most = min(len(rows) - 1, len(rows) * MOST_BYTES // size)


def _rollout(row: Mapping[str, Any]) -> dict[str, Any]:
    context, pieces, shift = row.get("context"), row.get("pieces"), row.get("shift")
    context = context if isinstance(context, Mapping) else {}
    sample, score = number(row.get("sample")), number(row.get("score"))
    return {
        "step": int(number(row.get("step")) or 0),
        "problem": str(row.get("problem", "?")),
        "sample": None if sample is None else int(sample),
        "right": bool(row.get("success")),
        "score": None if score is None else round(score, 4),
        "kind": str(context.get("kind")) if context else NO_CONTEXT,
        "cut": bool(context.get("cut")),
        **{key: str(row.get(key) or "") for key in ("prompt", "completion", "expected", "verdict", "finish")},
        "student": str(row.get("student_prompt") or ""),
        "teacher": str(row.get("teacher_prompt") or ""),
        "tokens": int(number(row.get("tokens")) or 0),
        "pieces": [str(p) for p in pieces] if isinstance(pieces, list) else None,
        "shift": [number(x) for x in shift] if isinstance(shift, list) else None,
    }


def histories(run: Run) -> list[dict[str, Any]]:
    """Each held-out problem with its likeliest answers at every evaluation, in the order of steps.

    What the teacher read is that of the first and the last evaluation. Problems are the first ones in the order of evaluation,
    up to MOST_HISTORY bytes.
    """
    found: dict[str, dict[int, Mapping[str, Any]]] = defaultdict(dict)
    for row in run.answer_rows():
        if (step := number(row.get("step"))) is not None:
            found[str(row.get("problem", "?"))][int(step)] = row
    out: list[dict[str, Any]] = []
    size = 0
    for problem, rows in found.items():
        history = _history(problem, [rows[step] for step in sorted(rows)])
        size += len(json.dumps(history))
        if out and size > MOST_HISTORY:
            break
        out.append(history)
    return out


def _history(problem: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    ends = rows[:1] if len(rows) == 1 else [rows[0], rows[-1]]
    return {
        "problem": problem,
        "prompt": str(rows[0].get("prompt") or ""),
        "expected": str(next((r["expected"] for r in rows if r.get("expected")), "")),
        "answers": [
            {
                "step": int(number(row.get("step")) or 0),
                "right": bool(row.get("success")),
                "text": str(row.get("completion") or ""),
                "verdict": str(row.get("verdict") or ""),
                "cut": row.get("finish") == "length",
            }
            for row in rows
        ],
        "taught": [
            {
                "step": int(number(row.get("step")) or 0),
                "kind": str(row.get("context")),
                "text": str(row["teacher_prompt"]),
            }
            for row in ends
            if row.get("teacher_prompt")
        ],
    }
