"""SDPO and OPSD: distil the network under feedback into the network without.

Both are the M-step of VPD on every batch, with a teacher that follows as an EMA; OPSD's feedback is the reference solution.
With a live teacher, SDPO is VPD whose E-step never comes. `alpha`, top-k and its tail follow SDPO's reference code; the other
kinds of teacher, minibatches and epochs are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vpd_mlx.algos.base import Metrics, Stateful, Step, prefixed
from vpd_mlx.algos.m_step import divergence_update
from vpd_mlx.algos.samples import gather
from vpd_mlx.algos.settings import MStepSettings, TeacherSettings
from vpd_mlx.algos.teacher import Teacher
from vpd_mlx.common.seeds import phase_seed
from vpd_mlx.engine.learner import Learner
from vpd_mlx.engine.policy import Policy
from vpd_mlx.types import Group

if TYPE_CHECKING:
    from vpd_mlx.recipe import Recipe

__all__ = ["Sdpo"]


class Sdpo:
    """An M-step on every batch."""

    def __init__(self, recipe: Recipe, policy: Policy) -> None:
        self.m_step = recipe.section(MStepSettings)
        self.teacher = Teacher(TeacherSettings.of(recipe), policy)
        self.learner = Learner(recipe.optimizer)
        self.parts: dict[str, Stateful] = {"m": self.learner, "teacher": self.teacher}

    def __call__(self, policy: Policy, groups: Sequence[Group], step: Step) -> Metrics:
        """One M-step."""
        seed = phase_seed(step.seed, step.number, "update")
        self.learner.begin(step.number)
        samples = gather(groups)
        with step.clock("student"):
            self.teacher.begin_batch(policy)
            metrics, tokens = divergence_update(policy, samples, self.learner, self.m_step, self.teacher, seed=seed)
            of_teacher = self.teacher.end_batch(policy, samples)
        step.tokens.update(tokens)
        return {**prefixed("student", metrics), **of_teacher}
