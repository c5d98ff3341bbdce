"""One pass of the network over rows: a prompt that is shared is read once, with gradient, and its completions behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from vpd_mlx.engine.batching import Padded, Shared
from vpd_mlx.engine.caches import Held, Kind, capture, rows

__all__ = ["states_of"]

Body = Callable[..., Any]
"""Token ids (B, T) and the blocks' caches -> hidden states (B, T, D)."""

NEVER = 1 << 30  # keys: more than any row has


def states_of(
    body: Body,
    layout: Sequence[Kind],
    tokens: Padded | Shared,
    long: int | None,
    *,
    banded: bool,
    unpadded: bool = False,
) -> tuple[mx.array, mx.array]:
    """States that predict each completion token, and these tokens: (M, D) and (M,), rows in order.

    `layout` says what the body's caches hold. Where attention has `long` keys or more, masks are such as `attention.bounded`
    keeps small: it must be in force. `banded` says whether the network takes our caches, with which a sliding window needs no
    array of all positions. `unpadded` has each prompt read by a pass of its own, without padding.
    """
    long = long or NEVER
    if isinstance(tokens, Padded):
        caches = [rows(kind) for kind in layout] if banded and tokens.inputs.shape[1] >= long else None
        flat = body(mx.array(tokens.inputs), cache=caches).flatten(0, 1)  # (B * L, D)
        return flat[mx.array(tokens.positions)], mx.array(tokens.targets)
    width, added = tokens.prompts.shape[1], tokens.completions.shape[1]
    if unpadded:
        flat = _prompt_by_prompt(body, layout, tokens, banded=width >= long)
        return flat[mx.array(tokens.positions)], mx.array(tokens.targets)
    ends = _ends(tokens)
    lengths = None if (ends == width).all() else mx.array(ends)
    captures = [capture(kind, lengths, banded=width >= long) for kind in layout]
    flat = body(mx.array(tokens.prompts), cache=captures).flatten(0, 1)  # (U * P, D)
    if added:
        read = _one_by_one if added * (width + added) >= long**2 else _all_at_once
        flat = mx.concatenate([flat, read(body, tokens, captures).flatten(0, 1)])  # (U * P + B * T, D)
    return flat[mx.array(tokens.positions)], mx.array(tokens.targets)


def _ends(together: Shared) -> npt.NDArray[np.int32]:
    """The length of each prompt (U,)."""
    ends = np.zeros(len(together.prompts), np.int32)
    ends[together.parents] = together.lengths
    return ends


def _prompt_by_prompt(body: Body, layout: Sequence[Kind], together: Shared, *, banded: bool) -> mx.array:
    """States of all prompts, padded again, and all completions (U * P + B * T, D), by passes for each prompt alone."""
    width, added = together.prompts.shape[1], together.completions.shape[1]
    before, behind = [], []
    for prompt, length in enumerate(_ends(together).tolist()):
        captures = [capture(kind, None, banded=banded) for kind in layout]
        states = body(mx.array(together.prompts[prompt : prompt + 1, :length]), cache=captures)
        before.append(mx.pad(states, [(0, 0), (0, width - length), (0, 0)]).flatten(0, 1))
        own = np.flatnonzero(together.parents == prompt)
        if added:
            caches = [c.behind(0, length, len(own)) for c in captures]
            behind.append(body(mx.array(together.completions[own]), cache=caches))
    if not added:
        return mx.concatenate(before)
    order = np.argsort(np.argsort(together.parents, kind="stable"))
    return mx.concatenate([*before, mx.concatenate(behind)[mx.array(order)].flatten(0, 1)])


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
