"""One pass of the network over rows: a prompt that is shared is read once, with gradient, and its completions behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from vpd_mlx.engine.batching import Padded, Shared
from vpd_mlx.engine.caches import Behind, Capture, Extend, Rows

__all__ = ["states_of"]

Body = Callable[..., Any]
"""Token ids (B, T) and one cache per block -> hidden states (B, T, D)."""

NEVER = 1 << 30  # keys: more than any row has


def states_of(
    body: Body, blocks: int, tokens: Padded | Shared, long: int | None, *, banded: bool
) -> tuple[mx.array, mx.array]:
    """States that predict each completion token, and these tokens: (M, D) and (M,), rows in order.

    Where attention has `long` keys or more, masks are such as `attention.bounded` keeps small: it must be in force. `banded` says
    whether the network takes our caches, with which a sliding window needs no array of all positions.
    """
    long = long or NEVER
    if isinstance(tokens, Padded):
        caches = [Rows(banded=True) for _ in range(blocks)] if banded and tokens.inputs.shape[1] >= long else None
        flat = body(mx.array(tokens.inputs), cache=caches).flatten(0, 1)  # (B * L, D)
        return flat[mx.array(tokens.positions)], mx.array(tokens.targets)
    width, added = tokens.prompts.shape[1], tokens.completions.shape[1]
    captures = [Capture(banded=width >= long) for _ in range(blocks)]
    flat = body(mx.array(tokens.prompts), cache=captures).flatten(0, 1)  # (U * P, D)
    if added:
        read = _one_by_one if added * (width + added) >= long**2 else _all_at_once
        flat = mx.concatenate([flat, read(body, tokens, captures).flatten(0, 1)])  # (U * P + B * T, D)
    return flat[mx.array(tokens.positions)], mx.array(tokens.targets)


def _all_at_once(body: Body, together: Shared, captures: list[Capture]) -> mx.array:
    """States of the completions' tokens (B, T, D) by one pass, its attention masked by an array."""
    parents, lengths = mx.array(together.parents), mx.array(together.lengths)
    states: mx.array = body(mx.array(together.completions), cache=[Extend(c, parents, lengths) for c in captures])
    return states


def _one_by_one(body: Body, together: Shared, captures: list[Capture]) -> mx.array:
    """The same by a pass for each prompt: its attention is causal, and so bounded by mlx itself on a GPU."""
    passes, order = [], np.argsort(together.parents, kind="stable")
    for prompt in range(len(together.prompts)):
        rows = np.flatnonzero(together.parents == prompt)
        here = (slice(prompt, prompt + 1), slice(None), slice(int(together.lengths[rows[0]])))
        read = [[x[here] for x in layer.kept()] for layer in captures]  # without padding
        caches = [Behind(keys, values, len(rows), banded=True) for keys, values in read]
        passes.append(body(mx.array(together.completions[rows]), cache=caches))
    return mx.concatenate(passes)[mx.array(np.argsort(order))]
