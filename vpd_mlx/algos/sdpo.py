"""SDPO: distil the network under feedback into the network without, and OPSD, the same from reference solutions.

The M-step of VPD alone, with a teacher that follows as an EMA unless the recipe says otherwise. With a live teacher it is VPD
whose E-step never comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vpd_mlx.algos.base import Metrics, State, Step, load_state, prefixed, save_state
from vpd_mlx.algos.m_step import divergence_update
from vpd_mlx.algos.settings import MStepSettings, TeacherSettings
from vpd_mlx.algos.teacher import Teacher
from vpd_mlx.common.seeds import phase_seed
from vpd_mlx.engine.gradients import Learner, gather
from vpd_mlx.engine.policy import Policy
from vpd_mlx.types import Group

if TYPE_CHECKING:
    from vpd_mlx.recipe import Recipe

__all__ = ["Sdpo"]


class Sdpo:
    """An M-step on every batch."""

    def __init__(self, recipe: Recipe, policy: Policy) -> None:
        self.recipe = recipe
        self.teacher = Teacher(recipe.section(TeacherSettings), "ema", policy)
        self.learners = {"m": Learner(recipe.optimizer)}

    def __call__(self, policy: Policy, groups: Sequence[Group], step: Step) -> Metrics:
        """One M-step."""
        with step.clock("m_step"):
            self.teacher.begin_batch(policy)
            metrics, tokens = divergence_update(
                policy,
                gather(groups),
                self.learners["m"],
                self.recipe.section(MStepSettings),
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
