"""Which adapter a run hands over: the best by problems of their own, which take no part in what is reported.

A figure is biased once it has chosen what it describes. So a part of the held-out problems, picked by their hash, is set aside;
every `selection_every` steps it is answered once by the likeliest completion and once by a sampled one, without the teacher.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from vpd_mlx.common.stats import mean
from vpd_mlx.errors import SourceError
from vpd_mlx.recipe import Recipe
from vpd_mlx.run.collect import Batch
from vpd_mlx.run.evaluate import answered
from vpd_mlx.run.records import SelectionRow
from vpd_mlx.run.setup import Parts
from vpd_mlx.tasks import Task
from vpd_mlx.tasks.data import content, fraction
from vpd_mlx.types import Problem

__all__ = ["apart", "score", "unchosen"]

SHARE = 4  # at most one in so many held-out problems is set aside
LEAST = 2


def apart(recipe: Recipe, task: Task) -> tuple[tuple[Problem, ...], tuple[Problem, ...]]:
    """Held-out problems to choose the adapter by, and those to report on; the former are none where nothing is to spare.

    They are picked by the prompt's hash, whatever their order, and one prompt is never on both sides.
    """
    held, cfg = tuple(task.held_out), recipe.evaluation
    count = min(cfg.selection, len(held) // SHARE)
    if not cfg.keep_best or count < LEAST:
        return (), held
    hashes = [fraction(content(p)) for p in held]
    last = sorted(hashes)[count - 1]
    chosen = tuple(p for p, h in zip(held, hashes, strict=True) if h <= last)
    if len(chosen) > len(held) // 2:  # hardly any prompt differs from the others
        return (), held
    return chosen, tuple(p for p, h in zip(held, hashes, strict=True) if h > last)


def unchosen(recipe: Recipe, task: Task) -> tuple[str, ...]:
    """What to say where `keep_best` has no problems to choose by."""
    if not recipe.evaluation.keep_best or apart(recipe, task)[0]:
        return ()
    few = f"{len(task.held_out)} held-out problems are too few to set some aside"
    return (f"evaluation.keep_best: {few}, so the run hands over its last adapter",)


def score(parts: Parts, problems: Sequence[Problem], step: int) -> SelectionRow:
    """A row of `selection.jsonl`: the student on these problems by the weights of now.

    Raises:
        SourceError: the verifier failed on more than half of the completions.
    """
    start, ranks = time.perf_counter(), parts.policy.ranks
    mine = [problems[i] for i in ranks.own_range(len(problems))]
    none = Batch([], [])  # more ranks than problems
    found = ranks.gather([answered(parts, mine, "selection", 1, greedy) if mine else none for greedy in (True, False)])
    failures = [f for rank in found for batch in rank for f in batch.failures]
    if len(failures) > len(problems):
        raise SourceError(f"the verifier failed on {len(failures)} completions, first {failures[0]}")
    greedy, sampled = ([r for rank in found for r in rank[i].rollouts] for i in (0, 1))
    scores = [[r.verdict.score for r in part if r.verdict is not None] for part in (greedy, sampled)]
    return {
        "step": step,
        "problems": len(problems),
        "student": mean([*scores[0], *scores[1]]),
        "student_greedy": mean(scores[0]),
        "length": mean([float(len(r.tokens)) for r in sampled]),
        "truncated": mean([float(r.finish == "length") for r in sampled]),
        "verifier_failures": len(failures),
        "seconds": round(time.perf_counter() - start, 3),
    }
