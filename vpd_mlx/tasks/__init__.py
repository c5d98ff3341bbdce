"""Tasks: rows, prompts and a verifier. A task proves at start that its reference answers score 1.0."""

from __future__ import annotations

from vpd_mlx.config import AdditionTask, ExactTask, PythonTask, Recipe
from vpd_mlx.errors import DataError
from vpd_mlx.tasks.addition import Addition
from vpd_mlx.tasks.base import Task
from vpd_mlx.tasks.exact import Exact
from vpd_mlx.tasks.python_file import PythonFile

__all__ = ["Task", "build_task", "prove"]


def build_task(recipe: Recipe) -> Task:
    """The task that the recipe names, its data read and split.

    Raises:
        DataError: a data file is missing, empty or broken.
        ConfigError: a verifier file cannot be used.
    """
    match recipe.task:
        case AdditionTask() as cfg:
            return Addition(cfg)
        case ExactTask() as cfg:
            return Exact(cfg)
        case PythonTask() as cfg:
            return PythonFile(cfg)


def prove(task: Task, rows: int = 32) -> None:
    """Run reference answers through the verifier: each must score 1.0, or training would learn from a wrong judge.

    Raises:
        DataError: a reference answer does not score 1.0, or the verifier fails on it.
    """
    for problem in (*task.train[:rows], *task.held_out[:rows]):
        answer = task.reference_completion(problem)
        if answer is None:
            continue
        verdict = task.verify(problem, answer)
        if verdict.error is not None:
            raise DataError(
                f"row {problem.id}: the verifier failed on the reference answer {answer!r}: {verdict.error}"
            )
        if verdict.score < 1.0:
            raise DataError(
                f"row {problem.id}: the reference answer {answer!r} scores {verdict.score:g}, not 1; "
                "mend the row or the verifier"
            )
