"""How far the student's style has moved: its first token on a few fixed prompts, against the untrained model's.

A forward pass of these prompts a step, without sampling: the figure has no noise. Of a step with 32 completions of 28
tokens it takes less than a tenth, of a longer one next to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from vpd_mlx.engine.policy import Policy
from vpd_mlx.types import TokenRow

__all__ = ["PROMPTS", "Style"]

PROMPTS = 8
TOKENS = 4096  # of all prompts together: long ones are fewer


class Style:
    """The first-token distributions of some prompts, (P, V) each."""

    def __init__(self, policy: Policy, prompts: Sequence[tuple[int, ...]]) -> None:
        """At most `PROMPTS` prompts, of `TOKENS` together where the first is no longer than that; at least one."""
        self._policy = policy
        self._rows: list[TokenRow] = []
        left = TOKENS
        for prompt in prompts[:PROMPTS]:
            left -= len(prompt)
            if self._rows and left < 0:
                break
            self._rows.append(TokenRow(prompt, (0,)))  # what follows the prompt is not looked at
        self._untrained: mx.array | None = None

    def shift(self) -> float:
        """Total variation between the untrained model's first token and the one of now, 0..1, a mean over prompts."""
        if self._untrained is None:
            with self._policy.as_begun():
                self._untrained = self._first_token()
        return float((0.5 * mx.abs(self._first_token() - self._untrained).sum(axis=-1)).mean())

    def _first_token(self) -> mx.array:
        states = mx.concatenate(self._policy.states(self._rows))  # (P, D)
        found = mx.softmax(self._policy.head(states).astype(mx.float32), axis=-1)
        mx.eval(found)
        return found
