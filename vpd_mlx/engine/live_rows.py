"""Rows that have finished leave a cache now and then, not each time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

__all__ = ["LiveRows"]

DEAD_ROWS = 8  # one in so many may have finished before the cache is copied without them


class LiveRows:
    """The rows of a cache: those that still draw, and those that have finished and wait to be dropped.

    To drop a row copies the keys and values of all others. So it waits until one row in `DEAD_ROWS` has finished, or the longest
    prompts are done, without which the cache gets shorter.
    """

    def __init__(self, cache: list[Any], prompts: Sequence[int]) -> None:
        self.cache = cache
        self._prompts = list(prompts)  # tokens of each row's prompt
        self._live = list(range(len(prompts)))

    def spread(self, tokens: mx.array) -> mx.array:
        """The live rows' tokens as those of all rows; finished ones get any."""
        if len(self._live) == len(self._prompts):
            return tokens
        return mx.zeros(len(self._prompts), tokens.dtype).at[mx.array(self._live)].add(tokens)

    def live(self, logits: mx.array) -> mx.array:
        """Of all rows' logits those of the live ones. Only they may draw: others would shift their random numbers."""
        return logits if len(self._live) == len(self._prompts) else logits[mx.array(self._live)]

    def keep(self, indices: Sequence[int]) -> None:
        """Of the live rows only these go on."""
        self._live = [self._live[i] for i in indices]
        left = [self._prompts[i] for i in self._live]
        finished = len(self._prompts) - len(left)
        if finished * DEAD_ROWS >= len(self._prompts) or max(left) < max(self._prompts):
            for layer in self.cache:
                layer.filter(self._live)
            self._prompts, self._live = left, list(range(len(left)))
