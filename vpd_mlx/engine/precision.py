"""Half precision: a loss scale for float16.

Token weights are near 1 / (rows x tokens), and float16 ends at 6e-8: a gradient that is carried back in it loses its small
entries, and where weights or probabilities are small enough, most of itself. So the weights are multiplied by a power of two
before the backward pass, and the adapter's gradient, which is float32, divided by it afterwards: both exact.

The scale follows from the weights alone, with no state from update to update: a resumed run must take the same ones. Their sum
bounds what the head's gradient adds up to, so it is brought near `REACH`, half of what float16 holds. If a gradient overflows
all the same, the pass over the minibatch is done again with `SMALLER` of that, and a note says so; one that is not finite
without any scale either is left out by `Learner.apply`, which counts it. bfloat16 has float32's range: it loses digits alone,
which no scale brings back. float32 needs none.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten

__all__ = ["OVERFLOWED", "REACH", "SMALLER", "finite", "loss_scale"]

REACH = 2.0**15
SMALLER = 2.0**-5
OVERFLOWED = "float16: a gradient overflowed, and its update was computed again with a smaller loss scale (said once)"


def loss_scale(dtype: mx.Dtype, weights: npt.NDArray[np.float32], reach: float) -> float:
    """The power of two that brings the sum of the weights' sizes just to `reach` or below; 1 unless `dtype` is float16."""
    total = float(np.abs(weights).sum(dtype=np.float64))
    if dtype != mx.float16 or not total or not math.isfinite(total):
        return 1.0
    return float(2.0 ** math.floor(math.log2(reach / total)))


def finite(gradients: Any) -> bool:
    """Whether no entry of a tree of arrays is infinite or NaN; waits for the device once."""
    return bool(mx.stack([mx.isfinite(g).all() for _, g in tree_flatten(gradients)]).all().item())
