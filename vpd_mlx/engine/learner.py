"""To learn from completions: token losses and gradients summed over the rows of an update, and AdamW, which applies them.

Every token's weight is fixed beforehand from totals over the whole minibatch, so that any split into micro-batches gives the same
gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from vpd_mlx.common.stats import mean
from vpd_mlx.engine.batching import by_row
from vpd_mlx.engine.heads import TokenLoss, weighted_token_loss
from vpd_mlx.engine.policy import Policy
from vpd_mlx.engine.precision import OVERFLOWED, REACH, SMALLER, finite, loss_scale
from vpd_mlx.engine.settings import OptimizerSettings
from vpd_mlx.types import TokenRow

__all__ = [
    "Constants",
    "Floats",
    "Learner",
    "Metrics",
    "Pass",
    "accumulate",
    "accumulate_weighed",
    "adam_step",
    "scored",
    "unit_weights",
    "update_metrics",
]

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
    start: Any,
    reach: float = REACH,
) -> Pass:
    """`accumulate` of this rank's rows on top of the gradients `start`; done again at a smaller loss scale if they overflow."""
    total, gradients, scaled = 0.0, start, False
    columns: list[dict[str, Floats]] = [{} for _ in rows]
    mx.random.seed(seed)  # for dropout's masks
    for indices in policy.split(rows):
        part = [rows[i] for i in indices]
        fixed = {k: mx.concatenate([constants[i][k] for i in indices]) for k in constants[indices[0]]}

        def batch_loss(
            part: list[TokenRow] = part, indices: list[int] = indices, fixed: Mapping[str, mx.array] = fixed
        ) -> tuple[mx.array, dict[str, mx.array], float]:
            states, targets = policy.hidden(part)
            each = weights
            if callable(each):  # all rows are in this micro-batch
                found = dict(zip(indices, policy.scores(part, states, targets), strict=True))
                each = each([found[i] for i in range(len(rows))])
            flat = np.concatenate([each[i] for i in indices])
            scale = loss_scale(states.dtype, flat, reach)
            value, figures = weighted_token_loss(
                policy.head,
                token_loss,
                states,
                mx.array(flat * scale),
                {"targets": targets, **fixed},
                policy.head_chunk,
            )
            return value, figures, scale

        with policy.dropout_on():
            (value, figures, scale), gradient = nn.value_and_grad(policy.model, batch_loss)()
        if scale != 1.0:
            gradient = tree_map(partial(mx.multiply, 1.0 / scale), gradient)
        gradients = gradient if gradients is None else tree_map(mx.add, gradients, gradient)
        mx.eval(value, figures, gradients)
        total += float(value) / scale
        scaled |= scale != 1.0
        values = {name: by_row(np.array(column), part) for name, column in figures.items()}
        for n, i in enumerate(indices):
            columns[i] = {name: pieces[n] for name, pieces in values.items()}
    if scaled and reach >= 1 and not finite(gradients):
        if OVERFLOWED not in policy.notes:
            policy.notes.append(OVERFLOWED)
        return _accumulate(policy, rows, weights, constants, token_loss, seed, start, reach * SMALLER)
    return Pass(gradients, total, columns)


def unit_weights(rows: Sequence[TokenRow]) -> list[Floats]:
    """1 for every token: for losses that carry their weights themselves."""
    return [np.ones(len(r.completion), np.float32) for r in rows]


Metrics = dict[str, Any]

AdamStep = Callable[[Any, Any, Any, mx.array], tuple[Any, Any]]


def adam_step(adam: optim.AdamW) -> AdamStep:
    """(parameters, gradients, optimizer's state, factor on the gradients) -> (parameters, state), as trees of arrays.

    All that changes from update to update comes in as an array, so that one trace of `mx.compile` serves every update. On a GPU
    that is a kernel for each tensor in the place of a dozen; on the CPU compilation is off, see `Policy`.
    """

    def step(parameters: Any, gradients: Any, state: Any, factor: mx.array) -> tuple[Any, Any]:
        adam.state = state
        moved = adam.apply_gradients(tree_map(lambda g: g * factor.astype(g.dtype), gradients), parameters)
        return moved, adam.state

    return step


class Learner:
    """AdamW over the adapter with linear warm-up and clipping. An update whose gradient is not finite is skipped.

    Warm-up goes by the run's steps, once `begin` has told them, and starts again at a reset.
    """

    def __init__(self, cfg: OptimizerSettings, ratio: float = 1.0) -> None:
        self.cfg = cfg
        self.rate = cfg.learning_rate * ratio
        self.factor = 1.0
        self.updates = 0
        self.skipped = 0
        self.step: int | None = None
        self.since = 0  # the step of the last reset
        self._adam = optim.AdamW(
            learning_rate=self.rate,
            betas=[cfg.beta1, cfg.beta2],
            weight_decay=cfg.weight_decay,
            bias_correction=True,  # off by default in mlx
        )
        self._ready = False
        self._step: AdamStep = mx.compile(adam_step(self._adam))

    def prepare(self, policy: Policy) -> None:
        """Make room for the moments now, not in the first update."""
        if not self._ready:
            self._adam.init(policy.model.trainable_parameters())
            self._ready = True
            mx.eval(self._adam.state)

    def begin(self, step: int) -> None:
        """The updates that follow belong to this step of the run."""
        self.step = step

    @property
    def warmth(self) -> float:
        """Share of the full rate that the update now being made has."""
        done = self.updates
        if self.step is not None and self.cfg.warmup_by == "steps":
            done = max(1, self.step - self.since)  # `plan` measures a step 0
        return min(1.0, done / max(1, self.cfg.warmup_steps))

    def apply(self, policy: Policy, gradients: Any) -> Metrics:
        """Move the policy's adapter by one update, by the gradients of all ranks; returns `grad_norm`, `rate`, `applied`."""
        gradients = policy.ranks.sum(gradients)
        # One wait for the device, not one for every tensor.
        squares: Any = mx.stack([mx.square(g).sum() for _, g in tree_flatten(gradients)]).tolist()
        norm = math.sqrt(sum(squares))
        if not math.isfinite(norm):
            self.skipped += 1
            return {"grad_norm": None, "rate": 0.0, "applied": 0}
        self.updates += 1
        rate = self.rate * self.factor * self.warmth
        most = self.cfg.grad_clip
        factor = mx.array(1.0 if most is None or norm <= most else most / norm, mx.float32)
        self.prepare(policy)
        self._adam.learning_rate = rate
        parameters, self._adam.state = self._step(
            policy.model.trainable_parameters(), gradients, self._adam.state, factor
        )
        policy.model.update(parameters)
        mx.eval(policy.model.trainable_parameters(), self._adam.state)
        return {"grad_norm": norm, "rate": rate, "applied": 1}

    def arrays(self) -> dict[str, mx.array]:
        """The moments by name, for a checkpoint."""
        return dict(tree_flatten(self._adam.state))

    def scalars(self) -> dict[str, float]:
        """Updates made and skipped since the start or the last reset, its step, and the factor on the rate, for a checkpoint."""
        return {"updates": self.updates, "skipped": self.skipped, "factor": self.factor, "since": self.since}

    def restore(self, arrays: Mapping[str, mx.array], scalars: Mapping[str, float]) -> None:
        """Continue from what `arrays` and `scalars` gave."""
        self._adam.state = tree_unflatten(list(arrays.items()))
        self._ready = True
        self.updates, self.skipped = int(scalars["updates"]), int(scalars["skipped"])
        self.factor = scalars.get("factor", 1.0)  # the first versions never changed it
        self.since = int(scalars.get("since", 0))

    def reset(self, _policy: Policy, rate: float) -> None:
        """Forget the moments, warm up again, and go on at `rate` times the rate."""
        self.factor *= rate
        self.updates, self.since = 0, self.step or 0
        self._adam.state = tree_map(mx.zeros_like, self._adam.state)


def update_metrics(updates: Sequence[Metrics]) -> Metrics:
    """`grad_norm` (mean before clipping), `rate`, and how many updates were made or left out as not finite."""
    norms = [u["grad_norm"] for u in updates if u["grad_norm"] is not None]
    return {
        "grad_norm": mean(norms),
        "rate": updates[-1]["rate"] if updates else 0.0,
        "updates": sum(u["applied"] for u in updates),
        "nonfinite": sum(1 - u["applied"] for u in updates),
    }
