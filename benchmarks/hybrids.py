"""An update of a hybrid of recurrent layers and attention: its recurrence in chunks or not, its prompt shared or not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import work
from vpd_mlx.engine.policy import Policy
from vpd_mlx.engine.recurrence import Rule, rule_of

__all__ = ["APART", "ONE_BY_ONE", "SHARED", "runs"]

SHARED, APART, ONE_BY_ONE = "shared", "apart", "apart, token by token"


def runs(policy: Policy, prompt: int, completion: int) -> dict[str, Callable[[], Any]]:
    """Forward and backward of 8 completions' log-probabilities: as it is, without sharing, and as mlx-lm's layers do it."""
    u = work.Updates(policy, work.Batch(policy.vocabulary, 1, 8, prompt, completion))

    def run() -> Any:
        return u.backward_of(u.student)

    def apart() -> Any:
        with _apart(policy):
            return run()

    def one_by_one() -> Any:
        with _apart(policy), _token_by_token(policy):
            return run()

    return {SHARED: run, APART: apart, ONE_BY_ONE: one_by_one}


@contextlib.contextmanager
def _apart(policy: Policy) -> Iterator[None]:
    policy.shares_prompts = False
    try:
        yield
    finally:
        policy.shares_prompts = True


@contextlib.contextmanager
def _token_by_token(policy: Policy) -> Iterator[None]:
    """Within the block the recurrent layers are mlx-lm's own."""
    ours = [(m, type(m)) for m in policy.model.modules() if isinstance(rule_of(type(m)), Rule)]
    for layer, kind in ours:
        layer.__class__ = kind.__base__
    try:
        yield
    finally:
        for layer, kind in ours:
            layer.__class__ = kind
