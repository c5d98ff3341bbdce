"""The messages of student, teacher and critic, and their token ids.

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


class Templates(Section):
    """Wording of the prompts. null keeps the built-in text; `{prompt}` and `{context}` are replaced by the texts themselves."""

    student: str | None = Field(None, description="The student's user message, with `{prompt}`.")
    sibling: str | None = Field(None, description="The teacher's user message with a sibling's solution.")
    verifier: str | None = Field(None, description="The teacher's user message with the verifier's text.")
    critique: str | None = Field(None, description="The teacher's user message with a critique.")
    reference: str | None = Field(None, description="The teacher's user message with the reference solution.")
    both: str | None = Field(None, description="The teacher's user message with `{solution}` and `{context}`.")
    review: str | None = Field(None, description="The teacher's user message with feedback from any other source.")
    attempt: str | None = Field(None, description="Text before the feedback when `include_attempt`, with `{attempt}`.")
    critic: str | None = Field(
        None, description="The question to the critic, with `{prompt}`, `{attempt}`, `{answer}` and `{feedback}`."
    )
    critic_right: str | None = Field(None, description="The same about a right attempt, with `feedback.on_success`.")

    def faults(self, recipe: Any) -> Iterator[Fault]:
        """A template needs its placeholders, and must not have a misspelt one."""
        fields = {key: re.findall(r"\{(\w+)\}", text) for key, text in DEFAULT_TEMPLATES.items()}
        ours = {name for names in fields.values() for name in names}
        for key, known in fields.items():
            text: str | None = getattr(self, key)
            if text is None:
                continue
            needed = ("prompt", "context") if "context" in known else ("prompt",) if key == "student" else ()
            missing = [f"{{{name}}}" for name in needed if f"{{{name}}}" not in text]
            if missing:
                yield Fault(f"templates.{key}", f"lacks {' and '.join(missing)}", "put it where that text belongs")
            # Braces of other languages, such as LaTeX's \boxed{x}, are fine: only a name close to one of ours is a mistake.
            names = re.findall(r"(?<!\w)\{(\w+)\}", text)
            unknown = [n for n in names if n not in known and difflib.get_close_matches(n, ours, n=1, cutoff=0.75)]
            if unknown:
                yield Fault(
                    f"templates.{key}",
                    f"{{{unknown[0]}}} is not a placeholder of this template",
                    f"use {', '.join(f'{{{n}}}' for n in known)}, or take it out",
                )


class NoRoom(Exception):
    """`rollout.max_prompt_tokens` leaves no room for the text that a prompt is to show."""


CUT_MARK = "\n[...]\n"
_THINKING = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)


def demonstration(text: str) -> str:
    """A completion without its thinking, as a teacher may see it."""
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

    def template(self, name: str) -> str:
        """The wording of this name: the recipe's, else the built-in one."""
        own: str | None = getattr(self.templates, name)
        return DEFAULT_TEMPLATES[name] if own is None else own

    def student(self, problem: Problem) -> tuple[int, ...]:
        """Prompt ids of the student."""
        content = _fill(self.template("student"), prompt=problem.prompt)
        return self.encode([*problem.messages[:-1], {"role": "user", "content": content}])

    def teacher(
        self, problem: Problem, template: str, text: str, *, solution: str = "", attempt: str | None = None
    ) -> tuple[tuple[int, ...], bool]:
        """(the teacher's prompt ids with this context, whether the context had to be cut).

        A context that is too long loses its middle; the text around it, with the closing instruction, stays whole.

        Raises:
            NoRoom: the text around it fills the prompt alone.
        """

        def ids(context: str) -> tuple[int, ...]:
            body = _fill(self.template(template), prompt=problem.prompt, context=context, solution=solution)
            lead = "" if attempt is None else _fill(self.template("attempt"), attempt=attempt)
            if lead:
                body = body.replace(problem.prompt, f"{problem.prompt}\n\n{lead}", 1)
            return self.encode([*problem.messages[:-1], {"role": "user", "content": body}])

        return self._fit(ids, text)

    def critic(self, problem: Problem, attempt: str, feedback: str) -> tuple[int, ...]:
        """Prompt ids that ask the model for a critique of its own attempt.

        Raises:
            NoRoom: the text around the attempt fills the prompt alone.
        """

        def ids(shown: str) -> tuple[int, ...]:
            return self.encode([{"role": "user", "content": self.critic_message(problem, shown, feedback)}])

        return self._fit(ids, attempt)[0]

    def critic_message(self, problem: Problem, attempt: str, feedback: str, *, right: bool = False) -> str:
        """The question to a critic, this model or another, about an attempt that failed or was right."""
        answer = problem.answer or problem.reference or ""
        template = self.template("critic_right" if right else "critic")
        return _fill(template, prompt=problem.prompt, attempt=attempt, answer=answer, feedback=feedback)

    def encode(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Chat messages as ids, ready for a completion. A model without a chat template gets the plain text."""
        if self.tokenizer.chat_template is None:
            text = "\n\n".join(m["content"] for m in messages) + "\n"
            return tuple(self.tokenizer.encode(text))
        # mlx-lm's wrapper sets enable_thinking itself when it is absent: pass it, for student and teacher alike.
        ids = self.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, enable_thinking=self.thinking, tokenize=True, return_dict=False
        )
        return tuple(int(i) for i in ids)

    def _fit(self, build: Callable[[str], tuple[int, ...]], text: str) -> tuple[tuple[int, ...], bool]:
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        budget, ids = min(self.max_context_tokens, len(tokens)), build(text)
        if budget == len(tokens) and len(ids) <= self.max_prompt_tokens:
            return ids, False
        while True:
            # Only the context may shrink; do so until the whole prompt fits.
            head, tail = tokens[: (budget + 1) // 2], tokens[len(tokens) - budget // 2 :]
            ids = build(self.tokenizer.decode(head) + CUT_MARK + self.tokenizer.decode(tail))
            over = len(ids) - self.max_prompt_tokens
            if over <= 0 and budget > 0:
                return ids, True
            if budget == 0:
                raise NoRoom(
                    f"no room: the prompt and the text around it take {len(ids)} tokens of "
                    f"rollout.max_prompt_tokens {self.max_prompt_tokens}; raise it or shorten the template"
                )
            budget = max(0, budget - max(over, 1))
