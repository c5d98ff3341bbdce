"""Sampling: groups of completions from the student, one prefill per prompt, all rows decoded side by side.

The only module that touches mlx-lm's `BatchGenerator`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler

from vpd_mlx.errors import DataError
from vpd_mlx.policy import Policy
from vpd_mlx.prompts import Prompter
from vpd_mlx.types import FinishReason, Group, Problem, Rollout

__all__ = ["Sampling", "as_groups", "generate", "probe_batches", "roll_out", "student_prompts"]


@dataclass(frozen=True)
class Sampling:
    """How to sample. `temperature` 0 is greedy; `rows` bounds the sequences decoded side by side."""

    temperature: float
    top_p: float
    max_tokens: int
    rows: int | None = None


def generate(
    policy: Policy, prompts: Sequence[tuple[int, ...]], samples: int, how: Sampling, seed: int
) -> Iterator[tuple[int, int, Rollout]]:
    """Sample `samples` completions of each prompt; yields (prompt index, sample index, rollout) as each one finishes.

    The same seed, prompts and counts give the same tokens. Log-probabilities are those of the untempered distribution
    that the sampler saw.
    """
    total = len(prompts) * samples
    if not total:
        return
    mx.random.seed(seed)
    width = min(total, how.rows or total, policy.widest or total)
    generator = BatchGenerator(
        policy.model,
        stop_tokens=[[int(t)] for t in sorted(policy.tokenizer.eos_token_ids)],
        sampler=make_sampler(temp=how.temperature, top_p=how.top_p if how.top_p < 1.0 else 0.0),
        completion_batch_size=width,
        prefill_batch_size=width,
    )
    try:
        places = _insert(policy, generator, prompts, samples, how.max_tokens)
        tokens: dict[int, list[int]] = {uid: [] for uid in places}
        scores: dict[int, list[tuple[int, int]]] = {uid: [] for uid in places}
        columns: list[mx.array] = []
        stops = set(policy.tokenizer.eos_token_ids)
        while responses := generator.next_generated():
            # One gather a step for all rows: a kept row of log-probabilities would pin the whole (rows, V) buffer.
            column = mx.stack([r.logprobs[r.token] for r in responses]).astype(mx.float32)
            mx.async_eval(column)  # type: ignore[no-untyped-call]
            columns.append(column)
            finished = []
            for i, r in enumerate(responses):
                tokens[r.uid].append(r.token)
                scores[r.uid].append((len(columns) - 1, i))
                if r.finish_reason is not None:
                    finished.append((r.uid, r.finish_reason))
            del responses  # finished rows carry a copy of their cache
            if finished:
                values = {at: np.array(columns[at]) for uid, _ in finished for at, _ in scores[uid]}
                for uid, reason in finished:
                    ids, logps = tokens.pop(uid), tuple(float(values[at][i]) for at, i in scores.pop(uid))
                    yield (*places[uid], _rollout(policy.tokenizer, ids, logps, reason, stops))
    finally:
        generator.close()


def _insert(
    policy: Policy, generator: BatchGenerator, prompts: Sequence[tuple[int, ...]], samples: int, max_tokens: int
) -> dict[int, tuple[int, int]]:
    """Queue all rows; a prompt with several samples is read once and its cache shared."""
    places: dict[int, tuple[int, int]] = {}
    for p, prompt in enumerate(prompts):
        caches, ids = None, list(prompt)
        if samples > 1 and len(prompt) > 1:
            cache = make_prompt_cache(policy.model)
            if all(hasattr(c, "merge") for c in cache):
                step = 2048
                for start in range(0, len(prompt) - 1, step):
                    policy.model(mx.array([prompt[start : min(start + step, len(prompt) - 1)]]), cache=cache)
                    mx.eval([c.state for c in cache])
                caches, ids = [cache] * samples, list(prompt[-1:])
        uids = generator.insert([list(ids) for _ in range(samples)], [max_tokens] * samples, caches)
        places.update({uid: (p, n) for n, uid in enumerate(uids)})
    return places


def _rollout(
    tokenizer: Any, ids: list[int], logps: tuple[float, ...], reason: FinishReason, stops: set[int]
) -> Rollout:
    stopped = ids[-1] in stops
    text = tokenizer.decode(ids[:-1] if stopped else ids)
    return Rollout(tokens=tuple(ids), logps=logps, text=text, finish="stop" if stopped else reason)


def probe_batches(policy: Policy) -> None:
    """Find out whether mlx-lm can decode this architecture in batches; where it cannot, rows are decoded one by one."""
    policy.widest = None
    try:
        for _ in generate(policy, [(1, 2, 3), (4, 5)], 2, Sampling(1.0, 1.0, 3), 0):
            pass
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        policy.widest = 1
        policy.notes.append(
            f"{policy.architecture}: mlx-lm cannot decode it in batches ({str(error).splitlines()[0]}), so completions are "
            "sampled one by one: the same results, several times slower"
        )


def student_prompts(prompter: Prompter, problems: Sequence[Problem]) -> list[tuple[int, ...]]:
    """Prompt ids of each problem.

    Raises:
        DataError: a prompt is longer than the limit.
    """
    prompts = []
    for problem in problems:
        ids = prompter.student(problem)
        if len(ids) > prompter.max_prompt_tokens:
            raise DataError(
                f"row {problem.id}: its prompt has {len(ids)} tokens, more than rollout.max_prompt_tokens "
                f"{prompter.max_prompt_tokens}; raise the limit or take the row out"
            )
        prompts.append(ids)
    return prompts


def roll_out(
    policy: Policy, prompter: Prompter, problems: Sequence[Problem], group_size: int, how: Sampling, seed: int
) -> Iterator[tuple[int, int, Rollout]]:
    """`generate` for problems."""
    yield from generate(policy, student_prompts(prompter, problems), group_size, how, seed)


def as_groups(
    problems: Sequence[Problem], prompts: Sequence[tuple[int, ...]], rollouts: dict[tuple[int, int], Rollout], size: int
) -> list[Group]:
    """Groups from rollouts by (problem, sample); one left out for a failed verifier makes its group smaller."""
    return [
        Group(problem, prompt, tuple(rollouts[p, n] for n in range(size) if (p, n) in rollouts))
        for p, (problem, prompt) in enumerate(zip(problems, prompts, strict=True))
    ]
