"""Events of a run for those who watch it. The loop calls these methods and knows no terminal."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from vpd_mlx.types import Rollout

__all__ = ["Interrupted", "Progress", "Silent", "Stop"]


@dataclass
class Stop:
    """Set from outside, e.g. by a signal handler, to end the run at the next safe moment.

    `begun` says that the run has: until then nothing is written, and there is nothing to wait for.
    """

    signal: int | None = None
    begun: bool = False

    def check(self) -> None:
        """Raise `Interrupted` if the run is to end."""
        if self.signal is not None:
            raise Interrupted


class Interrupted(Exception):
    """The run ends here; its last snapshot stands."""


class Progress:
    """Receives a run's events as they happen. The methods here do nothing: override those that you need."""

    def note(self, text: str) -> None:
        """A line worth reading: a warning, a fallback, where files are."""

    def phase(self, name: str, done: int = 0, total: int | None = None) -> None:
        """A phase began or advanced: `done` of `total` sequences, if that is known."""

    def left(self, seconds: float) -> None:
        """How long the run will roughly take, before its first step, or before the first one after a resume."""

    def step(self, step: int, steps: int, metrics: Mapping[str, Any], seconds_left: float) -> None:
        """A step is complete."""

    def sample(self, prompt: str, rollout: Rollout, expected: str | None) -> None:
        """A completion of the current step, graded and with its context; the user message that it answers, and the right
        answer where the data have one."""

    def evaluation(self, step: int, result: Mapping[str, Any]) -> None:
        """An evaluation is complete."""

    def selection(self, step: int, result: Mapping[str, Any], *, best: bool) -> None:
        """A look at the problems by which the adapter is chosen is complete; `best` says that it is the best so far."""

    def paused(self) -> AbstractContextManager[None]:
        """A block in which the terminal belongs to a dialogue with a person."""
        return nullcontext()


class Silent(Progress):
    """Shows nothing."""
