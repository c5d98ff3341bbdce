"""Token losses and gradients summed over the rows of an update, micro-batch by micro-batch.

Every token's weight is fixed beforehand from totals over the whole minibatch, so that any split into micro-batches gives the same
gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_map

from vpd_mlx.engine.batching import by_row
from vpd_mlx.engine.heads import TokenLoss, weighted_token_loss
from vpd_mlx.engine.policy import Policy
from vpd_mlx.losses import LossAndMetrics
from vpd_mlx.types import TokenRow

__all__ = ["Floats", "Pass", "accumulate", "accumulate_weighed", "scored", "unit_weights"]

Floats = npt.NDArray[np.float32]


@dataclass
class Pass:
    """The result of one walk over a minibatch: this rank's gradients, the loss, and per row each token's figures."""

    gradients: Any
    loss: float
    columns: list[dict[str, Floats]]


Constants = Callable[[Sequence[int]], Sequence[Mapping[str, mx.array]]]
"""Indices of rows -> what the token loss needs for each beside its targets, token by token."""

Weigh = Callable[[list[Floats]], Sequence[Floats]]
"""Log-probabilities of every row's tokens -> their weights. A pure function: it may be called again."""


def accumulate(
    policy: Policy,
    rows: Sequence[TokenRow],
    weights: Sequence[Floats],
    constants: Constants | None,
    token_loss: TokenLoss,
    seed: int,
    into: Pass | None = None,
) -> Pass:
    """Sum of weighted token losses over rows and its gradient, micro-batch by micro-batch, on top of `into`.

    `constants` is None for a token loss that needs its targets alone. Each rank walks its own rows: loss and figures are those
    of all rows, and `Learner.apply` sums the gradients. When memory runs out, the walk starts over with smaller micro-batches
    and comes to the same sum.
    """
    own = policy.ranks.own_rows(rows)
    mine = [rows[i] for i in own]
    fixed = constants(own) if constants else [{} for _ in own]
    start = into.gradients if into else None
    done = policy.within_memory(
        lambda: _accumulate(policy, mine, [weights[i] for i in own], fixed, token_loss, seed, start)
    )
    if done.gradients is None:  # more ranks than rows
        done.gradients = tree_map(mx.zeros_like, policy.model.trainable_parameters())
    loss = (into.loss if into else 0.0) + sum(policy.ranks.gather(done.loss))
    return Pass(done.gradients, loss, policy.ranks.collect(own, done.columns, len(rows)))


def accumulate_weighed(
    policy: Policy, rows: Sequence[TokenRow], weigh: Weigh, token_loss: TokenLoss, seed: int
) -> Pass:
    """`accumulate` with weights that follow from the log-probabilities of all rows, which a forward pass must find first.

    When a single rank's rows fit half a micro-batch, the backward pass continues from that forward pass: one pass over the
    blocks fewer, and the same bits. Half, because reading log-probabilities midway keeps every intermediate array of the pass
    alive, two thirds more than its gradient needs: this way the peak stays below that of a full micro-batch.
    """

    def in_one() -> Pass | None:
        if policy.ranks.size > 1 or policy.has_dropout or len(policy.split(rows, 2)) != 1:
            return None
        return _accumulate(policy, rows, weigh, [{} for _ in rows], token_loss, seed, None)

    done = policy.within_memory(in_one)
    return done or accumulate(policy, rows, weigh(scored(policy, rows)), None, token_loss, seed)


def scored(policy: Policy, rows: Sequence[TokenRow]) -> list[Floats]:
    """`Policy.logps` of all rows, each rank scoring its own."""
    own = policy.ranks.own_rows(rows)
    return policy.ranks.collect(own, policy.logps([rows[i] for i in own]), len(rows))


def _accumulate(
    policy: Policy,
    rows: Sequence[TokenRow],
    weights: Sequence[Floats] | Weigh,
    constants: Sequence[Mapping[str, mx.array]],
    token_loss: TokenLoss,
    seed: int,
    gradients: Any,
) -> Pass:
    total = 0.0
    columns: list[dict[str, Floats]] = [{} for _ in rows]
    mx.random.seed(seed)  # for dropout's masks
    for indices in policy.split(rows):
        part = [rows[i] for i in indices]
        fixed = {k: mx.concatenate([constants[i][k] for i in indices]) for k in constants[indices[0]]}

        def batch_loss(
            part: list[TokenRow] = part, indices: list[int] = indices, fixed: Mapping[str, mx.array] = fixed
        ) -> LossAndMetrics:
            states, targets = policy.hidden(part)
            each = weights
            if callable(each):  # all rows are in this micro-batch
                found = dict(zip(indices, policy.scores(part, states, targets), strict=True))
                each = each([found[i] for i in range(len(rows))])
            flat = mx.array(np.concatenate([each[i] for i in indices]))
            return weighted_token_loss(
                policy.head, token_loss, states, flat, {"targets": targets, **fixed}, policy.head_chunk
            )

        with policy.dropout_on():
            (value, figures), gradient = nn.value_and_grad(policy.model, batch_loss)()
        gradients = gradient if gradients is None else tree_map(mx.add, gradients, gradient)
        mx.eval(value, figures, gradients)
        total += float(value)
        values = {name: by_row(np.array(column), part) for name, column in figures.items()}
        for n, i in enumerate(indices):
            columns[i] = {name: pieces[n] for name, pieces in values.items()}
    return Pass(gradients, total, columns)


def unit_weights(rows: Sequence[TokenRow]) -> list[Floats]:
    """1 for every token: for losses that carry their weights themselves."""
    return [np.ones(len(r.completion), np.float32) for r in rows]
