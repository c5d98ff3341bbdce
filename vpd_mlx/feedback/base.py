"""What a source of feedback is, what it is built from, what the program must know of it, and the keys that all sources share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import Field

from vpd_mlx.common.settings import Positive, Section
from vpd_mlx.errors import Fault
from vpd_mlx.types import Group, Rollout

__all__ = ["Answer", "CommonKeys", "Failed", "Generate", "Host", "Source", "SourceEntry", "SourceParts", "answer_each"]

Reply = TypeVar("Reply")


@dataclass(frozen=True)
class Failed:
    """In place of an answer: the source failed, and why."""

    why: str


Answer = str | Failed | None
"""A text; a failure; or nothing to say."""

Source = Callable[[Sequence[Group], list[list[bool]]], Sequence[Sequence[Answer]]]
"""(graded groups, which of their rollouts still want a context) -> an answer for each rollout."""

Generate = Callable[[Sequence[tuple[int, ...]], int], list[str]]
"""(prompt ids, most tokens of an answer) -> one sampled text for each prompt."""


@dataclass(frozen=True)
class Host:
    """What a source may ask of the run that it serves.

    Attributes:
        on_progress: called often with (rollouts answered, rollouts in all); may raise to end the wait.
        note: shows a line to the user.
        stopping: whether the run is to stop.
        stop: asks the run to stop.
        paused: a context within which the live view leaves the terminal alone.
    """

    on_progress: Callable[[int, int], None] = lambda done, total: None
    note: Callable[[str], None] = lambda text: None
    stopping: Callable[[], bool] = lambda: False
    stop: Callable[[], None] = lambda: None
    paused: Callable[[], AbstractContextManager[None]] = nullcontext


@dataclass(frozen=True)
class SourceParts:
    """What a source may be built from.

    Attributes:
        cfg: the recipe's section `feedback`, with the keys of all sources.
        host: the run.
        problems: ids of the task's problems; empty where they are not known.
        solutions: names of the sources that show a solution.
        prompter: the `Prompter`, and
        generate: the model itself (`Generate`); both None where a source that needs something is left out.
        functions: those of a Python program by name, `function:NAME`.
    """

    cfg: Any
    host: Host = Host()
    problems: Collection[str] = ()
    solutions: Collection[str] = ()
    prompter: Any = None
    generate: Any = None
    functions: Mapping[str, Callable[..., str | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class SourceEntry:
    """One line of `SOURCES`.

    Attributes:
        build: makes the source when a run begins.
        keys: the keys that it adds to the recipe's section `feedback`, and their faults.
        required: (the key that must be set when the source is named, how to set it).
        template: the wording of the teacher's prompt. `review` does not tell whether the attempt was right.
        whole_groups: it answers only once all rollouts of a group are graded.
        on_success: it answers on successes, too, when `feedback.on_success` is set.
        solution: its texts are solutions of the problem, not comments on a completion.
        siblings: its texts are other completions of the group, so that it speaks wherever another such source would.
        single_rank: it cannot serve several ranks.
        needs: what it cannot work without. `vpd-mlx verify` has none of these and leaves the source out.
        reach: given the section `feedback`, raises a `SourceError` where the source is not there, before anything is loaded.
        free: it takes what the task and the group hold already. `vpd-mlx probe` tries it even where the recipe does not name it.
    """

    build: Callable[[SourceParts], Source]
    keys: type[Section] | None = None
    required: tuple[str, str] | None = None
    template: str = "review"
    whole_groups: bool = False
    on_success: bool = False
    solution: bool = False
    siblings: bool = False
    single_rank: bool = False
    needs: str = ""
    free: bool = False
    reach: Callable[[Any], None] | None = None


class CommonKeys(Section):
    """The keys of the section `feedback` that belong to no source. `FeedbackSettings` describes the two that name sources."""

    sources: list[str] = Field(["sibling", "verifier"])
    with_solution: bool = Field(
        False, description="Show the teacher both where a failure has a sibling's solution and verifier text."
    )
    include_attempt: bool = Field(
        False, description="Show the teacher the student's own failed attempt, too. It was found to hurt."
    )
    max_tokens: Positive = Field(
        1024,
        description="Longest context in tokens; more is cut from its middle. So is a solution or an attempt beside it.",
    )
    max_prompt_tokens: Positive | None = Field(
        None, description="Longest prompt of the teacher or a critic in tokens; null takes `rollout.max_prompt_tokens`."
    )
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
            what = f"{sources} has no {needed}, and {recipe.algorithm} learns from {needed} solutions"
            yield Fault("feedback.sources", what, f"set feedback.sources to [{needed}]")
        if self.with_solution and not {"sibling", "verifier"} <= set(sources):
            yield Fault("feedback.with_solution", "needs both sibling and verifier", "name both in feedback.sources")
        if self.max_tokens >= recipe.max_teacher_tokens:
            key = f"{'rollout' if self.max_prompt_tokens is None else 'feedback'}.max_prompt_tokens"
            what = f"{self.max_tokens} leaves no room in {key} {recipe.max_teacher_tokens}"
            yield Fault("feedback.max_tokens", what, f"lower feedback.max_tokens or raise {key}")
        yield from super().faults(recipe)


def answer_each(
    groups: Sequence[Group], wanted: list[list[bool]], answer: Callable[[Group, Rollout], Reply]
) -> list[list[Reply | None]]:
    """The answers of a source that looks at one rollout at a time; None for those that want none."""
    return [
        [answer(group, rollout) if want else None for rollout, want in zip(group.rollouts, wants, strict=True)]
        for group, wants in zip(groups, wanted, strict=True)
    ]
