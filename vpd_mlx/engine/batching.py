"""Token lists in, padded arrays and index maps out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vpd_mlx.types import TokenRow

__all__ = ["Padded", "Shared", "by_row", "micro_batches", "pad", "shared_prompts", "token_weights"]


@dataclass(frozen=True)
class Padded:
    """Rows side by side, padded on the right.

    `inputs` (B, L) int32: prompt and completion, less the last token. `positions` (M,) int32: index into the flattened
    (B * L) grid of the position that predicts each completion token. `targets` (M,) int32: these tokens, rows in order.
    """

    inputs: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int32]


def pad(rows: Sequence[TokenRow], multiple: int = 1) -> Padded:
    """Pad rows on the right to a common length, a multiple of `multiple`.

    Right padding needs no mask under causal attention: no real position sees a padded one.
    """
    lengths = [len(r.prompt) + len(r.completion) - 1 for r in rows]
    width = _up(max(lengths), multiple)
    inputs = np.zeros((len(rows), width), np.int32)
    positions, targets = [], []
    for i, row in enumerate(rows):
        tokens = row.prompt + row.completion
        inputs[i, : len(tokens) - 1] = tokens[:-1]
        first = i * width + len(row.prompt) - 1
        positions.append(np.arange(first, first + len(row.completion), dtype=np.int32))
        targets.append(np.asarray(row.completion, np.int32))
    return Padded(inputs, np.concatenate(positions), np.concatenate(targets))


@dataclass(frozen=True)
class Shared:
    """Rows whose prompts are read once each.

    `prompts` (U, P) int32, padded on the right; `lengths` (B,) int32: of each row's prompt; `parents` (B,) int32: which it is;
    `completions` (B, T) int32: less each last token, padded on the right, T = 0 when all have one token. `positions` (M,)
    int32: into the flattened (U * P) prompt positions followed by the (B * T) completion positions. `targets` (M,) int32.
    """

    prompts: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int32]
    parents: npt.NDArray[np.int32]
    completions: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int32]


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def shared_prompts(rows: Sequence[TokenRow], multiple: int = 1, *, always: bool = False) -> Shared | None:
    """Rows grouped by identical prompt ids; None, unless `always`, where that saves less than a tenth of the positions."""
    index: dict[tuple[int, ...], int] = {}
    parents = [index.setdefault(r.prompt, len(index)) for r in rows]
    width = _up(max(len(p) for p in index), multiple)
    longest = max(len(r.completion) for r in rows) - 1
    added = _up(longest, multiple) if longest else 0
    plain = len(rows) * _up(max(len(r.prompt) + len(r.completion) - 1 for r in rows), multiple)
    if not always and len(index) * width + len(rows) * added > 0.9 * plain:
        return None
    prompts = np.zeros((len(index), width), np.int32)
    for ids, u in index.items():
        prompts[u, : len(ids)] = ids
    completions = np.zeros((len(rows), added), np.int32)
    positions, targets = [], []
    for i, row in enumerate(rows):
        n = len(row.completion)
        completions[i, : n - 1] = row.completion[:-1]
        first = parents[i] * width + len(row.prompt) - 1  # the prompt's last state predicts the first token
        rest = prompts.size + i * added + np.arange(n - 1)
        positions.append(np.concatenate([[first], rest]).astype(np.int32))
        targets.append(np.asarray(row.completion, np.int32))
    lengths, of = np.array([len(r.prompt) for r in rows], np.int32), np.array(parents, np.int32)
    return Shared(prompts, lengths, of, completions, np.concatenate(positions), np.concatenate(targets))


def by_row(values: Any, rows: Sequence[TokenRow]) -> list[Any]:
    """An array of all rows' completion tokens (M, ...), cut up by row: (T_i, ...) each."""
    ends = np.cumsum([len(r.completion) for r in rows]).tolist()
    return [values[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def micro_batches(rows: Sequence[TokenRow], budget: int, *, shared: bool = False, multiple: int = 1) -> list[list[int]]:
    """Indices of rows, grouped so that each group's positions stay within `budget`, long rows together.

    Without sharing a group costs rows x longest; with it, its distinct prompts x longest plus rows x longest completion, and
    rows of one prompt stay together where they fit. Lengths count as they are once padded to `multiple`. The order is a function
    of the rows alone, so the split is deterministic. A row longer than the budget gets a group of its own.
    """

    def plain_key(i: int) -> tuple[int, int]:
        return -(len(rows[i].prompt) + len(rows[i].completion)), i

    def shared_key(i: int) -> tuple[int, tuple[int, ...], int, int]:
        return -len(rows[i].prompt), rows[i].prompt, -len(rows[i].completion), i

    def padded(n: int) -> int:
        # The last token is not read; unpadded it counts all the same, or runs would be split otherwise than they were.
        return n if multiple == 1 else _up(n - 1, multiple)

    order = sorted(range(len(rows)), key=shared_key if shared else plain_key)
    batches: list[list[int]] = []
    prompts: set[tuple[int, ...]] = set()
    width = added = 0
    for i in order:
        p, c = len(rows[i].prompt), len(rows[i].completion)
        whole = padded(p + c)
        p, c = _up(p, multiple), padded(c)
        if batches:
            count = len(batches[-1]) + 1
            if shared:
                cost = len(prompts | {rows[i].prompt}) * max(width, p) + count * max(added, c)
            else:
                cost = count * max(width, whole)
            if cost <= budget:
                batches[-1].append(i)
                prompts.add(rows[i].prompt)
                width, added = max(width, p if shared else whole), max(added, c)
                continue
        batches.append([i])
        prompts = {rows[i].prompt}
        width, added = (p if shared else whole), c
    return batches


def token_weights(lengths: Sequence[int], weighting: str, sequences: int, tokens: int) -> list[npt.NDArray[np.float32]]:
    """Weight of every token, per row, so that a weighted sum over the whole batch is the wanted mean.

    `sequence`: 1 / (T_i * sequences), the mean over `sequences` sequences of their token means: sequences that take no
    part count 0 (what SDPO's reference computes). `token`: 1 / `tokens`. The totals come from outside, so that
    micro-batches and several machines give the same sum.
    """
    if weighting not in ("sequence", "token"):
        raise ValueError(f"weighting is {weighting!r}; use 'sequence' or 'token'")
    return [np.full(n, 1.0 / (n * sequences if weighting == "sequence" else tokens), np.float32) for n in lengths]
