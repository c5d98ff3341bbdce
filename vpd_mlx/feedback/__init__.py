"""Feedback: one file per source of the context C.

A source is a function from graded groups to a text or nothing for each rollout. `add_context` asks them in the recipe's
order of preference and builds the teacher's prompt from the first that has something to say. A source that fails on a
rollout has nothing to say on it; why is kept on the rollout.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, create_model

from vpd_mlx.common.settings import Section
from vpd_mlx.errors import Fault
from vpd_mlx.feedback import settings
from vpd_mlx.feedback.command import Command, CommandKeys
from vpd_mlx.feedback.critique import CritiqueKeys, Generate, critique
from vpd_mlx.feedback.human import Human
from vpd_mlx.feedback.outside import Answer, Asking, Failed, Host, Outside
from vpd_mlx.feedback.reference import reference
from vpd_mlx.feedback.replay import Replay, ReplayKeys
from vpd_mlx.feedback.server import Server, ServerKeys
from vpd_mlx.feedback.sibling import sibling
from vpd_mlx.feedback.verifier import verifier
from vpd_mlx.prompts import NoRoom, Prompter
from vpd_mlx.types import Context, Group, Problem, Rollout

__all__ = [
    "SOURCES",
    "Answer",
    "Choice",
    "Failed",
    "FeedbackSettings",
    "Host",
    "Source",
    "Sources",
    "add_context",
    "build_sources",
    "choose_contexts",
]

Source = Callable[[Sequence[Group], list[list[bool]]], Sequence[Sequence[Answer]]]
"""(graded groups, which rollouts still want a context) -> a text, a failure or None for each rollout."""

WHOLE_GROUPS = ("sibling", "critique")  # what they say is known only when all of a group is


class Sources(dict[str, Source]):
    """Sources by name, in order of preference. Those outside this process are opened, closed and kept here."""

    def outside(self) -> dict[str, Outside]:
        """Those that lie outside."""
        return {name: source for name, source in self.items() if isinstance(source, Outside)}

    def early(self, problem: Problem, rollout: Rollout) -> None:
        """Ask about a graded rollout while others are decoded, if it is certain already who is to be asked."""
        for name, source in self.items():
            if name in WHOLE_GROUPS:
                return
            if isinstance(source, Outside):
                source.early(problem, rollout)
                return
            if source([Group(problem, (), (rollout,))], [[True]])[0][0]:
                return  # it has its context

    def for_evaluation(self) -> Sources:
        """The same, but sparing with requests: an evaluation needs one context a group, and none from a person."""
        return Sources({name: s.sparing if isinstance(s, Outside) else s for name, s in self.items()})

    def ready(self) -> None:
        """A run is about to begin.

        Raises:
            ConfigError: a source cannot work here.
        """
        for source in self.outside().values():
            source.ready()

    def open(self, folder: Path) -> None:
        """The run folder is there."""
        for source in self.outside().values():
            source.open(folder)

    def close(self) -> None:
        """The run is over."""
        for source in self.outside().values():
            source.close()

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold of them."""
        return {name: state for name, source in self.outside().items() if (state := source.state())}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up the state of a checkpoint."""
        for name, source in self.outside().items():
            source.restore(state.get(name, {}))


@dataclass(frozen=True)
class Build:
    """What a source may be built from: the section `feedback`, the wording, the model itself, the run, and the ids of the
    problems that may be replayed."""

    cfg: Any
    prompter: Prompter
    generate: Generate
    host: Host
    problems: Collection[str]


@dataclass(frozen=True)
class Entry:
    """One source: how it is built, the keys that it adds to the section `feedback`, and whether it can be asked about a
    success."""

    build: Callable[[Build], Source]
    keys: type[Section] | None = None
    on_success: bool = False


def _command(b: Build) -> Source:
    program = Command(b.cfg.command or [], b.cfg.command_timeout, b.cfg.command_workers)
    return Asking("command", program, b.cfg, b.cfg.command_workers, b.host)


def _server(b: Build) -> Source:
    return Asking("server", Server(b.cfg.server, b.prompter, b.host.note), b.cfg, b.cfg.server.concurrency, b.host)


def _critique(b: Build) -> Source:
    return lambda groups, wanted: critique(groups, wanted, b.prompter, b.generate)


SOURCES: dict[str, Entry] = {
    "sibling": Entry(lambda b: sibling),
    "verifier": Entry(lambda b: verifier),
    "critique": Entry(_critique, CritiqueKeys),
    "reference": Entry(lambda b: reference),
    "command": Entry(_command, CommandKeys, on_success=True),
    "server": Entry(_server, ServerKeys, on_success=True),
    "human": Entry(lambda b: Human(b.cfg, b.host), on_success=True),
    "replay": Entry(
        lambda b: Replay(Path(b.cfg.replay or ""), b.problems, b.cfg.on_success), ReplayKeys, on_success=True
    ),
}


class _Feedback(settings.FeedbackSettings):
    """Where the teacher's context C comes from."""

    sources: list[Literal[tuple(SOURCES)]] = Field(  # type: ignore[valid-type]
        ["sibling", "verifier"],
        min_length=1,
        description="In order of preference: the first that has something to say.",
    )

    def faults(self, recipe: Any) -> Iterator[Fault]:
        """Successes can only be spoken about by sources outside."""
        yield from super().faults(recipe)
        able = [name for name, entry in SOURCES.items() if entry.on_success]
        if self.on_success and not set(able) & set(self.sources):
            yield Fault(
                "feedback.on_success",
                f"means nothing for {self.sources}",
                f"name {', '.join(able[:-1])} or {able[-1]} in feedback.sources, or take it out",
            )


if TYPE_CHECKING:
    FeedbackSettings = _Feedback
else:
    # Last in the order of inheritance is first in the order of keys.
    _keys = [entry.keys for entry in reversed(SOURCES.values()) if entry.keys is not None]
    FeedbackSettings = create_model(
        "FeedbackSettings", __base__=(*_keys, _Feedback), __module__=__name__, __doc__=_Feedback.__doc__
    )


def build_sources(
    cfg: Any,
    prompter: Prompter,
    generate: Generate,
    host: Host | None = None,
    problems: Collection[str] = (),
) -> Sources:
    """The recipe's sources. `generate` samples the model's own critiques; `problems` are the ids that may be replayed.

    Raises:
        ConfigError: a program or a key is missing.
        DataError: what is to be replayed cannot be read.
    """
    parts = Build(cfg, prompter, generate, host or Host(), problems)
    return Sources({name: SOURCES[name].build(parts) for name in cfg.sources})


@dataclass(frozen=True)
class Choice:
    """What a rollout's context is made of: its kind and text, the sibling's solution, and who failed, with the reason."""

    kind: str | None = None
    text: str = ""
    solution: str | None = None
    errors: Mapping[str, str] = field(default_factory=dict)


def choose_contexts(
    sources: Mapping[str, Source], groups: Sequence[Group], cfg: FeedbackSettings
) -> list[list[Choice]]:
    """Ask the sources in their order: the first that has something to say is heard."""
    chosen = [[Choice()] * len(g.rollouts) for g in groups]
    for name, source in sources.items():
        # A failure that already has a sibling's solution may get the checker's words on top.
        both = cfg.with_solution and name == "verifier"
        wanted = [[both or c.kind is None for c in row] for row in chosen]
        for row, answers in zip(chosen, source(groups, wanted), strict=True):
            for i, answer in enumerate(answers):
                row[i] = _heard(row[i], name, answer, both)
    return chosen


def _heard(choice: Choice, name: str, answer: Answer, both: bool) -> Choice:
    if isinstance(answer, Failed):
        return replace(choice, errors={**choice.errors, name: answer.why})
    if answer is None or not answer.strip():
        return choice
    if name == "sibling":
        choice = replace(choice, solution=answer)
    if choice.kind is None:
        return replace(choice, kind=name, text=answer)
    return replace(choice, kind="both", text=answer) if both and choice.solution is not None else choice


def add_context(
    sources: Mapping[str, Source], groups: Sequence[Group], prompter: Prompter, cfg: FeedbackSettings
) -> list[Group]:
    """The groups, each rollout with its context and teacher prompt where a source had something to say."""
    chosen = choose_contexts(sources, groups, cfg)
    return [
        replace(
            group,
            rollouts=tuple(_with_context(prompter, cfg, group, r, c) for r, c in zip(group.rollouts, row, strict=True)),
        )
        for group, row in zip(groups, chosen, strict=True)
    ]


def _with_context(prompter: Prompter, cfg: FeedbackSettings, group: Group, rollout: Rollout, choice: Choice) -> Rollout:
    if choice.errors:
        rollout = replace(rollout, source_errors=choice.errors)
    if choice.kind is None:
        return rollout
    attempt = rollout.text if cfg.include_attempt and not rollout.success else None
    try:
        prompt, cut = prompter.teacher(
            group.problem, choice.kind, choice.text, solution=choice.solution or "", attempt=attempt
        )
    except NoRoom as error:
        # Without its words the teacher would only be a student under other wording: nothing to learn from.
        source = "verifier" if choice.kind == "both" else choice.kind
        return replace(rollout, source_errors={**choice.errors, source: str(error)})
    return replace(rollout, context=Context(choice.kind, choice.text, cut), teacher_prompt=prompt)
