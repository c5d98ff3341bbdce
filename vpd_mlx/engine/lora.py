"""The adapter's layers for the time of a run: mlx-lm's LoRA, computed with less work and less memory.

mlx-lm's layer keeps its matrices in float32 and therefore casts, for every token that is decoded, the input up and the product
down again, and a gradient keeps the input once more for every layer, in float32. `Lora` holds the same float32 matrices under the
same names, so that files, optimizer and checkpoints see no difference, but

- casts them to the input's dtype, once for as long as they stay the same arrays: once for all tokens of a rollout, once for each
  pass of an update, whose gradient flows through the cast to the float32 matrices;
- folds the scale into B in float32, before the cast;
- multiplies by all A of the layers that read the same input at once (q, k and v; gate and up). Which these are is seen in a pass
  over one token, so that no list of architectures has to be kept;
- adds the product to the base's output where it is made (`mx.addmm`).

In exact arithmetic both are the same function. In float32 they differ in the last bits, because sums run in another order: a CPU
in float32, where launches cost little, keeps mlx-lm's layer, and with it the bits of earlier runs.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.tuner.utils import linear_to_lora_layers

from vpd_mlx.engine.device import gpu_ways

__all__ = ["Lora", "adapt", "lean", "share", "switched_off"]


@dataclass(frozen=True, eq=False)
class _Cast:
    """The matrices of layers that read the same input, in one dtype: `a` (D, n * r); `b`, n of (r, N_i), scale folded in."""

    dtype: mx.Dtype
    training: bool  # what a pass under a gradient casts belongs to its graph, and serves no other
    masters: tuple[tuple[Any, Any, float], ...]  # weak: an update must be free to drop the matrices that it replaces
    a: mx.array
    b: tuple[mx.array, ...]

    def is_of(self, layer: Lora, at: int, dtype: mx.Dtype) -> bool:
        """Whether this is still the layer's, the `at`-th here."""
        a, b, scale = self.masters[at]
        same = a() is layer.lora_a and b() is layer.lora_b and scale == layer.scale
        return same and dtype == self.dtype and layer.training == self.training


class _Inputs:
    """Layers that read the same input, and what they share."""

    def __init__(self, layers: Sequence[LoRALinear]) -> None:
        self._layers = tuple(layers)
        self._cast: _Cast | None = None
        # id of an input -> (it, the matrices, products of all layers). An entry goes when its input does: nothing is kept alive,
        # and threads, each with inputs of its own, do not meet.
        self._products: dict[int, tuple[weakref.ref[mx.array], _Cast, list[mx.array]]] = {}

    def product(self, layer: Lora, x: mx.array) -> tuple[mx.array, mx.array]:
        """(x @ A, scale * B) of one of the layers, (M, r) and (r, N), for x (..., D) with M positions."""
        at = layer.at
        cast = self._cast
        if cast is None or not cast.is_of(layer, at, x.dtype):
            cast = self._cast = self._make(x.dtype, training=layer.training)
        if len(self._layers) == 1:
            return x.reshape(-1, x.shape[-1]) @ cast.a, cast.b[0]
        key = id(x)
        found = self._products.get(key)
        if found is None or found[0]() is not x or found[1] is not cast:
            products = list(mx.split(x.reshape(-1, x.shape[-1]) @ cast.a, len(self._layers), axis=-1))
            found = self._products[key] = (weakref.ref(x, lambda _: self._products.pop(key, None)), cast, products)
        return found[2][at], cast.b[at]

    def _make(self, dtype: mx.Dtype, *, training: bool) -> _Cast:
        layers = self._layers
        masters = tuple((weakref.ref(m.lora_a), weakref.ref(m.lora_b), m.scale) for m in layers)
        a = [m.lora_a for m in layers]
        whole = (a[0] if len(a) == 1 else mx.concatenate(a, axis=1)).astype(dtype)
        b = tuple((m.scale * m.lora_b).astype(dtype) for m in layers)
        if not training:
            mx.eval(whole, b)  # here, because a lazy array cannot be evaluated by another thread
        return _Cast(dtype, training, masters, whole, b)


class Lora(LoRALinear):  # type: ignore[misc]
    """mlx-lm's `LoRALinear` made lean: x (..., D) -> linear(x) + scale * dropout(x) @ A @ B (..., N), in the dtype of x."""

    inputs: _Inputs
    at: int

    def __call__(self, x: mx.array) -> mx.array:
        """The base's output with the adapter's; at scale 0, the base's as it is."""
        y: mx.array = self.linear(x)
        if self.scale == 0.0:
            return y
        dropped = self.dropout(x)
        if dropped is x:
            product, b = self.inputs.product(self, x)
        else:  # each layer drops its own entries
            product = dropped.reshape(-1, x.shape[-1]) @ self.lora_a.astype(x.dtype)
            b = (self.scale * self.lora_b).astype(x.dtype)
        return mx.addmm(y.reshape(-1, y.shape[-1]), product, b).reshape(y.shape)


def adapt(model: nn.Module, config: dict[str, Any]) -> None:
    """Put mlx-lm's LoRA on a frozen model, as `adapter_config.json` has it, lean unless this is a CPU in float32."""
    linear_to_lora_layers(model, config["num_layers"], dict(config["lora_parameters"]))
    model.eval()
    lean(model, float32=gpu_ways())


@contextlib.contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Within the block the model's adapter changes nothing: its scale is 0."""
    modules = [m for m in model.modules() if "lora_b" in m]
    scales = [m.scale for m in modules]
    for m in modules:
        m.scale = 0.0
    try:
        yield
    finally:
        for m, scale in zip(modules, scales, strict=True):
            m.scale = scale


def lean(model: nn.Module, *, float32: bool = True) -> None:
    """Make a model's `LoRALinear` layers `Lora`; without `float32`, only those whose input is of a shorter dtype.

    Layers of experts and embeddings stay mlx-lm's, and so does a layer that a pass does not call exactly once.
    """
    layers = [m for m in model.modules() if type(m) is LoRALinear]
    seen: dict[int, tuple[mx.array, list[LoRALinear]]] = {}

    class Watched(LoRALinear):  # type: ignore[misc]
        def __call__(self, x: mx.array) -> mx.array:
            seen.setdefault(id(x), (x, []))[1].append(self)
            y: mx.array = super().__call__(x)
            return y

    for layer in layers:
        layer.__class__ = Watched
    model(mx.array([[1]]))  # never evaluated
    for layer in layers:
        layer.__class__ = LoRALinear
    calls = Counter(id(m) for _, readers in seen.values() for m in readers)
    for x, readers in seen.values():
        if float32 or x.dtype != mx.float32:
            share([m for m in readers if calls[id(m)] == 1])


def share(layers: Sequence[LoRALinear]) -> None:
    """Make layers `Lora` that multiply by their A together whenever they get the same array."""
    inputs = _Inputs(layers)
    for at, layer in enumerate(layers):
        layer.__class__ = Lora
        layer.inputs, layer.at = inputs, at
