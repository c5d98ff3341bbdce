"""What an algorithm is, and how its state is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx

from vpd_mlx.algos.teacher import Teacher
from vpd_mlx.common.stats import Clock
from vpd_mlx.engine.gradients import Floats, Learner
from vpd_mlx.engine.policy import Policy
from vpd_mlx.types import Group

__all__ = ["Algorithm", "Metrics", "State", "Step", "load_state", "prefixed", "save_state"]

Metrics = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """Where the run stands: the step's number from 1, the run's seed, the clock that phases are counted on.

    An algorithm with a teacher leaves in `tokens`, by rollout in order, each token's `teacher_logp` and `student_logp`.
    """

    number: int
    seed: int
    clock: Clock
    tokens: dict[int, Mapping[str, Floats]] = field(default_factory=dict)


@dataclass(frozen=True)
class State:
    """All that an algorithm carries from step to step, the policy's adapter aside."""

    arrays: dict[str, mx.array]
    scalars: dict[str, Any]


class Algorithm(Protocol):
    """Turns a batch of rollouts with contexts into updates of the policy."""

    def __call__(self, policy: Policy, groups: Sequence[Group], step: Step) -> Metrics:
        """One step; returns what to log."""

    def state(self) -> State:
        """For a checkpoint."""

    def restore(self, state: State) -> None:
        """Take up a checkpoint."""


def prefixed(prefix: str, metrics: Mapping[str, Any]) -> Metrics:
    """Metrics under `prefix/`."""
    return {f"{prefix}/{k}": v for k, v in metrics.items()}


def save_state(learners: Mapping[str, Learner], teacher: Teacher | None, delta: float | None = None) -> State:
    """The state of optimizers, teacher and reward shift."""
    arrays = {f"{name}.{k}": v for name, learner in learners.items() for k, v in learner.arrays().items()}
    if teacher is not None:
        arrays |= {f"teacher.{k}": v for k, v in teacher.arrays().items()}
    scalars: dict[str, Any] = {name: learner.scalars() for name, learner in learners.items()}
    return State(arrays, {**scalars, "delta": delta})


def load_state(state: State, learners: Mapping[str, Learner], teacher: Teacher | None) -> float | None:
    """Put a saved state back; returns the reward shift."""

    def part(name: str) -> dict[str, mx.array]:
        return {k.removeprefix(f"{name}."): v for k, v in state.arrays.items() if k.startswith(f"{name}.")}

    for name, learner in learners.items():
        learner.restore(part(name), state.scalars[name])
    if teacher is not None:
        teacher.restore(part("teacher"))
    delta: float | None = state.scalars["delta"]
    return delta
