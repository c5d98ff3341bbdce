"""What goes wrong in a run, seen in its logs: the loop looks after every step, the report at the end.

Each check has one threshold. Those on steps look at the last ten, since one bad batch is no trend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vpd_mlx.common.stats import paired
from vpd_mlx.common.text import interval, number, percent

if TYPE_CHECKING:
    from vpd_mlx.run.folder import Run

__all__ = ["Warnings", "findings", "warnings"]

Row = Mapping[str, Any]
Check = Callable[[Sequence[Row]], str | None]

WINDOW = 10  # steps
UNIFORM = 0.95  # of the groups
SILENT_STEPS = 5
SOLVED = 0.9  # reward or accuracy from which on certainty and a small gap are success
ENTROPY_LEFT, ENTROPY_LOW = 0.1, 0.05  # of the first steps' entropy; nats
SHORTER, LONGER = 0.34, 2.0  # of the first steps' length
CUT_OFF, RUNAWAY = 0.2, 0.5  # of the completions
NEGATIVE_MARGINS = 3  # E-steps in a row
SKIPPED = 0.5  # of the E-steps
CONTEXTS_CUT = 0.2  # of the contexts
GAP_BEFORE, GAP_LEFT = 0.1, 0.02


def _values(rows: Sequence[Row], key: str) -> list[float]:
    return [value for row in rows if (value := number(row.get(key))) is not None]


def _recent(rows: Sequence[Row], key: str) -> list[float]:
    return _values(rows[-WINDOW:], key)


def _change(rows: Sequence[Row], key: str) -> tuple[float, float] | None:
    """Means of the first and the last steps, once there are enough of them."""
    first, last = _values(rows[:WINDOW], key), _recent(rows, key)
    return (float(np.mean(first)), float(np.mean(last))) if len(rows) >= 2 * WINDOW and first and last else None


def _contexts(row: Row) -> float:
    """How many completions of a step got feedback."""
    kinds = row.get("contexts")
    return sum(number(n) or 0.0 for n in kinds.values()) if isinstance(kinds, Mapping) else 0.0


def _nonfinite(rows: Sequence[Row]) -> str | None:
    bad = sum(number(v) or 0.0 for row in rows for k, v in row.items() if k.endswith("/nonfinite"))
    return (
        f"{bad:.0f} update(s) were left out because loss or gradient was not finite; lower optimizer.learning_rate"
        if bad
        else None
    )


def _verifier(rows: Sequence[Row]) -> str | None:
    failed = sum(_values(rows, "verifier_failures"))
    return f"the verifier failed on {failed:.0f} completions, which were left out; fix the verifier" if failed else None


def _all_right(rows: Sequence[Row]) -> str | None:
    values = _recent(rows, "groups_all_right")
    if len(values) == WINDOW and np.mean(values) > UNIFORM:
        return (
            f"all completions are right in {percent(float(np.mean(values)))} of the last groups: nothing is left to learn; "
            "give harder problems, or stop"
        )
    return None


def _all_wrong(rows: Sequence[Row]) -> str | None:
    values = _recent(rows, "groups_all_wrong")
    if len(values) < WINDOW or np.mean(values) <= UNIFORM:
        return None
    rest = (
        "only feedback teaches anything; give easier problems, or raise rollout.group_size"
        if any(_contexts(row) for row in rows[-WINDOW:])
        else "and without feedback nothing is learned; add a source to feedback.sources, or give easier problems"
    )
    return f"all completions are wrong in {percent(float(np.mean(values)))} of the last groups: {rest}"


def _no_feedback(rows: Sequence[Row]) -> str | None:
    # A divergence from the teacher is all that such a step has to learn from, so it is logged even if there is none.
    silent = [row for row in rows[-SILENT_STEPS:] if "student/divergence" in row and not _contexts(row)]
    if len(silent) == SILENT_STEPS and np.mean(_values(silent, "groups_all_right") or [0.0]) < UNIFORM:
        return (
            f"no completion of the last {SILENT_STEPS} steps got feedback: nothing is learned; check feedback.sources"
        )
    return None


def _entropy(rows: Sequence[Row]) -> str | None:
    change, reward = _change(rows, "student/entropy"), _recent(rows, "reward")
    if change is None or change[1] >= ENTROPY_LEFT * change[0] or change[1] >= ENTROPY_LOW:
        return None
    if not reward or np.mean(reward) >= SOLVED:
        return None
    return (
        f"entropy collapse: {change[0]:.3f} -> {change[1]:.3f} nats at a reward of {np.mean(reward):.2f}; lower "
        "optimizer.learning_rate, raise rollout.temperature, or return to an earlier checkpoint"
    )


def _length(rows: Sequence[Row]) -> str | None:
    change = _change(rows, "length")
    if change is None or SHORTER * change[0] <= change[1] <= LONGER * change[0]:
        return None
    how, remedy = (
        ("collapse", "check what the verifier rewards")
        if change[1] < change[0]
        else ("growth", "read some completions: they may ramble or repeat")
    )
    return f"length {how}: {change[0]:.1f} -> {change[1]:.1f} tokens; {remedy}"


def _truncated(rows: Sequence[Row]) -> str | None:
    recent, change = _recent(rows, "truncated"), _change(rows, "truncated")
    if change is not None and change[1] > RUNAWAY and change[1] > 2 * change[0]:
        return (
            f"{change[1]:.0%} of completions are cut off at the limit: the model no longer stops; lower "
            "optimizer.learning_rate, or raise rollout.max_completion_tokens if the task needs it"
        )
    if len(recent) == WINDOW and np.mean(recent) > CUT_OFF:
        return (
            f"{np.mean(recent):.0%} of completions are cut off: the model learns from unfinished answers; raise "
            "rollout.max_completion_tokens"
        )
    return None


def _margin(rows: Sequence[Row]) -> str | None:
    e_steps = _values(rows, "e_step/margin")[-NEGATIVE_MARGINS:]
    if len(e_steps) == NEGATIVE_MARGINS and max(e_steps) < 0:
        return (
            f"the E-step's margin has been negative three times (last {e_steps[-1]:.2f}): the teacher prefers wrong "
            "completions; lower e_step.learning_rate_ratio, or check the feedback"
        )
    values = [] if e_steps else _recent(rows, "student/margin")
    if len(values) == WINDOW and np.mean(values) < 0:
        return (
            f"the teacher's margin is negative ({np.mean(values):.2f}): it prefers wrong completions, and teaches them; "
            "check the feedback"
        )
    return None


def _skipped(rows: Sequence[Row]) -> str | None:
    values = _values(rows, "e_step/skipped")
    if len(values) >= NEGATIVE_MARGINS and np.mean(values) > SKIPPED:
        return (
            f"{sum(values):.0f} of {len(values)} E-steps were skipped because all their completions were right, or all "
            "wrong; raise rollout.prompts, or choose problems that the student sometimes solves"
        )
    return None


def _cut(rows: Sequence[Row]) -> str | None:
    cut, given = sum(_values(rows, "contexts_cut")), sum(map(_contexts, rows))
    if given and cut > CONTEXTS_CUT * given:
        return f"{percent(cut / given)} of the feedback was cut; raise feedback.max_tokens if memory allows"
    return None


def _worse(evaluations: Sequence[Row]) -> str | None:
    before, after = evaluations[0], evaluations[-1]
    scores = [e.get("greedy_by_problem") for e in (before, after)]
    if number(before.get("step")) or before is after or not all(isinstance(s, Mapping) for s in scores):
        return None
    a, b = ({k: v for k, v in s.items() if number(v) is not None} for s in scores if isinstance(s, Mapping))
    change = paired(a, b)
    if change is None or change.verdict != "worse":
        return None
    return (
        f"the student got worse: greedy {percent(before.get('student_greedy'))} before, "
        f"{percent(after.get('student_greedy'))} after; lower optimizer.learning_rate, or take an earlier checkpoint"
    )


def _past_best(evaluations: Sequence[Row]) -> str | None:
    last, bounds = evaluations[-1], interval(evaluations[-1], "student")
    best = max(evaluations, key=lambda e: number(e.get("student")) or 0.0)
    value = number(best.get("student"))
    if len(evaluations) < 3 or bounds is None or value is None or value <= bounds[1]:
        return None
    return (
        f"the best evaluation was after step {best.get('step')} ({percent(value)}), the last is at "
        f"{percent(last.get('student'))}; set evaluation.keep_best, or lower optimizer.learning_rate"
    )


def _gap(evaluations: Sequence[Row]) -> str | None:
    measured = [e for e in evaluations if number(e.get("gap")) is not None]
    if len(measured) < 2 or measured[0]["gap"] <= GAP_BEFORE:
        return None
    last = measured[-1]
    if last["gap"] >= GAP_LEFT or (number(last.get("student")) or 0.0) >= SOLVED:
        return None
    teacher, student = (percent(last.get(key)) for key in ("teacher", "student_there"))
    return (
        f"the teacher's gap is gone ({teacher} against the student's {student}): feedback no longer helps; stop here, or "
        "give better feedback"
    )


ON_STEPS: Mapping[str, Check] = {
    "nonfinite": _nonfinite,
    "verifier": _verifier,
    "all wrong": _all_wrong,
    "all right": _all_right,
    "no feedback": _no_feedback,
    "skipped": _skipped,
    "margin": _margin,
    "entropy": _entropy,
    "length": _length,
    "truncated": _truncated,
    "cut": _cut,
}
ON_EVALUATIONS: Mapping[str, Check] = {"worse": _worse, "past best": _past_best, "gap": _gap}
NOTED = ("nonfinite", "verifier")  # the loop says so at the step itself


def _found(checks: Mapping[str, Check], rows: Sequence[Row]) -> dict[str, str]:
    return {name: text for name, check in checks.items() if rows and (text := check(rows)) is not None}


def warnings(rows: Sequence[Row], evaluations: Sequence[Row] = ()) -> dict[str, str]:
    """What goes wrong, by a short name: rows of `metrics.jsonl` and `evals.jsonl`, oldest first."""
    return _found(ON_EVALUATIONS, evaluations) | _found(ON_STEPS, rows)


def findings(run: Run) -> list[str]:
    """The warnings on a run folder, as sentences. The last evaluation that counts is that of the adapter handed over."""
    handed_over = [e for e in run.evals if (number(e.get("step")) or 0) <= run.evaluated]
    return [f"{text[0].upper()}{text[1:]}." for text in warnings(run.metrics, handed_over).values()]


class Warnings:
    """Says each warning once, until it has gone and come back."""

    def __init__(self) -> None:
        self._known: set[str] = set()
        self._of_evaluations: tuple[int, dict[str, str]] = (0, {})

    def new(self, rows: Sequence[Row], evaluations: Sequence[Row] = ()) -> list[str]:
        """The warnings that were not there the last time."""
        if self._of_evaluations[0] != len(evaluations):
            self._of_evaluations = len(evaluations), _found(ON_EVALUATIONS, evaluations)
        now = self._of_evaluations[1] | _found(ON_STEPS, rows)
        fresh = [text for name, text in now.items() if name not in self._known and name not in NOTED]
        self._known = set(now)
        return fresh
