"""Sampling and grading side by side: a finished completion goes to the verifier while the others are still decoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import closing
from dataclasses import dataclass

from vpd_mlx.common.workers import Workers
from vpd_mlx.engine.policy import Policy
from vpd_mlx.engine.sampling import Sampling, generate
from vpd_mlx.errors import DataError
from vpd_mlx.feedback.prompts import Prompter
from vpd_mlx.recipe import Recipe
from vpd_mlx.types import Group, Problem, Rollout, Verdict

__all__ = ["Batch", "check_prompt_lengths", "collect", "rows_at_once", "student_prompts"]

WORKERS = 4
HEARTBEAT = 1.0  # seconds


@dataclass(frozen=True)
class Batch:
    """Graded groups, and the verifier's failures as `problem: error`. A failed verdict is no score: its rollout is not among
    the groups."""

    groups: list[Group]
    failures: list[str]

    @property
    def rollouts(self) -> list[Rollout]:
        """All rollouts, in order."""
        return [r for g in self.groups for r in g.rollouts]


def rows_at_once(recipe: Recipe) -> int:
    """Most sequences to decode side by side wherever there may be more of them than a step has rollouts."""
    return recipe.memory.rollout_rows or recipe.rollout.prompts * recipe.rollout.group_size


def check_prompt_lengths(problems: Sequence[Problem], lengths: Sequence[int], limit: int) -> None:
    """See that no prompt, of so many tokens each, exceeds `rollout.max_prompt_tokens`.

    Raises:
        DataError: some do; the message names the first and counts them.
    """
    over = [(p.id, n) for p, n in zip(problems, lengths, strict=True) if n > limit]
    if over:
        row, length = over[0]
        count = f" ({len(over)} rows in all)" if len(over) > 1 else ""
        problem = f"its prompt has {length} tokens, more than rollout.max_prompt_tokens {limit}{count}"
        raise DataError(f"row {row}: {problem}; raise the limit or remove such rows")


def student_prompts(prompter: Prompter, problems: Sequence[Problem]) -> list[tuple[int, ...]]:
    """Each problem's prompt as the student reads it, in ids.

    Raises:
        DataError: a prompt is longer than the limit.
    """
    prompts = [prompter.student(p) for p in problems]
    check_prompt_lengths(problems, [len(ids) for ids in prompts], prompter.max_prompt_tokens)
    return prompts


def collect(
    policy: Policy,
    verify: Callable[[Problem, str], Verdict],
    problems: Sequence[Problem],
    prompts: Sequence[tuple[int, ...]],
    group_size: int,
    how: Sampling,
    *,
    threshold: float,
    seed: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    on_graded: Callable[[Problem, Rollout], None] = lambda problem, rollout: None,
) -> Batch:
    """Groups of completions for problems, graded; `prompts` has the ids of each one's prompt, the student's or a teacher's.

    `on_progress` is called with (finished, total) after each completion, and every second while verdicts are awaited; what it
    raises ends the call at once, even while verifiers run. `on_graded` is called with each rollout that has its verdict, in a
    worker thread.
    """
    total = len(problems) * group_size

    def grade(problem: Problem, rollout: Rollout) -> Rollout:
        verdict = verify(problem, rollout.text)
        rollout = rollout.graded(verdict, threshold)
        if verdict.error is None:
            on_graded(problem, rollout)
        return rollout

    waiting: dict[tuple[int, int], Future[Rollout]] = {}
    pool = Workers(WORKERS, "verdicts")
    try:
        # Closed at once when `on_progress` ends the run: an exception's traceback would keep it, and its threads, alive.
        with closing(generate(policy, prompts, group_size, how, seed)) as finished:
            for p, n, rollout in finished:
                if (p, n) in waiting:  # memory ran out, and this place was sampled again
                    waiting[p, n].cancel()
                waiting[p, n] = pool.submit(grade, problems[p], rollout)
                on_progress(len(waiting), total)
        while wait(waiting.values(), timeout=HEARTBEAT).not_done:
            on_progress(len(waiting), total)
        graded = [(at, waiting[at].result()) for at in sorted(waiting)]
    finally:
        pool.close()
    good: list[list[Rollout]] = [[] for _ in problems]
    failures = []
    for (p, _), rollout in graded:
        if rollout.verdict is not None and rollout.verdict.error is not None:
            failures.append(f"{problems[p].id}: {rollout.verdict.error}")
        else:
            good[p].append(rollout)
    return Batch([Group(p, ids, tuple(g)) for p, ids, g in zip(problems, prompts, good, strict=True)], failures)
