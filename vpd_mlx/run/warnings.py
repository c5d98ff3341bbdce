"""What goes wrong in a run, seen in its logs: the loop looks after every step, the report at the end.

The watchdogs (`watch`) see harm within a few steps. The other checks have one threshold each; those on steps look at the last
ten, since one bad batch is no trend.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vpd_mlx.common.stats import paired
from vpd_mlx.common.text import interval, number, percent
from vpd_mlx.run.folder import Run, greedy_by_problem
from vpd_mlx.run.forgetting import cost
from vpd_mlx.run.watch import collapse, completions, drift, lineage, moves_right, rise

__all__ = ["GAP_LEFT", "LEAST_PROBLEMS", "SOLVED", "Warnings", "findings", "no_gap", "warnings"]

Row = Mapping[str, Any]

WINDOW = 10  # steps
UNIFORM = 0.95  # of the groups
SILENT_STEPS = 5
SOLVED = 0.9  # reward or accuracy from which on certainty and a small gap are success
ENTROPY_LEFT, ENTROPY_LOW = 0.1, 0.05  # of the first steps' entropy; nats
SHORTER, LONGER = 0.34, 2.0  # of the first steps' length
CUT_OFF, RUNAWAY = 0.2, 0.5  # of the completions
ERRORS = 3.0  # standard errors
NEGATIVE_MARGINS = 3  # E-steps in a row
SKIPPED = 0.5  # of the E-steps
CONTEXTS_CUT = 0.2  # of the contexts
GAP_BEFORE, GAP_LEFT = 0.1, 0.02
LEAST_PROBLEMS = 8  # fewer say nothing about a gap


def _values(rows: Sequence[Row], key: str) -> list[float]:
    return [value for row in rows if (value := number(row.get(key))) is not None]


def _recent(rows: Sequence[Row], key: str, least: int = WINDOW) -> float:
    """Mean of the last steps; NaN, which is beyond no threshold, if fewer than `least` of them have the figure."""
    values = _values(rows[-WINDOW:], key)
    return float(np.mean(values)) if len(values) >= least else math.nan


def _change(rows: Sequence[Row], key: str) -> tuple[float, float]:
    """Means of the first and the last steps; NaN until there are enough of them."""
    if len(rows) < 2 * WINDOW or not (first := _values(rows[:WINDOW], key)):
        return math.nan, math.nan
    return float(np.mean(first)), _recent(rows, key, 1)


def _contexts(row: Row) -> float:
    """How many completions of a step got feedback."""
    return completions(row) - (number(row.get("contexts_none")) or 0.0)


def _on_groups(rows: Sequence[Row]) -> dict[str, str]:
    """Whether there is something to learn from, and whether it is learned."""
    found = {}
    bad = sum(number(v) or 0.0 for row in rows for k, v in row.items() if k.endswith("/nonfinite"))
    if bad:
        found["nonfinite"] = (
            f"{bad:.0f} update(s) were left out because loss or gradient was not finite; lower optimizer.learning_rate"
        )
    if failed := sum(_values(rows, "verifier_failures")):
        found["verifier"] = f"the verifier failed on {failed:.0f} completions, which were left out; fix the verifier"
    if (wrong := _recent(rows, "groups_all_wrong")) > UNIFORM:
        rest = (
            "only feedback teaches anything; give easier problems, or raise rollout.group_size"
            if any(_contexts(row) for row in rows[-WINDOW:])
            else "and without feedback nothing is learned; add a source to feedback.sources, or give easier problems"
        )
        found["all wrong"] = f"all completions are wrong in {percent(wrong)} of the last groups: {rest}"
    if (right := _recent(rows, "groups_all_right")) > UNIFORM:
        found["all right"] = (
            f"all completions are right in {percent(right)} of the last groups: nothing is left to learn; give harder "
            "problems, or stop"
        )
    # A divergence from the teacher is all that such a step has to learn from, so it is logged even if there is none.
    silent = [row for row in rows[-SILENT_STEPS:] if "student/divergence" in row and not _contexts(row)]
    if len(silent) == SILENT_STEPS and np.mean(_values(silent, "groups_all_right") or [0.0]) < UNIFORM:
        found["no feedback"] = (
            f"no completion of the last {SILENT_STEPS} steps got feedback: nothing is learned; check feedback.sources"
        )
    skipped = _values(rows, "e_step/skipped")
    if len(skipped) >= NEGATIVE_MARGINS and np.mean(skipped) > SKIPPED:
        found["skipped"] = (
            f"{sum(skipped):.0f} of {len(skipped)} E-steps were skipped because all their completions were right, or all "
            "wrong; raise rollout.prompts, or choose problems that the student sometimes solves"
        )
    return found


REMEDIES = (
    "lower optimizer.learning_rate, slow the teacher down (teacher.weights: ema), or change the wording under templates"
)
COVERS = {"truncated": "truncated", "style": "truncated", "length": "length", "entropy": "entropy"}


def _on_watch(rows: Sequence[Row]) -> dict[str, str]:
    """What the watchdogs see now, and what has been done about what they saw."""
    found = {}
    back = [r for r in rows if "watch/reverted_to" in r]
    if back:
        said = [
            f"after step {r.get('step')} to step {r.get('watch/reverted_to')} ({r.get('watch/collapse')})" for r in back
        ]
        found["reverted"] = (
            f"the run collapsed and went back to an earlier adapter, at half the learning rate: {'; '.join(said)}"
        )
    if rows and "watch/stopped" in rows[-1]:
        found["stopped"] = (
            f"the run stopped after step {rows[-1].get('step')}: {rows[-1].get('watch/collapse')}; {REMEDIES}"
        )
        return found
    harm, moved = collapse(rows), drift(rows)
    if harm is not None:
        found["collapse"] = f"collapse: {harm.text}; {REMEDIES}"
    elif moved is not None:
        found["drift"] = (
            f"{moved}; read some completions, and change the wording under templates if the format is going"
        )
    if (seen := [r for r in rows if "watch/collapse" in r and "watch/reverted_to" not in r]) and harm is None:
        found["collapsed"] = f"a collapse was seen after step {seen[0].get('step')}: {seen[0].get('watch/collapse')}"
    if (taught := moves_right(rows)) is not None:
        found["moves right"] = (
            f"{taught}: its prompt moves the style of the answer; change the wording under templates, or the feedback"
        )
    return found


def _on_figures(rows: Sequence[Row]) -> dict[str, str]:
    """The teacher's margin, the student's entropy, lengths."""
    found = {}
    e_steps = _values(rows, "e_step/margin")[-NEGATIVE_MARGINS:]
    if len(e_steps) == NEGATIVE_MARGINS and max(e_steps) < 0:
        found["margin"] = (
            f"the E-step's margin has been negative three times (last {e_steps[-1]:.2f}): the teacher prefers wrong "
            "completions; lower e_step.learning_rate_ratio, or check the feedback"
        )
    elif not e_steps and (margin := _recent(rows, "student/margin")) < 0:
        found["margin"] = (
            f"the teacher's margin is negative ({margin:.2f}): it prefers wrong completions, and teaches them; check the "
            "feedback"
        )
    (before, after), reward = _change(rows, "student/entropy"), _recent(rows, "reward", 1)
    if after < ENTROPY_LEFT * before and after < ENTROPY_LOW and reward < SOLVED:
        found["entropy"] = (
            f"entropy collapse: {before:.3f} -> {after:.3f} nats at a reward of {reward:.2f}; lower "
            "optimizer.learning_rate, raise rollout.temperature, or return to an earlier checkpoint"
        )
    before, after = _change(rows, "length")
    if after < SHORTER * before:
        found["length"] = f"length collapse: {before:.1f} -> {after:.1f} tokens; check what the verifier rewards"
    elif after > LONGER * before:
        growth = f"length growth: {before:.1f} -> {after:.1f} tokens"
        found["length"] = f"{growth}; read some completions: they may ramble or repeat"
    before, after = _change(rows, "truncated")
    if after > RUNAWAY and after > 2 * before:
        found["truncated"] = (
            f"{after:.0%} of completions are cut off at the limit: the model no longer stops; lower "
            "optimizer.learning_rate, or raise rollout.max_completion_tokens if the task needs it"
        )
    elif (share := _recent(rows, "truncated")) > CUT_OFF:
        found["truncated"] = (
            f"{share:.0%} of completions are cut off: the model learns from unfinished answers; raise "
            "rollout.max_completion_tokens"
        )
    cut, given = sum(_values(rows, "contexts_cut")), sum(map(_contexts, rows))
    if given and cut > CONTEXTS_CUT * given:
        found["cut"] = f"{percent(cut / given)} of the feedback was cut; raise feedback.max_tokens if memory allows"
    return found


def _on_evaluations(evaluations: Sequence[Row]) -> dict[str, str]:
    if len(evaluations) < 2:
        return {}
    found = {}
    first, last, bounds = evaluations[0], evaluations[-1], interval(evaluations[-1], "student")
    held, was, now = number(last.get("problems")) or 0, number(first.get("truncated")), number(last.get("truncated"))
    if was is not None and now is not None and now - was > CUT_OFF and rise(was, held, now, held) > ERRORS:
        found["stops less"] = (
            f"{percent(now)} of held-out completions are cut off at the limit, {percent(was)} before training: the model "
            "forgets to stop; take an earlier checkpoint, and lower optimizer.learning_rate"
        )
    change = None if number(first.get("step")) else paired(greedy_by_problem(first), greedy_by_problem(last))
    if change is not None and change.verdict == "worse":
        found["worse"] = (
            f"the student got worse: greedy {percent(first.get('student_greedy'))} before, "
            f"{percent(last.get('student_greedy'))} after; lower optimizer.learning_rate, or take an earlier checkpoint"
        )
    best = max(evaluations, key=lambda e: number(e.get("student")) or 0.0)
    value = number(best.get("student"))
    if len(evaluations) > 2 and bounds is not None and value is not None and value > bounds[1]:
        found["past best"] = (
            f"the best evaluation was after step {best.get('step')} ({percent(value)}), the last is at "
            f"{percent(last.get('student'))}; set evaluation.keep_best, or lower optimizer.learning_rate"
        )
    measured = [e for e in evaluations if number(e.get("gap")) is not None]
    gone = len(measured) > 1 and measured[0]["gap"] > GAP_BEFORE and measured[-1]["gap"] < GAP_LEFT
    if gone and (number(measured[-1].get("student")) or 0.0) < SOLVED:
        teacher, student = (percent(measured[-1].get(key)) for key in ("teacher", "student_there"))
        found["gap"] = (
            f"the teacher's gap is gone ({teacher} against the student's {student}): feedback no longer helps; stop here, "
            "or give better feedback"
        )
    return found


NOTED = ("nonfinite", "verifier", "reverted", "stopped")  # the loop says so at the step itself


def warnings(rows: Sequence[Row], evaluations: Sequence[Row] = ()) -> dict[str, str]:
    """What goes wrong, by a short name: rows of `metrics.jsonl` and `evals.jsonl`, oldest first."""
    found = _on_evaluations(evaluations) | _on_groups(rows) | _on_figures(lineage(rows)[0])
    harm = collapse(rows)
    if harm is not None:
        found.pop(COVERS.get(harm.cause, ""), None)
    return found | _on_watch(rows)


def no_gap(row: Mapping[str, Any]) -> bool:
    """Whether a teacher, measured on enough problems, is no better than a student that has much to learn."""
    gap, student = number(row.get("gap")), number(row.get("student"))
    if gap is None or student is None or student >= SOLVED:
        return False
    return gap <= 0 and int(row.get("teacher_problems") or 0) >= LEAST_PROBLEMS


def findings(run: Run) -> list[str]:
    """The warnings on a run folder, as sentences. The last evaluation that counts is that of the adapter handed over."""
    handed_over = [e for e in run.evals if (number(e.get("step")) or 0) <= run.evaluated]
    found = warnings(run.metrics, handed_over)
    if no_gap(run.before) and any(_contexts(row) for row in run.metrics):  # the loop says so before the first step
        teacher, student = (percent(run.before.get(key)) for key in ("teacher", "student_there"))
        found["no gap"] = (
            f"there was no gap from the start: before training the teacher was no better than the student ({teacher} against "
            f"{student}); better feedback, or another wording, must come first: ask `vpd-mlx probe`"
        )
    if any(r.verdict == "worse" for r in run.retained):
        found["cost"] = cost(run.retained)
    return [f"{text[0].upper()}{text[1:]}." for text in found.values()]


class Warnings:
    """Says each warning once, until it has gone and come back."""

    def __init__(self) -> None:
        self._known: set[str] = set()
        self._of_evaluations: tuple[int, dict[str, str]] = (0, {})

    def new(self, rows: Sequence[Row], evaluations: Sequence[Row] = ()) -> list[str]:
        """The warnings that were not there the last time."""
        if self._of_evaluations[0] != len(evaluations):
            self._of_evaluations = len(evaluations), warnings([], evaluations)
        now = self._of_evaluations[1] | warnings(rows)
        fresh = [text for name, text in now.items() if name not in self._known and name not in NOTED]
        self._known = set(now)
        return fresh
