"""What deserves a word about a recipe's rows and verifier before anybody trains on them. Needs the tokenizer, not the model."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vpd_mlx.common.text import duration
from vpd_mlx.feedback.prompts import Prompter
from vpd_mlx.recipe import Recipe
from vpd_mlx.tasks import Task
from vpd_mlx.types import Problem

__all__ = ["Lengths", "lengths_of", "seconds_a_verdict", "warnings_of"]

ABSURD = "purple zebra 31337 !!"  # no answer to anything
TRIED = 8  # rows on which a verifier is tried with answers that are wrong
NEAR = 0.95  # of a limit
FEW_ANSWERS = 12  # different ones at most, to be called classes
LOPSIDED = 0.5  # share of the commonest
SLOW = 1.0  # seconds for a verdict
WORKERS = 4  # verdicts under way at once, see `collect`


@dataclass(frozen=True)
class Lengths:
    """Tokens of each row's prompt and of its reference answer, None where it has none; and rows with an unknown token."""

    prompts: list[int]
    references: list[int | None]
    unknown: list[Problem]


def lengths_of(prompter: Prompter, task: Task, rows: Sequence[Problem]) -> Lengths:
    """Count tokens, as the student reads and would write them."""
    mark = getattr(prompter.tokenizer, "unk_token_id", None)
    prompts, references, unknown = [], [], []
    for problem in rows:
        ids = prompter.student(problem)
        answer = task.reference_completion(problem)
        own = [] if answer is None else prompter.tokenizer.encode(answer, add_special_tokens=False)
        prompts.append(len(ids))
        references.append(None if answer is None else len(own))
        if mark is not None and (mark in ids or mark in own):
            unknown.append(problem)
    return Lengths(prompts, references, unknown)


def warnings_of(recipe: Recipe, task: Task, rows: Sequence[Problem], lengths: Lengths, seconds: float) -> Iterator[str]:
    """A line for each thing that would waste a run; `seconds` is what the verifier took for a reference answer on average."""
    yield from _limits(recipe, rows, lengths)
    if lengths.unknown:
        few = f"{len(lengths.unknown)} rows hold characters that the model's tokenizer does not know"
        yield f"{few}, first {lengths.unknown[0].id}: the model cannot read or write them; reword, or take another model"
    yield from _classes(rows)
    yield from _wrong_answers(task, rows)
    if seconds > SLOW:
        count = recipe.rollout.prompts * recipe.rollout.group_size
        step = duration(seconds * count / WORKERS)
        yield (
            f"the verifier takes {seconds:.1f} s for an answer, so the {count} of a step take about {step} "
            f"({WORKERS} at once); make it faster, or lower rollout.prompts"
        )


def _limits(recipe: Recipe, rows: Sequence[Problem], lengths: Lengths) -> Iterator[str]:
    rollout = recipe.rollout
    most = rollout.max_completion_tokens
    # A completion ends with a token of its own.
    over = [(p, n + 1) for p, n in zip(rows, lengths.references, strict=True) if n is not None and n + 1 > most]
    if over:
        row, longest = max(over, key=lambda item: item[1])
        known = sum(n is not None for n in lengths.references)
        every = "no answer could be right" if len(over) == known else "answers to them could not be right"
        yield (
            f"{len(over)} of {known} reference answers are longer than rollout.max_completion_tokens {most}, longest "
            f"{longest} (row {row.id}): {every}; raise it to {longest} or more"
        )
    near = sum(n > NEAR * rollout.max_prompt_tokens for n in lengths.prompts)
    if near:
        yield f"{near} prompts take more than {NEAR:.0%} of rollout.max_prompt_tokens {rollout.max_prompt_tokens}; raise it"
    room = recipe.max_teacher_tokens - recipe.feedback.max_tokens
    tight = sum(n > room for n in lengths.prompts)
    if tight and recipe.entry.contexts:
        yield (
            f"{tight} prompts leave the teacher less room than feedback.max_tokens {recipe.feedback.max_tokens} of its "
            f"{recipe.max_teacher_tokens} tokens, so feedback may be cut; raise feedback.max_prompt_tokens"
        )


def _classes(rows: Sequence[Problem]) -> Iterator[str]:
    """Answers that are classes, one of which is right too often: a model that always gives it looks good."""
    answers = Counter(p.answer for p in rows if p.answer is not None)
    total = sum(answers.values())
    if not 1 < len(answers) <= min(FEW_ANSWERS, total // 4):
        return
    answer, count = answers.most_common(1)[0]
    if count > LOPSIDED * total:
        yield (
            f"the answer {answer!r} is right in {count} of {total} rows: a model that always gives it scores "
            f"{count / total:.0%}; balance the rows"
        )


def _wrong_answers(task: Task, rows: Sequence[Problem]) -> Iterator[str]:
    """Answers that no verifier should take, on a few rows: nothing at all, nonsense, and the answer to another row."""
    for what, text in (("an empty answer", ""), (f"the answer {ABSURD!r}", ABSURD)):
        right = [p for p in rows[:TRIED] if _takes(task, p, text)]
        if right:
            yield f"the verifier gives {what} 1.0 on {len(right)} of {len(rows[:TRIED])} rows, first {right[0].id}; fix it"
    others = [(p, q) for p, q in itertools.pairwise(rows[: TRIED + 1]) if p.answer != q.answer]
    taken = [p for p, q in others if (other := task.reference_completion(q)) is not None and _takes(task, p, other)]
    if len(taken) > len(others) / 2:
        yield (
            f"the verifier gives the answer to another row 1.0 on {len(taken)} of {len(others)} rows, first {taken[0].id}: "
            "it does not look at the problem"
        )


def _takes(task: Task, problem: Problem, completion: str) -> bool:
    verdict = task.verify(problem, completion)
    return verdict.error is None and verdict.score >= 1.0


def seconds_a_verdict(task: Task, rows: Sequence[Problem]) -> float:
    """What the verifier takes for a reference answer, on a few rows; the first call, which may load something, is left out."""
    known = [(p, a) for p in rows[: TRIED + 1] if (a := task.reference_completion(p)) is not None]
    spent: list[float] = []
    for problem, answer in known:
        start = time.perf_counter()
        task.verify(problem, answer)
        spent.append(time.perf_counter() - start)
    rest = spent[1:] or spent
    return sum(rest) / len(rest) if rest else 0.0
