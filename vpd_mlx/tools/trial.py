"""What an architecture allows, tried on a tiny random model of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import make_prompt_cache

from vpd_mlx import losses
from vpd_mlx.engine.decoding import probe_batches
from vpd_mlx.engine.heads import target_logps
from vpd_mlx.engine.learner import accumulate, unit_weights
from vpd_mlx.engine.policy import Policy
from vpd_mlx.engine.sampling import Sampling, generate
from vpd_mlx.engine.settings import LoraSettings
from vpd_mlx.engine.shapes import build
from vpd_mlx.types import TokenRow

__all__ = ["Trial", "trial"]

NOISE = 0.05  # on all weights: some start at zero, and would hide what depends on them


@dataclass(frozen=True)
class Trial:
    """What was seen.

    Attributes:
        gradient_error: largest difference between our gradient and that of a plain pass for each row, over the largest entry.
        score_error: largest difference between a sampled token's log-probability and its score, in nats.
        splits: whether the head comes off, so that losses never hold whole logits.
        shares: whether completions share their prompt in updates.
        bounded: whether attention over long rows keeps no scores.
        batches: whether completions are decoded side by side.
        caches: the kinds of mlx-lm's caches that its layers have.
        notes: what `Policy` says of its fallbacks.
    """

    gradient_error: float
    score_error: float
    splits: bool
    shares: bool
    bounded: bool
    batches: bool
    caches: tuple[str, ...]
    notes: tuple[str, ...]


def trial(config: Mapping[str, Any]) -> Trial:
    """Try the architecture of a config.json that is small enough to be run (`engine.miniature`).

    Raises:
        ModelError: the architecture cannot be trained.
        Exception: whatever mlx-lm raises where it cannot build the model.
    """
    mx.random.seed(0)
    model = build(config)
    model.update(tree_map(_noisy, model.parameters()))
    policy = Policy(model, SimpleNamespace(eos_token_ids={0}, decode=lambda ids: ""), "tiny")
    policy.adapt(LoraSettings(rank=2, experts=True), 0)
    policy.set_adapter({k: v + NOISE * mx.random.normal(v.shape) for k, v in policy.adapter.items()})
    probe_batches(policy)
    caches = sorted({type(c).__name__ for c in make_prompt_cache(policy.model)})
    bounded, batches = policy.long is not None, policy.widest is None
    errors = _gradient_error(policy), _score_error(policy)
    splits = not any("cannot run apart" in note for note in policy.notes)
    allowed = splits, policy.shares_prompts, bounded, batches
    return Trial(*errors, *allowed, tuple(caches), tuple(policy.notes))


def _noisy(weight: mx.array) -> mx.array:
    if not mx.issubdtype(weight.dtype, mx.floating):
        return weight
    return weight + NOISE * mx.random.normal(weight.shape)


PROMPTS = [tuple(range(5, 16)), (12, 13)]
ROWS = [TokenRow(PROMPTS[i // 3], (20 + i, 30, 31, 32)[: 2 + i % 3]) for i in range(6)]


def _gradient_error(policy: Policy) -> float:
    def plain() -> mx.array:
        total = mx.array(0.0)
        for row in ROWS:
            ids = mx.array([[*row.prompt, *row.completion]])
            logits = policy.model(ids[:, :-1]).astype(mx.float32)[0, len(row.prompt) - 1 :]
            total = total + losses.token_logps(logits, mx.array(row.completion)).sum()
        return total

    with policy.dropout_on():  # some architectures have a gradient in training mode alone
        wanted = dict(tree_flatten(nn.value_and_grad(policy.model, plain)()[1]))
    found = dict(tree_flatten(accumulate(policy, ROWS, unit_weights(ROWS), None, target_logps, seed=0).gradients))
    largest = max(float(mx.abs(v).max()) for v in wanted.values())
    return max(float(mx.abs(found[k] - v).max()) for k, v in wanted.items()) / largest


def _score_error(policy: Policy) -> float:
    how, worst = Sampling(1.0, 1.0, 9), 0.0
    for p, _, rollout in generate(policy, PROMPTS, 3, how, 0):
        scores = policy.logps([TokenRow(PROMPTS[p], rollout.tokens)])[0]
        worst = max(worst, float(np.abs(scores - np.array(rollout.logps, np.float32)).max()))
    return worst
