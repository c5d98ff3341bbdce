"""C = two right siblings and a wrong one, each called what it is (arXiv 2605.12652).

Worded by the template `sibling`, which calls the first right answer right; the text calls the others what they are. So every
wording and every recipe's own template serves, and where there is one right answer alone the teacher reads what `sibling` shows.
Ours: the label is repeated behind the wrong answer, since a text that is too long loses its middle, and with it the label before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from vpd_mlx.common.settings import Section
from vpd_mlx.common.thoughts import without_thoughts
from vpd_mlx.errors import Fault
from vpd_mlx.feedback.base import Answer, SourceEntry, answer_each
from vpd_mlx.feedback.sibling import group_of_one
from vpd_mlx.types import Group, Rollout

__all__ = ["ATTEMPTS", "AttemptsKeys", "attempts"]

RIGHT = 2  # right answers shown, at most
_ANOTHER = "\n\nAnother correct answer:\n{}"
_WRONG = "\n\nA wrong answer:\n{}\n(End of the wrong answer.)"


class AttemptsKeys(Section):
    """`attempts` adds no key to the section `feedback`, only a condition."""

    def faults(self, recipe: Any) -> Iterator[Fault]:
        """A group of one has no siblings."""
        yield from group_of_one(recipe, "attempts")
        yield from super().faults(recipe)


def attempts(groups: Sequence[Group], wanted: list[list[bool]]) -> list[list[Answer]]:
    """The first two right siblings and the first wrong one, without their thinking, for every rollout that has a right one.

    What says nothing beside its thinking, or says the same as one before, is passed over.
    """

    def labelled(group: Group, rollout: Rollout) -> Answer:
        right, wrong = (_texts(group, rollout, success=of) for of in (True, False))
        if not right:
            return None
        others = [_ANOTHER.format(text) for text in right[1:RIGHT]]
        return "".join([right[0], *others, *(_WRONG.format(text) for text in wrong[:1])])

    return answer_each(groups, wanted, labelled)


def _texts(group: Group, rollout: Rollout, *, success: bool) -> list[str]:
    """What the other rollouts of one verdict say, in order."""
    others = (r for r in group.rollouts if r is not rollout and r.success == success)
    return list(dict.fromkeys(text for r in others if (text := without_thoughts(r.text))))


ATTEMPTS = SourceEntry(
    lambda parts: attempts,
    keys=AttemptsKeys,
    template="sibling",
    whole_groups=True,
    solution=True,
    siblings=True,
    needs="the other completions of the group",
)
