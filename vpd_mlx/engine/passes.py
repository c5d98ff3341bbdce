"""One pass of the network over rows: a prompt that is shared is read once, with gradient, and its completions behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from vpd_mlx.engine.batching import Padded, Shared
from vpd_mlx.engine.caches import Held, Kind, capture, rows

__all__ = ["states_of"]

Body = Callable[..., Any]
"""Token ids (B, T) and the blocks' caches -> hidden states (B, T, D)."""

NEVER = 1 << 30  # keys: more than any row has


def states_of(
    body: Body, layout: Sequence[Kind], tokens: Padded | Shared, long: int | None, *, banded: bool
) -> tuple[mx.array, mx.array]:
    """States that predict each completion token, and these tokens: (M, D) and (M,), rows in order.

    `layout` says what the body's caches hold. Where attention has `long` keys or more, masks are such as `attention.bounded`
    keeps small: it must be in force. `banded` says whether the network takes our caches, with which a sliding window needs no
    array of all positions.
    """
    long = long or NEVER
    if isinstance(tokens, Padded):
        caches = [rows(kind) for kind in layout] if banded and tokens.inputs.shape[1] >= long else None
        flat = body(mx.array(tokens.inputs), cache=caches).flatten(0, 1)  # (B * L, D)
        return flat[mx.array(tokens.positions)], mx.array(tokens.targets)
    width, added = tokens.prompts.shape[1], tokens.completions.shape[1]
    ends = np.zeros(len(tokens.prompts), np.int32)
    ends[tokens.parents] = tokens.lengths
    lengths = None if (ends == width).all() else mx.array(ends)
    captures = [capture(kind, lengths, banded=width >= long) for kind in layout]
    flat = body(mx.array(tokens.prompts), cache=captures).flatten(0, 1)  # (U * P, D)
    if added:
        read = _one_by_one if added * (width + added) >= long**2 else _all_at_once
        flat = mx.concatenate([flat, read(body, tokens, captures).flatten(0, 1)])  # (U * P + B * T, D)
    return flat[mx.array(tokens.positions)], mx.array(tokens.targets)


def _all_at_once(body: Body, together: Shared, captures: Sequence[Held]) -> mx.array:
    """States of the completions' tokens (B, T, D) by one pass, its attention masked by an array."""
    parents, lengths = mx.array(together.parents), mx.array(together.lengths)
    states: mx.array = body(mx.array(together.completions), cache=[c.extend_by(parents, lengths) for c in captures])
    return states


def _one_by_one(body: Body, together: Shared, captures: Sequence[Held]) -> mx.array:
    """The same by a pass for each prompt: its attention is causal, and so bounded by mlx itself on a GPU."""
    passes, order = [], np.argsort(together.parents, kind="stable")
    for prompt in range(len(together.prompts)):
        own = np.flatnonzero(together.parents == prompt)
        caches = [c.behind(prompt, int(together.lengths[own[0]]), len(own)) for c in captures]
        passes.append(body(mx.array(together.completions[own]), cache=caches))
    return mx.concatenate(passes)[mx.array(np.argsort(order))]
