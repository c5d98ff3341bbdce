"""C = the verifier's text on a failure."""

from __future__ import annotations

from collections.abc import Sequence

from vpd_mlx.feedback.base import Answer, SourceEntry, answer_each
from vpd_mlx.types import Group, Rollout

__all__ = ["VERIFIER", "verifier"]


def verifier(groups: Sequence[Group], wanted: list[list[bool]]) -> list[list[Answer]]:
    """The verifier's text for every failure that got one; nothing for a success."""

    def text(_: Group, rollout: Rollout) -> Answer:
        found = "" if rollout.success or rollout.verdict is None else rollout.verdict.text
        return found if found.strip() else None

    return answer_each(groups, wanted, text)


VERIFIER = SourceEntry(lambda parts: verifier, template="verifier", free=True)
