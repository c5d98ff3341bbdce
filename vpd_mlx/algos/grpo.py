"""GRPO: clipped policy gradient on group advantages. No feedback, no teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vpd_mlx.algos.base import Metrics, State, Step, load_state, prefixed, save_state
from vpd_mlx.algos.policy_gradient import policy_gradient_update
from vpd_mlx.algos.settings import GrpoSettings
from vpd_mlx.common.seeds import phase_seed
from vpd_mlx.engine.gradients import Learner, gather
from vpd_mlx.engine.policy import Policy
from vpd_mlx.types import Group

if TYPE_CHECKING:
    from vpd_mlx.recipe import Recipe

__all__ = ["Grpo"]


class Grpo:
    """A policy-gradient update on every batch."""

    def __init__(self, recipe: Recipe, policy: Policy) -> None:
        self.recipe = recipe
        self.learners = {"pg": Learner(recipe.optimizer)}

    def __call__(self, policy: Policy, groups: Sequence[Group], step: Step) -> Metrics:
        """One update."""
        with step.clock("policy_gradient"):
            metrics, _ = policy_gradient_update(
                policy,
                gather(groups),
                self.learners["pg"],
                self.recipe.section(GrpoSettings),
                seed=phase_seed(step.seed, step.number, "update"),
            )
        return prefixed("policy_gradient", metrics)

    def state(self) -> State:
        """For a checkpoint."""
        return save_state(self.learners, None)

    def restore(self, state: State) -> None:
        """Take up a checkpoint."""
        load_state(state, self.learners, None)
