"""How evenly a mixture's tokens go to its experts, seen in passes that are made anyway."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from vpd_mlx.engine.keys import experts_of

__all__ = ["Load", "watched"]


class Load:
    """Which experts the last pass of each block took: indices of any shape, and how many experts there are."""

    def __init__(self) -> None:
        self.taken: dict[int, tuple[mx.array, int]] = {}

    def figures(self) -> dict[str, float]:
        """What a row of `metrics.jsonl` says of it; nothing of a dense model.

        `experts/busiest` is the most loaded expert's tokens over the mean expert's, `experts/idle` the fraction without a token,
        both means over blocks.
        """
        counts = [np.bincount(np.array(at).ravel(), minlength=n) for at, n in self.taken.values()]
        if not counts:
            return {}
        busiest = float(np.mean([c.max() / c.mean() for c in counts]))
        return {"experts/busiest": busiest, "experts/idle": float(np.mean([(c == 0).mean() for c in counts]))}


@contextlib.contextmanager
def watched(model: nn.Module) -> Iterator[Load]:
    """Within the block the passes of a mixture of experts are written down. One layer of each block is enough."""
    load = Load()
    first = {n: next(iter(found.values())) for n, b in enumerate(model.layers) if (found := experts_of(b))}
    plain = {n: type(layer) for n, layer in first.items()}

    def watching(n: int, kind: Any) -> type:
        def call(self: Any, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
            load.taken[n] = (indices, int(self.weight.shape[0]))
            out: mx.array = kind.__call__(self, x, indices, sorted_indices=sorted_indices)
            return out

        return type(kind.__name__, (kind,), {"__module__": kind.__module__, "__call__": call})

    try:
        for n, layer in first.items():
            layer.__class__ = watching(n, plain[n])
        yield load
    finally:
        for n, layer in first.items():
            layer.__class__ = plain[n]
