"""One pass over a prompt for all its completions, with gradient.

mlx-lm's models take any object with `update_and_fetch`, `offset` and `make_mask` as a layer's cache. `Capture` keeps a prompt's
keys and values in the graph; `Extend` hands each completion its prompt's, followed by its own. Since nothing is detached, the
gradient flows back through the shared prompt as it would through N copies of it.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

__all__ = ["Capture", "Extend", "extended"]


class Capture:
    """A cache of one layer that keeps keys and values, (U, H, P, D) each, as they come."""

    offset = 0

    def __init__(self) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Keep and return."""
        self.keys, self.values = keys, values
        return keys, values

    def make_mask(self, n: int, *, window_size: int | None = None, return_array: bool = False) -> Any:
        """Plain causal attention."""
        if not return_array and (window_size is None or n <= window_size):
            return "causal"
        at = mx.arange(n)
        mask = at[:, None] >= at[None]
        return mask if window_size is None else mask & (at[:, None] < at[None] + window_size)


class Extend:
    """A cache of one layer that puts each row's own prompt, of its own length, before what the row adds."""

    def __init__(self, prompt: Capture, parents: mx.array, lengths: mx.array) -> None:
        if prompt.keys is None or prompt.values is None:
            raise ValueError("the prompt's pass has not reached this layer")
        # (B, H, P, D): the gather's gradient adds the rows of one prompt up again
        self._keys, self._values = prompt.keys[parents], prompt.values[parents]
        self.offset = lengths

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """(B, H, P + T, D) each."""
        return mx.concatenate([self._keys, keys], axis=2), mx.concatenate([self._values, values], axis=2)

    def make_mask(self, n: int, *, window_size: int | None = None, return_array: bool = False) -> mx.array:
        """(B, 1, T, P + T): the prompt without its padding, and what came before in the row."""
        width = self._keys.shape[2]
        keys = mx.arange(width + n)[None, None]
        lengths = self.offset[:, None, None]
        own = keys >= width
        at = mx.where(own, keys - width + lengths, keys)  # each key's position in its row's text
        now = mx.arange(n)[None, :, None] + lengths
        mask = (own | (keys < lengths)) & (at <= now)
        if window_size is not None:
            mask = mask & (now < at + window_size)
        return mask[:, None]


def extended(captures: list[Capture], parents: mx.array, lengths: mx.array) -> list[Extend]:
    """Every layer's cache for rows whose prompts have been read: `parents` (B,) into the prompts, `lengths` (B,) of theirs."""
    return [Extend(c, parents, lengths) for c in captures]
