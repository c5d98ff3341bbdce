"""Token lists in, padded arrays and index maps out. Pure numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vpd_mlx.types import Row

__all__ = ["Padded", "micro_batches", "pad", "token_weights"]


@dataclass(frozen=True)
class Padded:
    """Rows side by side, padded on the right.

    `inputs` (B, L) int32: prompt and completion, less the last token. `positions` (M,) int32: index into the flattened
    (B * L) grid of the position that predicts each completion token. `targets` (M,) int32: these tokens, rows in order.
    """

    inputs: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int32]


def pad(rows: Sequence[Row], multiple: int = 1) -> Padded:
    """Pad rows on the right to a common length, a multiple of `multiple`.

    Right padding needs no mask under causal attention: no real position sees a padded one.
    """
    lengths = [len(r.prompt) + len(r.completion) - 1 for r in rows]
    width = -(-max(lengths) // multiple) * multiple
    inputs = np.zeros((len(rows), width), np.int32)
    positions, targets = [], []
    for i, row in enumerate(rows):
        tokens = row.prompt + row.completion
        inputs[i, : len(tokens) - 1] = tokens[:-1]
        first = i * width + len(row.prompt) - 1
        positions.append(np.arange(first, first + len(row.completion), dtype=np.int32))
        targets.append(np.asarray(row.completion, np.int32))
    return Padded(inputs, np.concatenate(positions), np.concatenate(targets))


def micro_batches(rows: Sequence[Row], budget: int) -> list[list[int]]:
    """Indices of rows, grouped so that rows x longest stays within `budget` tokens, long rows together.

    Sorted by length, so little is padding; the order within a length is that of the input, so the split is
    deterministic. A row longer than the budget gets a batch of its own.
    """
    order = sorted(range(len(rows)), key=lambda i: (-(len(rows[i].prompt) + len(rows[i].completion)), i))
    batches: list[list[int]] = []
    longest = 0
    for i in order:
        length = len(rows[i].prompt) + len(rows[i].completion)
        if batches and (len(batches[-1]) + 1) * longest <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
            longest = length
    return batches


def token_weights(lengths: Sequence[int], weighting: str, sequences: int, tokens: int) -> list[npt.NDArray[np.float32]]:
    """Weight of every token, per row, so that a weighted sum over the whole batch is the wanted mean.

    `sequence`: 1 / (T_i * sequences), the mean over `sequences` sequences of their token means: sequences that take no
    part count 0 (what SDPO's reference computes). `token`: 1 / `tokens`. The totals come from outside, so that
    micro-batches and several machines give the same sum.
    """
    if weighting == "sequence":
        return [np.full(n, 1.0 / (n * sequences), np.float32) for n in lengths]
    if weighting == "token":
        return [np.full(n, 1.0 / tokens, np.float32) for n in lengths]
    raise ValueError(f"weighting is {weighting!r}; use 'sequence' or 'token'")
