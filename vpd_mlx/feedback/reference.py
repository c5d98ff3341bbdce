"""C = the data set's reference solution (OPSD)."""

from __future__ import annotations

from collections.abc import Sequence

from vpd_mlx.feedback.base import SourceEntry, answer_each
from vpd_mlx.types import Group

__all__ = ["REFERENCE", "reference"]


def reference(groups: Sequence[Group], wanted: list[list[bool]]) -> list[list[str | None]]:
    """The row's reference solution, for every rollout of a problem that has one."""
    return answer_each(groups, wanted, lambda group, _: group.problem.reference)


REFERENCE = SourceEntry(lambda parts: reference, template="reference", solution=True, free=True)
