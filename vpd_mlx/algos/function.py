"""An algorithm that a Python program hands over: `vpd.train(..., algorithm=learn)`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vpd_mlx.algos.base import Metrics, Step
from vpd_mlx.common.functions import function_name
from vpd_mlx.engine.policy import Policy
from vpd_mlx.errors import RunError
from vpd_mlx.types import Group

__all__ = ["Function"]


class Function:
    """Calls the function with (policy, groups, step) and logs the metrics that it returns.

    What it carries from step to step, optimizers for one, a resume restores only from an attribute `parts` of the function, as
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
        with step.clock(function_name(self._learn)):
            metrics = self._learn(policy, groups, step)
        if not isinstance(metrics, dict | None):
            kind = type(metrics).__name__
            raise RunError(
                f"algorithm {function_name(self._learn)} returned a {kind}; return a dict of metrics, or None"
            )
        return dict(metrics or {})
