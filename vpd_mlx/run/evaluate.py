"""Held-out problems: the student's avg@k and greedy accuracy, and the teacher's under feedback on that student.

`measure` finds one value a problem for every figure; means, intervals and differences between two models follow from these
alone, so that two models are always compared problem by problem.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from vpd_mlx.algos.teacher import teaching
from vpd_mlx.common.seeds import phase_seed
from vpd_mlx.common.stats import Paired, bootstrap_interval, majority, mean, paired, pass_at_k, powers
from vpd_mlx.engine.sampling import Sampling, generate
from vpd_mlx.errors import SourceError
from vpd_mlx.feedback import add_context
from vpd_mlx.recipe import Recipe
from vpd_mlx.run.collect import Batch, collect, rows_at_once, student_prompts
from vpd_mlx.run.pairing import fingerprints
from vpd_mlx.run.records import AnswerRow, answer_row
from vpd_mlx.run.setup import Parts
from vpd_mlx.tasks import Task, answer_of, examine, expected
from vpd_mlx.types import Group, Problem, Rollout

__all__ = ["Measured", "compared", "evaluate", "measure", "names", "sampled_figures", "summed"]

MOST_ANSWERS = 200  # of an evaluation, kept as text: enough to read, and no burden to a run folder
Result = dict[str, Any]
Values = dict[str, float]
"""A figure's value by problem, 0..1."""


@dataclass(frozen=True)
class Measured:
    """One model on a set of problems: every figure's value by problem, and what is no figure.

    `student` is avg@k, `student_greedy` the likeliest completion's score, `teacher` that of one completion under the feedback on
    the student's own, where there was feedback; `pass@j` and `maj@k` are over problems none of whose k verdicts failed.
    `answers` are the likeliest completions of the first `MOST_ANSWERS` problems.
    """

    problems: int
    samples: int
    figures: Mapping[str, Values]
    facts: Mapping[str, Any]
    answers: Sequence[AnswerRow] = ()


def _sampling(recipe: Recipe, greedy: bool) -> Sampling:
    rollout, memory, cfg = recipe.rollout, recipe.memory, recipe.evaluation
    temperature, top_p = (0.0, 1.0) if greedy else (cfg.temperature, cfg.top_p)
    return Sampling(temperature, top_p, rollout.max_completion_tokens, rows_at_once(recipe), memory.rollout_streams)


def names(problems: Sequence[Problem]) -> list[str]:
    """Each problem's id; one that is there already gets a number behind it, so that no problem hides another."""
    seen: Counter[str] = Counter()
    out = []
    for problem in problems:
        seen[problem.id] += 1
        out.append(problem.id if seen[problem.id] == 1 else f"{problem.id} ({seen[problem.id]})")
    return out


def sampled_figures(task: Task, named: Mapping[str, Group], k: int) -> dict[str, Values]:
    """avg@k, pass@j for j = 1, 2, 4 … k, and maj@k, by problem."""
    full = {n: g.rollouts for n, g in named.items() if len(g.rollouts) == k}
    figures = {"student": {n: float(np.mean(_scores(g.rollouts))) for n, g in named.items() if g.rollouts}}
    for j in powers(k):
        figures[f"pass@{j}"] = {n: pass_at_k(k, sum(r.success for r in rows), j) for n, rows in full.items()}
    figures[f"maj@{k}"] = {n: majority([answer_of(task, r.text) for r in g], _scores(g)) for n, g in full.items()}
    return figures


def summed(measured: Measured, *, at: Sequence[str] | None = None) -> Result:
    """Mean and 95 % interval of each figure, of those in `at` where given; None where a figure has no data."""
    out: Result = {"problems": measured.problems, "samples": measured.samples}
    for name in measured.figures if at is None else at:
        values = list(measured.figures.get(name, {}).values())
        out |= {name: mean(values), f"{name}_interval": bootstrap_interval(values)}
    return {**out, **measured.facts}


def compared(base: Measured, other: Measured) -> dict[str, Paired]:
    """`other` less `base` in each figure that both have, paired by problem."""
    both = {n: paired(base.figures[n], other.figures[n]) for n in other.figures if n in base.figures}
    return {name: difference for name, difference in both.items() if difference is not None}


def evaluate(parts: Parts, problems: Sequence[Problem], step: int) -> tuple[Result, list[AnswerRow]]:
    """A row of `evals.jsonl`, these held-out problems' figures with their intervals; and rows of `answers.jsonl`.

    `student_there` is the student's avg@k on the problems where the teacher had feedback, so that `gap`, teacher less student,
    compares like with like.

    Raises:
        SourceError: the verifier failed on more than half of the completions.
    """
    start, k = time.perf_counter(), parts.recipe.evaluation.samples
    found = measure(parts, problems, own_teacher=True)
    row = summed(found, at=("student", "student_greedy", "teacher", f"pass@{k}", f"maj@{k}"))
    seconds = round(time.perf_counter() - start, 3)
    answers: list[AnswerRow] = [{"step": step, **answer} for answer in found.answers]
    hashes = dict(zip(names(problems), fingerprints(problems), strict=True))
    greedy = {"greedy_by_problem": found.figures["student_greedy"], "hash_by_problem": hashes}
    return {"step": step, **row, **greedy, "seconds": seconds}, answers


def answered(parts: Parts, problems: Sequence[Problem], name: str, samples: int, greedy: bool) -> Batch:
    """The student's graded completions of these problems, this rank's; every call of a run draws alike under the same name."""
    recipe, ranks = parts.recipe, parts.policy.ranks
    seed = ranks.seed(phase_seed(recipe.seed, 0, "evaluation"))

    def on_progress(done: int, total: int) -> None:
        if ranks.size == 1:  # several ranks stop together, between steps
            parts.stop.check()
        parts.progress.phase(f"evaluation, {name}", done, total)

    return collect(
        parts.policy,
        partial(examine, parts.task),
        problems,
        student_prompts(parts.prompter, problems),
        samples,
        _sampling(recipe, greedy),
        threshold=recipe.rollout.success_threshold,
        seed=phase_seed(seed, 0, name),
        on_progress=on_progress,
    )


def measure(
    parts: Parts, problems: Sequence[Problem], *, greedy_only: bool = False, own_teacher: bool = False
) -> Measured:
    """Student and teacher on these problems, by the weights that the policy has now.

    With `own_teacher` the teacher has the weights that the M-step reads, such as an EMA of the student's; else the policy's.
    With `greedy_only` nothing is sampled: the student's one completion is the likeliest, and so is the teacher's.

    Raises:
        SourceError: the verifier failed on more than half of the completions.
    """
    recipe, ranks, task = parts.recipe, parts.policy.ranks, parts.task
    seed = ranks.seed(phase_seed(recipe.seed, 0, "evaluation"))  # every evaluation of a run draws alike
    k = 1 if greedy_only else recipe.evaluation.samples
    own = ranks.own_range(len(problems))
    keys = [names(problems)[i] for i in own]
    problems = [problems[i] for i in own]

    sampled = None if greedy_only else answered(parts, problems, "student", k, False)
    greedy = answered(parts, problems, "greedy", 1, True)
    student = greedy if sampled is None else sampled
    groups = add_context(parts.sources.for_evaluation(), student.groups, parts.prompter, recipe.feedback)
    named = dict(zip(keys, groups, strict=True))
    with teaching(parts.algorithm, parts.policy) if own_teacher else contextlib.nullcontext():
        teacher = _teacher(parts, named, _sampling(recipe, greedy_only), phase_seed(seed, 0, "teacher"))
    mx.clear_cache()
    alone = {n: g.rollouts for n, g in zip(keys, greedy.groups, strict=True) if g.rollouts}
    decode = parts.policy.tokenizer.decode
    answers = [
        answer_row(n, (g := named[n]).problem, r[0], _taught(g), expected(task, g.problem), decode)
        for n, r in itertools.islice(alone.items(), MOST_ANSWERS)
    ]
    figures = {} if sampled is None else sampled_figures(task, named, k)
    figures |= {"student_greedy": {n: _scores(rollouts)[0] for n, rollouts in alone.items()}, "teacher": teacher}
    part = _Part(
        figures,
        lengths=[len(r.tokens) for r in student.rollouts],
        truncated=[r.finish == "length" for r in student.rollouts],
        contexts_failed=sum(bool(r.source_errors) for g in groups for r in g.rollouts),
        failures=[*greedy.failures, *([] if sampled is None else sampled.failures)],
        completions=len(problems) * (1 if sampled is None else 1 + k),
        answers=answers,
    )
    return _whole(ranks.gather(part), k, greedy_only=greedy_only)


@dataclass(frozen=True)
class _Part:
    """What a rank found on its share of the problems."""

    figures: Mapping[str, Values]
    lengths: list[int]
    truncated: list[bool]
    contexts_failed: int
    failures: list[str]
    completions: int
    answers: list[AnswerRow]


def _whole(parts: Sequence[_Part], k: int, *, greedy_only: bool) -> Measured:
    """All ranks' parts as one; their problems follow one another."""
    failures = [f for p in parts for f in p.failures]
    if len(failures) > sum(p.completions for p in parts) // 2:
        raise SourceError(f"the verifier failed on {len(failures)} completions, first {failures[0]}")
    figures = {name: {n: v for p in parts for n, v in p.figures[name].items()} for name in parts[0].figures}
    teacher = figures["teacher"]
    gap = paired(figures["student_greedy" if greedy_only else "student"], teacher)
    facts = {
        "teacher_problems": len(teacher),
        "contexts_failed": sum(p.contexts_failed for p in parts),
        "student_there": None if gap is None else float(np.mean(list(teacher.values()))) - gap.difference,
        "gap": None if gap is None else gap.difference,
        "gap_interval": None if gap is None else (gap.low, gap.high),
        "length": mean([float(n) for p in parts for n in p.lengths]),
        "truncated": mean([float(t) for p in parts for t in p.truncated]),
        "verifier_failures": len(failures),
    }
    answers = [row for p in parts for row in p.answers][:MOST_ANSWERS]
    return Measured(sum(p.completions for p in parts) // (1 if greedy_only else 1 + k), k, figures, facts, answers)


def _taught(group: Group) -> Rollout | None:
    """The completion on which the teacher is evaluated: the first that got a context."""
    return next((r for r in group.rollouts if r.teacher_prompt is not None), None)


def _teacher(parts: Parts, named: Mapping[str, Group], how: Sampling, seed: int) -> Values:
    """The teacher on one completion per problem: its score by problem."""
    chosen: list[tuple[str, Problem, tuple[int, ...]]] = []
    for name, group in named.items():
        taught = _taught(group)
        if taught is not None and taught.teacher_prompt is not None:
            chosen.append((name, group.problem, taught.teacher_prompt))
    scores: dict[int, float] = {}
    for p, _, rollout in generate(parts.policy, [prompt for *_, prompt in chosen], 1, how, seed) if chosen else ():
        scores.pop(p, None)  # memory ran out, and this place was sampled again
        verdict = examine(parts.task, chosen[p][1], rollout.text)
        if verdict.error is None:
            scores[p] = verdict.score
        parts.progress.phase("evaluation, teacher", len(scores), len(chosen))
    return {chosen[p][0]: scores[p] for p in sorted(scores)}


def _scores(rollouts: Sequence[Rollout]) -> list[float]:
    return [r.verdict.score if r.verdict is not None else 0.0 for r in rollouts]
