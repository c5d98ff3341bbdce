"""Tasks: rows, prompts and a verifier. A task proves at start that its reference answers score 1.0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vpd_mlx.common.settings import Section
from vpd_mlx.errors import DataError
from vpd_mlx.tasks.addition import Addition, AdditionSettings
from vpd_mlx.tasks.base import Answering, Exam, Task, answer_of, examine
from vpd_mlx.tasks.code import Code, CodeSettings
from vpd_mlx.tasks.exact import Exact, ExactSettings
from vpd_mlx.tasks.json_schema import JsonSchema, JsonSchemaSettings
from vpd_mlx.tasks.math import Math, MathSettings
from vpd_mlx.tasks.mcq import Mcq, McqSettings
from vpd_mlx.tasks.python_file import PythonFile, PythonSettings
from vpd_mlx.tasks.reasoning_gym import ReasoningGym, ReasoningGymSettings
from vpd_mlx.tasks.regex import Regex, RegexSettings

__all__ = ["TASKS", "Answering", "Exam", "Task", "answer_of", "build_task", "examine", "notices", "prove"]


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
]
"""(section of the recipe, what is built from it) of every kind of task."""


def build_task(recipe: Any) -> Task:
    """The task that the recipe names, its data read and split.

    Raises:
        DataError: a data file is missing, empty or broken.
        ConfigError: a verifier file or a pattern cannot be used, or a library that the task needs is not installed.
        SourceError: programs cannot be run, or not as strictly as the recipe asks.
    """
    kind = next(task for settings, task in TASKS if isinstance(recipe.task, settings))
    found: Task = kind(recipe.task)
    return found


def notices(task: Task) -> tuple[str, ...]:
    """What a user should hear once at start, a line each: isolation that this machine does not grant, for one."""
    return tuple(getattr(task, "notices", ()))


def prove(task: Task, rows: int = 32) -> None:
    """Run reference answers through the verifier: each must score 1.0, or training would learn from a wrong judge.

    Held-out rows are graded as in evaluation, too.

    Raises:
        DataError: a reference answer does not score 1.0, or the verifier fails on it.
    """
    for problem in (*task.train[:rows], *task.held_out[:rows]):
        answer = task.reference_completion(problem)
        if answer is None:
            continue
        verdict = task.verify(problem, answer)
        if verdict.error is None and verdict.score == 1.0:
            verdict = examine(task, problem, answer)
        if verdict.error is not None:
            raise DataError(
                f"row {problem.id}: the verifier failed on the reference answer {answer!r}: {verdict.error}"
            )
        if verdict.score < 1.0:
            why = f" ({verdict.text})" if verdict.text else ""
            raise DataError(
                f"row {problem.id}: the reference answer {answer!r} scores {verdict.score:g}, not 1{why}; "
                "mend the row or the verifier"
            )
