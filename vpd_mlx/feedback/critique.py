"""C = the model's own critique of its failed attempt, written after it has seen the right answer (self-critique)."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from vpd_mlx.common.settings import Positive, Section
from vpd_mlx.feedback.base import Answer, Failed, Generate, Source, SourceEntry, SourceParts
from vpd_mlx.prompts import NoRoom, Prompter, demonstration
from vpd_mlx.types import Group

__all__ = ["CRITIQUE", "CritiqueKeys", "critique"]


class CritiqueKeys(Section):
    """What `critique` adds to the section `feedback`."""

    critique_tokens: Positive = Field(160, description="Longest critique the model writes for itself, in tokens.")


def critique(
    groups: Sequence[Group], wanted: list[list[bool]], prompter: Prompter, generate: Generate, max_tokens: int
) -> list[list[Answer]]:
    """Two or three sentences of the model's own for every failure that still wants a context."""
    places, prompts = [], []
    out: list[list[Answer]] = [[None] * len(g.rollouts) for g in groups]
    for g, (group, wants) in enumerate(zip(groups, wanted, strict=True)):
        for i, (rollout, want) in enumerate(zip(group.rollouts, wants, strict=True)):
            if want and not rollout.success:
                verdict = rollout.verdict.text if rollout.verdict is not None else ""
                try:
                    prompts.append(prompter.critic(group.problem, rollout.text, verdict))
                    places.append((g, i))
                except NoRoom as error:
                    out[g][i] = Failed(str(error))
    for (g, i), text in zip(places, generate(prompts, max_tokens) if prompts else [], strict=True):
        out[g][i] = demonstration(text) or None
    return out


def _build(parts: SourceParts) -> Source:
    return lambda groups, wanted: critique(groups, wanted, parts.prompter, parts.generate, parts.cfg.critique_tokens)


CRITIQUE = SourceEntry(_build, keys=CritiqueKeys, template="critique", whole_groups=True, needs="the model")
