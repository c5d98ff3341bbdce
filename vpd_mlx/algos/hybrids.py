"""The three hybrids of arXiv 2605.15113, B.3: GRPO's token loss, wrapped so that it follows the teacher too.

`joint` adds the M-step's divergence to the loss, `reshape` adds log q - log pi to each token's advantage, `reweight` scales the
advantages by it. Ours: what happens to a rollout without a context. Under joint it has the policy gradient alone; under the
other two its teacher counts as agreeing with the student.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import mlx.core as mx

from vpd_mlx import losses
from vpd_mlx.algos.base import Metrics, Stateful, Step, prefixed
from vpd_mlx.algos.grpo import Batch, GrpoLoss, Portion, policy_gradient_update
from vpd_mlx.algos.m_step import Distillation, divergence_metrics
from vpd_mlx.algos.samples import gather, teacher_row
from vpd_mlx.algos.settings import GrpoSettings, HybridSettings, MStepSettings, TeacherSettings
from vpd_mlx.algos.teacher import Teacher
from vpd_mlx.common.seeds import phase_seed
from vpd_mlx.engine.batching import token_weights
from vpd_mlx.engine.gradients import unit_weights
from vpd_mlx.engine.heads import Head
from vpd_mlx.engine.optimizer import Learner
from vpd_mlx.engine.policy import Policy
from vpd_mlx.types import Group

if TYPE_CHECKING:
    from vpd_mlx.recipe import Recipe

__all__ = ["Joint", "Reshape", "Reweight"]

TokenAdvantages = Callable[[mx.array, mx.array, mx.array], mx.array]
"""(advantages, teacher's log-probabilities, student's), each (m,) -> advantages (m,)."""


class _Hybrid:
    """A policy-gradient update in two portions: samples with a context, which have a teacher, and the others."""

    def __init__(self, recipe: Recipe, policy: Policy) -> None:
        self.recipe = recipe
        self.hybrid = recipe.section(HybridSettings)
        self.teacher = Teacher(recipe.section(TeacherSettings), "live", policy)
        self.learner = Learner(recipe.optimizer)
        self.parts: dict[str, Stateful] = {"pg": self.learner, "teacher": self.teacher}

    def portion(
        self, policy: Policy, step: int, batch: Batch, minibatch: Sequence[int], part: Sequence[int], taught: bool
    ) -> Portion:
        """Token loss, weights and constants of `part`, those samples of a minibatch that have a teacher or have none."""
        raise NotImplementedError

    def __call__(self, policy: Policy, groups: Sequence[Group], step: Step) -> Metrics:
        """One update."""
        samples = gather(groups)

        def portions(batch: Batch, minibatch: Sequence[int]) -> list[Portion]:
            out = []
            for taught in (True, False):
                part = [i for i in minibatch if (samples[i].teacher is not None) == taught]
                if part:
                    out.append(self.portion(policy, step.number, batch, minibatch, part, taught))
            return out

        with step.clock("student"):
            self.teacher.begin_batch(policy)
            metrics, seen = policy_gradient_update(
                policy,
                samples,
                self.learner,
                self.recipe.section(GrpoSettings),
                seed=phase_seed(step.seed, step.number, "update"),
                portions=portions,
            )
            self.teacher.end_batch(policy)
        step.tokens.update({i: t for i, t in seen.items() if "teacher_logp" in t})
        distilled = {i: {**c, "loss": c["divergence"]} for i, c in seen.items() if "divergence" in c}
        metrics |= {k: v for k, v in divergence_metrics(samples, distilled).items() if v is not None}
        return prefixed("student", metrics)


class Joint(_Hybrid):
    """distill * L_SDPO + reward * L_GRPO in one gradient."""

    def portion(
        self, policy: Policy, step: int, batch: Batch, minibatch: Sequence[int], part: Sequence[int], taught: bool
    ) -> Portion:
        """The two losses weigh tokens differently, so their weights are among the constants."""
        divergence = Distillation(self.recipe.section(MStepSettings), self.teacher)
        lengths = {i: len(batch.samples[i].student.completion) for i in minibatch}
        weights = dict(zip(minibatch, batch.weights(minibatch), strict=True))
        tokens = sum(n for i, n in lengths.items() if batch.samples[i].teacher is not None)

        def constants(own: Sequence[int]) -> list[dict[str, mx.array]]:
            mine = [part[i] for i in own]
            out = batch.constants(mine)
            if taught:
                found = divergence.constants(policy, [batch.samples[i] for i in mine])
                out = [{**a, **b} for a, b in zip(out, found, strict=True)]
            for fixed, i in zip(out, mine, strict=True):
                fixed["pg_weight"] = mx.array(weights[i])
                if taught:
                    of_sample = token_weights([lengths[i]], divergence.cfg.weighting, len(minibatch), tokens)
                    fixed["distill_weight"] = mx.array(of_sample[0])
            return out

        loss = _JointLoss(GrpoLoss(batch.cfg), divergence if taught else None, self.hybrid)
        return Portion(part, loss, unit_weights([batch.samples[i].student for i in part]), constants, int(taught))


@dataclass(frozen=True)
class _JointLoss:
    inner: GrpoLoss
    divergence: Distillation | None
    cfg: HybridSettings

    def __call__(
        self, logits: mx.array, fixed: Mapping[str, mx.array], head: Head
    ) -> tuple[mx.array, dict[str, mx.array]]:
        loss, metrics = self.inner(logits, fixed, head)
        loss = self.cfg.reward * loss * fixed["pg_weight"]
        if self.divergence is None:
            return loss, metrics
        apart, figures = self.divergence(logits, fixed, head)
        loss = loss + self.cfg.distill * apart * fixed["distill_weight"]
        return loss, {**metrics, **figures, "divergence": mx.stop_gradient(apart)}


class Reshape(_Hybrid):
    """A_t = reward * A + distill * sg[log q - log pi]: the teacher's opinion is added to each token's advantage."""

    def advantages(self, step: int) -> TokenAdvantages:
        """How advantages become token advantages at this step: here the same at every step."""
        return partial(losses.reshaped_advantages, reward=self.hybrid.reward, distill=self.hybrid.distill)

    def portion(
        self, policy: Policy, step: int, batch: Batch, minibatch: Sequence[int], part: Sequence[int], taught: bool
    ) -> Portion:
        """GRPO's weights; the loss needs the teacher's states."""
        weights = dict(zip(minibatch, batch.weights(minibatch), strict=True))

        def constants(own: Sequence[int]) -> list[dict[str, mx.array]]:
            mine = [part[i] for i in own]
            out = batch.constants(mine)
            if not taught:
                return out
            states = self.teacher.states(policy, [teacher_row(batch.samples[i]) for i in mine])
            return [{**a, **b} for a, b in zip(out, states, strict=True)]

        loss = _TokenAdvantageLoss(GrpoLoss(batch.cfg), self.advantages(step), self.teacher if taught else None)
        return Portion(part, loss, [weights[i] for i in part], constants, int(taught))


@dataclass(frozen=True)
class _TokenAdvantageLoss:
    inner: GrpoLoss
    advantages: TokenAdvantages
    teacher: Teacher | None

    def __call__(
        self, logits: mx.array, fixed: Mapping[str, mx.array], head: Head
    ) -> tuple[mx.array, dict[str, mx.array]]:
        own = mx.stop_gradient(losses.token_logps(logits, fixed["targets"]))
        theirs = own
        if self.teacher is not None:
            theirs = mx.stop_gradient(losses.token_logps(self.teacher.logits(fixed, head), fixed["targets"]))
        advantage = self.advantages(fixed["advantage"], theirs, own)
        loss, metrics = self.inner(logits, {**fixed, "advantage": advantage}, head)
        if self.teacher is not None:
            metrics |= {"teacher_logp": theirs, "student_logp": own}
        return loss, metrics


class Reweight(Reshape):
    """A_t = A ((1 - a) + a clip(exp(sign(A) (log q - log pi)), 1 +- eps)): the teacher says which tokens earn the advantage."""

    def advantages(self, step: int) -> TokenAdvantages:
        """`hybrid.mix` is a; it falls linearly to 0 over `hybrid.mix_decay_steps`, if that is set."""
        mix = self.hybrid.mix
        if self.hybrid.mix_decay_steps is not None:
            mix *= max(0.0, 1.0 - (step - 1) / self.hybrid.mix_decay_steps)
        return partial(losses.reweighted_advantages, mix=mix, clip=self.hybrid.weight_clip)
