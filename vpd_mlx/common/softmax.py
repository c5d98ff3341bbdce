"""The softmax over a vocabulary, and what one exponential of each logit is enough for.

On a CPU exponentials are most of what a loss over a wide vocabulary costs beside the head. So all losses and figures of a token
share one `Softmax`, and derivatives that are known are written down: autodiff would take an exponential for each of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

__all__ = ["FLOOR", "Softmax"]

FLOOR = -1e9  # what a logit of -inf counts as: its probability is 0, and no product with it NaN


@dataclass(frozen=True)
class Softmax:
    """Made by `Softmax.of`. Of what it holds and hands out, only `logits`, `token_logps` and `with_gradient` have a gradient.

    Attributes:
        logits: (..., V) float32, at least `FLOOR`.
        shifted: (..., V) float32, the logits less the largest of them.
        log_total: (..., 1) float32, the logarithm of the sum of exp(shifted).
        probs: (..., V) float32, the probabilities.
    """

    logits: mx.array
    shifted: mx.array
    log_total: mx.array
    probs: mx.array

    @classmethod
    def of(cls, logits: mx.array) -> Softmax:
        """Of logits (..., V) of any float dtype, -inf included. Nothing is computed that is not asked for."""
        x = mx.maximum(logits.astype(mx.float32), FLOOR)
        fixed = mx.stop_gradient(x)
        shifted = fixed - fixed.max(axis=-1, keepdims=True)
        powers = mx.exp(shifted)
        total = powers.sum(axis=-1, keepdims=True)
        return cls(x, shifted, mx.log(total), powers / total)

    @property
    def logps(self) -> mx.array:
        """Log-probabilities (..., V)."""
        return self.shifted - self.log_total

    @property
    def entropy(self) -> mx.array:
        """In nats, (...)."""
        return self.log_total[..., 0] - (self.probs * self.shifted).sum(axis=-1)

    def topk_mass(self, k: int) -> mx.array:
        """Probability of the k likeliest tokens together, (...)."""
        return mx.topk(self.probs, min(k, self.probs.shape[-1]), axis=-1).sum(axis=-1)

    def fixed_logps(self, ids: mx.array) -> mx.array:
        """Log-probability of one token each, (...) int -> (...)."""
        return mx.take_along_axis(self.shifted, ids[..., None], axis=-1)[..., 0] - self.log_total[..., 0]

    def token_logps(self, ids: mx.array) -> mx.array:
        """`fixed_logps` with gradient: of log p_y by the logits it is [y] - p."""
        at = ids[..., None]
        slope = mx.put_along_axis(-self.probs, at, 1.0 - mx.take_along_axis(self.probs, at, axis=-1), axis=-1)
        return self.with_gradient(self.fixed_logps(ids), slope)

    def with_gradient(self, value: mx.array, slope: mx.array) -> mx.array:
        """`value` (...), whose derivative by the logits is `slope` (..., V): what is added to it is linear in them, and 0."""
        linear = (mx.stop_gradient(slope) * self.logits).sum(axis=-1)
        return mx.stop_gradient(value) + (linear - mx.stop_gradient(linear))
