"""General checks: what nearly every chat model can do and no run trains on, so that a run can tell what training cost.

Prompts whose answers a few lines of code can judge, in the manner of IFEval (arXiv 2311.07911), and a text to measure perplexity
on. They are no benchmark: few and easy, so that they cost seconds and a loss shows. Compare a model with itself before training,
not with another model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from vpd_mlx.common.settings import OneOf, Section
from vpd_mlx.common.thoughts import spoken
from vpd_mlx.errors import DataError, Fault

__all__ = ["CHECKS", "TEXT", "Check", "RetainSettings", "passages"]

TEXT = "perplexity"
"""The check that has a text in place of prompts."""


@dataclass(frozen=True)
class Check:
    """Prompts, each with a function that says whether an answer is right, and the most tokens of an answer."""

    prompts: dict[str, Callable[[str], bool]]
    max_tokens: int = 48

    def right(self, prompt: str, completion: str) -> bool:
        """Whether the completion is right; its thinking does not count."""
        return self.prompts[prompt](spoken(completion).strip())


def _number(wanted: int) -> Callable[[str], bool]:
    return lambda text: [n.replace(",", "") for n in re.findall(r"\d[\d,]*", text.rstrip(",."))][-1:] == [str(wanted)]


def _words(least: int, most: int) -> Callable[[str], bool]:
    return lambda text: least <= len(text.split()) <= most


def _matches(pattern: str) -> Callable[[str], bool]:
    return lambda text: re.search(pattern, text, re.I | re.M) is not None


def _json(wanted: Any, brackets: str) -> Callable[[str], bool]:
    def right(text: str) -> bool:
        start, end = text.find(brackets[0]), text.rfind(brackets[1])
        try:
            found = json.loads(text[start : end + 1]) if 0 <= start < end else None
        except (ValueError, RecursionError):
            return False
        return bool(found == wanted)

    return right


INSTRUCTIONS = Check(
    {
        "Name a fruit. Write your answer in capital letters only.": str.isupper,
        "Greet me. Use lower-case letters only.": str.islower,
        "What is the capital of France? Answer with one word.": _words(1, 1),
        "Describe winter in fewer than ten words.": _words(1, 9),
        "Name three colours, separated by commas, and write nothing else.": lambda t: t.count(",") == 2,
        "Write one sentence about the sea that contains the word 'salt'.": _matches(r"\bsalt"),
        "Write one sentence about the weather that ends with an exclamation mark.": lambda t: t.endswith("!"),
        "What is water? Begin your answer with the word 'Indeed'.": lambda t: t.lower().startswith("indeed"),
        "Repeat this sentence and write nothing else: The train leaves at noon.": _matches(
            r"^\W*the train leaves at noon\W*$"
        ),
        "Write the word 'hello' three times.": lambda t: t.lower().count("hello") == 3,
        "Name a planet, in double quotation marks.": _matches(r'^["“][^"”]+["”]\.?$'),
        "Is the sun a star? Begin with 'Yes' or 'No', then give a reason.": _matches(r"\Ayes\b"),
    }
)
ARITHMETIC = Check(
    {
        f"What is {question}? Answer with the number alone.": _number(answer)
        for question, answer in (
            ("2 + 3", 5),
            ("7 + 5", 12),
            ("9 - 4", 5),
            ("3 * 4", 12),
            ("10 + 20", 30),
            ("14 - 6", 8),
            ("5 * 6", 30),
            ("25 + 17", 42),
            ("100 - 30", 70),
            ("18 / 3", 6),
            ("half of 12", 6),
            ("the number after 99", 100),
        )
    },
    max_tokens=24,
)
FORMAT = Check(
    {
        "Write the name Ada and the age 36 as a JSON object with the keys name and age.": _json(
            {"name": "Ada", "age": 36}, "{}"
        ),
        "Write red, green and blue as a JSON list of three strings.": _json(["red", "green", "blue"], "[]"),
        "List three animals as a numbered list.": _matches(r"^\s*1[.)] .+\n+\s*2[.)] .+\n+\s*3[.)] .+"),
        "List two cities, each on a line that begins with a dash.": _matches(r"^\s*[-–] ?\S.*\n+\s*[-–] ?\S"),
        "Is ice colder than steam? Answer yes or no.": _matches(r"\A\W*yes\b"),
        "Write the date 5 March 2021 in the form YYYY-MM-DD.": _matches(r"\b2021-03-05\b"),
        "Write the numbers from one to five as digits, separated by commas.": _matches(r"\b1, ?2, ?3, ?4, ?5\b"),
        "Write a level-two Markdown heading with the text Results.": _matches(r"^## *Results"),
    }
)
CHECKS: dict[str, Check] = {
    "instructions": INSTRUCTIONS,
    "arithmetic": ARITHMETIC,
    "format": FORMAT,
    TEXT: Check({}),
}


class RetainSettings(Section):
    """What the model could do before, and should still do after: checked greedily before the first step and at the end.

    `retain: [instructions, perplexity]` is short for `retain: {checks: [instructions, perplexity]}`.
    """

    shorthand: ClassVar[str | None] = "checks"
    paths: ClassVar[tuple[str, ...]] = ("text",)

    checks: list[Annotated[str, OneOf(CHECKS)]] = Field(
        [],
        description="General checks to run before and after: `instructions`, `arithmetic` and `format` are a dozen prompts each "
        "that code can judge, `perplexity` is on a text. They take seconds and train nothing; the result is in `general.jsonl`.",
    )
    text: str | None = Field(
        None,
        description="Text file for `perplexity`, its passages apart by empty lines; the first 64 count, to 256 tokens each. null "
        "takes eight passages of English that come with the package.",
    )

    def faults(self, recipe: Any) -> Iterator[Fault]:
        """A check is named once; a text is for perplexity."""
        if len(set(self.checks)) != len(self.checks):
            yield Fault("retain.checks", f"{self.checks} names a check twice", "name each once")
        if self.text is not None and TEXT not in self.checks:
            yield Fault("retain.text", f"means nothing without {TEXT}", f"add {TEXT} to retain.checks")


def passages(file: str | None) -> list[str]:
    """The passages of a text file, or those that come with the package.

    Raises:
        DataError: the file cannot be read, or holds no passage.
    """
    try:
        own = files("vpd_mlx.tasks") / "general.txt" if file is None else Path(file)
        text = own.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"retain.text: {file} cannot be read ({error}); give a text file in UTF-8") from None
    found = [part.strip("\n") for part in re.split(r"\n[ \t]*\n", text) if part.strip()]
    if not found:
        raise DataError(f"retain.text: {file} is empty; give a text of some passages, apart by empty lines")
    return found[:64]
