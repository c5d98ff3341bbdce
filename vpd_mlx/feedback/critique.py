"""C = the model's own critique of its failed attempt, written after it has seen the right answer (self-critique)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from pydantic import Field

from vpd_mlx.common.settings import Positive, Section
from vpd_mlx.common.thoughts import without_thoughts
from vpd_mlx.feedback.base import Answer, Failed, SourceEntry, SourceParts, answer_each
from vpd_mlx.feedback.prompts import NoRoom
from vpd_mlx.types import Group, Rollout

__all__ = ["CRITIQUE", "CritiqueKeys", "critique"]


class CritiqueKeys(Section):
    """What `critique` adds to the section `feedback`."""

    critique_tokens: Positive = Field(160, description="Longest critique the model writes for itself, in tokens.")


def critique(parts: SourceParts, groups: Sequence[Group], wanted: list[list[bool]]) -> list[list[Answer]]:
    """Two or three sentences of the model's own for every failure that still wants a context."""
    prompts = []

    def place(group: Group, rollout: Rollout) -> int | Failed | None:
        """Where in `prompts` the question about this rollout stands."""
        if rollout.success:
            return None
        verdict = rollout.verdict.text if rollout.verdict is not None else ""
        try:
            prompts.append(parts.prompter.critic(group.problem, rollout.text, verdict))
        except NoRoom as error:
            return Failed(str(error))
        return len(prompts) - 1

    places = answer_each(groups, wanted, place)
    texts = parts.generate(prompts, parts.cfg.critique_tokens) if prompts else []
    return [[without_thoughts(texts[at]) or None if isinstance(at, int) else at for at in row] for row in places]


CRITIQUE = SourceEntry(
    lambda parts: partial(critique, parts), keys=CritiqueKeys, template="critique", whole_groups=True, needs="the model"
)
