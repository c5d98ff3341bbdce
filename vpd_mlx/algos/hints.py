"""The teacher behind one hint, taught by the teacher behind another.

A right answer is written behind a failure's context, such as the checker's words, and the teacher there is pulled onto the
teacher that reads the success's own context, such as a sibling's solution, token by token: KL(behind its own | behind the
failure's), the former without gradient. What one kind of context already tells the teacher, the others come to tell it, too.
Nothing pushes any likelihood down.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import mlx.core as mx

from vpd_mlx import losses
from vpd_mlx.algos.samples import Sample, teacher_row
from vpd_mlx.common.softmax import Softmax
from vpd_mlx.engine.batching import token_weights
from vpd_mlx.engine.heads import Head
from vpd_mlx.engine.learner import Pass, accumulate
from vpd_mlx.engine.policy import Policy
from vpd_mlx.losses import LossAndMetrics
from vpd_mlx.types import TokenRow

__all__ = ["Hinted", "hinted", "hints_gradient", "strangers"]

COPIES = ("sibling", "both", "attempts")
"""Kinds of context that are themselves a sibling's solution: behind one that very answer would be a copy."""


class Hinted(NamedTuple):
    """A success behind a failure's context, and behind its own."""

    group: int
    learns: TokenRow
    teaches: TokenRow


def strangers(samples: Sequence[Sample]) -> list[tuple[Sample, Sample]]:
    """(failure, the first success of its group) for every failure whose context is not a sibling's solution."""
    first: dict[int, Sample] = {}
    for s in samples:
        if s.rollout.success:
            first.setdefault(s.group, s)
    found = []
    for s in samples:
        right, context = first.get(s.group), s.rollout.context
        if right is None or s.rollout.success or s.teacher is None or context is None or context.kind in COPIES:
            continue
        found.append((s, right))
    return found


def hinted(samples: Sequence[Sample]) -> list[Hinted]:
    """The pairs of a batch: none of successes that have no context of their own."""
    return [
        Hinted(s.group, TokenRow(teacher_row(s).prompt, right.student.completion), right.teacher)
        for s, right in strangers(samples)
        if right.teacher is not None
    ]


def _forward_kl(student: Softmax, fixed: Mapping[str, mx.array], head: Head) -> LossAndMetrics:
    """KL(teaches | learns) of each token."""
    return losses.divergence_of(student, Softmax.of(head(fixed["teaches"])), alpha=0.0), {}


def hints_gradient(policy: Policy, pairs: Sequence[Hinted], weight: float, seed: int, into: Pass) -> Pass:
    """Add `weight` times the mean over pairs of the token means to a pass's loss and gradient."""
    if not pairs:
        return into
    rows = [p.learns for p in pairs]
    weights = token_weights([len(r.completion) for r in rows], "sequence", len(rows), 0)

    def constants(own: Sequence[int]) -> list[dict[str, mx.array]]:
        return [{"teaches": s} for s in policy.states([pairs[i].teaches for i in own])]

    return accumulate(policy, rows, [weight * w for w in weights], constants, _forward_kl, seed, into)
