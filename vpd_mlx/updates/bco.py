"""The E-step: Binary Classifier Optimization of the teacher (arXiv 2605.15113, Eq. 7 to 9)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from vpd_mlx import losses
from vpd_mlx.config import EStep
from vpd_mlx.heads import Head
from vpd_mlx.metrics import auc, correlation, mean
from vpd_mlx.policy import Policy, phase_seed
from vpd_mlx.teacher import Teacher
from vpd_mlx.updates.crossed import crossed
from vpd_mlx.updates.learner import (
    Floats,
    Learner,
    Metrics,
    Sample,
    accumulate,
    minibatches,
    scored,
    teacher_row,
    update_metrics,
)

__all__ = ["EStepResult", "bco_update"]

SATURATED = 5.0  # |r~ - delta| beyond which the BCO gradient is all but gone


@dataclass(frozen=True)
class EStepResult:
    """What the M-step may reuse or complete: per contexted sample the anchor's token log-probabilities under the student's
    prompt, and the metrics so far."""

    metrics: Metrics
    delta: float | None
    anchor: dict[int, Floats] = field(default_factory=dict)


def bco_update(
    policy: Policy,
    samples: Sequence[Sample],
    learner: Learner,
    cfg: EStep,
    *,
    previous_delta: float | None,
    seed: int,
    teacher: Teacher,
) -> EStepResult:
    """E-step: BCO on the teacher's prompt, anchored to the student as it stands (arXiv 2605.15113, Eq. 7 to 9).

    Two passes: implicit rewards and delta of the whole batch without gradient, then a backward pass weighted by the
    analytic gradient, exact in any split. A batch that lacks a class is left alone.
    """
    if cfg.contexts == "crossed":
        samples = crossed(samples)
    chosen = [i for i, s in enumerate(samples) if s.teacher is not None]
    labels = np.array([samples[i].rollout.success for i in chosen], bool)
    counts: Metrics = {"n_right": int(labels.sum()), "n_wrong": int((~labels).sum())}
    if not labels.any() or labels.all():
        return EStepResult({**counts, "skipped": 1}, previous_delta)
    student_rows = [samples[i].student for i in chosen]
    teacher_rows = [teacher_row(samples[i]) for i in chosen]
    lengths = np.array([len(r.completion) for r in student_rows], np.float32)
    if cfg.prior == "fixed":
        with policy.adapter_off():
            anchor = scored(policy, student_rows)
    else:
        anchor = scored(policy, student_rows)
    base = np.array([a.sum() for a in anchor], np.float32)

    def rewards(indices: Sequence[int]) -> Floats:
        teacher_sums = np.array([t.sum() for t in scored(policy, [teacher_rows[i] for i in indices])], np.float32)
        r = losses.implicit_rewards(
            mx.array(teacher_sums),
            mx.array(base[indices]),
            beta=cfg.beta,
            lengths=mx.array(lengths[indices]) if cfg.length_normalise else None,
        )
        return np.array(r)

    everyone = list(range(len(chosen)))
    with teacher.e_step_weights(policy):
        first = rewards(everyone)
        midpoint = float(losses.class_midpoint(mx.array(first), mx.array(labels)))
        delta = midpoint
        if cfg.delta == "ema" and previous_delta is not None:
            delta = (1 - cfg.delta_rate) * previous_delta + cfg.delta_rate * midpoint
        updates = []
        batches = minibatches([samples[i] for i in chosen], cfg.minibatch_prompts)
        for number, indices in enumerate(batches):
            # Until the first update the rewards of the whole batch still hold.
            r = first[indices] if number == 0 else rewards(indices)
            right = labels[indices]
            slopes = losses.bco_gradient(
                mx.array(r), mx.array(right), delta, beta=cfg.beta, n_pos=int(right.sum()), n_neg=int((~right).sum())
            )
            scale = lengths[indices] if cfg.length_normalise else np.ones(len(indices), np.float32)
            # The anchor: -log q per token of each success, a mean over successes.
            pull = np.where(right, -cfg.anchor / (lengths[indices] * max(1, int(right.sum()))), 0.0)
            weights = [
                np.full(int(lengths[i]), slope / n + hold, np.float32)
                for i, slope, n, hold in zip(indices, np.array(slopes), scale, pull, strict=True)
            ]
            rows = [teacher_rows[i] for i in indices]
            done = accumulate(
                policy, rows, weights, lambda own: [{} for _ in own], _signed_logps, phase_seed(seed, number, "e_step")
            )
            updates.append(learner.apply(policy, done.gradients))
    loss = losses.bco_loss(
        mx.array(first / cfg.beta), mx.zeros(len(first)), mx.array(labels), beta=cfg.beta, delta=delta
    )[0]
    kinds = [c.kind if (c := samples[i].rollout.context) else "" for i in chosen]
    metrics = {
        **counts,
        "skipped": 0,
        "loss": float(loss),
        "delta": delta,
        **_reward_metrics(first, labels, delta, lengths, kinds),
        **update_metrics(updates),
    }
    return EStepResult(metrics, delta, dict(zip(chosen, anchor, strict=True)))


def _signed_logps(logits: mx.array, fixed: Mapping[str, mx.array], _head: Head) -> tuple[mx.array, dict[str, mx.array]]:
    # The weights carry dL/dlog q, sign included: the "loss" of a token is its log-probability.
    return losses.token_logps(logits, fixed["targets"]), {}


def _reward_metrics(
    rewards: Floats, labels: npt.NDArray[np.bool_], delta: float, lengths: Floats, kinds: Sequence[str]
) -> Metrics:
    right, wrong = rewards[labels], rewards[~labels]
    out: Metrics = {
        "reward_right": float(right.mean()),
        "reward_right_std": float(right.std()),
        "reward_wrong": float(wrong.mean()),
        "reward_wrong_std": float(wrong.std()),
        "margin": float(right.mean() - wrong.mean()),
        "auc": auc(right, wrong),
        "saturated": float((np.abs(rewards - delta) > SATURATED).mean()),
        "reward_length_correlation": correlation(rewards, lengths),
    }
    for kind in sorted(set(kinds)):
        of_kind = np.array([k == kind for k in kinds])
        a, b = rewards[of_kind & labels], rewards[of_kind & ~labels]
        out[f"reward_right/{kind}"], out[f"reward_wrong/{kind}"] = mean(a), mean(b)
        out[f"margin/{kind}"] = float(a.mean() - b.mean()) if len(a) and len(b) else None
    return out
