"""Feedback: one file per source of the context C.

A source is a function from graded groups to a text or nothing for each rollout. `add_context` asks them in the recipe's
order of preference and builds the teacher's prompt from the first that has something to say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from vpd_mlx.config import Feedback
from vpd_mlx.feedback.critique import Generate, critique
from vpd_mlx.feedback.reference import reference
from vpd_mlx.feedback.sibling import sibling
from vpd_mlx.feedback.verifier import verifier
from vpd_mlx.prompts import Prompter
from vpd_mlx.types import Context, Group, Rollout

__all__ = ["Source", "add_context", "build_sources"]

Source = Callable[[Sequence[Group], list[list[bool]]], list[list[str | None]]]
"""(graded groups, which rollouts still want a context) -> a text or None for each rollout."""


def build_sources(cfg: Feedback, prompter: Prompter, generate: Generate) -> dict[str, Source]:
    """The recipe's sources by name, in its order of preference. `generate` samples the model's own critiques."""
    every: Mapping[str, Source] = {
        "sibling": sibling,
        "verifier": verifier,
        "reference": reference,
        "critique": lambda groups, wanted: critique(groups, wanted, prompter, generate),
    }
    return {name: every[name] for name in cfg.sources}


def add_context(
    sources: Mapping[str, Source], groups: Sequence[Group], prompter: Prompter, cfg: Feedback
) -> list[Group]:
    """The groups, each rollout with its context and teacher prompt where a source had something to say."""
    wanted = [[True] * len(g.rollouts) for g in groups]
    chosen: list[list[tuple[str, str] | None]] = [[None] * len(g.rollouts) for g in groups]
    solutions: list[list[str | None]] = [[None] * len(g.rollouts) for g in groups]
    for name, source in sources.items():
        asked = wanted
        if cfg.with_solution and name == "verifier":
            # A failure that already has a sibling's solution may get the checker's words on top.
            asked = [[True] * len(g.rollouts) for g in groups]
        for g, texts in enumerate(source(groups, asked)):
            for i, text in enumerate(texts):
                if text is None or not text.strip():
                    continue
                if name == "sibling":
                    solutions[g][i] = text
                if wanted[g][i]:
                    chosen[g][i], wanted[g][i] = (name, text), False
                elif cfg.with_solution and name == "verifier" and solutions[g][i] is not None:
                    chosen[g][i] = ("both", text)
    return [
        replace(
            group,
            rollouts=tuple(
                _with_context(prompter, cfg, group, r, chosen[g][i], solutions[g][i])
                for i, r in enumerate(group.rollouts)
            ),
        )
        for g, group in enumerate(groups)
    ]


def _with_context(
    prompter: Prompter,
    cfg: Feedback,
    group: Group,
    rollout: Rollout,
    chosen: tuple[str, str] | None,
    solution: str | None,
) -> Rollout:
    if chosen is None:
        return rollout
    kind, text = chosen
    attempt = rollout.text if cfg.include_attempt and not rollout.success else None
    prompt, cut = prompter.teacher(group.problem, kind, text, solution=solution or "", attempt=attempt)
    return replace(rollout, context=Context(kind, text, cut), teacher_prompt=prompt)
