"""The messages of student, teacher and critic, and the token ids they become.

Only this module and `tasks/` hold prompt text. The student sees the plain prompt; the teacher sees the same
conversation with its last user message replaced by one that carries the feedback C. The completion's ids are appended
unchanged on both sides, so both score identical tokens (spec section 5).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from vpd_mlx.common.settings import Section
from vpd_mlx.errors import Fault
from vpd_mlx.types import Message, Problem

__all__ = ["DEFAULT_TEMPLATES", "NoRoom", "Prompter", "Templates", "demonstration"]

DEFAULT_TEMPLATES: Mapping[str, str] = {
    "student": "{prompt}",
    "sibling": (
        "{prompt}\n\nA correct solution of this problem, for your guidance:\n\n{context}\n\n"
        "Now solve the problem yourself, in the format it asks for."
    ),
    "verifier": (
        "{prompt}\n\nAn earlier attempt at this problem failed. What the checker said of it:\n\n{context}\n\n"
        "Solve the problem without that mistake, in the format it asks for."
    ),
    "critique": (
        "{prompt}\n\nAn earlier attempt at this problem failed. What a reviewer said of it:\n\n{context}\n\n"
        "Solve the problem with this advice, in the format it asks for."
    ),
    "reference": (
        "{prompt}\n\nThe reference solution of this problem:\n\n{context}\n\n"
        "Now solve the problem yourself, in the format it asks for."
    ),
    "both": (
        "{prompt}\n\nA correct solution of this problem:\n\n{solution}\n\nAn earlier attempt failed. What the checker "
        "said of it:\n\n{context}\n\nNow solve the problem yourself, in the format it asks for."
    ),
    "review": (
        "{prompt}\n\nWhat a reviewer said of an earlier attempt at this problem:\n\n{context}\n\n"
        "Solve the problem with this advice, in the format it asks for."
    ),
    "attempt": "The earlier attempt:\n\n{attempt}\n\n",
    "critic": (
        "Problem:\n\n{prompt}\n\nA failed attempt:\n\n{attempt}\n\nThe right answer: {answer}\n\n{feedback}\n\n"
        "In two or three sentences, say what went wrong and what to do differently. Do not write out the solution."
    ),
    "critic_right": (
        "Problem:\n\n{prompt}\n\nAn attempt that is right:\n\n{attempt}\n\nThe right answer: {answer}\n\n{feedback}\n\n"
        "In two or three sentences, say what it does well and what matters in this problem. Do not write out the solution."
    ),
}

# Sources outside this process share one wording, which does not give away whether the attempt was right.
_REVIEWS = ("command", "server", "human", "replay")


class Templates(Section):
    """Wording of the prompts. null keeps the built-in text; `{prompt}` and `{context}` are filled in."""

    student: str | None = Field(None, description="The student's user message, from `{prompt}`.")
    sibling: str | None = Field(None, description="The teacher's user message with another solution of the group.")
    verifier: str | None = Field(None, description="The teacher's user message with the verifier's words.")
    critique: str | None = Field(None, description="The teacher's user message with a critique.")
    reference: str | None = Field(None, description="The teacher's user message with the reference solution.")
    both: str | None = Field(None, description="The teacher's user message with `{solution}` and `{context}`.")
    review: str | None = Field(
        None, description="The teacher's user message with feedback from command, server, human or replay."
    )
    attempt: str | None = Field(None, description="Text before the feedback when `include_attempt`, with `{attempt}`.")
    critic: str | None = Field(
        None, description="What the critic is asked, with `{prompt}`, `{attempt}`, `{answer}` and `{feedback}`."
    )
    critic_right: str | None = Field(
        None, description="The same of a right attempt: what a server is asked when `feedback.on_success`."
    )

    def faults(self, recipe: Any) -> Iterator[Fault]:
        """A template must hold what is to be filled in, and nothing that nothing fills."""
        for key, needed in (("student", ("{prompt}",)), *((k, ("{prompt}", "{context}")) for k in _CONTEXT_TEMPLATES)):
            text = getattr(self, key)
            missing = [p for p in needed if text is not None and p not in text]
            if missing:
                yield Fault(f"templates.{key}", f"lacks {' and '.join(missing)}", "put it where the text belongs")
        for key, known in _TEMPLATE_FIELDS.items():
            # Braces of other tongues, LaTeX's \boxed{x} for one, are left alone: only what looks like one of ours counts.
            names = re.findall(r"(?<!\w)\{(\w+)\}", getattr(self, key) or "")
            ours = {n for fields in _TEMPLATE_FIELDS.values() for n in fields}
            unknown = [n for n in names if n not in known and difflib.get_close_matches(n, ours, n=1, cutoff=0.75)]
            if unknown:
                yield Fault(
                    f"templates.{key}",
                    f"{{{unknown[0]}}} is filled by nothing",
                    f"use {', '.join(f'{{{n}}}' for n in known)}, or take it out",
                )


_TEMPLATE_FIELDS = {
    "student": ("prompt",),
    **dict.fromkeys(("sibling", "verifier", "critique", "reference", "review"), ("prompt", "context")),
    "both": ("prompt", "context", "solution"),
    "attempt": ("attempt",),
    **dict.fromkeys(("critic", "critic_right"), ("prompt", "attempt", "answer", "feedback")),
}
_CONTEXT_TEMPLATES = ("sibling", "verifier", "critique", "reference", "both", "review")


class NoRoom(Exception):
    """Nothing of what is to be shown would be left within `rollout.max_prompt_tokens`."""


CUT_MARK = "\n[...]\n"
_THINKING = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)


def demonstration(text: str) -> str:
    """A completion as it may be shown to a teacher: its thinking is cut out."""
    return _THINKING.sub("", text).strip()


def _fill(template: str, **values: str) -> str:
    # One pass over the template, so that braces within a prompt or a context stay what they are.
    return re.sub(r"\{(\w+)\}", lambda m: values.get(m.group(1), m.group(0)), template)


@dataclass(frozen=True)
class Prompter:
    """Turns problems and contexts into token ids with one tokenizer, one set of templates, one set of limits."""

    tokenizer: Any
    templates: Templates
    thinking: bool
    max_prompt_tokens: int
    max_context_tokens: int

    def template(self, kind: str) -> str:
        """The wording for `kind`: the recipe's, else the built-in one."""
        kind = "review" if kind in _REVIEWS else kind
        own: str | None = getattr(self.templates, kind)
        return DEFAULT_TEMPLATES[kind] if own is None else own

    def student(self, problem: Problem) -> tuple[int, ...]:
        """Prompt ids of the student."""
        content = _fill(self.template("student"), prompt=problem.prompt)
        return self.encode([*problem.messages[:-1], {"role": "user", "content": content}])

    def teacher(
        self, problem: Problem, kind: str, text: str, *, solution: str = "", attempt: str | None = None
    ) -> tuple[tuple[int, ...], bool]:
        """(prompt ids of the teacher under a context, whether the context had to be cut).

        A context that is too long loses its middle: what stands around it, the closing instruction above all, stays
        whole.

        Raises:
            NoRoom: that alone fills the prompt, and nothing of the context would be left.
        """

        def ids(context: str) -> tuple[int, ...]:
            body = _fill(self.template(kind), prompt=problem.prompt, context=context, solution=solution)
            lead = "" if attempt is None else _fill(self.template("attempt"), attempt=attempt)
            if lead:
                body = body.replace(problem.prompt, f"{problem.prompt}\n\n{lead}", 1)
            return self.encode([*problem.messages[:-1], {"role": "user", "content": body}])

        return self._fit(ids, text)

    def critic(self, problem: Problem, attempt: str, feedback: str) -> tuple[int, ...]:
        """Prompt ids that ask the model for a critique of its own attempt.

        Raises:
            NoRoom: nothing of the attempt would be left.
        """

        def ids(shown: str) -> tuple[int, ...]:
            return self.encode([{"role": "user", "content": self.critic_message(problem, shown, feedback)}])

        return self._fit(ids, attempt)[0]

    def critic_message(self, problem: Problem, attempt: str, feedback: str, *, right: bool = False) -> str:
        """What a critic, this model or another, is asked of an attempt that failed or was right."""
        answer = problem.answer or problem.reference or ""
        template = self.template("critic_right" if right else "critic")
        return _fill(template, prompt=problem.prompt, attempt=attempt, answer=answer, feedback=feedback)

    def encode(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Chat messages as ids, ready for a completion. A model without a chat template gets the plain text."""
        if self.tokenizer.chat_template is None:
            text = "\n\n".join(m["content"] for m in messages) + "\n"
            return tuple(self.tokenizer.encode(text))
        # mlx-lm's wrapper sets enable_thinking by itself when it is absent: say it, on both sides alike.
        ids = self.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, enable_thinking=self.thinking, tokenize=True, return_dict=False
        )
        return tuple(int(i) for i in ids)

    def _fit(self, build: Callable[[str], tuple[int, ...]], text: str) -> tuple[tuple[int, ...], bool]:
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        budget = self.max_context_tokens
        ids = build(text)
        if len(tokens) <= budget and len(ids) <= self.max_prompt_tokens:
            return ids, False
        budget = min(budget, len(tokens))
        while True:
            # What does not belong to the context is fixed; shrink the context until the whole fits.
            head, tail = tokens[: (budget + 1) // 2], tokens[len(tokens) - budget // 2 :]
            ids = build(self.tokenizer.decode(head) + CUT_MARK + self.tokenizer.decode(tail))
            over = len(ids) - self.max_prompt_tokens
            if over <= 0 and budget > 0:
                return ids, True
            if budget == 0:
                raise NoRoom(
                    f"no room: the prompt and the words around it take {len(ids)} tokens of "
                    f"rollout.max_prompt_tokens {self.max_prompt_tokens}; raise it or shorten the template"
                )
            budget = max(0, budget - max(over, 1))
