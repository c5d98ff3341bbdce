"""What a task is."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from vpd_mlx.tasks.answers import spoken
from vpd_mlx.types import Problem, Verdict

__all__ = ["Answering", "Exam", "Task", "answer_of", "examine"]


class Task(Protocol):
    """Problems to train on, problems held out, and a verifier."""

    @property
    def train(self) -> tuple[Problem, ...]:
        """Problems to sample from in training."""

    @property
    def held_out(self) -> tuple[Problem, ...]:
        """Problems never trained on."""

    def verify(self, problem: Problem, completion: str) -> Verdict:
        """Grade one completion. A failure of the verifier itself comes back as `Verdict.error`, never as a score."""

    def reference_completion(self, problem: Problem) -> str | None:
        """A completion that must score 1.0, or None where the data has none."""


@runtime_checkable
class Exam(Protocol):
    """A task that grades evaluation by other means than training: by tests that no feedback has quoted, say."""

    def evaluate(self, problem: Problem, completion: str) -> Verdict:
        """Grade one completion for evaluation; otherwise as `verify`."""


def examine(task: Task, problem: Problem, completion: str) -> Verdict:
    """Grade one completion for evaluation: by the task's `evaluate` where it has one, else by its `verify`."""
    return task.evaluate(problem, completion) if isinstance(task, Exam) else task.verify(problem, completion)


@runtime_checkable
class Answering(Protocol):
    """A task whose completions end in an answer that is shorter than they are."""

    def answer_in(self, completion: str) -> str | None:
        """The answer alone; None where there is none."""


def answer_of(task: Task, completion: str) -> str | None:
    """What a completion votes for in maj@k: its final answer, or its whole text where the task tells none apart."""
    return task.answer_in(completion) if isinstance(task, Answering) else spoken(completion).strip()
