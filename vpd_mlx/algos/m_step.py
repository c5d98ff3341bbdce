"""The M-step: the student is pulled onto the teacher, token by token (arXiv 2605.15113, Eq. 10)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from vpd_mlx import losses
from vpd_mlx.algos.samples import Sample, epochs, minibatches, teacher_row, token_mean
from vpd_mlx.algos.settings import MStepSettings
from vpd_mlx.algos.teacher import Teacher
from vpd_mlx.common.seeds import phase_seed
from vpd_mlx.common.softmax import Softmax
from vpd_mlx.common.stats import auc, mean
from vpd_mlx.engine.batching import token_weights
from vpd_mlx.engine.heads import Head
from vpd_mlx.engine.learner import Floats, Learner, Metrics, accumulate, update_metrics
from vpd_mlx.engine.policy import Policy
from vpd_mlx.losses import LossAndMetrics

__all__ = ["Distillation", "divergence_metrics", "divergence_update", "group_weights"]

MASS_K = 20  # tokens counted by the top-k mass where the recipe sets no k


@dataclass(frozen=True)
class Distillation:
    """The token loss of the M-step: the divergence and the teacher's logits."""

    cfg: MStepSettings
    teacher: Teacher

    def __call__(self, student: Softmax, fixed: Mapping[str, mx.array], head: Head) -> LossAndMetrics:
        """Divergence of each token and what is logged of it."""
        cfg, ids = self.cfg, fixed["targets"]
        teacher = Softmax.of(self.teacher.logits(fixed, head))
        loss = losses.divergence_of(
            student, teacher, alpha=cfg.alpha, top_k=cfg.top_k, tail=cfg.tail, entry_clip=cfg.entry_clip
        )
        student_logp = student.fixed_logps(ids)
        if cfg.importance_clip is not None:
            loss = loss * losses.importance_weights(student_logp, fixed["old"], clip=cfg.importance_clip)
        return loss, {
            "student_logp": student_logp,
            "teacher_logp": teacher.fixed_logps(ids),
            "entropy": student.entropy,
            "teacher_entropy": teacher.entropy,
            "mass": student.topk_mass(cfg.top_k or MASS_K),
        }

    def constants(self, policy: Policy, samples: Sequence[Sample]) -> list[dict[str, mx.array]]:
        """What the loss needs beside the targets, per sample: a teacher's pass, and the sampler's log-probabilities."""
        states = self.teacher.states(policy, [teacher_row(s) for s in samples])
        if self.cfg.importance_clip is None:
            return states
        return [{**s, "old": mx.array(x.rollout.logps)} for s, x in zip(states, samples, strict=True)]


def divergence_update(
    policy: Policy, samples: Sequence[Sample], learner: Learner, cfg: MStepSettings, teacher: Teacher, *, seed: int
) -> tuple[Metrics, dict[int, dict[str, Floats]]]:
    """M-step: pull the student onto the teacher by a divergence of each token (arXiv 2605.15113, Eq. 10).

    Returns metrics and, by sample, the tokens' figures as they stood before the first update of this batch.
    """
    loss = Distillation(cfg, teacher)
    batches = minibatches(samples, cfg.minibatch_prompts)
    of_group = group_weights(samples, cfg)
    seen: dict[int, dict[str, Floats]] = {}
    updates, values = [], []
    for number, indices in epochs(batches, cfg.epochs):
        chosen = [i for i in indices if samples[i].teacher is not None]
        if not chosen:
            continue  # without a context there is no teacher
        part = [samples[i] for i in chosen]
        rows = [s.student for s in part]
        lengths = [len(r.completion) for r in rows]
        weights = token_weights(lengths, cfg.weighting, sequences=len(indices), tokens=sum(lengths))
        weights = [w * of_group[s.group] for w, s in zip(weights, part, strict=True)]

        def constants(own: Sequence[int], part: list[Sample] = part) -> list[dict[str, mx.array]]:
            return loss.constants(policy, [part[i] for i in own])

        done = accumulate(policy, rows, weights, constants, loss, phase_seed(seed, number, "m_step"))
        updates.append(learner.apply(policy, done.gradients))
        values.append(done.loss)
        for i, columns in zip(chosen, done.columns, strict=True):
            seen.setdefault(i, columns)
    return {
        "loss": mean(values),
        "sequences": len(seen),
        **divergence_metrics(samples, seen),
        **update_metrics(updates),
    }, seen


def group_weights(samples: Sequence[Sample], cfg: MStepSettings) -> dict[int, np.float32]:
    """What the divergence of a group's completions is multiplied with, by group: 1, or by `m_step.pass_rate_weights`."""
    right: dict[int, list[bool]] = {}
    for s in samples:
        right.setdefault(s.group, []).append(s.rollout.success)
    if not cfg.pass_rate_weights:
        return dict.fromkeys(right, np.float32(1.0))
    weights = np.array(losses.pass_rate_weights(mx.array([float(np.mean(of)) for of in right.values()])))
    return dict(zip(right, weights, strict=True))


def divergence_metrics(samples: Sequence[Sample], seen: Mapping[int, Mapping[str, Floats]]) -> Metrics:
    """Means over tokens of what `Distillation` hands out, by sample.

    The margin says how far the teacher prefers right completions to wrong ones: sums of log q - log pi, so r~ / beta, by class.
    """
    right, wrong = ([c for i, c in seen.items() if samples[i].rollout.success == of] for of in (True, False))
    a, b = ([float((c["teacher_logp"] - c["student_logp"]).sum()) for c in part] for part in (right, wrong))
    return {
        "divergence": token_mean(seen.values(), "loss"),
        "divergence_right": token_mean(right, "loss"),
        "divergence_wrong": token_mean(wrong, "loss"),
        **{name: token_mean(seen.values(), name) for name in ("entropy", "teacher_entropy", "mass")},
        "log_ratio_right": mean(a),
        "log_ratio_wrong": mean(b),
        "margin": float(np.mean(a) - np.mean(b)) if a and b else None,
        "auc": auc(a, b),
    }
