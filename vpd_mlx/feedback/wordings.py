"""The built-in wordings of the prompts: sets of templates by name, the recipe's `templates.style`.

Each set puts the same context in another place, or other words around it. The wording moves the style of the teacher's answers,
and the student learns that with everything else (docs/feedback.md). In a template `{student}` stands for the student's whole
message, `{prompt}` for the problem in it, `{context}` for the feedback.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["COMMON", "STYLES", "Style"]

COMMON: Mapping[str, str] = {
    "student": "{prompt}",
    "critic": (
        "Problem:\n\n{prompt}\n\nA failed attempt:\n\n{attempt}\n\nThe right answer: {answer}\n\n{feedback}\n\n"
        "In two or three sentences, say what went wrong and what to do differently. Do not write out the solution."
    ),
    "critic_right": (
        "Problem:\n\n{prompt}\n\nAn attempt that is right:\n\n{attempt}\n\nThe right answer: {answer}\n\n{feedback}\n\n"
        "In two or three sentences, say what it does well and what matters in this problem. Do not write out the solution."
    ),
}
"""The templates that are not the teacher's, the same in every style."""


@dataclass(frozen=True)
class Style:
    """One wording of the teacher's prompts.

    Attributes:
        what: one line on it.
        texts: template by name: one for each kind of context, and `attempt`.
        place: where the texts stand: they are the user's message, or the end of the system message before the student's own.
    """

    what: str
    texts: Mapping[str, str]
    place: Literal["user", "system"] = "user"


_AFTER = Style(
    "the context after the problem, under a short heading; no instruction behind it",
    {
        "sibling": "{student}\n\nA correct answer:\n{context}",
        "verifier": "{student}\n\nWhat a checker said of a wrong answer:\n{context}",
        "critique": "{student}\n\nWhat a reviewer said of a wrong answer:\n{context}",
        "reference": "{student}\n\nA correct answer:\n{context}",
        "both": "{student}\n\nA correct answer:\n{solution}\n\nWhat a checker said of a wrong answer:\n{context}",
        "review": "{student}\n\nWhat a reviewer said of an answer:\n{context}",
        "attempt": "A wrong answer:\n{attempt}",
    },
)

_BEFORE = Style(
    "the context as a hint before the unchanged problem",
    {
        "sibling": "A hint for what follows, a correct answer: {context}\n\n{student}",
        "verifier": "A hint for what follows, what a checker said of a wrong answer: {context}\n\n{student}",
        "critique": "A hint for what follows, what a reviewer said of a wrong answer: {context}\n\n{student}",
        "reference": "A hint for what follows, a correct answer: {context}\n\n{student}",
        "both": (
            "A hint for what follows, a correct answer: {solution}\n\n"
            "What a checker said of a wrong answer: {context}\n\n{student}"
        ),
        "review": "A hint for what follows, what a reviewer said of an answer: {context}\n\n{student}",
        "attempt": "A wrong answer to what follows: {attempt}",
    },
)

_EXACTLY = Style(
    "the context after the problem, as a remark in brackets",
    {
        "sibling": "{student}\n\n(A correct answer is: {context})",
        "verifier": "{student}\n\n(A checker said of a wrong answer: {context})",
        "critique": "{student}\n\n(A reviewer said of a wrong answer: {context})",
        "reference": "{student}\n\n(A correct answer is: {context})",
        "both": "{student}\n\n(A correct answer is: {solution})\n\n(A checker said of a wrong answer: {context})",
        "review": "{student}\n\n(A reviewer said of an answer: {context})",
        "attempt": "(A wrong answer is: {attempt})",
    },
)

_SYSTEM = Style(
    "the context in the system message; the user's message is the student's own",
    {
        "sibling": "A correct answer to the user's message:\n{context}",
        "verifier": "What a checker said of a wrong answer to the user's message:\n{context}",
        "critique": "What a reviewer said of a wrong answer to the user's message:\n{context}",
        "reference": "A correct answer to the user's message:\n{context}",
        "both": (
            "A correct answer to the user's message:\n{solution}\n\nWhat a checker said of a wrong answer to it:\n{context}"
        ),
        "review": "What a reviewer said of an answer to the user's message:\n{context}",
        "attempt": "A wrong answer to the user's message:\n{attempt}",
    },
    place="system",
)

_CLOSING = Style(
    "the context after the problem, and an instruction behind it",
    {
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
    },
)

_SDPO = Style(
    "the sections of SDPO's prompts, which the paper builds on: solution, feedback, and a line that asks for a solution",
    {
        "sibling": "{student}\n\nCorrect solution:\n\n{context}\n\nSolve the original problem correctly.",
        "verifier": (
            "{student}\n\nFeedback on an attempt of yours that was not successful:\n\n{context}\n\n"
            "Solve the original problem correctly."
        ),
        # In the sibling's place: it does not say that an attempt failed, which would give the verdict away.
        "critique": "{student}\n\nAdvice on this problem:\n\n{context}\n\nSolve the original problem correctly.",
        "reference": "{student}\n\nCorrect solution:\n\n{context}\n\nSolve the original problem correctly.",
        "both": (
            "{student}\n\nCorrect solution:\n\n{solution}\n\nFeedback on an attempt of yours that was not successful:\n\n"
            "{context}\n\nSolve the original problem correctly."
        ),
        "review": "{student}\n\nFeedback on an attempt of yours:\n\n{context}\n\nSolve the original problem correctly.",
        "attempt": "An attempt of yours that was not successful:\n\n{attempt}",
    },
)

STYLES: dict[str, Style] = {
    "after": _AFTER,
    "before": _BEFORE,
    "exactly": _EXACTLY,
    "system": _SYSTEM,
    "closing": _CLOSING,
    "sdpo": _SDPO,
}
