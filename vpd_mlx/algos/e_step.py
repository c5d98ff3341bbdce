"""The E-step: Binary Classifier Optimization of the teacher (arXiv 2605.15113, Eq. 7 to 9)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from vpd_mlx import losses
from vpd_mlx.algos.crossed import crossed
from vpd_mlx.algos.settings import EStepSettings
from vpd_mlx.algos.teacher import Teacher
from vpd_mlx.common.seeds import phase_seed
from vpd_mlx.common.stats import auc, correlation, mean
from vpd_mlx.engine.gradients import (
    Floats,
    Learner,
    Metrics,
    Sample,
    accumulate,
    accumulate_weighed,
    minibatches,
    scored,
    teacher_row,
    update_metrics,
)
from vpd_mlx.engine.heads import Head
from vpd_mlx.engine.policy import Policy

__all__ = ["EStepResult", "bco_update"]

SATURATED = 5.0  # |r~ - delta| beyond which the BCO gradient is all but gone


@dataclass(frozen=True)
class EStepResult:
    """What the M-step may reuse or complete: per contexted sample the anchor's token log-probabilities under the student's
    prompt, and the metrics so far."""

    metrics: Metrics
    delta: float | None
    anchor: dict[int, Floats] = field(default_factory=dict)


class _Bco:
    """Rewards, delta and weights of one batch of B contexted samples.

    Attributes:
        first: (B,) implicit rewards before the first update.
        delta: the reward shift.
    """

    first: Floats
    delta: float

    def __init__(
        self,
        cfg: EStepSettings,
        labels: npt.NDArray[np.bool_],
        lengths: Floats,
        base: Floats,
        previous_delta: float | None,
    ) -> None:
        """(B,) each: success, tokens, log-probability under the prior."""
        self.cfg, self.labels, self.lengths, self.base = cfg, labels, lengths, base
        self.previous_delta = previous_delta

    def rewards(self, indices: Sequence[int], teacher: Sequence[Floats]) -> Floats:
        """Implicit rewards of these samples from the teacher's log-probabilities of their tokens."""
        r = losses.implicit_rewards(
            mx.array(np.array([t.sum() for t in teacher], np.float32)),
            mx.array(self.base[indices]),
            beta=self.cfg.beta,
            lengths=mx.array(self.lengths[indices]) if self.cfg.length_normalise else None,
        )
        return np.array(r)

    def survey(self, teacher: Sequence[Floats]) -> None:
        """Take the whole batch's first rewards, and delta from them."""
        self.first = self.rewards(list(range(len(teacher))), teacher)
        midpoint = float(losses.class_midpoint(mx.array(self.first), mx.array(self.labels)))
        self.delta = midpoint
        if self.cfg.delta == "ema" and self.previous_delta is not None:
            self.delta = (1 - self.cfg.delta_rate) * self.previous_delta + self.cfg.delta_rate * midpoint

    def weights(self, indices: Sequence[int], rewards: Floats) -> list[Floats]:
        """dL/dlog q of every token of a minibatch, (T_i,) each."""
        right, lengths = self.labels[indices], self.lengths[indices]
        slopes = losses.bco_gradient(
            mx.array(rewards),
            mx.array(right),
            self.delta,
            beta=self.cfg.beta,
            n_pos=int(right.sum()),
            n_neg=int((~right).sum()),
        )
        scale = lengths if self.cfg.length_normalise else np.ones(len(indices), np.float32)
        # The anchor: -log q per token of each success, a mean over successes.
        pull = np.where(right, -self.cfg.anchor / (lengths * max(1, int(right.sum()))), 0.0)
        return [
            np.full(int(length), slope / n + hold, np.float32)
            for length, slope, n, hold in zip(lengths, np.array(slopes), scale, pull, strict=True)
        ]


def bco_update(
    policy: Policy,
    samples: Sequence[Sample],
    learner: Learner,
    cfg: EStepSettings,
    *,
    previous_delta: float | None,
    seed: int,
    teacher: Teacher,
) -> EStepResult:
    """E-step: BCO on the teacher's prompt, anchored to the student as it stands (arXiv 2605.15113, Eq. 7 to 9).

    Implicit rewards and delta of the whole batch first, then a backward pass weighted by the analytic gradient, exact in
    any split. A batch that lacks a class is left alone.
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
    if cfg.prior == "fixed":
        with policy.adapter_off():
            anchor = scored(policy, student_rows)
    else:
        anchor = scored(policy, student_rows)
    lengths = np.array([len(r.completion) for r in student_rows], np.float32)
    bco = _Bco(cfg, labels, lengths, np.array([a.sum() for a in anchor], np.float32), previous_delta)
    everyone = list(range(len(chosen)))
    batches = minibatches([samples[i] for i in chosen], cfg.minibatch_prompts)
    updates = []
    with teacher.e_step_weights(policy):
        if len(batches) > 1:
            bco.survey(scored(policy, teacher_rows))
        for number, indices in enumerate(batches):
            rows = [teacher_rows[i] for i in indices]
            of_step = phase_seed(seed, number, "e_step")

            def weigh(teacher: list[Floats], indices: list[int] = indices) -> list[Floats]:
                if indices == everyone:
                    bco.survey(teacher)
                return bco.weights(indices, bco.rewards(indices, teacher))

            if number == 0 and len(batches) > 1:
                # Until the first update the rewards of the whole batch still hold.
                weights = bco.weights(indices, bco.first[indices])
                done = accumulate(policy, rows, weights, lambda own: [{} for _ in own], _signed_logps, of_step)
            else:
                done = accumulate_weighed(policy, rows, weigh, _signed_logps, of_step)
            updates.append(learner.apply(policy, done.gradients))
    first, delta = bco.first, bco.delta
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
