"""The mathematics: arrays in, arrays or (loss, metrics) out. No model, no configuration, no randomness.

Everything is float32 and made of plain operations, so that autodiff is right on every backend. The teacher never gets a
gradient. A logit of -inf counts as -1e9: what a mask forbids keeps probability 0, and no loss turns into NaN.

Sources: arXiv 2605.15113 (VPD), arXiv 2404.04656 (BCO), arXiv 2402.03300 (GRPO), arXiv 2503.20783 (GRPO without the
standard deviation), arXiv 1912.09729 (dual clip), and the conventions of SDPO's reference code for `alpha`, top-k and
its tail.
"""

from __future__ import annotations

import math
from typing import Literal

import mlx.core as mx

from vpd_mlx.common.softmax import FLOOR, Softmax

__all__ = [
    "LossAndMetrics",
    "bco_gradient",
    "bco_loss",
    "class_midpoint",
    "contrast",
    "divergence",
    "divergence_from_logps",
    "divergence_of",
    "entropy",
    "group_advantages",
    "implicit_rewards",
    "importance_weights",
    "k3_kl",
    "log_softmax",
    "pass_rate_weights",
    "policy_gradient_loss",
    "policy_gradient_tokens",
    "reshaped_advantages",
    "reweighted_advantages",
    "sampled_token_loss",
    "token_logps",
]

LossAndMetrics = tuple[mx.array, dict[str, mx.array]]

SMALLEST = 1e-37  # a normal float32, whose logarithm is finite
LOG_RATIO_BOUND = 20.0  # exp() of a larger difference would only overflow
STD_EPSILON = 1e-6
TAIL_EPSILON = 1e-7


# --- distributions


def log_softmax(logits: mx.array) -> mx.array:
    """Float32 log-probabilities over the last axis, finite even where logits are -inf."""
    x = mx.maximum(logits.astype(mx.float32), FLOOR)
    return x - mx.logsumexp(x, axis=-1, keepdims=True)


def token_logps(logits: mx.array, token_ids: mx.array) -> mx.array:
    """Log-probability of the given tokens: (..., V) and (...) -> (...), float32."""
    x = mx.maximum(logits.astype(mx.float32), FLOOR)
    chosen = mx.take_along_axis(x, token_ids[..., None], axis=-1)[..., 0]
    return chosen - mx.logsumexp(x, axis=-1)


def entropy(logits: mx.array) -> mx.array:
    """Entropy in nats, without gradient: (..., V) -> (...), float32."""
    return Softmax.of(logits).entropy


# --- M-step: distillation


def divergence(
    student_logits: mx.array,
    teacher_logits: mx.array,
    *,
    alpha: float,
    top_k: int | None = None,
    tail: bool = True,
    entry_clip: float | None = None,
) -> mx.array:
    """D_alpha(student, sg[teacher]) of every token: (B, T, V) twice -> (B, T), float32.

    `alpha` 0 is KL(teacher|student), 1 is KL(student|teacher); between, with m = (1 - alpha) p_S + alpha p_T, it is
    (1 - alpha) KL(p_S|m) + alpha KL(p_T|m): 0.5 is Jensen-Shannon (arXiv 2605.15113 Eq. 10; SDPO's convention).

    Args:
        student_logits: (..., V).
        teacher_logits: (..., V); gets no gradient.
        alpha: in [0, 1].
        top_k: compare on the student's k likeliest tokens only; None, or k >= V, takes the vocabulary.
        tail: with `top_k`, put the rest of the mass into one bucket; otherwise both sides are renormalised.
        entry_clip: most that one entry of the vocabulary adds, in nats; beyond it the entry has no gradient (OPSD's code). None
            clips nothing.

    Raises:
        ValueError: `alpha` outside [0, 1] or `top_k` below 1.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha is {alpha}; needs 0..1")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; needs 1 or more, or None")
    student, teacher = Softmax.of(student_logits), Softmax.of(teacher_logits)
    return divergence_of(student, teacher, alpha=alpha, top_k=top_k, tail=tail, entry_clip=entry_clip)


def divergence_of(
    student: Softmax,
    teacher: Softmax,
    *,
    alpha: float,
    top_k: int | None = None,
    tail: bool = True,
    entry_clip: float | None = None,
) -> mx.array:
    """`divergence` where both softmaxes are there already: (..., V) twice -> (...).

    Over the whole vocabulary, unclipped, its derivative by the student's logits is written down. With p the student, q the
    teacher and m the mixture, that of KL(q|p) is p - q. Elsewhere those of log p and log m cancel, and with d = log p - log m
    it is (1 - alpha) p (d - sum p d); KL(p|q)'s has q for m and lacks the factor.
    """
    if entry_clip is not None or (top_k is not None and top_k < student.logits.shape[-1]):
        pair = log_softmax(student.logits), teacher.logps
        return divergence_from_logps(*pair, alpha=alpha, top_k=top_k, tail=tail, entry_clip=entry_clip)
    p, q = student.probs, teacher.probs
    if alpha == 0.0:
        return student.with_gradient((q * (teacher.logps - student.logps)).sum(axis=-1), p - q)
    share = 1.0 if alpha == 1.0 else 1.0 - alpha
    target = teacher.logps if alpha == 1.0 else mx.log(mx.maximum((1.0 - alpha) * p + alpha * q, SMALLEST))
    apart = student.logps - target
    own = (p * apart).sum(axis=-1)
    value = own if alpha == 1.0 else share * own + alpha * (q * (teacher.logps - target)).sum(axis=-1)
    return student.with_gradient(value, share * p * (apart - own[..., None]))


def divergence_from_logps(
    student: mx.array,
    teacher: mx.array,
    *,
    alpha: float,
    top_k: int | None = None,
    tail: bool = True,
    entry_clip: float | None = None,
) -> mx.array:
    """`divergence` of log-probabilities that are normalised already: (..., V) twice -> (...)."""
    teacher = mx.stop_gradient(teacher)
    if top_k is not None and top_k < student.shape[-1]:
        support = mx.stop_gradient(mx.argpartition(-student, top_k - 1, axis=-1)[..., :top_k])
        student = _on_support(student, support, tail)
        teacher = mx.stop_gradient(_on_support(teacher, support, tail))
    if alpha == 0.0:
        entries = _kl_entries(teacher, student)
    elif alpha == 1.0:
        entries = _kl_entries(student, teacher)
    else:
        mixture = mx.logaddexp(student + math.log(1.0 - alpha), teacher + math.log(alpha))
        entries = (1.0 - alpha) * _kl_entries(student, mixture) + alpha * _kl_entries(teacher, mixture)
    return (entries if entry_clip is None else mx.minimum(entries, entry_clip)).sum(axis=-1)


def _kl_entries(p: mx.array, q: mx.array) -> mx.array:
    return mx.exp(p) * (p - q)


def _on_support(logps: mx.array, support: mx.array, tail: bool) -> mx.array:
    chosen = mx.take_along_axis(logps, support, axis=-1)
    if not tail:
        return chosen - mx.logsumexp(chosen, axis=-1, keepdims=True)
    # log(1 - mass) loses every digit in float32 once the mass nears 1: add up what is outside the support instead.
    inside = mx.put_along_axis(mx.zeros(logps.shape, mx.bool_), support, mx.array(True), axis=-1)
    rest = mx.logsumexp(mx.where(inside, FLOOR, logps), axis=-1, keepdims=True)
    return mx.concatenate([chosen, mx.maximum(rest, math.log(TAIL_EPSILON))], axis=-1)


def sampled_token_loss(student_logits: mx.array, teacher_logits: mx.array, token_ids: mx.array) -> mx.array:
    """The reverse KL's score-function estimate from the sampled token alone: (B, T, V) twice, (B, T) -> (B, T).

    Its value is sg[log p_S - log p_T] * log p_S of the token, so that its gradient's expectation under the student is
    that of KL(student|teacher).
    """
    student, teacher = token_logps(student_logits, token_ids), token_logps(teacher_logits, token_ids)
    return mx.stop_gradient(student - teacher) * student


def importance_weights(logps: mx.array, old_logps: mx.array, *, clip: float) -> mx.array:
    """min(exp(logp - old), clip), the log-ratio kept within +-20, without gradient: (B, T), float32."""
    return mx.stop_gradient(mx.minimum(_ratio(logps, old_logps), clip))


def _ratio(logps: mx.array, old_logps: mx.array) -> mx.array:
    difference = logps.astype(mx.float32) - old_logps.astype(mx.float32)
    return mx.exp(mx.clip(difference, -LOG_RATIO_BOUND, LOG_RATIO_BOUND))


# --- E-step: BCO


def implicit_rewards(
    teacher_logps: mx.array, student_logps: mx.array, *, beta: float, lengths: mx.array | None = None
) -> mx.array:
    """r~ = beta * (log q - log pi_old), from sums over a completion's tokens: (N,) -> (N,), float32.

    `lengths` (N,) turns the sums into means per token. (arXiv 2605.15113 Eq. 7)
    """
    rewards = beta * (teacher_logps.astype(mx.float32) - student_logps.astype(mx.float32))
    return rewards if lengths is None else rewards / lengths


def class_midpoint(rewards: mx.array, labels: mx.array) -> mx.array:
    """delta = half the sum of the two class means of r~, without gradient; 0 where a class is absent. (Algorithm 1)"""
    positive = labels.astype(mx.float32)
    negative = 1.0 - positive
    n_pos, n_neg = positive.sum(), negative.sum()
    mean_pos = (rewards * positive).sum() / mx.maximum(n_pos, 1.0)
    mean_neg = (rewards * negative).sum() / mx.maximum(n_neg, 1.0)
    return mx.stop_gradient(mx.where((n_pos > 0) & (n_neg > 0), 0.5 * (mean_pos + mean_neg), 0.0))


def bco_loss(
    teacher_logps: mx.array, student_logps: mx.array, labels: mx.array, *, beta: float, delta: float | None = None
) -> LossAndMetrics:
    """Binary Classifier Optimization of the teacher (arXiv 2605.15113, Eq. 7 to 9).

    mean over successes of -log sigmoid(r~ - delta), plus mean over failures of -log sigmoid(delta - r~): the sum of two
    class means, not a pooled mean.

    Args:
        teacher_logps: (N,) sums of log q over each completion.
        student_logps: (N,) sums of log pi_old; gets no gradient.
        labels: (N,) 1 for a success, 0 for a failure.
        beta: scale of the implicit reward.
        delta: reward shift; None takes the class midpoint. No gradient flows through it.

    Returns:
        (scalar, {"rewards": (N,), "delta": scalar}). Without `delta`, a batch that lacks a class has no midpoint: its
        loss and gradient are 0. With `delta`, an absent class counts 0.
    """
    positive = labels.astype(mx.float32)
    rewards = implicit_rewards(teacher_logps, mx.stop_gradient(student_logps), beta=beta)
    if delta is None:
        shift = class_midpoint(rewards, labels)
        usable = ((positive.sum() > 0) & (positive.sum() < positive.size)).astype(mx.float32)
    else:
        shift, usable = mx.stop_gradient(mx.array(delta, mx.float32)), mx.array(1.0)
    n_pos, n_neg = mx.maximum(positive.sum(), 1.0), mx.maximum((1.0 - positive).sum(), 1.0)
    per_sample = mx.where(positive > 0, _softplus(shift - rewards) / n_pos, _softplus(rewards - shift) / n_neg)
    return usable * per_sample.sum(), {"rewards": mx.stop_gradient(rewards), "delta": shift}


def _softplus(x: mx.array) -> mx.array:
    return mx.logaddexp(x, mx.zeros_like(x))


def pass_rate_weights(rates: mx.array) -> mx.array:
    """2 sqrt(p (1 - p)) with p the share of successes in a group: one shape in, the same out, float32.

    1 where half of a group is right, 0 where all or none is (arXiv 2605.27765, there without the 2).
    """
    p = rates.astype(mx.float32)
    return 2.0 * mx.sqrt(p * (1.0 - p))


def bco_gradient(
    rewards: mx.array, labels: mx.array, delta: mx.array | float, *, beta: float, n_pos: int, n_neg: int
) -> mx.array:
    """dL/dlog q of each completion under `bco_loss`: (N,) -> (N,), float32.

    -(beta / n_pos) sigmoid(delta - r~) for a success, +(beta / n_neg) sigmoid(r~ - delta) for a failure. With r~ and
    delta known for the whole batch, a backward pass weighted by it is exact in any split. `n_pos` and `n_neg` count the
    whole batch.
    """
    up = -(beta / max(n_pos, 1)) * mx.sigmoid(delta - rewards)
    down = (beta / max(n_neg, 1)) * mx.sigmoid(rewards - delta)
    return mx.where(labels.astype(mx.float32) > 0, up, down)


# --- policy gradient


def group_advantages(rewards: mx.array, *, scale: Literal["none", "group", "batch"] = "none") -> mx.array:
    """A = r - group mean: (P, G) -> (P, G), float32.

    `scale` divides by nothing, by each group's, or by the whole batch's standard deviation (n - 1 in the denominator),
    plus 1e-6; another one is a ValueError.
    """
    rewards = rewards.astype(mx.float32)
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    if scale not in ("none", "group", "batch"):
        raise ValueError(f"scale is {scale!r}; use 'none', 'group' or 'batch'")
    axis, count = (1, rewards.shape[1]) if scale == "group" else (None, rewards.size)
    if scale == "none" or count < 2:
        return centred
    return centred / (mx.std(rewards, axis=axis, keepdims=True, ddof=1) + STD_EPSILON)


def policy_gradient_tokens(
    logps: mx.array,
    old_logps: mx.array,
    advantages: mx.array,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> LossAndMetrics:
    """The clipped surrogate of every token, all of one shape: -> (loss, {"ratio", "clipped", "dual_clipped"}).

    max(-A rho, -A clip(rho, 1 - low, 1 + high)); for A < 0 bounded above by -A * dual_clip (arXiv 1912.09729).
    """
    ratio = _ratio(logps, old_logps)
    plain = -advantages * ratio
    bounded = -advantages * mx.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    loss = mx.maximum(plain, bounded)
    clipped = (bounded > plain).astype(mx.float32)
    dual = mx.zeros_like(ratio)
    if dual_clip is not None:
        ceiling = -advantages * dual_clip
        dual = ((advantages < 0) & (loss > ceiling)).astype(mx.float32)
        loss = mx.where(advantages < 0, mx.minimum(loss, ceiling), loss)
    return loss, {"ratio": mx.stop_gradient(ratio), "clipped": clipped, "dual_clipped": dual}


def policy_gradient_loss(
    logps: mx.array,
    old_logps: mx.array,
    advantages: mx.array,
    mask: mx.array,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> LossAndMetrics:
    """Token mean of `policy_gradient_tokens`, whose clips it takes: -> (scalar, means of its metrics over the mask).

    Log-probabilities and `mask` are (B, T), `advantages` (B,), one per completion, or (B, T). What is masked has no part in value
    or gradient; all masked gives 0.
    """
    mask = mask.astype(mx.float32)
    seen = mask > 0
    wide = advantages[:, None] if advantages.ndim == 1 else advantages
    loss, metrics = policy_gradient_tokens(
        mx.where(seen, logps, 0.0),
        mx.where(seen, old_logps, 0.0),
        mx.where(seen, wide.astype(mx.float32), 0.0),
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
    )
    count = mx.maximum(mask.sum(), 1.0)
    return (loss * mask).sum() / count, {k: (v * mask).sum() / count for k, v in metrics.items()}


def k3_kl(logps: mx.array, reference_logps: mx.array) -> mx.array:
    """exp(d) - d - 1 with d = log ref - log pi: an unbiased, never negative estimate of KL(pi|ref) per token."""
    d = mx.clip(reference_logps.astype(mx.float32) - logps.astype(mx.float32), -LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return mx.exp(d) - d - 1.0


def contrast(right: mx.array, wrong: mx.array) -> mx.array:
    """log q under a right hint less log(mean of q under K wrong ones), without gradient: (T,), (K, T) -> (T,), float32.

    (arXiv 2606.11709)
    """
    mean = mx.logsumexp(wrong.astype(mx.float32), axis=0) - math.log(wrong.shape[0])
    return mx.stop_gradient(right.astype(mx.float32) - mean)


def reshaped_advantages(
    advantages: mx.array, teacher_logps: mx.array, student_logps: mx.array, *, reward: float, distill: float
) -> mx.array:
    """A_t = reward * A + distill * sg[log q - log pi]: one shape in, the same out. (arXiv 2605.15113, B.3)"""
    return mx.stop_gradient(reward * advantages + distill * (teacher_logps - student_logps))


def reweighted_advantages(
    advantages: mx.array, teacher_logps: mx.array, student_logps: mx.array, *, mix: float, clip: float
) -> mx.array:
    """A_t = A ((1 - mix) + mix * clip(exp(sign(A) (log q - log pi)), 1 - clip, 1 + clip)). (arXiv 2605.15113, B.3)"""
    difference = mx.clip(teacher_logps - student_logps, -LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    weights = mx.clip(mx.exp(mx.sign(advantages) * difference), 1.0 - clip, 1.0 + clip)
    return mx.stop_gradient(advantages * ((1.0 - mix) + mix * weights))
