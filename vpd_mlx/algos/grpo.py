"""GRPO: clipped policy gradient on group advantages. No feedback, no teacher.

The surrogate is arXiv 2402.03300's, by default with arXiv 2503.20783's advantages (no division by the standard deviation), a
mean over all tokens, and DAPO's asymmetric clipping; the bound for negative advantages is arXiv 1912.09729's. Ours: groups may
differ in size, since a failed verifier takes rollouts out of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from vpd_mlx import losses
from vpd_mlx.algos.base import Metrics, Stateful, Step, prefixed
from vpd_mlx.algos.samples import Sample, epochs, gather, minibatches, score, token_mean
from vpd_mlx.algos.settings import GrpoSettings
from vpd_mlx.common.seeds import phase_seed
from vpd_mlx.common.softmax import Softmax
from vpd_mlx.common.stats import mean
from vpd_mlx.engine.batching import token_weights
from vpd_mlx.engine.heads import Head, TokenLoss
from vpd_mlx.engine.learner import Constants, Floats, Learner, Pass, accumulate, scored, update_metrics
from vpd_mlx.engine.policy import Policy
from vpd_mlx.losses import LossAndMetrics
from vpd_mlx.types import Group

if TYPE_CHECKING:
    from vpd_mlx.recipe import Recipe

__all__ = ["Batch", "Grpo", "GrpoLoss", "Portion", "Portions", "advantages_of", "policy_gradient_update"]


class Grpo:
    """A policy-gradient update on every batch."""

    def __init__(self, recipe: Recipe, policy: Policy) -> None:
        self.cfg = recipe.section(GrpoSettings)
        self.learner = Learner(recipe.optimizer)
        self.parts: dict[str, Stateful] = {"pg": self.learner}

    def __call__(self, policy: Policy, groups: Sequence[Group], step: Step) -> Metrics:
        """One update."""
        seed = phase_seed(step.seed, step.number, "update")
        self.learner.begin(step.number)
        with step.clock("student"):
            metrics, _ = policy_gradient_update(policy, gather(groups), self.learner, self.cfg, seed=seed)
        return prefixed("student", metrics)


def advantages_of(samples: Sequence[Sample], cfg: GrpoSettings) -> Floats:
    """One advantage per sample, from its score against its group's. Groups may be of different sizes."""
    scores = np.array([score(s) for s in samples], np.float32)
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


@dataclass(frozen=True)
class GrpoLoss:
    """Token loss: the clipped surrogate and, where the batch has reference log-probabilities, the KL term."""

    cfg: GrpoSettings

    def __call__(self, student: Softmax, fixed: Mapping[str, mx.array], _head: Head) -> LossAndMetrics:
        """Loss of each token and what is logged of it."""
        logp = student.token_logps(fixed["targets"])
        loss, metrics = losses.policy_gradient_tokens(
            logp,
            fixed.get("old_logp", mx.stop_gradient(logp)),
            fixed["advantage"],
            clip_low=self.cfg.clip_low,
            clip_high=self.cfg.clip_high,
            dual_clip=self.cfg.dual_clip,
        )
        metrics["entropy"] = student.entropy
        metrics["logp"] = mx.stop_gradient(logp)
        if "reference" in fixed:
            kl = losses.k3_kl(logp, fixed["reference"])
            loss = loss + self.cfg.kl * kl
            metrics["kl"] = mx.stop_gradient(kl)
        return loss, metrics


@dataclass(frozen=True)
class Batch:
    """What stays the same over all updates of a batch.

    By sample: `advantages` (B,), log-probabilities `old` and `reference` (T_i,) each, or None if not needed. `old` lacks the
    samples of the first update until it is made: their ratio is 1 by definition, and that pass finds what is old from then on.
    """

    samples: Sequence[Sample]
    cfg: GrpoSettings
    advantages: Floats
    old: dict[int, Floats] | None
    reference: Sequence[Floats] | None

    def weights(self, indices: Sequence[int]) -> dict[int, Floats]:
        """Weights of all tokens of a minibatch, by sample."""
        lengths = [len(self.samples[i].student.completion) for i in indices]
        found = token_weights(lengths, self.cfg.weighting, sequences=len(indices), tokens=sum(lengths))
        return dict(zip(indices, found, strict=True))

    def constants(self, indices: Sequence[int]) -> list[dict[str, mx.array]]:
        """What the token loss needs for these samples, besides the targets."""
        out = []
        for i in indices:
            fixed = {"advantage": mx.full(len(self.samples[i].student.completion), float(self.advantages[i]))}
            if self.old is not None and i in self.old:
                fixed["old_logp"] = mx.array(self.old[i])
            if self.reference is not None:
                fixed["reference"] = mx.array(self.reference[i])
            out.append(fixed)
        return out


@dataclass(frozen=True)
class Portion:
    """Samples of a minibatch under one token loss.

    `weights` are those of the samples' tokens; `constants` gives what the loss needs for some of the samples. `seed_offset`, 0 or
    1, gives the portions of a minibatch different dropout masks.
    """

    indices: Sequence[int]
    loss: TokenLoss
    weights: Sequence[Floats]
    constants: Constants
    seed_offset: int = 0


Portions = Callable[[Batch, Sequence[int]], Sequence[Portion]]
"""A minibatch's samples -> the portions that add up to its gradient."""


def _one_portion(batch: Batch, indices: Sequence[int]) -> list[Portion]:
    return [Portion(indices, GrpoLoss(batch.cfg), list(batch.weights(indices).values()), batch.constants)]


def policy_gradient_update(
    policy: Policy,
    samples: Sequence[Sample],
    learner: Learner,
    cfg: GrpoSettings,
    *,
    seed: int,
    portions: Portions = _one_portion,
) -> tuple[Metrics, dict[int, dict[str, Floats]]]:
    """Clipped policy gradient on group advantages, one update for each minibatch and epoch; `seed` is for dropout.

    Returns metrics and, by sample, the tokens' figures as they stood before the first update of this batch.
    """
    batches = _minibatches(samples, cfg)
    batch = _batch(policy, samples, cfg, batches)
    updates, values = [], []
    seen: dict[int, dict[str, Floats]] = {}
    ratios: list[Floats] = []
    for number, indices in epochs(batches, cfg.epochs):
        done: Pass | None = None
        for portion in portions(batch, indices) if indices else ():
            rows = [samples[i].student for i in portion.indices]
            of_pass = phase_seed(seed, 2 * number + portion.seed_offset, "policy_gradient")

            def constants(own: Sequence[int], portion: Portion = portion) -> Sequence[Mapping[str, mx.array]]:
                return portion.constants([portion.indices[i] for i in own])

            done = accumulate(policy, rows, portion.weights, constants, portion.loss, of_pass, done)
            for i, columns in zip(portion.indices, done.columns, strict=True):
                logp = columns.pop("logp")
                if batch.old is not None:
                    batch.old.setdefault(i, logp)
                seen.setdefault(i, columns)
                if "ratio" in columns:  # a hybrid's portion may have another loss
                    ratios.append(columns["ratio"])
        if done is None:
            continue
        updates.append(learner.apply(policy, done.gradients))
        values.append(done.loss)
    spread = np.concatenate(ratios) if ratios else np.ones(1, np.float32)
    return {
        "loss": mean(values),
        "sequences": len(seen),
        "advantage_std": float(batch.advantages.std()) if len(samples) else None,
        "ratio_min": float(spread.min()),
        "ratio_max": float(spread.max()),
        **{name: token_mean(seen.values(), name) for name in ("clipped", "dual_clipped", "entropy", "kl")},
        **update_metrics(updates),
    }, seen


def _minibatches(samples: Sequence[Sample], cfg: GrpoSettings) -> list[list[int]]:
    """`minibatches`, less the groups that are left out because all their scores are equal, hence all advantages 0."""
    batches = minibatches(samples, cfg.minibatch_prompts)
    if not cfg.drop_uniform_groups:
        return batches
    scores: dict[int, set[float]] = {}
    for sample in samples:
        scores.setdefault(sample.group, set()).add(score(sample))
    return [[i for i in part if len(scores[samples[i].group]) > 1] for part in batches]


def _batch(policy: Policy, samples: Sequence[Sample], cfg: GrpoSettings, batches: Sequence[list[int]]) -> Batch:
    rows = [s.student for s in samples]
    # With a single update the ratio is 1 by definition; with several the policy's log-probabilities from before are needed. Those
    # of the first update's samples come from its own pass, unless dropout has a part in that.
    old: dict[int, Floats] | None = {} if len(batches) * cfg.epochs > 1 else None
    if old is not None and (len(batches) > 1 or policy.has_dropout):
        first = [] if policy.has_dropout else batches[0]
        old = {i: logps for i, logps in enumerate(scored(policy, rows)) if i not in set(first)}
    reference = None
    if cfg.kl > 0:
        with policy.as_begun():
            reference = scored(policy, rows)
    return Batch(samples, cfg, advantages_of(samples, cfg), old, reference)
