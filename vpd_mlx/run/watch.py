"""Watchdogs: whether a run is being harmed right now, seen in rows of `metrics.jsonl`. Pure functions; nothing here acts.

Learning a format moves the style, the length and the share of cut-off answers, too. So a change counts as a collapse only if it
is large, is no accident of a few samples, and the reward does not pay for it. The last `WINDOW` steps are compared with the first
ones, and for the reward also with the best ten before. Completions of one problem resemble each other (`ALIKE`), so that they
count for less than their number. Steps that a revert has undone have no part in what comes after.

The thresholds were set by simulating steps without any change, 100 to a run: fewer than one such run in a hundred is stopped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vpd_mlx.common.text import number, percent

__all__ = ["WINDOW", "Collapse", "collapse", "completions", "drift", "lineage", "moves_right", "rise"]

Row = Mapping[str, Any]

WINDOW = 3  # steps
LINGER = 5  # steps for which a style must have moved: it moves before the reward does where a format is learned
LONG = 10  # steps of the best stretch so far
ALIKE = 0.7  # correlation of two completions of one problem
GROUP = 4  # completions of a problem, where a row does not say
RISEN, PAID, FALLEN = 0.0, 2.0, 5.0  # standard errors of the reward's change: anything, something, a loss
LOST = 0.5  # of the best reward
CUT_OFF, CUT_OFF_ERRORS = 0.3, 4.0  # rise of the share of cut-off completions
CREEPING, CREEPING_ERRORS = 0.1, 3.5  # the same where the style has moved far
DRIFT, FAR = 0.3, 0.4  # style: total variation of the first token from the untrained model's
WILDER = 1.5  # of the first steps' entropy, where the style has moved far
LONGER, LONGER_TOKENS = 3.0, 12  # of the first steps' median length
SOLVED = 0.9  # reward from which on nothing need pay, and wrong completions are few
LEAST_RIGHT = 12  # completions for a mean over right ones
ENTROPY_LEFT, ENTROPY_LOW = 0.1, 0.05  # of the first steps' entropy; nats


@dataclass(frozen=True)
class Collapse:
    """A harm: `cause` is a short name, `text` what has changed, with figures."""

    cause: str
    text: str


@dataclass(frozen=True)
class _Stretch:
    """Some steps in a row: the number of completions that they are worth, and a mean of any figure, NaN if there is none."""

    rows: Sequence[Row]

    @property
    def size(self) -> float:
        n = sum(completions(row) for row in self.rows)
        groups = sum(number(row.get("groups")) or completions(row) / GROUP for row in self.rows)
        return n / (1 + ALIKE * (n / groups - 1)) if groups else 0.0

    def mean(self, key: str) -> float:
        values = [value for row in self.rows if (value := number(row.get(key))) is not None]
        return float(np.mean(values)) if values else math.nan


def completions(row: Row) -> float:
    """How many completions a step had."""
    kinds = row.get("contexts")
    given = sum(number(n) or 0.0 for n in kinds.values()) if isinstance(kinds, Mapping) else 0.0
    return given + (number(row.get("contexts_none")) or 0.0)


def _errors(before: _Stretch, after: _Stretch, key: str) -> float:
    """The rise of a share in standard errors, 0 if there is nothing to compare; a mean of scores varies no more than a share."""
    a, b = before.mean(key), after.mean(key)
    return 0.0 if math.isnan(a) or math.isnan(b) else rise(a, before.size, b, after.size)


def rise(a: float, n: float, b: float, m: float) -> float:
    """The rise from the share a of n to the share b of m in standard errors, as Agresti and Caffo count them."""
    p, q = (a * n + 1) / (n + 2), (b * m + 1) / (m + 2)
    return (q - p) / math.sqrt(p * (1 - p) / (n + 2) + q * (1 - q) / (m + 2))


def lineage(rows: Sequence[Row]) -> tuple[list[Row], int]:
    """The steps that led to the adapter of now, and how many of them came before the last revert."""
    path: list[Row] = []
    kept = 0
    for row in rows:
        path.append(row)
        to = number(row.get("watch/reverted_to"))
        if to is not None:
            path = [r for r in path if (number(r.get("step")) or 0) <= to]
            kept = len(path)
    return path, kept


@dataclass(frozen=True)
class _View:
    """The first steps, the last ones, and the ten best in between."""

    first: _Stretch
    last: _Stretch
    best: _Stretch

    @property
    def gain(self) -> float:
        """The reward's rise since the start, in standard errors."""
        return _errors(self.first, self.last, "reward")

    @property
    def loss(self) -> float:
        """The reward's fall from its best, in standard errors."""
        return -_errors(self.best, self.last, "reward")

    @property
    def pays(self) -> bool:
        """Whether the reward has risen and is still there, or there is little left to gain."""
        return self.last.mean("reward") >= SOLVED or (self.gain >= PAID and self.loss < PAID)


def _view(rows: Sequence[Row]) -> _View | None:
    """None until there are steps enough, from the start or from the last revert on."""
    path, kept = lineage(rows)
    if len(path) - kept < WINDOW or len(rows) < WINDOW + 2:
        return None
    last, before = path[-WINDOW:], path[:-WINDOW]
    first = rows[: min(WINDOW, len(rows) - WINDOW)]
    stretches = [before[i : i + LONG] for i in range(max(1, len(before) - LONG + 1))]
    best = max((_Stretch(s) for s in [*stretches, first] if len(s) >= 2), key=lambda s: s.mean("reward"))
    return _View(_Stretch(first), _Stretch(last), best)


def collapse(rows: Sequence[Row]) -> Collapse | None:
    """The harm that the last steps show, or None: rows of `metrics.jsonl`, oldest first."""
    view = _view(rows)
    if view is None:
        return None
    first, last, best = view.first, view.last, view.best
    was, now = best.mean("reward"), last.mean("reward")
    if view.loss >= FALLEN and now < LOST * was:
        return Collapse("reward", f"the reward has fallen from {was:.2f} to {now:.2f}")
    if view.pays:
        return None
    reward = f"and the reward has not risen ({first.mean('reward'):.2f} at first, {now:.2f} now)"
    style = last.rows[-1].get("style/first_token")
    moved = number(style) or 0.0
    was, now = first.mean("truncated"), last.mean("truncated")
    errors = _errors(first, last, "truncated")
    cut_off = f"{percent(now)} of completions are cut off at the limit, {percent(was)} at first"
    if now - was >= CUT_OFF and errors >= CUT_OFF_ERRORS:
        return Collapse("truncated", f"{cut_off}, {reward}")
    other = f"the first token is another in {percent(moved)} of answers"
    if moved >= FAR and now - was >= CREEPING and errors >= CREEPING_ERRORS:
        return Collapse("style", f"{other}, {cut_off}, {reward}")
    was, now = first.mean("length_median"), last.mean("length_median")
    if moved >= FAR and now >= LONGER * was and now >= was + LONGER_TOKENS:
        return Collapse("length", f"completions have grown from {was:.0f} to {now:.0f} tokens (median), {reward}")
    was, now = first.mean("student/entropy"), last.mean("student/entropy")
    if moved >= FAR and now > WILDER * was:
        return Collapse("style", f"{other}, entropy has grown from {was:.2f} to {now:.2f} nats, {reward}")
    if now < ENTROPY_LEFT * was and now < ENTROPY_LOW:
        return Collapse("entropy", f"entropy has gone from {was:.3f} to {now:.3f} nats, {reward}")
    return None


def _without_gain(rows: Sequence[Row]) -> _Stretch | None:
    """The last `LINGER` steps, if their reward is no higher than that of the first; None if it is, or there are too few."""
    view, (path, kept) = _view(rows), lineage(rows)
    recent = _Stretch(path[kept:][-LINGER:])
    if view is None or view.pays or len(recent.rows) < LINGER or _errors(view.first, recent, "reward") > RISEN:
        return None
    return recent


def drift(rows: Sequence[Row]) -> str | None:
    """What to say of a style that has moved for some steps without any gain; None if it stays, or the reward rises."""
    recent = _without_gain(rows)
    moved = [] if recent is None else [number(row.get("style/first_token")) or 0.0 for row in recent.rows]
    if recent is None or min(moved) < DRIFT:
        return None
    was, now = _Stretch(rows[:WINDOW]).mean("reward"), recent.mean("reward")
    return (
        f"the style drifts without a gain: the first token is another in {percent(moved[-1])} of answers, and the reward went "
        f"from {was:.2f} to {now:.2f}"
    )


def moves_right(rows: Sequence[Row]) -> str | None:
    """What to say where nothing is gained from a teacher that differs on right completions as much as on wrong ones, else None.

    What it changes in a right answer is not the answer: it is its style. Where answers are free that need not hinder learning.
    """
    recent = _without_gain(rows)
    if recent is None or len(rows) < LONG:  # a gain takes its time
        return None
    right, wrong = recent.mean("student/divergence_right"), recent.mean("student/divergence_wrong")
    count = sum((number(row.get("success")) or 0.0) * completions(row) for row in recent.rows)
    if count < LEAST_RIGHT or recent.mean("success") > SOLVED or not right >= wrong:
        return None
    return f"no gain, and the teacher differs as much on right completions ({right:.2f} nats) as on wrong ones ({wrong:.2f})"
