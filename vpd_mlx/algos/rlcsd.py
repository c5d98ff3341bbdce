"""RLCSD: the advantage of a token is scaled by how much a right hint says for it that wrong hints do not (arXiv 2606.11709).

A hint moves a teacher's style whatever it says. So its teacher reads the first right sibling, then up to four wrong ones
in the same words, and what is left of log q under the right one, less the logarithm of the mean q under the wrong ones, is about
the answer. The verifier keeps the sign: it scales GRPO's advantage, within 1 +- `hybrid.weight_clip`. Ours: that bound, which is
reweight's, and that a completion whose group has no other right or no other wrong answer keeps the plain advantage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx

from vpd_mlx import losses
from vpd_mlx.algos.grpo import Batch, GrpoLoss, Portion
from vpd_mlx.algos.hybrids import Reweight
from vpd_mlx.algos.samples import Sample, teacher_row
from vpd_mlx.common.softmax import Softmax
from vpd_mlx.engine.heads import Head
from vpd_mlx.engine.policy import Policy
from vpd_mlx.losses import LossAndMetrics
from vpd_mlx.types import TokenRow

__all__ = ["Rlcsd"]


class Rlcsd(Reweight):
    """A_t = A ((1 - a) + a clip(exp(sign(A) contrast), 1 +- eps)) with a = `hybrid.mix`."""

    def taught(self, sample: Sample) -> bool:
        """Completions with a right sibling and a wrong one."""
        return bool(sample.rollout.wrong_prompts) and super().taught(sample)

    def _hints(self, policy: Policy, samples: Sequence[Sample]) -> list[dict[str, mx.array]]:
        """Per sample, (T,) each: log q under the right hint, and the contrast."""
        right = self.teacher.logps(policy, [teacher_row(s) for s in samples])
        rows = [TokenRow(prompt, s.student.completion) for s in samples for prompt in s.rollout.wrong_prompts]
        wrong = iter(self.teacher.logps(policy, rows))
        out = []
        for s, own in zip(samples, right, strict=True):
            others = mx.stack([mx.array(next(wrong)) for _ in s.rollout.wrong_prompts])
            out.append({"right": mx.array(own), "contrast": losses.contrast(mx.array(own), others)})
        return out

    def portion(
        self, policy: Policy, step: int, batch: Batch, minibatch: Sequence[int], part: Sequence[int], taught: bool
    ) -> Portion:
        """GRPO's weights; the loss needs the contrast."""
        grpo, advantages, weights = GrpoLoss(batch.cfg), self.advantages(step), batch.weights(minibatch)

        def constants(own: Sequence[int]) -> list[dict[str, mx.array]]:
            out = batch.constants(own)
            if not taught:
                return out
            hints = self._hints(policy, [batch.samples[i] for i in own])
            return [{**a, **b} for a, b in zip(out, hints, strict=True)]

        def loss(student: Softmax, fixed: Mapping[str, mx.array], head: Head) -> LossAndMetrics:
            if not taught:
                return grpo(student, fixed, head)
            contrast = fixed["contrast"]
            advantage = advantages(fixed["advantage"], contrast, mx.zeros_like(contrast))
            each, metrics = grpo(student, {**fixed, "advantage": advantage}, head)
            return each, {
                **metrics,
                "teacher_logp": fixed["right"],
                "student_logp": metrics["logp"],
                "contrast": contrast,
            }

        return Portion(part, loss, [weights[i] for i in part], constants, int(taught))
