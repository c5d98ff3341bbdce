"""Variational Policy Distillation (arXiv 2605.15113, Algorithm 1).

Every batch gets its M-step; every F-th gets an E-step first, on the same rollouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from vpd_mlx.algos.base import Metrics, State, Step, load_state, prefixed, save_state
from vpd_mlx.algos.e_step import EStepResult, bco_update
from vpd_mlx.algos.m_step import divergence_update
from vpd_mlx.algos.settings import EStepSettings, MStepSettings, TeacherSettings
from vpd_mlx.algos.teacher import Teacher
from vpd_mlx.common.seeds import phase_seed
from vpd_mlx.engine.gradients import Learner, Sample, gather
from vpd_mlx.engine.policy import Policy
from vpd_mlx.types import Group

if TYPE_CHECKING:
    from vpd_mlx.recipe import Recipe

__all__ = ["Vpd"]


class Vpd:
    """EM on one network: the E-step trains the teacher's prompt, the M-step the student's."""

    def __init__(self, recipe: Recipe, policy: Policy) -> None:
        self.recipe = recipe
        self.teacher = Teacher(recipe.section(TeacherSettings), "live", policy)
        ratio = recipe.section(EStepSettings).learning_rate_ratio
        self.learners = {"m": Learner(recipe.optimizer), "e": Learner(recipe.optimizer, ratio)}
        self.delta: float | None = None

    def __call__(self, policy: Policy, groups: Sequence[Group], step: Step) -> Metrics:
        """An E-step when due, then an M-step."""
        samples = gather(groups)
        seed = phase_seed(step.seed, step.number, "update")
        metrics: Metrics = {}
        e_step: EStepResult | None = None
        if step.number % self.recipe.section(EStepSettings).every == 0:
            with step.clock("e_step"):
                e_step = bco_update(
                    policy,
                    samples,
                    self.learners["e"],
                    self.recipe.section(EStepSettings),
                    previous_delta=self.delta,
                    seed=seed,
                    teacher=self.teacher,
                )
            self.delta = e_step.delta
            metrics |= prefixed("e_step", e_step.metrics)
        with step.clock("m_step"):
            self.teacher.begin_batch(policy)
            m_step, tokens = divergence_update(
                policy, samples, self.learners["m"], self.recipe.section(MStepSettings), self.teacher, seed=seed
            )
            self.teacher.end_batch(policy)
        step.tokens.update(tokens)
        if e_step is not None and e_step.anchor and self.teacher.kind in ("live", "frozen", "adapter"):
            metrics |= prefixed("e_step", self._after(samples, e_step, tokens))
        return {**metrics, **prefixed("m_step", m_step)}

    def _after(
        self, samples: Sequence[Sample], e_step: EStepResult, tokens: dict[int, dict[str, np.ndarray]]
    ) -> Metrics:
        """What the E-step did, read off the M-step's own passes: the margin afterwards, the student's shift."""
        cfg = self.recipe.section(EStepSettings)
        rewards: dict[bool, list[float]] = {True: [], False: []}
        moved = []
        for i, anchor in e_step.anchor.items():
            if i not in tokens:
                continue
            reward = cfg.beta * float(tokens[i]["teacher_logp"].sum() - anchor.sum())
            rewards[samples[i].rollout.success].append(reward / len(anchor) if cfg.length_normalise else reward)
            moved.append(tokens[i]["student_logp"] - anchor)
        out: Metrics = {}
        if rewards[True] and rewards[False]:
            out["margin_after"] = float(np.mean(rewards[True]) - np.mean(rewards[False]))
        if moved and cfg.prior == "dynamic":
            shift = np.concatenate(moved)
            out |= {"student_shift": float(shift.mean()), "student_shift_abs": float(np.abs(shift).mean())}
        return out

    def state(self) -> State:
        """For a checkpoint."""
        return save_state(self.learners, self.teacher, self.delta)

    def restore(self, state: State) -> None:
        """Take up a checkpoint."""
        self.delta = load_state(state, self.learners, self.teacher)
