"""Gradient checkpointing: a block's intermediate arrays are made again in the backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import _BaseCache

from vpd_mlx.engine.attention import bounded, in_use
from vpd_mlx.engine.caches import Held

__all__ = ["recompute_blocks"]

Call = Callable[..., Any]


def recompute_blocks(model: nn.Module) -> None:
    """Have this model's blocks recomputed: each gets a class of its own, so that other models stay as they are.

    A cache in which a pass reads or leaves arrays (`caches.Held`) goes through the checkpointed function as these arrays, in and
    out, so that their gradient flows. Blocks that decode, with caches of mlx-lm's, are called as before.
    """
    own: dict[type, type] = {}
    for block in model.layers:
        kind = type(block)
        if kind not in own:
            own[kind] = type(
                kind.__name__, (kind,), {"__module__": kind.__module__, "__call__": _recomputed(kind.__call__)}
            )
        block.__class__ = own[kind]


def _recomputed(plain: Call) -> Call:
    def call(block: Any, *args: Any, **kwargs: Any) -> Any:
        caches = [a for a in (*args, *kwargs.values()) if isinstance(a, Held | _BaseCache)]
        if not all(isinstance(c, Held) for c in caches):
            return plain(block, *args, **kwargs)
        use = in_use(block)
        key = _random_key() if block.training else None  # dropout must draw the same masks again
        runs = 0

        def run(parameters: Any, taken: list[list[mx.array]], args: Any, kwargs: Any) -> Any:
            nonlocal runs
            runs += 1
            fresh = {id(c): c.again(arrays) for c, arrays in zip(caches, taken, strict=True)}
            inputs = [fresh.get(id(a), a) for a in args]
            named = {name: fresh.get(id(a), a) for name, a in kwargs.items()}
            with contextlib.ExitStack() as stack:
                stack.enter_context(_using(block, parameters))
                if key is not None and runs > 1:
                    stack.enter_context(_drawing_from(key))
                if use is not None:
                    stack.enter_context(bounded(block, use.least, use.size))
                out = plain(block, *inputs, **named)
            return out, [c.kept() for c in fresh.values()]

        taken = [c.taken() for c in caches]
        out, kept = mx.checkpoint(run)(block.trainable_parameters(), taken, args, kwargs)
        for cache, arrays in zip(caches, kept, strict=True):
            cache.keep(arrays)
        return out

    return call


@contextlib.contextmanager
def _using(block: nn.Module, parameters: Any) -> Iterator[None]:
    before = block.trainable_parameters()
    block.update(parameters)
    try:
        yield
    finally:
        block.update(before)


def _random_key() -> int:
    state: Any = mx.random.state
    high, low = state[0].tolist()
    return int(high) << 32 | int(low)


@contextlib.contextmanager
def _drawing_from(key: int) -> Iterator[None]:
    """Within the block random numbers come from here; afterwards they go on as if nothing had been drawn."""
    after = _random_key()
    mx.random.seed(key)  # which takes apart what `_random_key` puts together
    try:
        yield
    finally:
        mx.random.seed(after)
