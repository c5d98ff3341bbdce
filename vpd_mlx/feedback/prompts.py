"""The messages of student, teacher and critic, and their token ids.

The words around a prompt stand in `wordings`; here they are put together. The student sees the plain prompt; the teacher sees the
same conversation with the feedback C in its last user message or in its system message, as the style has it. The completion's ids
are appended unchanged on both sides, so both score identical tokens (spec section 5).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from jinja2.exceptions import TemplateError
from pydantic import Field

from vpd_mlx.common.settings import OneOf, Section
from vpd_mlx.errors import Fault, config_error
from vpd_mlx.feedback.wordings import COMMON, STYLES
from vpd_mlx.types import Message, Problem

__all__ = ["PLACEHOLDERS", "NoRoom", "Prompter", "Templates"]

_TEACHERS = ("prompt", "student", "context")
PLACEHOLDERS: Mapping[str, tuple[str, ...]] = {
    "student": ("prompt",),
    **dict.fromkeys(("sibling", "verifier", "critique", "reference", "review"), _TEACHERS),
    "both": (*_TEACHERS, "solution"),
    "attempt": ("attempt",),
    **dict.fromkeys(("critic", "critic_right"), ("prompt", "attempt", "answer", "feedback")),
}
"""What may stand in braces in each template."""


class Templates(Section):
    """Wording of the prompts: a set by name, and single templates in place of its own. `templates: NAME` names the set alone.

    In a template `{student}` stands for the student's whole message, `{prompt}` for the problem, `{context}` for the feedback.
    """

    shorthand = "style"

    style: Annotated[str, OneOf(STYLES)] = Field(
        "after",
        description="The set of wordings, see [the styles](feedback.md#the-wording-around-it).",
    )
    student: str | None = Field(
        None, description="The student's user message, with `{prompt}`; null is the problem alone."
    )
    sibling: str | None = Field(
        None, description="The teacher's message with a sibling's solution; null, here and below, takes the style's."
    )
    verifier: str | None = Field(None, description="The teacher's message with the verifier's text.")
    critique: str | None = Field(None, description="The teacher's message with a critique.")
    reference: str | None = Field(None, description="The teacher's message with the reference solution.")
    both: str | None = Field(None, description="The teacher's message with `{solution}` and `{context}`.")
    review: str | None = Field(None, description="The teacher's message with feedback from any other source.")
    attempt: str | None = Field(None, description="Text before the feedback when `include_attempt`, with `{attempt}`.")
    critic: str | None = Field(
        None, description="The question to the critic, with `{prompt}`, `{attempt}`, `{answer}` and `{feedback}`."
    )
    critic_right: str | None = Field(None, description="The same about a right attempt, with `feedback.on_success`.")

    def text(self, name: str) -> str:
        """The wording of this name: the recipe's own, else its style's."""
        own: str | None = getattr(self, name)
        return {**COMMON, **STYLES[self.style].texts}[name] if own is None else own

    def faults(self, recipe: Any) -> Iterator[Fault]:
        """A template needs its placeholders, and must not have a misspelt one."""
        in_user = STYLES[self.style].place == "user"
        for key, known in PLACEHOLDERS.items():
            text: str | None = getattr(self, key)
            if text is None:
                continue
            teachers, names = "context" in known, re.findall(r"\{(\w+)\}", text)
            missing = ["{context}"] if teachers and "context" not in names else []
            if key == "student" and "prompt" not in names:
                missing = ["{prompt}"]
            if teachers and in_user and not {"prompt", "student"} & set(names):
                missing.insert(0, "{prompt} or {student}")
            if missing:
                yield Fault(f"templates.{key}", f"lacks {' and '.join(missing)}", "put it where that text belongs")
            # Braces of other languages, such as LaTeX's \boxed{x}, are fine: only a name close to one of ours is a mistake.
            names = re.findall(r"(?<!\w)\{(\w+)\}", text)
            ours = {name for names in PLACEHOLDERS.values() for name in names}
            unknown = [n for n in names if n not in known and difflib.get_close_matches(n, ours, n=1, cutoff=0.75)]
            if unknown:
                yield Fault(
                    f"templates.{key}",
                    f"{{{unknown[0]}}} is not a placeholder of this template",
                    f"use {', '.join(f'{{{n}}}' for n in known)}, or take it out",
                )


class NoRoom(Exception):
    """The teacher's prompt limit leaves no room for the text that a prompt is to show."""


CUT_MARK = "\n[...]\n"


def _lowered(budgets: Sequence[int], over: int) -> list[int]:
    """`over` tokens less in all: the largest budgets come down to a common level, at least 0."""
    level = next((c for c in range(max(budgets), 0, -1) if sum(max(0, b - c) for b in budgets) >= over), 0)
    return [min(b, level) for b in budgets]


def _fill(template: str, **values: str) -> str:
    # One pass over the template, so that braces within a prompt or a context stay what they are.
    return re.sub(r"\{(\w+)\}", lambda m: values.get(m.group(1), m.group(0)), template)


@dataclass(frozen=True)
class Prompter:
    """Turns problems and contexts into token ids with one tokenizer, one set of templates, one set of limits.

    Limits are in tokens: `max_prompt_tokens` of the student's prompt, `max_teacher_tokens` of the teacher's and the critic's,
    `max_context_tokens` of each text of a context within it.
    """

    tokenizer: Any
    templates: Templates
    thinking: bool
    max_prompt_tokens: int
    max_context_tokens: int
    max_teacher_tokens: int

    def template(self, name: str) -> str:
        """The wording of this name: the recipe's own, else its style's."""
        return self.templates.text(name)

    def student(self, problem: Problem) -> tuple[int, ...]:
        """Prompt ids of the student."""
        return self.encode([*problem.messages[:-1], {"role": "user", "content": self._message(problem)}])

    def _message(self, problem: Problem) -> str:
        return _fill(self.template("student"), prompt=problem.prompt)

    def teacher(
        self, problem: Problem, template: str, text: str, *, solution: str = "", attempt: str | None = None
    ) -> tuple[tuple[int, ...], bool]:
        """(the teacher's prompt ids with this context, whether the context had to be cut).

        A context that is too long loses its middle, and so do a solution and an attempt beside it, the longest of them first;
        the text around them, with the closing instruction, stays whole.

        Raises:
            NoRoom: the text around it fills the prompt alone.
        """

        def ids(context: str, solution: str, tried: str) -> tuple[int, ...]:
            return self.encode(self._shown(problem, template, context, solution, None if attempt is None else tried))

        return self._fit(ids, text, solution, attempt or "")

    def _shown(
        self, problem: Problem, template: str, context: str, solution: str, attempt: str | None
    ) -> list[Message]:
        """The conversation that the teacher sees."""
        body, own = self.template(template), self._message(problem)
        values = {"prompt": problem.prompt, "student": own, "solution": solution, "context": context}
        lead = "" if attempt is None else _fill(self.template("attempt"), attempt=attempt)
        first = re.search(r"\{(prompt|student|context|solution)\}", body)
        if lead and first is not None and first.group(1) in ("prompt", "student"):  # right behind the problem
            text = f"{_fill(body[: first.end()], **values)}\n\n{lead}{_fill(body[first.end() :], **values)}"
        else:  # or, where the problem does not come first, before all
            text = "\n\n".join([*([lead] if lead else []), _fill(body, **values)])
        *earlier, _ = problem.messages
        if STYLES[self.templates.style].place == "user":
            return [*earlier, {"role": "user", "content": text}]
        if earlier and earlier[0]["role"] == "system":
            head, *earlier = earlier
            text = f"{head['content']}\n\n{text}"
        return [{"role": "system", "content": text}, *earlier, {"role": "user", "content": own}]

    def check_style(self) -> None:
        """Refuse a style whose context the model's chat template would not show.

        Raises:
            ConfigError: the style needs a system message, and the chat template has none.
        """
        if STYLES[self.templates.style].place == "user":
            return
        seen = {self._shows(system) for system in ("one", "two")}
        if None in seen or len(seen) == 1:
            problem = f"{self.templates.style!r} puts the context into the system message, which the chat template {{}}"
            what = "refuses" if None in seen else "leaves out"
            raise config_error("templates.style", problem.format(what), "take another style, e.g. after")

    def _shows(self, system: str) -> tuple[int, ...] | None:
        try:
            return self.encode([{"role": "system", "content": system}, {"role": "user", "content": "x"}])
        except TemplateError:
            return None

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

    def _fit(self, build: Callable[..., tuple[int, ...]], *texts: str) -> tuple[tuple[int, ...], bool]:
        tokens = [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        full = [len(t) for t in tokens]
        budgets = [min(self.max_context_tokens, n) for n in full]
        while True:
            # Only these texts may shrink; they do until the whole prompt fits.
            ids = build(*(self._cut(*of) for of in zip(texts, tokens, budgets, strict=True)))
            over = len(ids) - self.max_teacher_tokens
            if over <= 0 and (budgets[0] > 0 or budgets == full):
                return ids, budgets != full
            if not any(budgets):
                raise NoRoom(
                    f"no room: the prompt and the text around it take {len(ids)} tokens of the teacher's "
                    f"{self.max_teacher_tokens}; raise feedback.max_prompt_tokens or shorten the template"
                )
            budgets = _lowered(budgets, max(over, 1))

    def _cut(self, text: str, tokens: Sequence[int], budget: int) -> str:
        """The text, or so many tokens of its two ends."""
        if budget == len(tokens):
            return text
        head, tail = tokens[: (budget + 1) // 2], tokens[len(tokens) - budget // 2 :]
        return str(self.tokenizer.decode(head) + CUT_MARK + self.tokenizer.decode(tail))
