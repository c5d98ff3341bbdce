"""A batch of rollouts as the updates see it: samples, minibatches of whole groups, epochs over them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vpd_mlx.engine.learner import Floats
from vpd_mlx.types import Group, Rollout, TokenRow

__all__ = ["Sample", "epochs", "gather", "minibatches", "score", "teacher_row", "token_mean"]


@dataclass(frozen=True)
class Sample:
    """One rollout: its completion behind the student's prompt and, with a context, behind the teacher's."""

    group: int
    student: TokenRow
    teacher: TokenRow | None
    rollout: Rollout


def gather(groups: Sequence[Group]) -> list[Sample]:
    """All rollouts of a batch, in order."""
    return [
        Sample(
            group=g,
            student=TokenRow(group.prompt, r.tokens),
            teacher=None if r.teacher_prompt is None else TokenRow(r.teacher_prompt, r.tokens),
            rollout=r,
        )
        for g, group in enumerate(groups)
        for r in group.rollouts
    ]


def score(sample: Sample) -> float:
    """The verifier's score, 0 without a verdict."""
    return sample.rollout.verdict.score if sample.rollout.verdict else 0.0


def minibatches(samples: Sequence[Sample], prompts: int | None) -> list[list[int]]:
    """Indices of samples, `prompts` whole groups at a time; None takes all."""
    present = sorted({s.group for s in samples})
    size = prompts or max(1, len(present))
    chosen = [set(present[i : i + size]) for i in range(0, len(present), size)]
    return [[i for i, s in enumerate(samples) if s.group in part] for part in chosen]


def epochs(batches: Sequence[list[int]], passes: int) -> Iterator[tuple[int, list[int]]]:
    """(number of the update within this batch, indices), `passes` times over the minibatches."""
    return enumerate(indices for _ in range(passes) for indices in batches)


def teacher_row(sample: Sample) -> TokenRow:
    """The completion behind the teacher's prompt.

    Raises:
        ValueError: the sample has no context.
    """
    if sample.teacher is None:
        raise ValueError("a sample without a context has no teacher prompt")
    return sample.teacher


def token_mean(columns: Iterable[Mapping[str, Floats]], name: str) -> float | None:
    """Mean of one figure over the tokens of all samples that have it; None without any."""
    parts = [c[name] for c in columns if name in c]
    return float(np.concatenate(parts).mean()) if parts else None
