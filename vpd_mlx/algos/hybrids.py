"""The three hybrids of arXiv 2605.15113, B.3: GRPO's token loss, wrapped so that it follows the teacher too.

`joint` adds the M-step's divergence to the loss, `reshape` adds log q - log pi to each token's advantage, `reweight` scales the
advantages by it. Ours: what happens to a rollout without a context. Under joint it has the policy gradient alone; under the
other two its teacher counts as agreeing with the student.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import mlx.core as mx

from vpd_mlx import losses
from vpd_mlx.algos.base import Metrics, Stateful, Step, prefixed
from vpd_mlx.algos.grpo import Batch, GrpoLoss, Portion, policy_gradient_update
from vpd_mlx.algos.m_step import Distillation, divergence_metrics, group_weights
from vpd_mlx.algos.samples import Sample, gather, teacher_row
from vpd_mlx.algos.settings import GrpoSettings, HybridSettings, MStepSettings, TeacherSettings
from vpd_mlx.algos.teacher import Teacher
from vpd_mlx.common.seeds import phase_seed
from vpd_mlx.common.softmax import Softmax
from vpd_mlx.engine.batching import token_weights
from vpd_mlx.engine.heads import Head
from vpd_mlx.engine.learner import Learner, unit_weights
from vpd_mlx.engine.policy import Policy
from vpd_mlx.losses import LossAndMetrics
from vpd_mlx.types import Group

if TYPE_CHECKING:
    from vpd_mlx.recipe import Recipe

__all__ = ["Hybrid", "Joint", "Reshape", "Reweight"]

TokenAdvantages = Callable[[mx.array, mx.array, mx.array], mx.array]
"""(advantages, teacher's log-probabilities, student's), each (m,) -> advantages (m,)."""


class Hybrid(ABC):
    """A policy-gradient update in two portions: samples that learn from a teacher, and the others."""

    def __init__(self, recipe: Recipe, policy: Policy) -> None:
        self.recipe = recipe
        self.hybrid = recipe.section(HybridSettings)
        self.teacher = Teacher(TeacherSettings.of(recipe), policy)
        self.learner = Learner(recipe.optimizer)
        self.parts: dict[str, Stateful] = {"pg": self.learner, "teacher": self.teacher}

    def taught(self, sample: Sample) -> bool:
        """Whether a sample learns from the teacher, which needs a context: here all that have one."""
        return sample.teacher is not None

    @abstractmethod
    def portion(
        self, policy: Policy, step: int, batch: Batch, minibatch: Sequence[int], part: Sequence[int], taught: bool
    ) -> Portion:
        """Token loss, weights and constants of `part`, those samples of a minibatch that are `taught`, or that are not."""

    def __call__(self, policy: Policy, groups: Sequence[Group], step: Step) -> Metrics:
        """One update."""
        samples = gather(groups)

        def portions(batch: Batch, minibatch: Sequence[int]) -> list[Portion]:
            split = {of: [i for i in minibatch if self.taught(samples[i]) == of] for of in (True, False)}
            return [self.portion(policy, step.number, batch, minibatch, p, of) for of, p in split.items() if p]

        cfg, seed = self.recipe.section(GrpoSettings), phase_seed(step.seed, step.number, "update")
        self.learner.begin(step.number)
        with step.clock("student"):
            self.teacher.begin_batch(policy)
            metrics, seen = policy_gradient_update(policy, samples, self.learner, cfg, seed=seed, portions=portions)
            of_teacher = self.teacher.end_batch(policy, samples)
        step.tokens.update({i: t for i, t in seen.items() if "teacher_logp" in t})
        distilled = {i: {**c, "loss": c["divergence"]} for i, c in seen.items() if "divergence" in c}
        metrics |= {k: v for k, v in divergence_metrics(samples, distilled).items() if v is not None}
        return {**prefixed("student", metrics), **of_teacher}


class Joint(Hybrid):
    """distill * L_SDPO + reward * L_GRPO in one gradient."""

    def portion(
        self, policy: Policy, step: int, batch: Batch, minibatch: Sequence[int], part: Sequence[int], taught: bool
    ) -> Portion:
        """The two losses weigh tokens differently, so their weights are among the constants."""
        grpo, divergence = GrpoLoss(batch.cfg), Distillation(self.recipe.section(MStepSettings), self.teacher)
        lengths = {i: len(batch.samples[i].student.completion) for i in minibatch}
        weights = batch.weights(minibatch)
        tokens = sum(n for i, n in lengths.items() if batch.samples[i].teacher is not None)
        of_group = group_weights(batch.samples, divergence.cfg)

        def constants(own: Sequence[int]) -> list[dict[str, mx.array]]:
            out = [{**c, "pg_weight": mx.array(weights[i])} for i, c in zip(own, batch.constants(own), strict=True)]
            if taught:
                found = divergence.constants(policy, [batch.samples[i] for i in own])
                for i, fixed, more in zip(own, out, found, strict=True):
                    of_sample = token_weights([lengths[i]], divergence.cfg.weighting, len(minibatch), tokens)
                    weight = of_sample[0] * of_group[batch.samples[i].group]
                    fixed |= {**more, "distill_weight": mx.array(weight)}
            return out

        def loss(student: Softmax, fixed: Mapping[str, mx.array], head: Head) -> LossAndMetrics:
            each, metrics = grpo(student, fixed, head)
            each = self.hybrid.reward * each * fixed["pg_weight"]
            if not taught:
                return each, metrics
            apart, figures = divergence(student, fixed, head)
            each = each + self.hybrid.distill * apart * fixed["distill_weight"]
            return each, {**metrics, **figures, "divergence": mx.stop_gradient(apart)}

        return Portion(part, loss, unit_weights([batch.samples[i].student for i in part]), constants, int(taught))


class Reshape(Hybrid):
    """A_t = reward * A + distill * sg[log q - log pi]: the teacher's opinion is added to each token's advantage."""

    def advantages(self, step: int) -> TokenAdvantages:
        """How advantages become token advantages at this step: here the same at every step."""
        return partial(losses.reshaped_advantages, reward=self.hybrid.reward, distill=self.hybrid.distill)

    def portion(
        self, policy: Policy, step: int, batch: Batch, minibatch: Sequence[int], part: Sequence[int], taught: bool
    ) -> Portion:
        """GRPO's weights; the loss needs the teacher's states."""
        grpo, advantages, weights = GrpoLoss(batch.cfg), self.advantages(step), batch.weights(minibatch)

        def constants(own: Sequence[int]) -> list[dict[str, mx.array]]:
            out = batch.constants(own)
            if not taught:
                return out
            states = self.teacher.states(policy, [teacher_row(batch.samples[i]) for i in own])
            return [{**a, **b} for a, b in zip(out, states, strict=True)]

        def loss(student: Softmax, fixed: Mapping[str, mx.array], head: Head) -> LossAndMetrics:
            ours = theirs = student.fixed_logps(fixed["targets"])
            if taught:
                theirs = mx.stop_gradient(losses.token_logps(self.teacher.logits(fixed, head), fixed["targets"]))
            advantage = advantages(fixed["advantage"], theirs, ours)
            each, metrics = grpo(student, {**fixed, "advantage": advantage}, head)
            return each, {**metrics, "teacher_logp": theirs, "student_logp": ours} if taught else metrics

        return Portion(part, loss, [weights[i] for i in part], constants, int(taught))


class Reweight(Reshape):
    """A_t = A ((1 - a) + a clip(exp(sign(A) (log q - log pi)), 1 +- eps)): the teacher says which tokens earn the advantage."""

    def advantages(self, step: int) -> TokenAdvantages:
        """`hybrid.mix` is a; it falls linearly to 0 over `hybrid.mix_decay_steps`, if that is set."""
        mix = self.hybrid.mix
        if self.hybrid.mix_decay_steps is not None:
            mix *= max(0.0, 1.0 - (step - 1) / self.hybrid.mix_decay_steps)
        return partial(losses.reweighted_advantages, mix=mix, clip=self.hybrid.weight_clip)
