"""What an algorithm is: a callable over groups of rollouts, and the parts of it that outlive a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx

from vpd_mlx.common.functions import function_name
from vpd_mlx.common.stats import Clock
from vpd_mlx.engine.learner import Floats, Metrics
from vpd_mlx.engine.policy import Policy
from vpd_mlx.errors import RunError
from vpd_mlx.types import Group

__all__ = [
    "Algorithm",
    "Function",
    "Metrics",
    "Stateful",
    "Step",
    "prefixed",
    "reset_parts",
    "restore_parts",
    "save_parts",
]


@dataclass(frozen=True)
class Step:
    """Where the run stands: the step's number, the run's seed, the clock that phases are counted on.

    Steps count from 1. `plan` measures a step 0: whatever comes every n-th step comes in it.
    An algorithm with a teacher leaves in `tokens`, by rollout in order, each token's `teacher_logp` and `student_logp`.
    """

    number: int
    seed: int
    clock: Clock
    tokens: dict[int, Mapping[str, Floats]] = field(default_factory=dict)


class Stateful(Protocol):
    """A part of an algorithm that a checkpoint must keep."""

    def arrays(self) -> dict[str, mx.array]:
        """Its tensors by name, by default none; their bytes also count as memory held between updates."""
        return {}

    def scalars(self) -> Any:
        """The rest of its state, as JSON, by default nothing."""
        return None

    def restore(self, arrays: Mapping[str, mx.array], scalars: Any) -> None:
        """Take up what `arrays` and `scalars` returned."""

    def reset(self, policy: Policy, rate: float) -> None:
        """Start afresh from the policy's adapter, which the run has gone back to; learning rates are `rate` times what they were.

        A part with nothing to start afresh keeps this method, which does nothing.
        """


class Algorithm(Protocol):
    """Turns a batch of rollouts with contexts into updates of the policy.

    Attributes:
        parts: name -> part, of all that it carries from step to step besides the policy's adapter. Checkpoints use the names.
    """

    parts: Mapping[str, Stateful]

    def __call__(self, policy: Policy, groups: Sequence[Group], step: Step) -> Metrics:
        """One step; returns what to log."""


class Function:
    """Calls a function of a Python program, `vpd.train(..., algorithm=learn)`, and logs the metrics that it returns.

    What it carries from step to step, such as optimizers, is resumed only from an attribute `parts` of the function, as
    `Algorithm` has it.
    """

    def __init__(self, learn: Callable[[Policy, Sequence[Group], Step], Any]) -> None:
        self._learn = learn
        self.parts: Any = getattr(learn, "parts", {})

    def __call__(self, policy: Policy, groups: Sequence[Group], step: Step) -> Metrics:
        """One step.

        Raises:
            RunError: it returned something else than metrics.
        """
        name = function_name(self._learn)
        with step.clock(name):
            metrics = self._learn(policy, groups, step)
        if not isinstance(metrics, dict | None):
            kind = type(metrics).__name__
            raise RunError(f"algorithm {name} returned a {kind}; return a dict of metrics, or None")
        return dict(metrics or {})


def prefixed(prefix: str, metrics: Mapping[str, Any]) -> Metrics:
    """Metrics under `prefix/`."""
    return {f"{prefix}/{k}": v for k, v in metrics.items()}


def save_parts(parts: Mapping[str, Stateful]) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """All arrays as `<part>.<name>`, and each part's scalars."""
    arrays = {f"{name}.{k}": v for name, part in parts.items() for k, v in part.arrays().items()}
    # The first versions read `delta` whatever the algorithm.
    return arrays, {"delta": None, **{name: part.scalars() for name, part in parts.items()}}


def restore_parts(parts: Mapping[str, Stateful], arrays: Mapping[str, mx.array], scalars: Mapping[str, Any]) -> None:
    """Hand every part what `save_parts` found in it."""
    for name, part in parts.items():
        own = {k.removeprefix(f"{name}."): v for k, v in arrays.items() if k.startswith(f"{name}.")}
        part.restore(own, scalars.get(name))


def reset_parts(parts: Mapping[str, Stateful], policy: Policy, rate: float) -> None:
    """Let every part start afresh from the policy's adapter, at `rate` times its learning rate.

    Raises:
        RunError: a part of a Python program's function has no `reset`.
    """
    for name, part in parts.items():
        if not hasattr(part, "reset"):
            remedy = "give it reset(policy, rate), or set on_collapse to stop or warn"
            raise RunError(f"part {name} of the algorithm cannot be reset; {remedy}")
        part.reset(policy, rate)
