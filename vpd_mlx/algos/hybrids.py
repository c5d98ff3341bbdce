"""What the three hybrids of arXiv 2605.15113 B.3 share: a policy gradient that hears the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vpd_mlx.algos.base import Metrics, State, Step, load_state, prefixed, save_state
from vpd_mlx.algos.m_step import Distillation
from vpd_mlx.algos.policy_gradient import TokenAdvantages, policy_gradient_update
from vpd_mlx.algos.settings import GrpoSettings, TeacherSettings
from vpd_mlx.algos.teacher import Teacher
from vpd_mlx.common.seeds import phase_seed
from vpd_mlx.engine.gradients import Learner, gather
from vpd_mlx.engine.policy import Policy
from vpd_mlx.types import Group

if TYPE_CHECKING:
    from vpd_mlx.recipe import Recipe

__all__ = ["Hybrid"]


class Hybrid:
    """A policy-gradient update with token advantages from the teacher, or with a divergence beside it."""

    def __init__(self, recipe: Recipe, policy: Policy) -> None:
        self.recipe = recipe
        self.teacher = Teacher(recipe.section(TeacherSettings), "live", policy)
        self.learners = {"pg": Learner(recipe.optimizer)}

    def reshape(self, step: int) -> TokenAdvantages | None:
        """How advantages become token advantages at this step; None leaves them."""
        return None

    def distillation(self) -> tuple[float, float, Distillation] | None:
        """(weight of the divergence, weight of the policy gradient, the divergence); None has no divergence."""
        return None

    def __call__(self, policy: Policy, groups: Sequence[Group], step: Step) -> Metrics:
        """One update."""
        with step.clock("policy_gradient"):
            self.teacher.begin_batch(policy)
            metrics, tokens = policy_gradient_update(
                policy,
                gather(groups),
                self.learners["pg"],
                self.recipe.section(GrpoSettings),
                seed=phase_seed(step.seed, step.number, "update"),
                teacher=self.teacher,
                reshape=self.reshape(step.number),
                distill=self.distillation(),
            )
            self.teacher.end_batch(policy)
        step.tokens.update({i: t for i, t in tokens.items() if "teacher_logp" in t})
        return prefixed("policy_gradient", metrics)

    def state(self) -> State:
        """For a checkpoint."""
        return save_state(self.learners, self.teacher)

    def restore(self, state: State) -> None:
        """Take up a checkpoint."""
        load_state(state, self.learners, self.teacher)
