"""Masks of several rows for attention with capped scores (Gemma 2), which mlx-lm computes in plain operations.

Where several query heads share a key head its scores have five axes, (B, h, H / h, T, K), and a mask for each row, (B, 1, T, K),
would be read as one of each key head's. It gets the axis that it lacks, in a class of the layer's own (as in `recurrence`): then
rows decode side by side, and prompts of several lengths are shared.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

__all__ = ["take_masks_of_rows"]


def take_masks_of_rows(model: nn.Module) -> None:
    """Have this model's layers with capped scores take masks (B, 1, T, K)."""
    own: dict[type, type] = {}
    for layer in model.modules():
        kind = type(layer)
        capped = getattr(layer, "attn_logit_softcapping", None) is not None and getattr(layer, "repeats", 1) > 1
        if not capped:
            continue
        if kind not in own:
            own[kind] = type(
                kind.__name__, (kind,), {"__module__": kind.__module__, "__call__": _grouped(kind.__call__)}
            )
        layer.__class__ = own[kind]


def _grouped(plain: Any) -> Any:
    def call(layer: Any, x: mx.array, mask: Any = None, cache: Any = None) -> Any:
        if isinstance(mask, mx.array) and mask.ndim == 4:
            mask = mx.expand_dims(mask, 2)
        return plain(layer, x, mask, cache)

    return call
