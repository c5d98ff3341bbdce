"""Variational Policy Distillation (arXiv 2605.15113, Algorithm 1).

Every batch gets its M-step; every F-th gets an E-step first, on the same rollouts. From the paper: the two losses (Eq. 7 to 10),
delta as the class midpoint, the dynamic prior, F. Ours: LoRA in place of full weights, Adam moments and a learning rate of the
E-step's own, teachers other than `live`, and `e_step.contexts: crossed` and `e_step.anchor`, which are off by default.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from vpd_mlx.algos.base import Metrics, Step, prefixed
from vpd_mlx.algos.e_step import EStepResult, RewardShift, bco_update
from vpd_mlx.algos.samples import Sample, gather
from vpd_mlx.algos.sdpo import Sdpo
from vpd_mlx.algos.settings import EStepSettings
from vpd_mlx.common.seeds import phase_seed
from vpd_mlx.engine.learner import Learner
from vpd_mlx.engine.policy import Policy
from vpd_mlx.types import Group

if TYPE_CHECKING:
    from vpd_mlx.recipe import Recipe

__all__ = ["Vpd"]


class Vpd(Sdpo):
    """EM on one network: the E-step trains the teacher's prompt, the M-step, which is SDPO's, the student's."""

    def __init__(self, recipe: Recipe, policy: Policy) -> None:
        super().__init__(recipe, policy)
        self.e_step = recipe.section(EStepSettings)
        self.e_learner = Learner(recipe.optimizer, self.e_step.learning_rate_ratio)
        self.shift = RewardShift()
        self.parts |= {"e": self.e_learner, "delta": self.shift}

    def __call__(self, policy: Policy, groups: Sequence[Group], step: Step) -> Metrics:
        """An E-step when due, then an M-step."""
        self.e_learner.begin(step.number)
        if step.number % self.e_step.every:
            return super().__call__(policy, groups, step)
        samples = gather(groups)
        with step.clock("e_step"):
            done = bco_update(
                policy,
                samples,
                self.e_learner,
                self.e_step,
                previous_delta=self.shift.delta,
                seed=phase_seed(step.seed, step.number, "update"),
                teacher=self.teacher,
            )
        self.shift.delta = done.delta
        m_step = super().__call__(policy, groups, step)
        return {**prefixed("e_step", {**done.metrics, **self._after(samples, done, step)}), **m_step}

    def _after(self, samples: Sequence[Sample], done: EStepResult, step: Step) -> Metrics:
        """What the E-step did, read off the M-step's own passes: the margin afterwards, the student's shift."""
        if self.teacher.kind not in ("live", "frozen", "adapter"):
            return {}  # the M-step looked at another teacher than the E-step trained
        rewards: dict[bool, list[float]] = {True: [], False: []}
        shifts = []
        for i, anchor in done.anchor.items():
            if (tokens := step.tokens.get(i)) is None:
                continue
            counted = done.counted[i]
            reward = self.e_step.beta * float(((tokens["teacher_logp"] - anchor) * counted).sum())
            of = float(counted.sum()) if self.e_step.length_normalise else 1.0
            rewards[samples[i].rollout.success].append(reward / of)
            shifts.append(tokens["student_logp"] - anchor)
        out: Metrics = {}
        if rewards[True] and rewards[False]:
            out["margin_after"] = float(np.mean(rewards[True]) - np.mean(rewards[False]))
        if shifts and self.e_step.prior == "dynamic":
            shift = np.concatenate(shifts)
            out |= {"student_shift": float(shift.mean()), "student_shift_abs": float(np.abs(shift).mean())}
        return out
