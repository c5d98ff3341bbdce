"""Nucleus sampling without a sort of the whole vocabulary."""

from __future__ import annotations

import mlx.core as mx
from mlx_lm.sample_utils import apply_top_p

__all__ = ["nucleus"]

LIKELIEST = 1024  # tokens among which a nucleus is looked for


def nucleus(logps: mx.array, top_p: float) -> mx.array:
    """mlx-lm's `apply_top_p`, (..., V) -> (..., V), without sorting the whole vocabulary where the likeliest tokens suffice.

    The same but for rounding: the mass of all is summed in another order.
    """
    if logps.shape[-1] > 4 * LIKELIEST:
        top = mx.sort(mx.topk(logps, LIKELIEST, axis=-1), axis=-1)
        mass = mx.exp(top.astype(mx.float32))
        above = mx.cumsum(mass, axis=-1, reverse=True, inclusive=False)
        goal = top_p * mx.exp(logps.astype(mx.float32)).sum(axis=-1, keepdims=True)
        if bool((above[..., :1] + mass[..., :1] >= goal).all()):
            dropped = (above >= goal).sum(axis=-1, keepdims=True)
            return mx.where(logps < mx.take_along_axis(top, dropped, axis=-1), -float("inf"), logps)
    whole: mx.array = apply_top_p(logps, top_p)
    return whole
