"""Caches by which one pass over a prompt serves all its completions, with a gradient.

mlx-lm's models take any object with `update_and_fetch`, `offset` and `make_mask` as a layer's cache. `Capture` keeps a prompt's
keys and values in the graph; `Extend` hands each completion its prompt's, followed by its own, and `Behind` does so for the
completions of a single prompt. Since nothing is detached, the gradient flows back through the shared prompt as it would through N
copies of it.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from vpd_mlx.engine.attention import Band

__all__ = ["Behind", "Capture", "Extend", "Rows"]


class Rows:
    """A cache of one layer that keeps nothing: rows from their beginning, or all behind a common start of `offset` tokens.

    With `banded`, a sliding window is given as a `Band` in the place of an array, which only attention within
    `attention.bounded` takes.
    """

    offset: Any = 0

    def __init__(self, *, banded: bool = False) -> None:
        self.banded = banded

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Return what comes."""
        return keys, values

    def make_mask(self, n: int, *, window_size: int | None = None, return_array: bool = False) -> Any:
        """Causal attention of the last `n` positions, to no more than the window."""
        if window_size is not None and self.banded and not return_array:
            return Band(window_size)
        if not return_array and (window_size is None or self.offset + n <= window_size):
            return "causal"
        now, at = mx.arange(self.offset, self.offset + n), mx.arange(self.offset + n)
        mask = now[:, None] >= at[None]
        return mask if window_size is None else mask & (now[:, None] < at[None] + window_size)

    def taken(self) -> list[mx.array]:
        """What it reads, through which a gradient flows: a checkpointed block takes it as an input."""
        return []

    def again(self, _taken: list[mx.array]) -> Rows:
        """One like it that reads these arrays."""
        return Rows(banded=self.banded)

    def kept(self) -> list[mx.array]:
        """What a pass has left in it: a checkpointed block hands it on as an output."""
        return []

    def keep(self, _kept: list[mx.array]) -> None:
        """Put in what another's pass has left."""


class Capture(Rows):
    """A cache of one layer that keeps keys and values, (U, H, P, D) each, as they come."""

    def __init__(self, *, banded: bool = False) -> None:
        super().__init__(banded=banded)
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Keep and return."""
        self.keys, self.values = keys, values
        return keys, values

    def again(self, _taken: list[mx.array]) -> Capture:
        """An empty one."""
        return Capture(banded=self.banded)

    def kept(self) -> list[mx.array]:
        """Keys and values.

        Raises:
            ValueError: there are none.
        """
        if self.keys is None or self.values is None:
            raise ValueError("the prompt's pass has not reached this layer")
        return [self.keys, self.values]

    def keep(self, kept: list[mx.array]) -> None:
        """Put them in."""
        self.keys, self.values = kept


class Behind(Rows):
    """A cache of one layer that puts one prompt, without padding, before what each of `rows` rows adds.

    The rows' masks are then plain causal ones, which mlx bounds by itself on a GPU; and the gradient of the prompt is a sum over
    rows, in one order.
    """

    def __init__(self, keys: mx.array, values: mx.array, rows: int, *, banded: bool = False) -> None:
        """`keys` and `values` (1, H, P, D)."""
        super().__init__(banded=banded)
        self._keys, self._values, self._rows = keys, values, rows
        self.offset = keys.shape[2]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """(rows, H, P + T, D) each."""

        def behind(prompt: mx.array, own: mx.array) -> mx.array:
            return mx.concatenate([mx.broadcast_to(prompt, (self._rows, *prompt.shape[1:])), own], axis=2)

        return behind(self._keys, keys), behind(self._values, values)

    def taken(self) -> list[mx.array]:
        """The prompt's keys and values."""
        return [self._keys, self._values]

    def again(self, taken: list[mx.array]) -> Behind:
        """The same rows behind these keys and values."""
        keys, values = taken
        return Behind(keys, values, self._rows, banded=self.banded)


class Extend(Rows):
    """A cache of one layer that puts each row's own prompt, of its own length, before what the row adds."""

    def __init__(self, prompt: Capture, parents: mx.array, lengths: mx.array) -> None:
        super().__init__()
        self._prompt, self._parents = prompt.kept(), parents
        self.offset = lengths

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """(B, H, P + T, D) each. The gather's gradient adds the rows of one prompt up again."""
        before, behind = (x[self._parents] for x in self._prompt)
        return mx.concatenate([before, keys], axis=2), mx.concatenate([behind, values], axis=2)

    def make_mask(self, n: int, *, window_size: int | None = None, return_array: bool = False) -> mx.array:
        """(B, 1, T, P + T): the prompt without its padding, and what came before in the row."""
        width = self._prompt[0].shape[2]
        keys = mx.arange(width + n)[None, None]
        lengths = self.offset[:, None, None]
        own = keys >= width
        at = mx.where(own, keys - width + lengths, keys)  # each key's position in its row's text
        now = mx.arange(n)[None, :, None] + lengths
        mask = (own | (keys < lengths)) & (at <= now)
        if window_size is not None:
            mask = mask & (now < at + window_size)
        return mx.expand_dims(mask, 1)

    def taken(self) -> list[mx.array]:
        """The prompts' keys and values."""
        return self._prompt

    def again(self, taken: list[mx.array]) -> Extend:
        """The same rows behind these keys and values."""
        prompt = Capture()
        prompt.keep(taken)
        return Extend(prompt, self._parents, self.offset)
