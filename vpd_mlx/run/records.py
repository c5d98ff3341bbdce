"""What is logged of a step's rollouts: figures of the batch, and a line for each completion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vpd_mlx.common.stats import overlap
from vpd_mlx.run.collect import Batch
from vpd_mlx.types import Group, Rollout

__all__ = ["rollout_metrics", "rollout_row"]


def rollout_metrics(batch: Batch, groups: Sequence[Group]) -> dict[str, Any]:
    """What a row of `metrics.jsonl` says of a step's rollouts: scores, lengths, groups by outcome, contexts by kind."""
    rollouts = [r for g in groups for r in g.rollouts]
    lengths = np.array([len(r.tokens) for r in rollouts] or [0])
    scores = [r.verdict.score for r in rollouts if r.verdict is not None]
    full = [g for g in groups if g.rollouts]
    right = [sum(r.success for r in g.rollouts) for g in full]
    kinds: dict[str, int] = {}
    copied = []
    for r in rollouts:
        if r.context is not None:
            kinds[r.context.kind] = kinds.get(r.context.kind, 0) + 1
            copied.append(overlap(r.text, r.context.text))
    n = max(1, len(full))
    return {
        "reward": float(np.mean(scores)) if scores else None,
        "success": float(np.mean([r.success for r in rollouts])) if rollouts else None,
        "length": float(lengths.mean()),
        "length_max": int(lengths.max()),
        "truncated": float(np.mean([r.finish == "length" for r in rollouts])) if rollouts else None,
        "groups_mixed": sum(0 < k < len(g.rollouts) for k, g in zip(right, full, strict=True)) / n,
        "groups_all_right": sum(k == len(g.rollouts) for k, g in zip(right, full, strict=True)) / n,
        "groups_all_wrong": sum(k == 0 for k in right) / n,
        "contexts": kinds,
        "contexts_none": sum(r.context is None for r in rollouts),
        "contexts_cut": sum(r.context is not None and r.context.cut for r in rollouts),
        "contexts_failed": sum(bool(r.source_errors) for r in rollouts),
        "overlap": float(np.mean(copied)) if copied else None,
        "verifier_failures": len(batch.failures),
    }


def rollout_row(
    step: int, group: Group, index: int, rollout: Rollout, decode: Callable[[list[int]], str]
) -> dict[str, Any]:
    """One line of `rollouts.jsonl`. `pieces` are the completion's tokens as text; `shift`, added where there was a teacher,
    is its log-probability of each token less the student's."""
    verdict, context = rollout.verdict, rollout.context
    return {
        "step": step,
        "problem": group.problem.id,
        "sample": index,
        "prompt": group.problem.prompt,
        "completion": rollout.text,
        "score": verdict.score if verdict else None,
        "success": rollout.success,
        "verdict": verdict.text if verdict else "",
        "context": None if context is None else {"kind": context.kind, "text": context.text, "cut": context.cut},
        "tokens": len(rollout.tokens),
        "prompt_tokens": len(group.prompt),
        "teacher_prompt_tokens": None if rollout.teacher_prompt is None else len(rollout.teacher_prompt),
        "finish": rollout.finish,
        "teacher_prompt": None if rollout.teacher_prompt is None else decode(list(rollout.teacher_prompt)),
        "pieces": [decode([t]) for t in rollout.tokens],
        **({"source_errors": dict(rollout.source_errors)} if rollout.source_errors else {}),
    }
