"""Watchdogs: the known ways a run ends badly, seen in its metrics before the accuracy shows them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["Warnings", "warnings"]

Row = Mapping[str, Any]
WINDOW = 10  # steps looked at: one bad batch is no trend
UNHEARD = 5  # steps without any feedback


def _recent(rows: Sequence[Row], key: str, count: int = WINDOW) -> list[float]:
    return [float(r[key]) for r in rows[-count:] if isinstance(r.get(key), int | float)]


def _first(rows: Sequence[Row], key: str, count: int = WINDOW) -> list[float]:
    return [float(r[key]) for r in rows[:count] if isinstance(r.get(key), int | float)]


def _all_right(rows: Sequence[Row]) -> str | None:
    values = _recent(rows, "groups_all_right")
    if len(values) == WINDOW and np.mean(values) > 0.95:
        return "nearly all groups are all right: there is nothing left to learn here; take harder problems, or stop"
    return None


def _all_wrong(rows: Sequence[Row]) -> str | None:
    values, contexts = _recent(rows, "groups_all_wrong"), _recent(rows, "contexts_none")
    if len(values) == WINDOW and np.mean(values) > 0.95:
        heard = len(contexts) == WINDOW and any(sum(r["contexts"].values()) for r in rows[-WINDOW:])
        help_ = (
            "feedback is all there is to learn from" if heard else "and no feedback: nothing is learned; add a source"
        )
        return f"nearly all groups are all wrong, {help_}"
    return None


def _unheard(rows: Sequence[Row]) -> str | None:
    last = rows[-UNHEARD:]
    learns = [r for r in last if "m_step/sequences" in r and not sum(r["contexts"].values())]
    if len(learns) == UNHEARD and np.mean(_recent(last, "groups_all_right") or [0.0]) < 0.95:
        return f"no completion of the last {UNHEARD} steps got feedback: nothing is learned; check feedback.sources"
    return None


def _entropy(rows: Sequence[Row]) -> str | None:
    for key in ("m_step/student_entropy", "policy_gradient/student_entropy"):
        then, now = _first(rows, key), _recent(rows, key)
        if len(rows) >= 2 * WINDOW and then and now and np.mean(now) < 0.1 * np.mean(then) and np.mean(now) < 0.05:
            reward = _recent(rows, "reward")
            if reward and np.mean(reward) < 0.9:
                return (
                    f"entropy collapse: {np.mean(then):.3f} -> {np.mean(now):.3f} nats at a reward of {np.mean(reward):.2f}; "
                    "lower optimizer.learning_rate, or return to an earlier checkpoint"
                )
    return None


def _length(rows: Sequence[Row]) -> str | None:
    then, now, cut = _first(rows, "length"), _recent(rows, "length"), _recent(rows, "truncated")
    if len(rows) < 2 * WINDOW or not then or not now:
        return None
    if cut and np.mean(cut) > 0.5 and np.mean(cut) > 2 * np.mean(_first(rows, "truncated") or [0.0]):
        return (
            f"{np.mean(cut):.0%} of completions are cut off at the limit: the model no longer stops; lower "
            "optimizer.learning_rate, or raise rollout.max_completion_tokens if the task needs it"
        )
    if np.mean(now) < 0.34 * np.mean(then):
        return f"length collapse: {np.mean(then):.1f} -> {np.mean(now):.1f} tokens; check what the verifier rewards"
    return None


def _margin(rows: Sequence[Row]) -> str | None:
    values = _recent([r for r in rows if r.get("e_step/margin") is not None], "e_step/margin", 3)
    if len(values) == 3 and max(values) < 0:
        return (
            f"the E-step's margin has been negative three times (last {values[-1]:.2f}): the teacher prefers wrong answers; "
            "lower e_step.learning_rate_ratio, or look at the feedback"
        )
    return None


CHECKS: Mapping[str, Callable[[Sequence[Row]], str | None]] = {
    "all right": _all_right,
    "all wrong": _all_wrong,
    "unheard": _unheard,
    "entropy": _entropy,
    "length": _length,
    "margin": _margin,
}


def warnings(rows: Sequence[Row], evaluations: Sequence[Row] = ()) -> dict[str, str]:
    """What is going wrong, by a short name: rows of `metrics.jsonl` and `evals.jsonl`, oldest first."""
    found = {name: text for name, check in CHECKS.items() if (text := check(rows)) is not None}
    gaps = [e for e in evaluations if e.get("gap") is not None]
    if len(gaps) >= 2 and gaps[0]["gap"] > 0.1 and gaps[-1]["gap"] < 0.02 and gaps[-1]["student"] < 0.9:
        found["gap"] = (
            f"the teacher under feedback is no better than the student ({gaps[-1]['teacher']:.0%} against "
            f"{gaps[-1]['student_there']:.0%}): feedback no longer helps; stop here, or give better feedback"
        )
    return found


class Warnings:
    """Says each warning once, until it has gone and come back."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def new(self, rows: Sequence[Row], evaluations: Sequence[Row] = ()) -> list[str]:
        """The warnings that were not there the last time."""
        now = warnings(rows, evaluations)
        fresh = [text for name, text in now.items() if name not in self._said]
        self._said = set(now)
        return fresh
