"""Held-out problems: the student's avg@k and greedy accuracy, and the teacher's under feedback on that student."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vpd_mlx.collect import Batch, collect
from vpd_mlx.config import Recipe
from vpd_mlx.errors import SourceError
from vpd_mlx.feedback import Source, add_context
from vpd_mlx.metrics import bootstrap_interval, majority, pass_at_k
from vpd_mlx.policy import Policy, phase_seed
from vpd_mlx.progress import Progress
from vpd_mlx.prompts import Prompter
from vpd_mlx.rollout import Sampling, generate
from vpd_mlx.tasks import Task, examine
from vpd_mlx.types import Problem, Rollout

__all__ = ["evaluate", "evaluation_sampling"]

Result = dict[str, Any]


def evaluation_sampling(recipe: Recipe, *, greedy: bool) -> Sampling:
    """How evaluation samples: the recipe's temperature and nucleus, or the likeliest token."""
    rollout, cfg = recipe.rollout, recipe.evaluation
    return Sampling(
        temperature=0.0 if greedy else cfg.temperature,
        top_p=1.0 if greedy else cfg.top_p,
        max_tokens=rollout.max_completion_tokens,
        rows=recipe.memory.rollout_rows or rollout.prompts * rollout.group_size,
    )


def evaluate(
    policy: Policy,
    prompter: Prompter,
    task: Task,
    sources: dict[str, Source],
    recipe: Recipe,
    *,
    step: int,
    progress: Progress,
) -> Result:
    """Accuracy on held-out problems.

    `student` is avg@k over sampled completions, `student_greedy` that of the likeliest one, `teacher` that of one completion
    per problem sampled under the feedback on the student's own completion, over the problems where there is feedback;
    `student_there` is the student's avg@k on those, so that the gap compares like with like. Scores in 0..1; intervals are
    95 % bootstrap intervals over problems. Each key that has no data is None.

    Raises:
        SourceError: the verifier failed on more than half of the completions.
    """
    problems = task.held_out[: recipe.evaluation.problems]
    seed = phase_seed(recipe.seed, 0, "evaluation")  # every evaluation of a run draws alike
    k = recipe.evaluation.samples

    def run(name: str, samples: int, greedy: bool) -> Batch:
        batch = collect(
            policy,
            prompter,
            lambda problem, completion: examine(task, problem, completion),
            problems,
            samples,
            evaluation_sampling(recipe, greedy=greedy),
            threshold=recipe.rollout.success_threshold,
            seed=phase_seed(seed, 0, name),
            moved=lambda done, total: progress.phase(f"evaluation, {name}", done, total),
        )
        if len(batch.failures) > len(problems) * samples // 2:
            raise SourceError(f"the verifier failed on {len(batch.failures)} completions, first {batch.failures[0]}")
        return batch

    sampled = run("student", k, False)
    greedy = run("greedy", 1, True)
    teacher = _teacher(policy, prompter, task, sources, recipe, sampled, phase_seed(seed, 0, "teacher"), progress)
    by_problem = [[_score(r) for r in g.rollouts] for g in sampled.groups if g.rollouts]
    means = [float(np.mean(scores)) for scores in by_problem]
    greedy_scores = [_score(r) for r in greedy.rollouts]
    full = [g for g in sampled.groups if len(g.rollouts) == k]
    return {
        "step": step,
        "problems": len(problems),
        "samples": k,
        "student": _mean(means),
        "student_interval": bootstrap_interval(means),
        "student_greedy": _mean(greedy_scores),
        "student_greedy_interval": bootstrap_interval(greedy_scores),
        **teacher,
        f"pass@{k}": _mean([pass_at_k(k, sum(r.success for r in g.rollouts), k) for g in full]),
        f"maj@{k}": _mean([majority([r.text for r in g.rollouts], [_score(r) for r in g.rollouts]) for g in full]),
        "length": _mean([float(len(r.tokens)) for r in sampled.rollouts]),
        "truncated": _mean([float(r.finish == "length") for r in sampled.rollouts]),
        "verifier_failures": len(sampled.failures) + len(greedy.failures),
        "greedy_by_problem": {g.problem.id: _score(g.rollouts[0]) for g in greedy.groups if g.rollouts},
    }


def _teacher(
    policy: Policy,
    prompter: Prompter,
    task: Task,
    sources: dict[str, Source],
    recipe: Recipe,
    sampled: Batch,
    seed: int,
    progress: Progress,
) -> Result:
    """The teacher on one completion per problem: the first that got a context."""
    groups = add_context(sources, sampled.groups, prompter, recipe.feedback)
    chosen: list[tuple[Problem, tuple[int, ...], float]] = []
    for group in groups:
        prompt = next((r.teacher_prompt for r in group.rollouts if r.teacher_prompt is not None), None)
        if prompt is not None:
            chosen.append((group.problem, prompt, float(np.mean([_score(r) for r in group.rollouts]))))
    scores: dict[int, float] = {}
    if chosen:
        how = evaluation_sampling(recipe, greedy=False)
        for p, _, rollout in generate(policy, [prompt for _, prompt, _ in chosen], 1, how, seed):
            verdict = examine(task, chosen[p][0], rollout.text)
            if verdict.error is None:
                scores[p] = verdict.score
            progress.phase("evaluation, teacher", len(scores), len(chosen))
    values = [scores[p] for p in sorted(scores)]
    there = _mean([chosen[p][2] for p in sorted(scores)])
    teacher = _mean(values)
    return {
        "teacher": teacher,
        "teacher_interval": bootstrap_interval(values),
        "teacher_problems": len(values),
        "contexts_failed": sum(bool(r.source_errors) for g in groups for r in g.rollouts),
        "student_there": there,
        "gap": None if teacher is None or there is None else teacher - there,
    }


def _score(rollout: Rollout) -> float:
    return rollout.verdict.score if rollout.verdict is not None else 0.0


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
