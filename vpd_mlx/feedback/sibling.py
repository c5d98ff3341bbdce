"""C = the first successful rollout of the same group, other than itself (SDPO's rule)."""

from __future__ import annotations

from collections.abc import Sequence

from vpd_mlx.prompts import demonstration
from vpd_mlx.types import Group

__all__ = ["sibling"]


def sibling(groups: Sequence[Group], wanted: list[list[bool]]) -> list[list[str | None]]:
    """A correct sibling's text for every rollout that has one, thinking cut out."""
    out: list[list[str | None]] = []
    for group, wants in zip(groups, wanted, strict=True):
        right = [i for i, r in enumerate(group.rollouts) if r.success]
        row: list[str | None] = []
        for i, want in enumerate(wants):
            other = next((j for j in right if j != i), None)
            row.append(demonstration(group.rollouts[other].text) if want and other is not None else None)
        out.append(row)
    return out
