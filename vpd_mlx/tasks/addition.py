"""Sums of two numbers, graded digit by digit in words. No data file, no network: the task of `quickstart`."""

from __future__ import annotations

import hashlib
import itertools
import random
from typing import Literal

from pydantic import Field

from vpd_mlx.common.settings import Section
from vpd_mlx.types import Problem, Verdict

__all__ = ["Addition", "AdditionSettings", "digit_feedback", "has_carry", "held_out", "without_carrying"]


class AdditionSettings(Section):
    """Sums of two numbers of `digits` digits, generated; the verifier describes each digit in words."""

    kind: Literal["addition"]
    digits: int = Field(2, ge=1, le=6, description="Digits of each number.")
    train_only: Literal["carry", "no-carry"] | None = Field(None, description="Train on such sums only; null on all.")
    eval_only: Literal["carry", "no-carry"] | None = Field(
        "carry", description="Evaluate on such held-out sums only; null on all."
    )


PLACES = ("ones", "tens", "hundreds", "thousands", "ten thousands", "hundred thousands", "millions")
TOO_LONG = "not a number of this size"
HELD_OUT = 10  # one sum in ten
MOST_PAIRS = 20_000  # for longer numbers, a sample of this size


def held_out(a: int, b: int) -> bool:
    """Whether this sum is kept out of all training, including that of the start model. Decided by a hash, so it never changes."""
    return int(hashlib.sha256(f"{a}+{b}".encode()).hexdigest(), 16) % HELD_OUT == 0


def without_carrying(a: int, b: int) -> int:
    """The sum with every carry forgotten: each column modulo ten."""
    total, place = 0, 1
    while a or b:
        total += (a + b) % 10 * place
        a, b, place = a // 10, b // 10, place * 10
    return total


def has_carry(a: int, b: int) -> bool:
    """Whether some column sums to ten or more."""
    return without_carrying(a, b) != a + b


def digit_feedback(answer: str, attempt: str) -> str:
    """What is wrong with `attempt`, a word or two per digit from the ones upwards, without the right digits."""
    words = []
    for i, (right, got) in enumerate(itertools.zip_longest(reversed(answer), reversed(attempt))):
        if got is None or right is None:
            word = "missing" if got is None else "extra"
        elif got == right:
            word = "right"
        else:
            word = "too low" if got < right else "too high"
        words.append(f"{PLACES[min(i, len(PLACES) - 1)]} {word}")
    return ", ".join(words)


class Addition:
    """Prompt `47+38=`, completion `85`."""

    def __init__(self, cfg: AdditionSettings) -> None:
        low, high = 10 ** (cfg.digits - 1), 10**cfg.digits
        if (high - low) ** 2 <= MOST_PAIRS:
            pairs = list(itertools.product(range(low, high), repeat=2))
        else:
            rng = random.Random(cfg.digits)
            pairs = list({(rng.randrange(low, high), rng.randrange(low, high)): None for _ in range(MOST_PAIRS)})
        random.Random(0).shuffle(pairs)  # the first n are a fair sample

        def chosen(kind: str | None, a: int, b: int) -> bool:
            return kind is None or has_carry(a, b) == (kind == "carry")

        self.train = tuple(_problem(a, b) for a, b in pairs if not held_out(a, b) and chosen(cfg.train_only, a, b))
        self.held_out = tuple(_problem(a, b) for a, b in pairs if held_out(a, b) and chosen(cfg.eval_only, a, b))

    def verify(self, problem: Problem, completion: str) -> Verdict:
        """1 for the right sum, else 0 with a word per digit, or a word on the format."""
        answer, attempt = problem.answer or "", completion.strip()
        if attempt == answer:
            return Verdict(1.0)
        if not attempt.isascii() or not attempt.isdigit() or len(attempt) > len(answer) + 1:
            return Verdict(0.0, TOO_LONG)
        return Verdict(0.0, digit_feedback(answer, attempt))

    def reference_completion(self, problem: Problem) -> str | None:
        """The sum."""
        return problem.answer


def _problem(a: int, b: int) -> Problem:
    return Problem(id=f"{a}+{b}", messages=({"role": "user", "content": f"{a}+{b}="},), answer=str(a + b))
