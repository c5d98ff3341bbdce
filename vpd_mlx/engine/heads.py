"""Hidden states to per-token losses, without ever holding (tokens, vocabulary).

The head and the loss run in one, chunk by chunk, and the gradient with respect to the hidden states is made in the
forward pass: what stays is (M, D), not (M, V). `mx.depends` makes each chunk wait for the one before, so that the
scheduler cannot hold several at once. The head itself is frozen; where an adapter touches it, `policy` hands over
logits and an identity head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx

from vpd_mlx.common.softmax import Softmax
from vpd_mlx.engine.device import gpu_ways
from vpd_mlx.losses import LossAndMetrics

__all__ = [
    "Head",
    "TokenLoss",
    "chunk_size",
    "map_tokens",
    "scored_logps",
    "target_logps",
    "tempered",
    "weighted_token_loss",
]

Head = Callable[[mx.array], mx.array]
"""(m, D) hidden states -> (m, V) logits."""

TokenLoss = Callable[[Softmax, Mapping[str, mx.array], Head], LossAndMetrics]
"""(softmax of logits (m, V), constants with m rows each, head) -> (loss (m,), metrics of (m,) each)."""


def tempered(head: Head, temperature: float) -> Head:
    """The head of the distribution that is sampled at this temperature: logits / temperature, float32. 1 is the head itself."""
    if temperature == 1.0:
        return head
    return lambda states: head(states).astype(mx.float32) / temperature


CHUNK_BYTES = 14 << 20
GPU_FACTOR = 14  # there each chunk costs launches and reads the whole head again
GPU_TILE = 64  # rows that its matrix kernels take at once: a chunk that is no multiple computes padding
LIVE_COPIES = 8  # float32 arrays of a chunk's (m, V) alive at once in a divergence and its gradient


def chunk_size(vocabulary: int) -> int:
    """Completion tokens per chunk, such that a divergence's intermediates stay near `CHUNK_BYTES`.

    On a GPU near 14 times that, in whole tiles of 64 rows, at least one: 311 MB at a vocabulary of 151,936.
    """
    row = 4 * LIVE_COPIES * vocabulary
    if not gpu_ways():
        return max(1, CHUNK_BYTES // row)
    return GPU_TILE * max(1, GPU_FACTOR * CHUNK_BYTES // row // GPU_TILE)


def target_logps(student: Softmax, fixed: Mapping[str, mx.array], _head: Head) -> LossAndMetrics:
    """The token loss that is each target's log-probability: weights with a sign make any policy gradient of it."""
    return student.token_logps(fixed["targets"]), {}


def scored_logps(student: Softmax, fixed: Mapping[str, mx.array], _head: Head) -> LossAndMetrics:
    """`target_logps` without gradient, to the bit."""
    return student.fixed_logps(fixed["targets"]), {}


def weighted_token_loss(
    head: Head,
    token_loss: TokenLoss,
    hidden: mx.array,
    weights: mx.array,
    constants: Mapping[str, mx.array],
    chunk: int,
) -> LossAndMetrics:
    """sum_t w_t * loss_t, differentiable in `hidden`, and each token's loss and metrics without gradient.

    `hidden` (M, D) are the states that predict the completion's tokens, `weights` (M,) float32, `constants` arrays with M rows:
    targets, old log-probabilities, the teacher's hidden states. Returns (scalar float32, {"loss": (M,), name: (M,)}).
    """
    names: list[str] = []

    def forward(h: mx.array) -> list[mx.array]:
        value, gradient, columns = chunked(head, token_loss, h, weights, constants, chunk)
        names[:] = columns
        return [value, gradient, *columns.values()]

    run = mx.custom_function(forward)

    @run.vjp
    def _(_primal: mx.array, cotangents: list[mx.array], outputs: list[mx.array]) -> mx.array:
        # Only the first output carries a gradient; the others are handed out for logging.
        return cotangents[0] * outputs[1]

    outputs: Any = run(hidden)
    value, _, *columns = outputs
    return value, dict(zip(names, columns, strict=True))


def chunked(
    head: Head,
    token_loss: TokenLoss,
    hidden: mx.array,
    weights: mx.array,
    constants: Mapping[str, mx.array],
    chunk: int,
) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
    """What `weighted_token_loss` comes to, its gradient (M, D) by `hidden`, and each token's loss and metrics."""
    totals, gradients = [], []
    columns: dict[str, list[mx.array]] = {}
    previous: list[mx.array] = []
    for start in range(0, hidden.shape[0], chunk):
        part = slice(start, start + chunk)
        states, w = hidden[part], weights[part]
        if previous:
            states = mx.depends([states], previous)[0]
        fixed = {k: v[part] for k, v in constants.items()}

        def total(
            x: mx.array, w: mx.array = w, fixed: Mapping[str, mx.array] = fixed
        ) -> tuple[mx.array, dict[str, mx.array]]:
            each, metrics = token_loss(Softmax.of(head(x)), fixed, head)
            return (each * w).sum(), {"loss": each, **metrics}

        (value, row), gradient = mx.value_and_grad(total)(states)
        totals.append(value)
        gradients.append(gradient)
        for name, values in row.items():
            columns.setdefault(name, []).append(values)
        previous = [value, *row.values(), gradient]  # evaluated in this order: what only figures need goes first
    whole = {name: mx.concatenate(parts) for name, parts in columns.items()}
    return mx.stack(totals).sum(), mx.concatenate(gradients), whole


def map_tokens(
    head: Head, token_loss: TokenLoss, hidden: mx.array, constants: Mapping[str, mx.array], chunk: int
) -> dict[str, mx.array]:
    """Each token's loss and metrics, without gradient: {"loss": (M,), name: (M,)}.

    Evaluated chunk by chunk, one behind: the device has the next one while we wait, and never holds more than two.
    """
    columns: dict[str, list[mx.array]] = {}
    behind: dict[str, mx.array] = {}
    for start in range(0, hidden.shape[0], chunk):
        part = slice(start, start + chunk)
        each, metrics = token_loss(Softmax.of(head(hidden[part])), {k: v[part] for k, v in constants.items()}, head)
        row = {"loss": each, **metrics}
        mx.async_eval(row)  # type: ignore[no-untyped-call]
        mx.eval(behind)
        behind = row
        for name, values in row.items():
            columns.setdefault(name, []).append(values)
    return {name: mx.concatenate(parts) for name, parts in columns.items()}
