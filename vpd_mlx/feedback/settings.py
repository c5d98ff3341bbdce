"""The recipe's section `feedback`: the keys that hold for all sources. Each source adds its own, see `feedback.SOURCES`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import Field

from vpd_mlx.common.settings import Positive, Section
from vpd_mlx.errors import Fault

__all__ = ["CommonKeys"]


class CommonKeys(Section):
    """The keys of the section `feedback` that belong to no source. `FeedbackSettings` describes the two that name sources."""

    sources: list[str] = Field(["sibling", "verifier"])
    with_solution: bool = Field(
        False, description="Show the teacher both where a failure has a sibling's solution and verifier text."
    )
    include_attempt: bool = Field(
        False, description="Show the teacher the student's own failed attempt, too. It was found to hurt."
    )
    max_tokens: Positive = Field(1024, description="Longest context in tokens; more is cut from its middle.")
    on_success: bool = False
    max_failures: Positive = Field(
        20, description="Failures in a row of a source outside this process that stop the run."
    )

    def faults(self, recipe: Any) -> Iterator[Fault]:
        """Sources that contradict each other or the algorithm, and contexts that leave no room for a prompt."""
        sources, needed = self.sources, recipe.entry.source
        if len(set(sources)) != len(sources):
            yield Fault("feedback.sources", f"{sources} names a source twice", "name each once")
        if needed is not None and needed not in sources:
            yield Fault(
                "feedback.sources",
                f"{sources} has no {needed}, and {recipe.algorithm} learns from {needed} solutions",
                f"set feedback.sources to [{needed}]",
            )
        if self.with_solution and not {"sibling", "verifier"} <= set(sources):
            yield Fault("feedback.with_solution", "needs both sibling and verifier", "name both in feedback.sources")
        if self.max_tokens >= recipe.rollout.max_prompt_tokens:
            yield Fault(
                "feedback.max_tokens",
                f"{self.max_tokens} leaves no room in rollout.max_prompt_tokens {recipe.rollout.max_prompt_tokens}",
                "lower feedback.max_tokens or raise rollout.max_prompt_tokens",
            )
        yield from super().faults(recipe)
