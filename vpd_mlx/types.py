"""The frozen records that travel through a step: problem, rollout, verdict, context, group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from vpd_mlx.common.text import without_surrogates

__all__ = ["Context", "FinishReason", "Group", "Message", "Problem", "Rollout", "TokenRow", "Verdict"]

Message = dict[str, str]
MOST_TEXT = 20_000  # characters of a verdict's texts
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Problem:
    """One task row.

    `messages` is the student's chat (an optional system message, the last one from the user). `answer` is what the
    verifier compares with, `reference` a worked solution if the data has one, `data` whatever else a verifier needs.
    """

    id: str
    messages: tuple[Message, ...]
    answer: str | None = None
    reference: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """The last user message."""
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class Verdict:
    """A verifier's verdict on one completion.

    `score` lies in [0, 1]; `text` is its feedback in words, empty if it has none. `error` describes a failure of the
    verifier itself: the score then means nothing, and the rollout leaves the batch. Both texts are cut to `MOST_TEXT`
    characters, and lone surrogates, which no file or tokenizer accepts, become `?`.
    """

    score: float
    text: str = ""
    error: str | None = None

    def __post_init__(self) -> None:
        for name in ("text", "error"):
            text = getattr(self, name)
            if text:
                object.__setattr__(self, name, without_surrogates(text[:MOST_TEXT]))


@dataclass(frozen=True)
class Context:
    """The language feedback C of one completion: its kind, its words, and whether it was cut to fit."""

    kind: str
    text: str
    cut: bool = False


@dataclass(frozen=True)
class Rollout:
    """One completion sampled from the student.

    `tokens` are the completion's ids with the stop token if there is one; `logps` the sampler's float32
    log-probabilities of these tokens, at its temperature; `text` the decoded completion without the stop token.
    `teacher_prompt` is set with `context`. `wrong_prompts` are the teacher's prompts with wrong siblings' answers worded as
    solutions, for algorithms that contrast them. `source_errors` says which feedback sources failed on it, and why.
    """

    tokens: tuple[int, ...]
    logps: tuple[float, ...]
    text: str
    finish: FinishReason
    verdict: Verdict | None = None
    success: bool = False
    context: Context | None = None
    teacher_prompt: tuple[int, ...] | None = None
    wrong_prompts: tuple[tuple[int, ...], ...] = ()
    source_errors: Mapping[str, str] = field(default_factory=dict)

    def graded(self, verdict: Verdict, threshold: float) -> Rollout:
        """This rollout with its verdict; success is score >= threshold."""
        return replace(self, verdict=verdict, success=verdict.error is None and verdict.score >= threshold)


@dataclass(frozen=True)
class Group:
    """The N rollouts of one problem, with the student's prompt ids."""

    problem: Problem
    prompt: tuple[int, ...]
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True)
class TokenRow:
    """A prompt and a completion, as token ids, to be scored or trained on."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
