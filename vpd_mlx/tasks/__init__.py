"""Tasks: problems to train on, problems held out, and a verifier that grades completions.

One file for each kind of task. It holds the task's settings, which are the recipe's section `task` when `kind` names it, and the
class that is built from them. `TASKS` lists both; the recipe, the reference page and `build_task` follow from this list.
`Task` is what the class must offer, and may offer besides; `data.py` has the keys and the rows of all tasks that read files,
`answers.py` what several verifiers share.

A run calls, in this order:

1. `build_task`: reads all rows and makes the two sides, `train` and `held_out`. A broken row is an error here, not mid-run.
2. `notices`: what the user should know before it starts.
3. `prove`: runs reference answers through the verifier; each must score 1.0.
4. `Task.verify` for each sampled completion, in worker threads. Evaluation uses `examine`, which prefers the task's own
   `evaluate`, and `answer_of` for majority votes.

With several ranks, `fingerprint` must be the same on all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from vpd_mlx.common.functions import NOTHING, Handed
from vpd_mlx.common.settings import Section
from vpd_mlx.common.thoughts import spoken
from vpd_mlx.errors import DataError
from vpd_mlx.tasks.addition import Addition, AdditionSettings
from vpd_mlx.tasks.code import Code, CodeSettings
from vpd_mlx.tasks.exact import Exact, ExactSettings
from vpd_mlx.tasks.json_schema import JsonSchema, JsonSchemaSettings
from vpd_mlx.tasks.math import Math, MathSettings
from vpd_mlx.tasks.mcq import Mcq, McqSettings
from vpd_mlx.tasks.python_file import Function, FunctionSettings, PythonFile, PythonSettings
from vpd_mlx.tasks.reasoning_gym import ReasoningGym, ReasoningGymSettings
from vpd_mlx.tasks.regex import Regex, RegexSettings
from vpd_mlx.types import Problem, Verdict

__all__ = [
    "TASKS",
    "Task",
    "answer_of",
    "build_task",
    "examine",
    "expected",
    "faulty_rows",
    "fingerprint",
    "notices",
    "prove",
]


class Task(Protocol):
    """Problems to train on, problems held out, and a verifier. A task may also have

    - `notices`, a tuple of lines to show the user at the start;
    - `fingerprint`, bytes on which its verdicts depend besides the rows;
    - `evaluate`, as `verify`, where evaluation grades otherwise: by tests that no feedback quotes, for example;
    - `answer_in(completion)`, the short final answer in a completion, or None.
    """

    @property
    def train(self) -> tuple[Problem, ...]:
        """Problems to train on."""

    @property
    def held_out(self) -> tuple[Problem, ...]:
        """Problems never trained on."""

    def verify(self, problem: Problem, completion: str) -> Verdict:
        """Grade one completion. A failure of the verifier itself comes back as `Verdict.error`, never as a score."""

    def reference_completion(self, problem: Problem) -> str | None:
        """A completion that must score 1.0, or None if the data has none."""


TASKS: list[tuple[type[Section], Callable[[Any], Task]]] = [
    (AdditionSettings, Addition),
    (ExactSettings, Exact),
    (MathSettings, Math),
    (McqSettings, Mcq),
    (RegexSettings, Regex),
    (JsonSchemaSettings, JsonSchema),
    (CodeSettings, Code),
    (ReasoningGymSettings, ReasoningGym),
    (PythonSettings, PythonFile),
    (FunctionSettings, Function),
]
"""(section of the recipe, class of the task) for every kind of task."""
MOST_SHOWN = 200  # characters of a reference answer in an error
MOST_EXPECTED = 4000  # characters of one beside a verdict


def build_task(recipe: Any, handed: Handed = NOTHING) -> Task:
    """The task that the recipe names, its data read and split. A verifier of a Python program comes in `handed`.

    Raises:
        DataError: a data file is missing, empty or broken.
        ConfigError: a verifier file or a pattern cannot be used, or a library that the task needs is not installed.
        SourceError: programs cannot be run, or not as strictly as the recipe asks.
    """
    kind = next(task for settings, task in TASKS if isinstance(recipe.task, settings))
    found: Task = kind(recipe.task) if handed.verify is None else Function(recipe.task, handed.verify, handed.files)
    return found


def examine(task: Task, problem: Problem, completion: str) -> Verdict:
    """Grade one completion for evaluation: by the task's `evaluate` if it has one, else by its `verify`."""
    grade: Callable[[Problem, str], Verdict] = getattr(task, "evaluate", task.verify)
    return grade(problem, completion)


def answer_of(task: Task, completion: str) -> str | None:
    """What a completion votes for in maj@k: its final answer, or its whole text if the task does not extract one."""
    answer_in: Callable[[str], str | None] = getattr(task, "answer_in", lambda text: spoken(text).strip())
    return answer_in(completion)


def expected(task: Task, problem: Problem) -> str | None:
    """What stands beside a verdict as the right answer: the data's, else a completion that scores 1, else None.

    Of a longer one the first `MOST_EXPECTED` characters.
    """
    text = problem.answer if problem.answer is not None else task.reference_completion(problem)
    if text is None or len(text) <= MOST_EXPECTED:
        return text
    return f"{text[:MOST_EXPECTED]} …"


def notices(task: Task) -> tuple[str, ...]:
    """Lines to show the user once at the start: isolation that this machine does not provide, for example."""
    return tuple(getattr(task, "notices", ()))


def fingerprint(task: Task) -> str:
    """A short hash of all rows, and of the task's own `fingerprint`: a file, say, that its verdicts depend on."""
    found = hashlib.sha256()
    for p in (*task.train, *task.held_out):
        found.update(repr((p.id, p.messages, p.answer, p.reference)).encode())
    found.update(getattr(task, "fingerprint", b""))
    return found.hexdigest()[:16]


def prove(task: Task, rows: int = 32) -> None:
    """Run reference answers through the verifier: each must score 1.0, or training would learn from wrong verdicts.

    Raises:
        DataError: a reference answer does not score 1.0, or the verifier fails on it.
    """
    for fault in faulty_rows(task, (*task.train[:rows], *task.held_out[:rows])):
        raise DataError(f"{fault}; fix the row or the verifier")


def faulty_rows(task: Task, problems: Iterable[Problem]) -> Iterator[str]:
    """Every row whose reference answer does not score 1.0, one after another, with the reason in words.

    They are graded as in evaluation, too, where a task has another way for it.
    """
    for problem in problems:
        answer = task.reference_completion(problem)
        if answer is None:
            continue
        verdict = task.verify(problem, answer)
        if hasattr(task, "evaluate") and verdict.error is None and verdict.score == 1.0:
            verdict = examine(task, problem, answer)
        shown = repr(answer if len(answer) <= MOST_SHOWN else f"{answer[:MOST_SHOWN]}...")
        if verdict.error is not None:
            yield f"row {problem.id}: the verifier failed on the reference answer {shown}: {verdict.error}"
        elif verdict.score < 1.0:
            why = f" ({verdict.text})" if verdict.text else ""
            yield f"row {problem.id}: the reference answer {shown} scores {verdict.score:g}, not 1{why}"
