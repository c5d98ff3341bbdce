"""SDPO: distil the network under feedback into the network without, and OPSD, the same from reference solutions.

The M-step of VPD alone, with a teacher that follows as an EMA unless the recipe says otherwise. With a live teacher it is VPD
whose E-step never comes.
"""

from __future__ import annotations

from collections.abc import Sequence

from vpd_mlx.algos.base import Metrics, State, Step, load_state, prefixed, save_state
from vpd_mlx.config import Recipe
from vpd_mlx.policy import Policy, phase_seed
from vpd_mlx.teacher import Teacher
from vpd_mlx.types import Group
from vpd_mlx.updates import Learner, divergence_update, gather

__all__ = ["Sdpo"]


class Sdpo:
    """An M-step on every batch."""

    def __init__(self, recipe: Recipe, policy: Policy) -> None:
        self.recipe = recipe
        self.teacher = Teacher(recipe.teacher, "ema", policy)
        self.learners = {"m": Learner(recipe.optimizer)}

    def __call__(self, policy: Policy, groups: Sequence[Group], step: Step) -> Metrics:
        """One M-step."""
        with step.clock("m_step"):
            self.teacher.begin_batch(policy)
            metrics, tokens = divergence_update(
                policy,
                gather(groups),
                self.learners["m"],
                self.recipe.m_step,
                self.teacher,
                seed=phase_seed(step.seed, step.number, "update"),
            )
            self.teacher.end_batch(policy)
        step.tokens.update(tokens)
        return prefixed("m_step", metrics)

    def state(self) -> State:
        """For a checkpoint."""
        return save_state(self.learners, self.teacher)

    def restore(self, state: State) -> None:
        """Take up a checkpoint."""
        load_state(state, self.learners, self.teacher)
