"""C = the verifier's words on a failure."""

from __future__ import annotations

from collections.abc import Sequence

from vpd_mlx.types import Group

__all__ = ["verifier"]


def verifier(groups: Sequence[Group], wanted: list[list[bool]]) -> list[list[str | None]]:
    """The verifier's text for every failure that got one; nothing for a success."""
    return [
        [
            r.verdict.text if want and not r.success and r.verdict is not None and r.verdict.text.strip() else None
            for r, want in zip(group.rollouts, wants, strict=True)
        ]
        for group, wants in zip(groups, wanted, strict=True)
    ]
