"""Group-relative policy optimisation, and its share in the hybrids (arXiv 2402.03300, 2503.20783; 2605.15113 B.3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import numpy as np

from vpd_mlx import losses
from vpd_mlx.algos.m_step import Distillation, divergence_metrics
from vpd_mlx.algos.settings import GrpoSettings
from vpd_mlx.algos.teacher import Teacher
from vpd_mlx.common.seeds import phase_seed
from vpd_mlx.common.stats import mean
from vpd_mlx.engine.batching import token_weights
from vpd_mlx.engine.gradients import (
    Floats,
    Learner,
    Metrics,
    Pass,
    Sample,
    accumulate,
    epochs,
    minibatches,
    scored,
    teacher_row,
    unit_weights,
    update_metrics,
)
from vpd_mlx.engine.heads import Head
from vpd_mlx.engine.policy import Policy

__all__ = ["advantages_of", "policy_gradient_update"]


def advantages_of(samples: Sequence[Sample], cfg: GrpoSettings) -> Floats:
    """One advantage per sample, from its score against its group's. Groups may be of different sizes."""
    scores = np.array([s.rollout.verdict.score if s.rollout.verdict else 0.0 for s in samples], np.float32)
    of = np.array([s.group for s in samples])
    sizes = {g: int((of == g).sum()) for g in sorted(set(of.tolist()))}
    out = np.zeros(len(samples), np.float32)
    if len(set(sizes.values())) == 1:
        rewards = mx.array(np.stack([scores[of == g] for g in sizes]))
        values = np.array(losses.group_advantages(rewards, scale=cfg.scale))
        for g, row in zip(sizes, values, strict=True):
            out[of == g] = row
        return out
    # A failed verifier took rollouts out: the same formula, group by group, the batch's deviation from all scores.
    spread = float(scores.std(ddof=1)) + losses.STD_EPSILON if len(scores) > 1 else 1.0
    for g in sizes:
        rewards = mx.array(scores[of == g][None])
        if cfg.scale == "batch":
            out[of == g] = np.array(losses.group_advantages(rewards))[0] / spread
        else:
            out[of == g] = np.array(losses.group_advantages(rewards, scale=cfg.scale))[0]
    return out


TokenAdvantages = Callable[[mx.array, mx.array, mx.array], mx.array]
"""(advantages, teacher's log-probabilities, student's), each (m,) -> advantages (m,)."""


def policy_gradient_update(
    policy: Policy,
    samples: Sequence[Sample],
    learner: Learner,
    cfg: GrpoSettings,
    *,
    seed: int,
    teacher: Teacher | None = None,
    reshape: TokenAdvantages | None = None,
    distill: tuple[float, float, Distillation] | None = None,
) -> tuple[Metrics, dict[int, dict[str, Floats]]]:
    """Clipped policy gradient on group advantages, alone or together with the teacher.

    Args:
        policy: the student.
        samples: the whole batch.
        learner: the optimizer.
        cfg: clipping, scaling, KL, minibatches.
        seed: for dropout.
        teacher: needed by `reshape` and `distill`.
        reshape: turns advantages into token advantages where a sample has a context.
        distill: (weight of the divergence, weight of the policy gradient, the divergence): both in one gradient.

    Returns metrics and, by sample, the tokens' figures as they stood before the first update of this batch.
    """
    rows = [s.student for s in samples]
    batches = _minibatches(samples, cfg)
    # With a single update the ratio is 1 by definition; with several the sampler's log-probabilities are needed.
    old = scored(policy, rows) if len(batches) * cfg.epochs > 1 else None
    reference = None
    if cfg.kl > 0:
        with policy.adapter_off():
            reference = scored(policy, rows)
    batch = _Batch(policy, samples, teacher, distill, advantages_of(samples, cfg), old, reference)
    reward = distill[1] if distill is not None else 1.0
    updates, values = [], []
    seen: dict[int, dict[str, Floats]] = {}
    ratios: list[Floats] = []
    for number, indices in epochs(batches, cfg.epochs):
        if not indices:
            continue
        lengths = [len(rows[i].completion) for i in indices]
        base = token_weights(lengths, cfg.weighting, sequences=len(indices), tokens=sum(lengths))
        weight_of = dict(zip(indices, base, strict=True))
        done: Pass | None = None
        for taught in (True, False):
            part = [i for i in indices if (samples[i].teacher is not None and teacher is not None) == taught]
            if not part:
                continue
            loss = _PolicyGradient(cfg, teacher if taught else None, reshape, distill if taught else None, reward)
            student_rows = [rows[i] for i in part]
            done = accumulate(
                policy,
                student_rows,
                unit_weights(student_rows),
                partial(batch.constants, indices, part, weight_of, taught),
                loss,
                phase_seed(seed, 2 * number + taught, "policy_gradient"),
                done,
            )
            for i, columns in zip(part, done.columns, strict=True):
                seen.setdefault(i, columns)
                ratios.append(columns["ratio"])
        if done is None:
            continue
        updates.append(learner.apply(policy, done.gradients))
        values.append(done.loss)
    metrics = {
        "loss": mean(values),
        "sequences": len(seen),
        "advantage_std": float(batch.advantages.std()) if len(samples) else None,
        **_token_metrics(seen, ratios),
        **update_metrics(updates),
    }
    if teacher is not None:
        distilled = {i: {**c, "loss": c["divergence"]} for i, c in seen.items() if "divergence" in c}
        metrics |= {k: v for k, v in divergence_metrics(samples, distilled).items() if v is not None}
    return metrics, seen


def _minibatches(samples: Sequence[Sample], cfg: GrpoSettings) -> list[list[int]]:
    """`minibatches`, less the groups that are left out for being all right or all wrong."""
    batches = minibatches(samples, cfg.minibatch_prompts)
    if not cfg.drop_uniform_groups:
        return batches
    outcomes: dict[int, set[bool]] = {}
    for sample in samples:
        outcomes.setdefault(sample.group, set()).add(sample.rollout.success)
    return [[i for i in part if len(outcomes[samples[i].group]) > 1] for part in batches]


def _token_metrics(seen: Mapping[int, Mapping[str, Floats]], ratios: Sequence[Floats]) -> Metrics:
    """Means over tokens before the first update, and how far ratios went over all updates."""

    def token_mean(name: str) -> float | None:
        parts = [c[name] for c in seen.values() if name in c]
        return float(np.concatenate(parts).mean()) if parts else None

    spread = np.concatenate(ratios) if ratios else np.ones(1, np.float32)
    names = ("clipped", "dual_clipped", "student_entropy", "kl")
    return {
        "ratio_min": float(spread.min()),
        "ratio_max": float(spread.max()),
        **{name: token_mean(name) for name in names},
    }


@dataclass(frozen=True)
class _Batch:
    """What stays the same over all updates of a batch. By sample: `advantages` (B,), log-probabilities `old` and `reference`
    (T_i,) each, where they are needed."""

    policy: Policy
    samples: Sequence[Sample]
    teacher: Teacher | None
    distill: tuple[float, float, Distillation] | None
    advantages: Floats
    old: Sequence[Floats] | None
    reference: Sequence[Floats] | None

    def constants(
        self,
        indices: Sequence[int],
        part: Sequence[int],
        weight_of: Mapping[int, Floats],
        taught: bool,
        own: Sequence[int],
    ) -> list[dict[str, mx.array]]:
        """What the token loss needs for the samples of `part` at `own`, `part` being those of a minibatch that have a teacher,
        or those that have none."""
        mine = [part[i] for i in own]
        samples = [self.samples[i] for i in mine]
        divergence = self.distill[2] if taught and self.distill is not None else None
        out: list[dict[str, mx.array]] = [{} for _ in mine]
        if divergence is not None:
            out = divergence.constants(self.policy, samples)
        elif taught and self.teacher is not None:
            out = self.teacher.states(self.policy, [teacher_row(s) for s in samples])
        for c, sample, i in zip(out, samples, mine, strict=True):
            n = len(sample.student.completion)
            c["advantage"] = mx.full(n, float(self.advantages[i]))
            c["pg_weight"] = mx.array(weight_of[i])
            if divergence is not None:
                tokens = _context_tokens(self.samples, indices)
                c["distill_weight"] = mx.array(token_weights([n], divergence.cfg.weighting, len(indices), tokens)[0])
            if self.old is not None:
                c["old_logp"] = mx.array(self.old[i])
            if self.reference is not None:
                c["reference"] = mx.array(self.reference[i])
        return out


def _context_tokens(samples: Sequence[Sample], indices: Sequence[int]) -> int:
    return sum(len(samples[i].student.completion) for i in indices if samples[i].teacher is not None)


@dataclass(frozen=True)
class _PolicyGradient:
    """Token loss of GRPO and its hybrids. Weights are inside, since the two parts of `joint` weigh tokens differently."""

    cfg: GrpoSettings
    teacher: Teacher | None
    reshape: TokenAdvantages | None
    distill: tuple[float, float, Distillation] | None
    reward: float

    def __call__(
        self, logits: mx.array, fixed: Mapping[str, mx.array], head: Head
    ) -> tuple[mx.array, dict[str, mx.array]]:
        student = losses.log_softmax(logits)
        logp = mx.take_along_axis(student, fixed["targets"][:, None], axis=-1)[:, 0]
        old = fixed.get("old_logp", mx.stop_gradient(logp))
        advantage = fixed["advantage"]
        teacher_logp: mx.array | None = None
        if self.reshape is not None and self.teacher is not None:
            teacher_logp = mx.stop_gradient(losses.token_logps(self.teacher.logits(fixed, head), fixed["targets"]))
            advantage = self.reshape(advantage, teacher_logp, mx.stop_gradient(logp))
        elif self.reshape is not None:
            # Without a context there is no teacher: it agrees with the student by default.
            advantage = self.reshape(advantage, mx.stop_gradient(logp), mx.stop_gradient(logp))
        loss, metrics = losses.policy_gradient_tokens(
            logp,
            old,
            advantage,
            clip_low=self.cfg.clip_low,
            clip_high=self.cfg.clip_high,
            dual_clip=self.cfg.dual_clip,
        )
        if teacher_logp is not None:
            metrics = {**metrics, "teacher_logp": teacher_logp, "student_logp": mx.stop_gradient(logp)}
        frozen = mx.stop_gradient(student)
        metrics = {**metrics, "student_entropy": -(mx.exp(frozen) * frozen).sum(-1)}
        if "reference" in fixed:
            kl = losses.k3_kl(logp, fixed["reference"])
            loss = loss + self.cfg.kl * kl
            metrics["kl"] = mx.stop_gradient(kl)
        loss = self.reward * loss * fixed["pg_weight"]
        if self.distill is not None:
            weight, _, divergence = self.distill
            apart, figures = divergence(logits, fixed, head)
            loss = loss + weight * apart * fixed["distill_weight"]
            metrics = {**metrics, **figures, "divergence": mx.stop_gradient(apart)}
        return loss, metrics
