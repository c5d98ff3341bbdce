"""Attention whose memory is bounded while a gradient is taken: no (T, K) array of scores per head is ever whole.

mlx bounds it by itself on a GPU, for causal attention without an array mask (`left_to_mlx`). Elsewhere, long rows go block by
block of queries, forward and backward: each block's scores are made again in the backward pass, by mlx's own attention and its
own derivative, and `mx.depends` makes each block wait for the one before. A block reads only the keys that it can see, so that
causal attention does half of the plain version's work.

mlx-lm's models call one function for attention, which each has imported by name. Within `bounded` that name is ours.
"""

from __future__ import annotations

import contextlib
import importlib.metadata as metadata
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import base

from vpd_mlx.engine.device import device_kind, gpu_ways

__all__ = ["LONG", "Band", "Use", "blocked", "bounded", "in_use", "left_to_mlx"]

LONG = (
    512  # keys; on the CPU blocks take half the time and a third of the memory from there, and shorter rows hold little
)
BLOCK_BYTES = 1 << 20  # one block's scores; about five arrays of them are alive at once
GPU_FACTOR = 64  # there each block costs launches
LEAST_QUERIES = 32  # in a block

Mask = Any
"""None, "causal" (the last query sees all keys), an array that broadcasts to (B, H, T, K), or a `Band`."""


@dataclass(frozen=True)
class Band:
    """Causal attention to the last `window` positions, a query's own among them."""

    window: int


Span = tuple[int, int, int, int]
"""A block: its first query and one past its last, the first key that any of them sees and one past the last."""


def _spans(queries: int, keys: int, mask: Mask, size: int) -> list[Span]:
    before = keys - queries
    window = mask.window if isinstance(mask, Band) else keys
    out = []
    for start in range(0, queries, size):
        end = min(start + size, queries)
        if isinstance(mask, Band) or mask == "causal":
            out.append((start, end, max(0, before + start + 1 - window), before + end))
        else:
            out.append((start, end, 0, keys))
    return out


def _part(mask: Mask, span: Span, before: int) -> Mask:
    """The mask of one block."""
    start, end, first, last = span
    if isinstance(mask, Band):
        ahead = (mx.arange(start, end) + before)[:, None] - mx.arange(first, last)[
            None
        ]  # (t, k): queries ahead of keys
        return (ahead >= 0) & (ahead < mask.window)
    if isinstance(mask, mx.array) and mask.ndim >= 2 and mask.shape[-2] > 1:
        return mask[..., start:end, :]
    return mask


def _block(queries: mx.array, keys: mx.array, mask: Mask) -> int:
    """Queries per block, such that its scores take about `BLOCK_BYTES`, on a GPU 64 times that."""
    rows, heads = queries.shape[:2]
    seen = min(keys.shape[2], 2 * mask.window) if isinstance(mask, Band) else keys.shape[2]
    budget = BLOCK_BYTES * (GPU_FACTOR if gpu_ways() else 1)
    fit = budget // (rows * heads * seen * queries.dtype.size)
    return max(LEAST_QUERIES, fit // LEAST_QUERIES * LEAST_QUERIES)


def blocked(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    mask: Mask = None,
    sinks: mx.array | None = None,
    size: int | None = None,
) -> mx.array:
    """softmax(scale * Q K^T) V, exact, in blocks of `size` queries, and so its gradient.

    `queries` (B, H, T, D), `keys` and `values` (B, h, K, D), h a divisor of H; returns (B, H, T, D). The gradients of keys and
    values are summed in float32. `sinks` (H,) and an array `mask` are constants.
    """
    if (
        sinks is not None
    ):  # Metal's backward refuses them, and lets the plain operations do it behind an array mask alone
        mask = Band(keys.shape[2]) if isinstance(mask, str) else mx.array([[True]]) if mask is None else mask
    before = keys.shape[2] - queries.shape[2]
    spans = _spans(queries.shape[2], keys.shape[2], mask, size or _block(queries, keys, mask))

    def one(span: Span) -> Callable[[mx.array, mx.array, mx.array], mx.array]:
        def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
            part = _part(mask, span, before)
            return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=part, sinks=sinks)

        return attend

    def forward(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        done: list[mx.array] = []
        for span in spans:
            start, end, first, last = span
            part = _after(q[:, :, start:end], done[-1:])
            done.append(one(span)(part, k[:, :, first:last], v[:, :, first:last]))
        return mx.concatenate(done, axis=2)

    run: Any = mx.custom_function(forward)

    def backward(primals: Any, cotangent: mx.array, _output: mx.array) -> Any:
        q, k, v = primals
        towards_q: list[mx.array] = []
        towards_k, towards_v = mx.zeros(k.shape, mx.float32), mx.zeros(v.shape, mx.float32)
        for span in spans:
            start, end, first, last = span
            seen = slice(first, last)
            part = _after(q[:, :, start:end], [*towards_q[-1:], towards_k, towards_v] if towards_q else [])
            inputs = [part, k[:, :, seen], v[:, :, seen]]
            _, (dq, dk, dv) = mx.vjp(one(span), inputs, [cotangent[:, :, start:end]])
            towards_q.append(dq)
            towards_k = towards_k.at[:, :, seen].add(dk.astype(mx.float32))  # in place: nothing else holds it
            towards_v = towards_v.at[:, :, seen].add(dv.astype(mx.float32))
        return mx.concatenate(towards_q, axis=2), towards_k.astype(k.dtype), towards_v.astype(v.dtype)

    run.vjp(backward)
    out: mx.array = run(queries, keys, values)
    return out


def _after(array: mx.array, others: list[mx.array]) -> mx.array:
    """The array, not computed from before the others are there."""
    waiting: list[mx.array] = mx.depends([array], others) if others else [array]
    return waiting[0]


METAL_SINCE = (0, 32, 4)
METAL_DIMS = {(d, d) for d in (64, 72, 80, 96, 128, 192, 256)} | {(96, 64)}
HALF = (mx.float16, mx.bfloat16)


def left_to_mlx(
    kind: str, queries: mx.array, keys: mx.array, values: mx.array, mask: Mask, *, sinks: bool, graded: bool
) -> bool:
    """Whether mlx's own attention keeps no scores here, on this kind of device; `graded` says whether a gradient is being taken.

    Read from mlx 0.32.4: Metal's blocked backward takes half precision and float32, these head sizes, no array mask and no sinks;
    without a gradient, heads of 192 and 256 are computed plainly there. cuDNN's takes half precision, heads of a multiple of 8 up
    to 128, and queries of a multiple of 128. Both align the last query with the last key. Neither has been run here.
    """
    if kind == "cpu" or sinks or not (mask is None or mask == "causal") or queries.shape[2] > keys.shape[2]:
        return False
    dims = (queries.shape[-1], values.shape[-1])
    if kind == "cuda":
        return queries.dtype in HALF and queries.shape[2] % 128 == 0 and all(d % 8 == 0 and d <= 128 for d in dims)
    version = tuple(int(n) for n in metadata.version("mlx").split(".")[:3] if n.isdigit())
    off = os.environ.get("MLX_SDPA_VJP_FALLBACK", "0") != "0"
    fused = dims in METAL_DIMS and (graded or dims[0] < 192)
    return version >= METAL_SINCE and not off and fused and queries.dtype in (*HALF, mx.float32)


@dataclass
class Use:
    """How attention runs within `bounded`, and how many calls there were."""

    least: int
    size: int | None
    graded: bool
    calls: int = 0

    def __call__(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        cache: Any,
        scale: float,
        mask: Mask,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """In the place of `mlx_lm.models.base.scaled_dot_product_attention`."""
        self.calls += 1
        kind = device_kind()
        short = keys.shape[2] < self.least and not isinstance(mask, Band) and (sinks is None or kind == "cpu")
        given = {"sinks": sinks is not None, "graded": self.graded}
        if short or left_to_mlx(kind, queries, keys, values, mask, **given):
            out: mx.array = PLAIN(queries, keys, values, cache, scale, mask, sinks)
            return out
        return blocked(queries, keys, values, scale, mask, sinks, self.size)


PLAIN = base.scaled_dot_product_attention
NAME = "scaled_dot_product_attention"


@contextlib.contextmanager
def bounded(module: nn.Module, least: int = LONG, size: int | None = None) -> Iterator[Use]:
    """Within the block attention over `least` keys or more, in this module's blocks, is bounded. Within itself it does nothing.

    What counts is where the module is called: a gradient may be taken later. `size` is the queries per block, None for what
    fits `BLOCK_BYTES`.
    """
    use = Use(least, size, graded=module.training)  # so are passes told apart: scoring is done in evaluation mode
    homes = {id(m): m for m in (sys.modules[type(part).__module__] for part in module.modules())}.values()
    swapped = [home for home in homes if getattr(home, NAME, None) is PLAIN]
    try:
        for home in swapped:
            setattr(home, NAME, use)
        yield use
    finally:
        for home in swapped:
            setattr(home, NAME, PLAIN)


def in_use(module: nn.Module) -> Use | None:
    """How attention of this module's parts is bounded now, if it is."""
    for part in module.modules():
        found = getattr(sys.modules[type(part).__module__], NAME, None)
        if isinstance(found, Use):
            return found
    return None
