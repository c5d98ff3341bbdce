"""What a GPU would be given to do, counted on any machine: launches per decoded token, bytes that a gradient keeps per token.

Launches are the operations of a step's graph that are no views; the bytes are what is still allocated once the loss is computed
and its gradient is not. Either is the same on every device, but for mlx's fast kernels: where there is no GPU, mlx puts a dozen
plain operations in their place. `fast_kernels` has one stand in for each. Operations that a GPU could fuse count one by one.
"""

from __future__ import annotations

import contextlib
import gc
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from vpd_mlx.engine.heads import target_logps
from vpd_mlx.engine.learner import accumulate, unit_weights
from vpd_mlx.engine.policy import Policy
from vpd_mlx.engine.sampling import Sampling, generate
from vpd_mlx.types import TokenRow

__all__ = ["counting", "fast_kernels", "kept_per_token", "kernels", "of_an_update", "per_decoded_token"]

ROWS = 4

# What only sees its input's memory in another shape, or waits: no kernel. A shape that does not suit is copied all the same: that
# is left out on all sides.
VIEWS = {
    *("AsStrided", "Broadcast", "BroadcastAxes", "Copy", "CustomTransforms", "Depends", "ExpandDims", "Flatten"),
    *("NumberOfElements", "Reshape", "Slice", "Split", "Squeeze", "StopGradient", "Transpose", "Unflatten", "View"),
}


def kernels(*outputs: mx.array) -> Counter[str]:
    """Kernels, by operation, that these lazy arrays still ask for: one each, and one for each part of a concatenation."""
    dot = io.StringIO()
    mx.export_to_dot(dot, *outputs)
    text = dot.getvalue()
    inputs = Counter(re.findall(r'^"\w+" -> (\d+)$', text, re.M))
    found: Counter[str] = Counter()
    for node, name in re.findall(r'\{ (\d+) \[label ="(\w+)"', text):
        if name not in VIEWS:
            found[name] += inputs[node] if name == "Concatenate" else 1
    return found


@mx.custom_function
def _kernel(*inputs: mx.array) -> mx.array:
    return mx.abs(inputs[0])


@_kernel.vjp  # type: ignore[untyped-decorator]
def _reads_all(inputs: Any, cotangent: mx.array, output: mx.array) -> Any:
    if isinstance(inputs, mx.array):
        return inputs * cotangent
    return (inputs[0] * cotangent * output, *(mx.square(i) for i in inputs[1:]))


@contextlib.contextmanager
def fast_kernels() -> Iterator[None]:
    """Within the block mlx's fast functions launch one kernel, and their gradients read what theirs do. The values are wrong."""

    def norm(x: mx.array, _weight: mx.array | None, _eps: float) -> mx.array:
        return _kernel(x)

    def attention(q: mx.array, k: mx.array, v: mx.array, **_how: Any) -> mx.array:
        return _kernel(q, k, v)

    def rope(x: mx.array, *_args: Any, **_how: Any) -> mx.array:
        return mx.negative(x)  # its gradient turns back and reads nothing

    def dequantize(w: mx.array, scales: mx.array, biases: mx.array, *, bits: int, **_how: Any) -> mx.array:
        values = mx.zeros((*w.shape[:-1], w.shape[-1] * 32 // bits), scales.dtype)
        return mx.depends([values], [w, scales, biases])[0]

    with (
        mock.patch.multiple(mx.fast, rms_norm=norm, rope=rope, scaled_dot_product_attention=attention),
        mock.patch.object(mx, "dequantize", dequantize),
    ):
        yield


@contextlib.contextmanager
def counting() -> Iterator[Counter[str]]:
    """Within the block: kernels launched by what is evaluated by name, as all of a rollout and of an update is."""
    found: Counter[str] = Counter()

    def counted(evaluate: Callable[..., None]) -> Callable[..., None]:
        def run(*trees: Any) -> None:
            found.update(kernels(*(a for _, a in tree_flatten(trees) if isinstance(a, mx.array))))
            evaluate(*trees)

        return run

    with mock.patch.multiple(mx, eval=counted(mx.eval), async_eval=counted(mx.async_eval)):
        yield found


def per_decoded_token(policy: Policy) -> float:
    """Launches of a rollout for one token more of each row, sampling among them."""

    def rollout(tokens: int) -> int:
        with fast_kernels(), counting() as found:
            for _ in generate(policy, [(1, 2, 3)], 4, Sampling(1.0, 1.0, tokens), 0):
                pass
        return found.total()

    rollout(2)  # casts the adapter
    return (rollout(12) - rollout(4)) / 8


def of_an_update(policy: Policy) -> int:
    """Launches of the gradient of one micro-batch."""
    rows = _rows(16)
    with fast_kernels(), counting() as found:
        accumulate(policy, rows, unit_weights(rows), None, target_logps, 0)
    return found.total()


def kept_per_token(policy: Policy) -> float:
    """Bytes that the gradient of the blocks keeps for one token more."""

    def kept(length: int) -> int:
        parameters, rows = policy.adapter, _rows(length)
        mx.eval(parameters)
        with fast_kernels(), policy.dropout_on():
            gc.collect()
            before = mx.get_active_memory()
            states = nn.value_and_grad(
                policy.model, lambda: policy.hidden(rows, shared=False)[0].astype(mx.float32).sum()
            )
            value, _gradient = states()
            mx.eval(value)
            gc.collect()
            after = mx.get_active_memory()
        policy.set_adapter(parameters)  # not the tracers of the pass
        return after - before

    return (kept(128) - kept(64)) / (64 * ROWS)


def _rows(length: int) -> list[TokenRow]:
    return [TokenRow((row + 1,), tuple(range(1, length + 1))) for row in range(ROWS)]
