"""How far a teacher's prompt moves the style of the answers: how they begin, how they end, and what lies between.

Student and teacher are scored on the same tokens. A teacher that knows more should raise the probability of right answers and
leave their form alone. One whose prompt lowers the probability of how they begin or end teaches another form first, and the
task's is lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from vpd_mlx import losses
from vpd_mlx.common.softmax import Softmax
from vpd_mlx.common.stats import auc, mean
from vpd_mlx.engine.batching import by_row
from vpd_mlx.engine.heads import Head, map_tokens
from vpd_mlx.engine.learner import Floats
from vpd_mlx.engine.policy import Policy
from vpd_mlx.losses import LossAndMetrics
from vpd_mlx.run.advice import Style
from vpd_mlx.types import TokenRow

__all__ = ["Scored", "Scorer", "style_of"]

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Scored:
    """A completion to be scored under both prompts. `stops` says whether its last token is a stop token, `right` whether it is
    right; `sampled` whether the student sampled it and the context is its own, so that training would learn from it."""

    student: Ids
    teacher: Ids
    completion: Ids
    stops: bool
    right: bool
    sampled: bool


def _compared(student: Softmax, fixed: Mapping[str, mx.array], head: Head) -> LossAndMetrics:
    """Jensen-Shannon divergence of each token, KL(student|teacher), and log q - log pi of the token itself; nats."""
    teacher, ids = Softmax.of(head(fixed["teacher"])), fixed["targets"]
    shift = teacher.fixed_logps(ids) - student.fixed_logps(ids)
    kl = losses.divergence_of(student, teacher, alpha=1.0)
    return losses.divergence_of(student, teacher, alpha=0.5), {"kl": kl, "shift": shift}


class Scorer:
    """Scores completions under student and teacher; the student's hidden states are found once for all teachers."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._states: dict[TokenRow, mx.array] = {}

    def __call__(self, rows: Sequence[Scored]) -> list[dict[str, Floats]]:
        """`loss` (Jensen-Shannon), `kl` and `shift` of every token, in nats, per row (T_i,)."""
        if not rows:
            return []
        policy = self._policy
        student = [TokenRow(r.student, r.completion) for r in rows]
        new = [row for row in dict.fromkeys(student) if row not in self._states]
        self._states |= dict(zip(new, policy.states(new), strict=True)) if new else {}
        teacher = policy.states([TokenRow(r.teacher, r.completion) for r in rows])
        fixed = {
            "teacher": mx.concatenate(teacher),
            "targets": mx.array(np.concatenate([np.asarray(r.completion, np.int32) for r in rows])),
        }
        states = mx.concatenate([self._states[row] for row in student])
        found = map_tokens(policy.head, _compared, states, fixed, policy.head_chunk)
        columns = {name: by_row(np.array(values), student) for name, values in found.items()}
        return [{name: pieces[i] for name, pieces in columns.items()} for i in range(len(rows))]


def _over(values: Iterable[Floats]) -> float | None:
    """The mean over all tokens."""
    parts = [v for v in values if v.size]
    return mean(np.concatenate(parts)) if parts else None


def _within(problems: Sequence[Mapping[bool, Sequence[float]]]) -> float | None:
    """The AUC over all pairs of a right and a wrong completion of the same problem: harder problems do not count as judgement."""
    pairs = [len(of[True]) * len(of[False]) for of in problems]
    won = [n * (auc(of[True], of[False]) or 0.0) for n, of in zip(pairs, problems, strict=True) if n]
    return sum(won) / sum(pairs) if won else None


def style_of(rows: Sequence[Scored], scores: Sequence[Mapping[str, Floats]]) -> Style:
    """What the tokens' figures say of a teacher's prompt. Figures without data are None."""
    right, stopped, between, first = [], [], [], {}
    divergence: dict[bool, list[Floats]] = {True: [], False: []}
    gains: dict[Ids, dict[bool, list[float]]] = {}
    for row, found in zip(rows, scores, strict=True):
        # The first token's distributions do not depend on the completion: they count once for each pair of prompts.
        first[row.student, row.teacher] = float(found["kl"][0]), float(found["loss"][0])
        if row.sampled:
            divergence[row.right].append(found["loss"])
            gains.setdefault(row.student, {True: [], False: []})[row.right].append(float(found["shift"].sum()))
        if row.right:
            right.append(float(found["shift"][0]))
            between.append(found["shift"][1:-1] if row.stops else found["shift"][1:])
            if row.stops and len(row.completion) > 1:
                stopped.append(float(found["shift"][-1]))
    sums = {of: sum(float(d.sum()) for d in divergence[of]) for of in (True, False)}
    total = sums[True] + sums[False]
    return Style(
        first_token=mean(right),
        stop_token=mean(stopped),
        rest=_over(between),
        first_kl=mean([kl for kl, _ in first.values()]),
        first_js=mean([js for _, js in first.values()]),
        divergence_right=_over(divergence[True]),
        divergence_wrong=_over(divergence[False]),
        right_share=sums[True] / total if total > 0 else None,
        auc=_within(list(gains.values())),
    )
