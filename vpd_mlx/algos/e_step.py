"""The E-step: Binary Classifier Optimization of the teacher (arXiv 2605.15113, Eq. 7 to 9; BCO is arXiv 2404.04656).

Ours are the crossed contexts. In the paper each completion is scored under its own context, so a failure's feedback is only
ever seen with a wrong answer behind it, and the kind of context gives the label away: the teacher learns "after a checker's
words, make what follows less likely", right answers included. Crossed, a failure's context is also paired with a correct
sibling's completion, as a success. Both classes then occur under the same contexts, and what tells them apart is what the words
say of the answer. Ours are also the anchor, which holds up the likelihood of successes; the floor, which does so only where it
has sunk below the student's (as DPO-Positive does, arXiv 2402.13228); rewards of a share of the tokens; the divergence between
hints; and to leave a teacher alone that can tell right from wrong already (`until_auc`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from vpd_mlx import losses
from vpd_mlx.algos.base import Stateful
from vpd_mlx.algos.hints import Hinted, hinted, hints_gradient, strangers
from vpd_mlx.algos.samples import Sample, epochs, minibatches, teacher_row
from vpd_mlx.algos.settings import EStepSettings
from vpd_mlx.algos.teacher import Teacher
from vpd_mlx.common.seeds import phase_seed
from vpd_mlx.common.stats import auc, correlation, mean
from vpd_mlx.engine.heads import target_logps
from vpd_mlx.engine.learner import Floats, Learner, Metrics, accumulate, accumulate_weighed, scored, update_metrics
from vpd_mlx.engine.policy import Policy
from vpd_mlx.types import TokenRow

__all__ = ["EStepResult", "RewardShift", "bco_update", "crossed"]

SATURATED = 5.0  # |r~ - delta| beyond which the BCO gradient is nearly 0


@dataclass(frozen=True)
class EStepResult:
    """What the M-step may reuse or complete: per contexted sample the anchor's token log-probabilities under the student's
    prompt, which of its tokens (T_i,) the reward counts, and the metrics so far."""

    metrics: Metrics
    delta: float | None
    anchor: dict[int, Floats] = field(default_factory=dict)
    counted: dict[int, Floats] = field(default_factory=dict)


@dataclass
class RewardShift(Stateful):
    """The newest E-step's delta, which `e_step.delta: ema` goes on from; None before the first."""

    delta: float | None = None

    def scalars(self) -> float | None:
        """For a checkpoint."""
        return self.delta

    def restore(self, _arrays: Mapping[str, mx.array], scalars: float | None) -> None:
        """Take up a checkpoint's delta."""
        self.delta = scalars

    def reset(self, _policy: Policy, _rate: float) -> None:
        """There is no E-step to go on from any more."""
        self.delta = None


def crossed(samples: Sequence[Sample]) -> list[Sample]:
    """The samples, and for each failure with a context of its own the group's first success behind that context.

    A context that shows a sibling's solution is left out: the first success is in it, and behind it would be a copy.
    """
    extra = []
    for s, right in strangers(samples):
        prompt = teacher_row(s).prompt
        rollout = replace(right.rollout, context=s.rollout.context, teacher_prompt=prompt)
        extra.append(replace(right, teacher=TokenRow(prompt, right.student.completion), rollout=rollout))
    return [*samples, *extra]


@dataclass
class _Bco:
    """Rewards, reward shift and weights of one batch of B contexted samples."""

    cfg: EStepSettings
    labels: npt.NDArray[np.bool_]  # (B,) success
    anchor: Sequence[Floats]  # (T_i,) each, log-probabilities under the prior
    previous_delta: float | None
    counted: Sequence[Floats] = field(init=False)  # (T_i,) each, 1 where a token is part of the reward, else 0
    lengths: Floats = field(init=False)  # (B,) tokens that are
    first: Floats = field(init=False)  # (B,) implicit rewards before the first update
    delta: float = field(init=False)

    def rewards(self, indices: Sequence[int], teacher: Sequence[Floats]) -> Floats:
        """Implicit rewards of these samples from the teacher's log-probabilities of their tokens."""

        def sums(logps: Sequence[Floats]) -> mx.array:
            counted = [self.counted[i] for i in indices]
            return mx.array(np.array([(x * c).sum() for x, c in zip(logps, counted, strict=True)], np.float32))

        r = losses.implicit_rewards(
            sums(teacher),
            sums([self.anchor[i] for i in indices]),
            beta=self.cfg.beta,
            lengths=mx.array(self.lengths[indices]) if self.cfg.length_normalise else None,
        )
        return np.array(r)

    def survey(self, teacher: Sequence[Floats]) -> None:
        """Choose the tokens that count, and take the whole batch's first rewards, and delta from them."""
        apart = [np.abs(t - a) for t, a in zip(teacher, self.anchor, strict=True)]
        self.counted = [largest(x, self.cfg.token_share) for x in apart]
        self.lengths = np.array([c.sum() for c in self.counted], np.float32)
        self.first = self.rewards(list(range(len(teacher))), teacher)
        midpoint = float(losses.class_midpoint(mx.array(self.first), mx.array(self.labels)))
        self.delta = midpoint
        if self.cfg.delta == "ema" and self.previous_delta is not None:
            self.delta = (1 - self.cfg.delta_rate) * self.previous_delta + self.cfg.delta_rate * midpoint

    @property
    def finished(self) -> bool:
        """Whether the teacher tells right from wrong so surely that there is nothing to train."""
        limit, surely = self.cfg.until_auc, auc(self.first[self.labels], self.first[~self.labels])
        return limit is not None and surely is not None and surely >= limit

    @property
    def loss(self) -> float:
        """The BCO loss before the first update."""
        beta, sums, labels = self.cfg.beta, mx.array(self.first / self.cfg.beta), mx.array(self.labels)
        return float(losses.bco_loss(sums, mx.zeros(len(labels)), labels, beta=beta, delta=self.delta)[0])

    def weights(self, indices: Sequence[int], rewards: Floats) -> list[Floats]:
        """dL/dlog q of every token of a minibatch, (T_i,) each."""
        right, counted = self.labels[indices], [self.counted[i] for i in indices]
        n_pos, n_neg = int(right.sum()), int((~right).sum())
        shown, labels = mx.array(rewards), mx.array(right)
        slopes = losses.bco_gradient(shown, labels, self.delta, beta=self.cfg.beta, n_pos=n_pos, n_neg=n_neg)
        scale = self.lengths[indices] if self.cfg.length_normalise else np.ones(len(indices), np.float32)
        # Anchor and floor: -log q per token of each success, a mean over successes; the floor's where q has sunk below the prior.
        pull = right * (self.cfg.anchor + self.cfg.floor * (rewards < 0)) / max(1, n_pos)
        return [
            (slope / n * of - hold / len(of)).astype(np.float32)
            for of, slope, n, hold in zip(counted, np.array(slopes), scale, pull, strict=True)
        ]


class _NeedlessError(Exception):
    """The forward pass has shown that the teacher needs no training: there is no backward pass."""


def largest(values: Floats, share: float) -> Floats:
    """1 at the largest `share` of the values, at least one, else 0: (T,) -> (T,); of equal ones the first come first."""
    keep = max(1, round(share * len(values)))
    out = np.zeros(len(values), np.float32)
    out[np.argsort(-values, kind="stable")[:keep]] = 1.0
    return out


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

    A batch that lacks a class is left alone, and so is a teacher that needs no training (`until_auc`).
    """
    pairs = hinted(samples) if cfg.hints else []
    if cfg.contexts == "crossed":
        samples = crossed(samples)
    chosen = [i for i, s in enumerate(samples) if s.teacher is not None]
    contexted = [samples[i] for i in chosen]
    labels = np.array([s.rollout.success for s in contexted], bool)
    counts: Metrics = {"n_right": int(labels.sum()), "n_wrong": int((~labels).sum())}
    if not labels.any() or labels.all():
        return EStepResult({**counts, "skipped": 1}, previous_delta)
    student_rows = [s.student for s in contexted]
    with policy.as_begun() if cfg.prior == "fixed" else contextlib.nullcontext():
        anchor = scored(policy, student_rows)
    bco = _Bco(cfg, labels, anchor, previous_delta)
    with teacher.e_step_weights(policy):
        updates = _updates(policy, contexted, learner, bco, seed, pairs)
    lengths = np.array([len(r.completion) for r in student_rows], np.float32)
    kinds = [c.kind if (c := s.rollout.context) else "" for s in contexted]
    metrics = {
        **counts,
        **({"n_hinted": len(pairs)} if cfg.hints else {}),
        "skipped": 0,
        **({} if cfg.until_auc is None else {"needless": int(bco.finished)}),
        "loss": bco.loss,
        "delta": bco.delta,
        **_reward_metrics(bco.first, labels, bco.delta, lengths, kinds),
        "displaced": float((bco.first[labels] < 0).mean()),
        **(update_metrics(updates) if updates else {}),
    }
    by_sample = dict(zip(chosen, anchor, strict=True))
    return EStepResult(metrics, bco.delta, by_sample, dict(zip(chosen, bco.counted, strict=True)))


def _updates(
    policy: Policy, samples: Sequence[Sample], learner: Learner, bco: _Bco, seed: int, pairs: Sequence[Hinted]
) -> list[Metrics]:
    """Rewards and delta of the whole batch first, then backward passes weighted by the analytic gradient, exact in any split.

    No updates where the teacher needs no training.
    """
    teacher_rows = [teacher_row(s) for s in samples]
    everyone = list(range(len(samples)))
    batches = minibatches(samples, bco.cfg.minibatch_prompts)
    if surveyed := len(batches) > 1:
        bco.survey(scored(policy, teacher_rows))
        if bco.finished:
            return []
    updates = []
    for number, indices in epochs(batches, bco.cfg.epochs):
        rows = [teacher_rows[i] for i in indices]
        of_step = phase_seed(seed, number, "e_step")

        def weigh(teacher: list[Floats], indices: list[int] = indices, number: int = number) -> list[Floats]:
            if number == 0 and indices == everyone and not surveyed:
                bco.survey(teacher)
                if bco.finished:
                    raise _NeedlessError
            return bco.weights(indices, bco.rewards(indices, teacher))

        if number == 0 and surveyed:
            # Until the first update the rewards of the whole batch still hold.
            weights = bco.weights(indices, bco.first[indices])
            done = accumulate(policy, rows, weights, None, target_logps, of_step)
        else:
            try:
                done = accumulate_weighed(policy, rows, weigh, target_logps, of_step)
            except _NeedlessError:
                return []
        own = {samples[i].group for i in indices}
        done = hints_gradient(policy, [p for p in pairs if p.group in own], bco.cfg.hints, of_step, done)
        updates.append(learner.apply(policy, done.gradients))
    return updates


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
