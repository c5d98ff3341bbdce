"""Several processes as one trainer, on one machine or on several (`mlx.launch`).

Each rank samples and grades a part of a step's prompts. The rollouts are then exchanged, so that every rank has the whole
batch and computes weights, class means and the reward shift from it as a single process would. Only forward and backward
passes are divided, row by row; their figures are gathered and their gradients summed. So every rank makes the same update.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from vpd_mlx.errors import RunError
from vpd_mlx.types import TokenRow

__all__ = ["ALONE", "Ranks"]

T = TypeVar("T")
# Set by `mlx.launch` for the ring, jaccl and NCCL backends, and by MPI.
LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK")


class Ranks:
    """This process's place among those that train together. Without a group it is alone, and nothing is ever sent.

    Whatever sends something raises a RunError when another rank is gone.

    Attributes:
        index: this rank, from 0; 0 is the one that writes.
        size: how many there are.
    """

    def __init__(self, group: mx.distributed.Group | None = None) -> None:
        self._group = group
        self.index = group.rank() if group is not None else 0
        self.size = group.size() if group is not None else 1

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> Ranks:
        """The ranks that `mlx.launch` started, or this process alone.

        Raises:
            RunError: the others cannot be reached.
        """
        if not any(name in environment for name in LAUNCHED):
            return ALONE
        try:
            group = mx.distributed.init(strict=True)
        except (RuntimeError, ValueError) as error:
            why = f"the other ranks cannot be reached ({error}); check the hosts given to mlx.launch"
            raise RunError(why) from None
        return cls(group) if group.size() > 1 else ALONE

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.index == 0

    # --- who does what

    def own_range(self, count: int) -> range:
        """This rank's contiguous part of `count` things; the parts differ by one at most."""
        return range(count * self.index // self.size, count * (self.index + 1) // self.size)

    def seed(self, seed: int) -> int:
        """A seed of this rank's own, so that no two draw the same; the first keeps the run's."""
        return seed + self.index

    def own_rows(self, rows: Sequence[TokenRow]) -> list[int]:
        """Indices of this rank's rows, in order; the same division on every rank.

        Rows with one prompt stay together, so that it is read once, unless there are fewer prompts than ranks. The
        heaviest goes to the rank that has the fewest tokens.
        """
        if self.size == 1:
            return list(range(len(rows)))
        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for i, row in enumerate(rows):
            by_prompt.setdefault(row.prompt, []).append(i)
        units = list(by_prompt.values()) if len(by_prompt) >= self.size else [[i] for i in range(len(rows))]
        cost = [len(rows[u[0]].prompt) + sum(len(rows[i].completion) for i in u) for u in units]
        loads, mine = [0] * self.size, []
        for n in sorted(range(len(units)), key=lambda n: -cost[n]):
            least = loads.index(min(loads))
            loads[least] += cost[n]
            if least == self.index:
                mine += units[n]
        return sorted(mine)

    # --- exchange

    def gather(self, thing: T) -> list[T]:
        """Every rank's `thing`, by rank. Anything that pickles: only this program's own ranks send it."""
        if self.size == 1:
            return [thing]
        data = np.frombuffer(pickle.dumps(thing), np.uint8)
        counts = self._all(mx.distributed.all_gather, mx.array([len(data)], mx.int64))
        sizes = [int(n) for n in np.array(counts)]
        padded = np.zeros(max(sizes), np.uint8)
        padded[: len(data)] = data
        everyone = np.array(self._all(mx.distributed.all_gather, mx.array(padded)[None]))
        return [pickle.loads(everyone[i, :n].tobytes()) for i, n in enumerate(sizes)]

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns on the first rank, on all ranks."""
        if self.size == 1:
            return make()
        things: list[Any] = self.gather(make() if self.first else None)
        found: T = things[0]
        return found

    def collect(self, own: Sequence[int], values: Sequence[T], count: int) -> list[T]:
        """All `count` values, where this rank has those at `own`."""
        if self.size == 1:
            return list(values)
        out: list[Any] = [None] * count
        for part in self.gather(dict(zip(own, values, strict=True))):
            for i, value in part.items():
                out[i] = value
        return out

    def sum(self, tree: Any) -> Any:
        """The sum of all ranks' trees of float32 arrays, as one message, the same to the bit on every rank."""
        if self.size == 1:
            return tree
        leaves = tree_flatten(tree)
        flat = mx.concatenate([leaf.astype(mx.float32).reshape(-1) for _, leaf in leaves])
        total = self._all(mx.distributed.all_sum, flat)
        ends = np.cumsum([leaf.size for _, leaf in leaves])[:-1].tolist()
        pairs = zip(leaves, mx.split(total, ends), strict=True)
        return tree_unflatten([(name, part.reshape(leaf.shape)) for (name, leaf), part in pairs])

    def agree(self, what: str, mine: str) -> None:
        """See that `mine` is the same on every rank, and raise a RunError when it is not."""
        said = self.gather(mine)
        for other, text in enumerate(said):
            if text != said[0]:
                raise RunError(
                    f"rank {other} differs from rank 0 in {what} ({text} against {said[0]}); every machine needs the same "
                    "versions, model and data"
                )

    def _all(self, operation: Callable[..., mx.array], values: mx.array) -> mx.array:
        try:
            mx.eval(values)
            out = operation(values, group=self._group)
            mx.eval(out)
            return out
        except RuntimeError as error:
            raise RunError(
                f"rank {self.index} has lost another rank ({error}); that one's last message says why. Go on with --resume"
            ) from None


ALONE = Ranks()
