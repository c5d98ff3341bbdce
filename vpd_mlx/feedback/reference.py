"""C = the data set's reference solution (OPSD)."""

from __future__ import annotations

from collections.abc import Sequence

from vpd_mlx.types import Group

__all__ = ["reference"]


def reference(groups: Sequence[Group], wanted: list[list[bool]]) -> list[list[str | None]]:
    """The row's reference solution, for every rollout of a problem that has one."""
    return [
        [group.problem.reference if want else None for want in wants]
        for group, wants in zip(groups, wanted, strict=True)
    ]
