"""What a task is."""

from __future__ import annotations

from typing import Protocol

from vpd_mlx.types import Problem, Verdict

__all__ = ["Task"]


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
