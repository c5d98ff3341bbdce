"""The recipe's section on feedback: what holds for all sources. Each source adds keys of its own, see `feedback.SOURCES`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import Field

from vpd_mlx.common.settings import Positive, Section
from vpd_mlx.errors import Fault

__all__ = ["FeedbackSettings", "unset"]


class FeedbackSettings(Section):
    """Where the teacher's context C comes from."""

    sources: list[str] = Field(
        ["sibling", "verifier"],
        min_length=1,
        description="In order of preference: the first that has something to say.",
    )
    with_solution: bool = Field(
        False, description="A failure that has both a sibling solution and verifier text shows the teacher both."
    )
    include_attempt: bool = Field(
        False, description="Show the teacher the student's own failed attempt, too. It was found to hurt."
    )
    max_tokens: Positive = Field(1024, description="Longest context in tokens; more is cut from its middle.")
    on_success: bool = Field(
        False,
        description="Ask command, server, human and replay about successes, too, so that having feedback does not give "
        "the failure away.",
    )
    max_failures: Positive = Field(
        20, description="Failures of command or server in a row, without one answer between, that stop the run."
    )

    def faults(self, recipe: Any) -> Iterator[Fault]:
        """Sources that have nothing to say in this recipe, or no room to say it."""
        n, sources = recipe.rollout.group_size, self.sources
        uses = recipe.entry.contexts
        if uses and n == 1 and sources == ["sibling"]:
            yield Fault(
                "rollout.group_size",
                "1 leaves no sibling to learn from, and `feedback.sources` has only sibling",
                "set rollout.group_size to 2 or more, or add another source",
            )
        elif uses and n == 1 and "sibling" in sources:
            yield Fault(
                "rollout.group_size",
                "1 leaves no sibling to learn from, yet `feedback.sources` names sibling",
                "set rollout.group_size to 2 or more, or take sibling out of feedback.sources",
            )
        if len(set(sources)) != len(sources):
            yield Fault("feedback.sources", f"{sources} names a source twice", "name each once")
        needed = recipe.entry.source
        if needed is not None and needed not in sources:
            yield Fault(
                "feedback.sources",
                f"{sources} has no {needed}, and {recipe.algorithm} learns from {needed} solutions",
                f"set feedback.sources to [{needed}]",
            )
        if self.with_solution and not {"sibling", "verifier"} <= set(sources):
            yield Fault("feedback.with_solution", "needs both sibling and verifier", "name both in feedback.sources")
        yield from super().faults(recipe)
        if self.max_tokens >= recipe.rollout.max_prompt_tokens:
            yield Fault(
                "feedback.max_tokens",
                f"{self.max_tokens} leaves no room in rollout.max_prompt_tokens {recipe.rollout.max_prompt_tokens}",
                "lower feedback.max_tokens or raise rollout.max_prompt_tokens",
            )


def unset(name: str, key: str, value: object, remedy: str, recipe: Any) -> Iterator[Fault]:
    """A source that is named needs to know where to ask."""
    if name in recipe.feedback.sources and value is None:
        yield Fault(f"feedback.{key}", f"is not set, and `feedback.sources` names {name}", remedy)
