"""The general checks of `retain`, by the weights that the policy has now: greedy, without feedback, outside training."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np

from vpd_mlx.engine.policy import Policy
from vpd_mlx.engine.sampling import Sampling, generate
from vpd_mlx.run.collect import rows_at_once
from vpd_mlx.run.records import GeneralRow
from vpd_mlx.run.setup import Parts
from vpd_mlx.run.state import RunState
from vpd_mlx.tasks.general import CHECKS, TEXT, passages
from vpd_mlx.types import TokenRow

__all__ = ["check_after", "check_before", "general_row"]

MOST_TOKENS = 256  # of a passage


def check_before(state: RunState) -> None:
    """Run those of the recipe's checks that are not yet made of the untrained adapter; logged, counted, kept for a resume."""
    missing = _missing(state)
    if missing:
        _add(state, missing, 0)
        state.take_snapshot(state.settle())


def check_after(state: RunState, step: int) -> None:
    """Run the recipe's checks of the adapter that is handed over, that of `step`.

    A check that came only with a resume is first made of the untrained adapter. There is no snapshot: it would take the adapter
    that is handed over for the one to go on with.
    """
    if missing := _missing(state):
        with state.trainer.policy.using(state.initial):
            _add(state, missing, 0)
    _add(state, state.trainer.recipe.retain.checks, step)


def _missing(state: RunState) -> list[str]:
    made = {row["check"] for row in state.general}
    return [name for name in state.trainer.recipe.retain.checks if name not in made]


def _add(state: RunState, checks: Sequence[str], step: int) -> None:
    rows = [general_row(state.trainer, name, step) for name in checks]
    state.count_general(rows)
    state.log.append("general.jsonl", rows)


def general_row(parts: Parts, name: str, step: int) -> GeneralRow:
    """One check's row of `general.jsonl`. Every rank finds the same.

    Raises:
        DataError: the text for perplexity cannot be used.
    """
    start = time.perf_counter()
    parts.progress.phase(f"general check, {name}")
    row: GeneralRow = {"step": step, "check": name}
    row |= _perplexity(parts) if name == TEXT else _answered(parts, name)
    mx.clear_cache()
    row["seconds"] = round(time.perf_counter() - start, 3)
    return row


def _answered(parts: Parts, name: str) -> GeneralRow:
    check, streams = CHECKS[name], parts.recipe.memory.rollout_streams
    questions = list(check.prompts)
    prompts = [parts.prompter.encode([{"role": "user", "content": text}]) for text in questions]
    how = Sampling(0.0, 1.0, check.max_tokens, rows_at_once(parts.recipe), streams)
    texts: dict[int, str] = {}
    for p, _, rollout in generate(parts.policy, prompts, 1, how, 0):
        texts[p] = rollout.text
        parts.stop.check()
        parts.progress.phase(f"general check, {name}", len(texts), len(prompts))
    answers = {text: texts[i] for i, text in enumerate(questions)}
    scores = {text: float(check.right(text, answer)) for text, answer in answers.items()}
    return {"value": float(np.mean(list(scores.values()))), "by_item": scores, "answers": answers}


def _perplexity(parts: Parts) -> GeneralRow:
    """Perplexity of the text, and the mean log-probability of a token by passage, in nats, at temperature 1."""
    encode = parts.policy.tokenizer.encode
    texts = passages(parts.recipe.retain.text)
    tokens = [tuple(int(i) for i in encode(text))[:MOST_TOKENS] for text in texts]
    rows = {f"{n}: {t[:40]}": TokenRow(ids[:1], ids[1:]) for n, (t, ids) in enumerate(zip(texts, tokens, strict=True))}
    rows = {name: row for name, row in rows.items() if row.completion}
    with _at_temperature_one(parts.policy):
        found = parts.policy.logps(list(rows.values()))
    every = np.concatenate([np.zeros(0), *found]).astype(np.float64)
    value = float(np.exp(-every.mean())) if len(every) else None
    return {"value": value, "by_item": {n: float(f.mean()) for n, f in zip(rows, found, strict=True)}}


@contextlib.contextmanager
def _at_temperature_one(policy: Policy) -> Iterator[None]:
    """A policy scores at the temperature of its rollouts, which sharpens or flattens what it says of a text."""
    own = policy.temperature
    policy.temper(1.0)
    try:
        yield
    finally:
        policy.temper(own)
