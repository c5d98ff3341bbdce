"""Caches by which one pass over a prompt serves all its completions, with a gradient.

mlx-lm's models take any object with `update_and_fetch`, `offset` and `make_mask` as the cache of a layer with attention.
`Capture` keeps a prompt's keys and values in the graph; `Extend` hands each completion its prompt's, followed by its own, and
`Behind` does so for the completions of a single prompt. A recurrent layer or a convolution leaves a few arrays of fixed size
where the prompt ends, and the completions go on from copies of them: `State`. Since nothing is detached, the gradient flows
back through the shared prompt as it would through N copies of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, CacheList

from vpd_mlx.engine.attention import Band

__all__ = [
    "KEYS",
    "Behind",
    "Capture",
    "Extend",
    "Held",
    "Kind",
    "Rows",
    "Several",
    "State",
    "capture",
    "layout",
    "rows",
]

Kind = int | tuple["Kind", ...]
"""What a layer's cache holds: `KEYS`, a number of arrays, or several caches."""

KEYS = 0
"""Keys and values."""


class Held:
    """What a pass reads from a layer's cache and leaves in it, as arrays: a checkpointed block takes and returns them.

    Attributes:
        leaves: how many arrays `kept` gives.
    """

    leaves = 0

    def taken(self) -> list[mx.array]:
        """What it reads, through which a gradient flows: a checkpointed block takes it as an input."""
        return []

    def again(self, _taken: list[mx.array]) -> Held:
        """One like it that reads these arrays."""
        raise NotImplementedError

    def kept(self) -> list[mx.array]:
        """What a pass has left in it: a checkpointed block hands it on as an output."""
        return []

    def keep(self, _kept: list[mx.array]) -> None:
        """Put in what another's pass has left."""

    def extend_by(self, parents: mx.array, lengths: mx.array) -> Held:
        """What rows read, each behind its prompt, one of those whose pass this has seen. Both (B,)."""
        raise NotImplementedError

    def behind(self, prompt: int, length: int, rows: int) -> Held:
        """What so many rows read behind one of the prompts, of so many tokens."""
        raise NotImplementedError


class Rows(Held):
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

    def again(self, _taken: list[mx.array]) -> Rows:
        """One like it."""
        return Rows(banded=self.banded)


class Capture(Rows):
    """A cache of one layer that keeps keys and values, (U, H, P, D) each, as they come."""

    leaves = 2

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

    def extend_by(self, parents: mx.array, lengths: mx.array) -> Extend:
        """Each row's prompt, padded as it came."""
        return Extend(self, parents, lengths)

    def behind(self, prompt: int, length: int, rows: int) -> Behind:
        """The prompt without its padding."""
        keys, values = (x[prompt : prompt + 1, :, :length] for x in self.kept())
        return Behind(keys, values, rows, banded=True)


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


class State(Held, ArraysCache):  # type: ignore[misc]
    """A recurrent layer's or a convolution's arrays: those that rows start from, if any, and those where prompts end.

    mlx-lm's layers read and replace them by index. Prompts of different lengths are padded on the right; from `lengths` mlx-lm
    makes a mask behind which a recurrence stands still, and finds where each row's last inputs of a convolution are.
    """

    def __init__(
        self,
        size: int,
        start: Sequence[mx.array] = (),
        lengths: mx.array | None = None,
        *,
        keeps: bool = False,
    ) -> None:
        """`start`: none, or `size` arrays (B, ...); `lengths` (B,), None where rows need no mask; `keeps` for `kept`."""
        super().__init__(size)
        self._start, self._keeps = list(start), keeps
        self.leaves = size if keeps else 0
        if start:
            self.cache = list(start)
        self.lengths = lengths

    def advance(self, _n: int) -> None:
        """Nothing: a single pass is all that these rows are for, and `lengths` belongs to all layers."""

    def taken(self) -> list[mx.array]:
        """What rows start from."""
        return self._start

    def again(self, taken: list[mx.array]) -> State:
        """One from which the same rows start with these arrays."""
        return State(len(self.cache), taken, self.lengths, keeps=self._keeps)

    def kept(self) -> list[mx.array]:
        """The arrays where rows end, if they are asked for.

        Raises:
            ValueError: there are none.
        """
        if not self._keeps:
            return []
        if any(x is None for x in self.cache):
            raise ValueError("the prompt's pass has not reached this layer")
        return list(self.cache)

    def keep(self, kept: list[mx.array]) -> None:
        """Put them in."""
        if self._keeps:
            self.cache = kept

    def extend_by(self, parents: mx.array, _lengths: mx.array) -> State:
        """A copy for each row. The gather's gradient adds the rows of one prompt up again."""
        return State(len(self.cache), [x[parents] for x in self.kept()])

    def behind(self, prompt: int, _length: int, rows: int) -> State:
        """The prompt's for every row."""
        own = (x[prompt : prompt + 1] for x in self.kept())
        return State(len(self.cache), [mx.broadcast_to(x, (rows, *x.shape[1:])) for x in own])


class Several(Held):
    """The caches of a layer that has more than one part which keeps something."""

    def __init__(self, parts: Sequence[Held]) -> None:
        self._parts = list(parts)

    def __getitem__(self, part: int) -> Held:
        return self._parts[part]

    def taken(self) -> list[mx.array]:
        """All parts', in a row."""
        return [x for part in self._parts for x in part.taken()]

    def again(self, taken: list[mx.array]) -> Several:
        """The parts again, each with its own."""
        left = iter(taken)
        return Several([part.again([next(left) for _ in part.taken()]) for part in self._parts])

    def kept(self) -> list[mx.array]:
        """All parts', in a row."""
        return [x for part in self._parts for x in part.kept()]

    def keep(self, kept: list[mx.array]) -> None:
        """Put in each part its own."""
        left = iter(kept)
        for part in self._parts:
            part.keep([next(left) for _ in range(part.leaves)])

    def extend_by(self, parents: mx.array, lengths: mx.array) -> Several:
        """Each part's."""
        return Several([part.extend_by(parents, lengths) for part in self._parts])

    def behind(self, prompt: int, length: int, rows: int) -> Several:
        """Each part's."""
        return Several([part.behind(prompt, length, rows) for part in self._parts])


def layout(caches: Sequence[Any]) -> list[Kind] | None:
    """What the caches that a model makes for itself hold, one by one; None where one of them holds something else."""
    found: list[Kind] = []
    for cache in caches:
        if isinstance(cache, CacheList):
            parts = layout(cache.caches)
            if parts is None:
                return None
            found.append(tuple(parts))
        elif isinstance(cache, ArraysCache):
            found.append(len(cache.cache))
        elif type(cache).__name__ in ("KVCache", "RotatingKVCache"):
            found.append(KEYS)
        else:
            return None
    return found


def rows(kind: Kind) -> Held:
    """A cache for rows that are read from their beginning, and of which nothing is kept."""
    if isinstance(kind, tuple):
        return Several([rows(part) for part in kind])
    return Rows(banded=True) if kind == KEYS else State(kind)


def capture(kind: Kind, lengths: mx.array | None, *, banded: bool) -> Held:
    """A cache for prompts, whose completions are to go on from it; `lengths` (U,), None if they are all as long as they came."""
    if isinstance(kind, tuple):
        return Several([capture(part, lengths, banded=banded) for part in kind])
    return Capture(banded=banded) if kind == KEYS else State(kind, lengths=lengths, keeps=True)
