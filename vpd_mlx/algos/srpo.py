"""SRPO: right completions learn by the policy gradient, wrong ones from the teacher that read the feedback (arXiv 2604.02288).

The verdict routes each completion to one loss: GRPO's says how much better than its group a right one was, the M-step's
divergence says of a wrong one where it went wrong. A wrong completion without a context has no teacher and keeps the policy
gradient, so that nothing is lost. `hybrid.reward` and `hybrid.distill` weigh the two losses. Ours: both are means over all
completions of a minibatch, so that each completion counts alike whichever loss it has; `grpo.kl` is for those under the policy
gradient. The paper further weighs the teacher's tokens by its entropy, which this file does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx

from vpd_mlx.algos.grpo import Batch, GrpoLoss, Portion
from vpd_mlx.algos.hybrids import Hybrid
from vpd_mlx.algos.m_step import Distillation, group_weights
from vpd_mlx.algos.samples import Sample
from vpd_mlx.algos.settings import MStepSettings
from vpd_mlx.common.softmax import Softmax
from vpd_mlx.engine.batching import token_weights
from vpd_mlx.engine.heads import Head
from vpd_mlx.engine.policy import Policy
from vpd_mlx.losses import LossAndMetrics

__all__ = ["Srpo"]


class Srpo(Hybrid):
    """reward * L_GRPO on some completions, distill * L_SDPO on the others, in one gradient."""

    def taught(self, sample: Sample) -> bool:
        """Wrong completions with a context."""
        return not sample.rollout.success and super().taught(sample)

    def portion(
        self, policy: Policy, step: int, batch: Batch, minibatch: Sequence[int], part: Sequence[int], taught: bool
    ) -> Portion:
        """The divergence alone, or GRPO's loss alone."""
        if not taught:
            weights = batch.weights(minibatch)
            return Portion(part, GrpoLoss(batch.cfg), [self.hybrid.reward * weights[i] for i in part], batch.constants)
        divergence = Distillation(self.recipe.section(MStepSettings), self.teacher)
        lengths = [len(batch.samples[i].student.completion) for i in part]
        tokens = sum(len(batch.samples[i].student.completion) for i in minibatch)
        of_part = token_weights(lengths, divergence.cfg.weighting, sequences=len(minibatch), tokens=tokens)
        of_group = group_weights(batch.samples, divergence.cfg)
        of_part = [w * of_group[batch.samples[i].group] for w, i in zip(of_part, part, strict=True)]

        def constants(own: Sequence[int]) -> list[dict[str, mx.array]]:
            return divergence.constants(policy, [batch.samples[i] for i in own])

        def loss(student: Softmax, fixed: Mapping[str, mx.array], head: Head) -> LossAndMetrics:
            each, figures = divergence(student, fixed, head)
            return each, {**figures, "logp": figures["student_logp"], "divergence": mx.stop_gradient(each)}

        return Portion(part, loss, [self.hybrid.distill * w for w in of_part], constants, int(taught))
