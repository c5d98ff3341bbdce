"""Feedback: where the context C comes from that makes the teacher know more than the student.

One file for each source. It holds the keys that the source adds to the recipe's section `feedback`, the source itself, and a
`SourceEntry` that says how to build it and what the rest of the program must know of it. `SOURCES` lists the entries; the
recipe, the reference page, `vpd-mlx verify` and `vpd-mlx show --kind` follow from this list. `base.py` has the types
and the keys of no particular source, `outside.py` what is common to sources that may be slow or fail, `prompts.py` the messages
to student, teacher and critic.

A run calls, in this order:

1. `build_sources`: the recipe's sources, in its order of preference.
2. `Sources.ready`, before anything is written, and `Sources.open`, with the run folder.
3. For each step, `Sources.prefetch` with each rollout that has been graded while others are still decoded; then
   `add_context` with all groups. It asks one source after another, gives each rollout the first answer that it gets, and
   builds the teacher's prompt from it. A source that fails on a rollout leaves a reason in `Rollout.source_errors`.
4. `Sources.state` for a checkpoint, `Sources.restore` on resume, `Sources.close` at the end.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from vpd_mlx.common.functions import Listed
from vpd_mlx.common.settings import OneOf
from vpd_mlx.common.thoughts import without_thoughts
from vpd_mlx.errors import Fault
from vpd_mlx.feedback.attempts import ATTEMPTS
from vpd_mlx.feedback.base import Answer, CommonKeys, Failed, Generate, Host, Source, SourceEntry, SourceParts
from vpd_mlx.feedback.command import COMMAND
from vpd_mlx.feedback.critique import CRITIQUE
from vpd_mlx.feedback.human import HUMAN
from vpd_mlx.feedback.outside import Outside, function_entry
from vpd_mlx.feedback.prompts import NoRoom, Prompter
from vpd_mlx.feedback.reference import REFERENCE
from vpd_mlx.feedback.replay import REPLAY
from vpd_mlx.feedback.server import SERVER
from vpd_mlx.feedback.sibling import SIBLING
from vpd_mlx.feedback.verifier import VERIFIER
from vpd_mlx.types import Context, Group, Problem, Rollout

__all__ = [
    "SOURCES",
    "FeedbackSettings",
    "Sources",
    "add_context",
    "add_wrong_hints",
    "build_sources",
    "check_reachable",
    "choose_contexts",
]

SOURCES: dict[str, SourceEntry] = Listed(
    function_entry,
    sibling=SIBLING,
    attempts=ATTEMPTS,
    verifier=VERIFIER,
    critique=CRITIQUE,
    reference=REFERENCE,
    command=COMMAND,
    server=SERVER,
    human=HUMAN,
    replay=REPLAY,
)

BOTH = "both"  # the kind of a context that `feedback.with_solution` makes of a sibling's solution and verifier text

_ON_SUCCESS = [name for name, entry in SOURCES.items() if entry.on_success]
_KEYS = [entry.keys for entry in SOURCES.values() if entry.keys is not None]


# The base that comes last has its keys first.
class FeedbackSettings(*reversed(_KEYS), CommonKeys):  # type: ignore[misc]
    """Where the teacher's context C comes from."""

    sources: list[Annotated[str, OneOf(SOURCES)]] = Field(
        ["sibling", "verifier"],
        min_length=1,
        description="In order of preference: the first that has feedback on a completion provides its context.",
    )
    on_success: bool = Field(
        False,
        description=f"Ask {', '.join(_ON_SUCCESS[:-1])} and {_ON_SUCCESS[-1]} about successes, too, so that having feedback "
        "does not give the failure away.",
    )

    def faults(self, recipe: Any) -> Iterator[Fault]:
        """Some sources need a key of their own, some are never asked behind another, some say nothing on a success."""
        yield from super().faults(recipe)
        first, *rest = [name for name in self.sources if SOURCES[name].siblings] or [""]
        if rest and rest[0] != first:
            what = f"{self.sources} would never ask {rest[0]}: {first} speaks wherever it would"
            yield Fault("feedback.sources", what, f"take {rest[0]} or {first} out")
        for name in dict.fromkeys(self.sources):
            match SOURCES[name].required:
                case (key, remedy) if attrgetter(key)(self) is None:
                    yield Fault(f"feedback.{key}", f"is not set, and `feedback.sources` names {name}", remedy)
        if self.on_success and not any(SOURCES[name].on_success for name in self.sources):
            remedy = f"name {', '.join(_ON_SUCCESS[:-1])} or {_ON_SUCCESS[-1]} in feedback.sources, or take it out"
            yield Fault("feedback.on_success", f"means nothing for {self.sources}", remedy)


class Sources(dict[str, Source]):
    """Sources by name, in order of preference. Those outside this process are opened, closed and checkpointed here."""

    def outside(self) -> dict[str, Outside]:
        """The sources outside this process."""
        return {name: source for name, source in self.items() if isinstance(source, Outside)}

    def prefetch(self, problem: Problem, rollout: Rollout) -> None:
        """Ask about a graded rollout while others are decoded, if it is certain already which source is asked."""
        for name, source in self.items():
            if SOURCES[name].whole_groups:
                return
            if isinstance(source, Outside):
                source.prefetch(problem, rollout)
                return
            if source([Group(problem, (), (rollout,))], [[True]])[0][0]:
                return  # it has its context

    def for_evaluation(self) -> Sources:
        """The same sources, with one request a group at most, and none to a person."""
        return Sources({name: s.for_evaluation if isinstance(s, Outside) else s for name, s in self.items()})

    def ready(self) -> None:
        """Check that all sources can work here, see `Outside.ready`."""
        for source in self.outside().values():
            source.ready()

    def open(self, folder: Path) -> None:
        """Give the sources the run folder."""
        for source in self.outside().values():
            source.open(folder)

    def close(self) -> None:
        """End all that the sources have under way."""
        for source in self.outside().values():
            source.close()

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold of them."""
        return {name: state for name, source in self.outside().items() if (state := source.state())}

    def again(self, most: int) -> list[Problem]:
        """Problems that the sources want to be asked again in the next step, `most` at most of each."""
        return [problem for source in self.outside().values() for problem in source.again(most)]

    def figures(self) -> dict[str, float]:
        """What a row of `metrics.jsonl` says of them."""
        return {name: value for source in self.outside().values() for name, value in source.figures().items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up the state of a checkpoint."""
        for name, source in self.outside().items():
            source.restore(state.get(name, {}))


def check_reachable(cfg: Any) -> None:
    """See that sources outside this machine are there, before a model is loaded for them.

    Raises:
        SourceError: one is not.
    """
    for name in cfg.sources:
        if (reach := SOURCES[name].reach) is not None:
            reach(cfg)


def build_sources(
    cfg: Any,
    prompter: Prompter | None = None,
    generate: Generate | None = None,
    host: Host | None = None,
    problems: Collection[str] = (),
    functions: Mapping[str, Callable[..., str | None]] | None = None,
) -> Sources:
    """The recipe's sources. Without a prompter and a model, only those that need nothing (`SourceEntry.needs`).

    Raises:
        ConfigError: a program or a key is missing, or a proxy cannot be used.
        DataError: the feedback to replay cannot be read, or is on other problems.
    """
    solutions = (BOTH, *(name for name, entry in SOURCES.items() if entry.solution))
    parts = SourceParts(cfg, host or Host(), problems, solutions, prompter, generate, functions or {})
    alone = prompter is None
    return Sources({name: SOURCES[name].build(parts) for name in cfg.sources if not (alone and SOURCES[name].needs)})


@dataclass(frozen=True)
class Choice:
    """What a rollout's context is made of: its kind and text, the sibling's solution, and which sources failed, and why."""

    kind: str | None = None
    text: str = ""
    solution: str | None = None
    errors: Mapping[str, str] = field(default_factory=dict)


def choose_contexts(sources: Mapping[str, Source], groups: Sequence[Group], cfg: CommonKeys) -> list[list[Choice]]:
    """Ask the sources in their order; the first answer on a rollout becomes its context."""
    chosen = [[Choice()] * len(g.rollouts) for g in groups]
    for name, source in sources.items():
        # A failure that already has a sibling's solution may get the verifier's text as well.
        both = cfg.with_solution and name == "verifier"
        wanted = [[both or c.kind is None for c in row] for row in chosen]
        for row, answers in zip(chosen, source(groups, wanted), strict=True):
            for i, answer in enumerate(answers):
                row[i] = _updated(row[i], name, answer, both)
    return chosen


def _updated(choice: Choice, name: str, answer: Answer, both: bool) -> Choice:
    if isinstance(answer, Failed):
        return replace(choice, errors={**choice.errors, name: answer.why})
    if answer is None or not answer.strip():
        return choice
    if name == "sibling":
        choice = replace(choice, solution=answer)
    if choice.kind is None:
        return replace(choice, kind=name, text=answer)
    return replace(choice, kind=BOTH, text=answer) if both and choice.solution is not None else choice


def add_context(
    sources: Mapping[str, Source], groups: Sequence[Group], prompter: Prompter, cfg: CommonKeys
) -> list[Group]:
    """The groups, with context and teacher prompt for each rollout on which a source has an answer."""
    chosen = choose_contexts(sources, groups, cfg)
    out = []
    for group, row in zip(groups, chosen, strict=True):
        rollouts = (_with_context(prompter, cfg, group, r, c) for r, c in zip(group.rollouts, row, strict=True))
        out.append(replace(group, rollouts=tuple(rollouts)))
    return out


def add_wrong_hints(groups: Sequence[Group], prompter: Prompter, most: int) -> list[Group]:
    """The groups, with up to `most` teacher's prompts that word a wrong sibling's answer as a solution, for each rollout whose
    context is a right sibling's. An answer that fills the prompt alone is passed over.
    """

    def prompts(group: Group, rollout: Rollout) -> Iterator[tuple[int, ...]]:
        others = (r for r in group.rollouts if r is not rollout and not r.success)
        for text in dict.fromkeys(without_thoughts(r.text) for r in others):
            with contextlib.suppress(NoRoom):
                if text.strip():
                    yield prompter.teacher(group.problem, SIBLING.template, text)[0]

    def hinted(group: Group, rollout: Rollout) -> Rollout:
        if rollout.context is None or rollout.context.kind != "sibling":
            return rollout
        return replace(rollout, wrong_prompts=tuple(itertools.islice(prompts(group, rollout), most)))

    return [replace(g, rollouts=tuple(hinted(g, r) for r in g.rollouts)) for g in groups]


def _with_context(prompter: Prompter, cfg: CommonKeys, group: Group, rollout: Rollout, choice: Choice) -> Rollout:
    if choice.errors:
        rollout = replace(rollout, source_errors=choice.errors)
    if choice.kind is None:
        return rollout
    template = BOTH if choice.kind == BOTH else SOURCES[choice.kind].template
    attempt = rollout.text if cfg.include_attempt and not rollout.success else None
    try:
        prompt, cut = prompter.teacher(
            group.problem, template, choice.text, solution=choice.solution or "", attempt=attempt
        )
    except NoRoom as error:
        # Without the context the teacher would only be the student with another prompt: nothing to learn from.
        source = "verifier" if choice.kind == BOTH else choice.kind
        return replace(rollout, source_errors={**choice.errors, source: str(error)})
    return replace(rollout, context=Context(choice.kind, choice.text, cut), teacher_prompt=prompt)
