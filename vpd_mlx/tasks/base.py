"""What a task is: a class with these members. It may also have

- `notices`, a tuple of lines to show the user at the start;
- `fingerprint`, bytes on which its verdicts depend besides the rows.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from vpd_mlx.tasks.answers import spoken
from vpd_mlx.types import Problem, Verdict

__all__ = ["Answering", "Exam", "Task", "answer_of", "examine"]


class Task(Protocol):
    """Problems to train on, problems held out, and a verifier."""

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


@runtime_checkable
class Exam(Protocol):
    """A task that grades in evaluation otherwise than in training: by tests that no feedback quotes, for example."""

    def evaluate(self, problem: Problem, completion: str) -> Verdict:
        """Grade one completion for evaluation; otherwise as `verify`."""


def examine(task: Task, problem: Problem, completion: str) -> Verdict:
    """Grade one completion for evaluation: by the task's `evaluate` if it has one, else by its `verify`."""
    return task.evaluate(problem, completion) if isinstance(task, Exam) else task.verify(problem, completion)


@runtime_checkable
class Answering(Protocol):
    """A task whose completions hold a short final answer."""

    def answer_in(self, completion: str) -> str | None:
        """The answer alone; None if the completion has none."""


def answer_of(task: Task, completion: str) -> str | None:
    """What a completion votes for in maj@k: its final answer, or its whole text if the task does not extract one."""
    return task.answer_in(completion) if isinstance(task, Answering) else spoken(completion).strip()
