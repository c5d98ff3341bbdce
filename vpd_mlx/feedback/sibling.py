"""C = the first successful rollout of the same group, other than itself (SDPO's rule)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from vpd_mlx.common.settings import Section
from vpd_mlx.common.thoughts import without_thoughts
from vpd_mlx.errors import Fault
from vpd_mlx.feedback.base import Answer, SourceEntry, answer_each
from vpd_mlx.types import Group, Rollout

__all__ = ["SIBLING", "SiblingKeys", "group_of_one", "sibling"]


class SiblingKeys(Section):
    """`sibling` adds no key to the section `feedback`, only a condition."""

    def faults(self, recipe: Any) -> Iterator[Fault]:
        """A group of one has no siblings."""
        yield from group_of_one(recipe, "sibling")
        yield from super().faults(recipe)


def group_of_one(recipe: Any, name: str) -> Iterator[Fault]:
    """The source `name` shows other completions of the group, and there are none."""
    sources = recipe.feedback.sources
    if recipe.entry.contexts and recipe.rollout.group_size == 1 and name in sources:
        alone = sources == [name]
        what = f"1 leaves no sibling to learn from, and `feedback.sources` names {'only ' * alone}{name}"
        other = "add another source" if alone else f"take {name} out of feedback.sources"
        yield Fault("rollout.group_size", what, f"set rollout.group_size to 2 or more, or {other}")


def sibling(groups: Sequence[Group], wanted: list[list[bool]]) -> list[list[Answer]]:
    """The text of a correct sibling for every rollout that has one, without its thinking."""

    def first_other(group: Group, rollout: Rollout) -> Answer:
        return next((without_thoughts(r.text) for r in group.rollouts if r.success and r is not rollout), None)

    return answer_each(groups, wanted, first_other)


SIBLING = SourceEntry(
    lambda parts: sibling,
    keys=SiblingKeys,
    template="sibling",
    whole_groups=True,
    solution=True,
    siblings=True,
    needs="the other completions of the group",
    free=True,
)
