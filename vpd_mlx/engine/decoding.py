"""How an architecture can be decoded: found out on a few tokens, by whether samples have the scores that they were drawn by."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from vpd_mlx.engine.device import gpu_ways
from vpd_mlx.engine.models import first_line
from vpd_mlx.engine.policy import Policy
from vpd_mlx.engine.sampling import Sampling, can_merge, generate
from vpd_mlx.errors import ModelError
from vpd_mlx.types import TokenRow

__all__ = ["probe_batches"]

ROUNDING = 1e-3  # nats: what float32 may be off
HALF_OFF = 1.0  # and half precision, at most
PROMPTS: list[tuple[int, ...]] = [(1, 2, 3, 4, 5, 6, 7), (4, 5)]  # their rows are padded, if read side by side
FAULTS = (ValueError, TypeError, AttributeError, NotImplementedError, IndexError)


def probe_batches(policy: Policy) -> None:
    """Find out whether mlx-lm can decode this architecture in batches; where it cannot, rows are decoded one by one.

    Prompts that are read side by side are padded. An architecture that takes no notice of this gives other log-probabilities than
    scoring does: then each prompt is read by itself.

    Raises:
        ModelError: mlx-lm decodes it neither way.
    """
    policy.widest, policy.reads_alone = None, False
    if (fault := _read(policy) or _fault(policy)) is None:
        return
    policy.widest, policy.reads_alone = 1, False
    policy.notes.append(
        f"{policy.architecture}: mlx-lm cannot decode it in batches ({fault}), so completions are sampled one by one: the same "
        "results, several times slower"
    )
    if _fault(policy) is not None:
        problem = f"mlx-lm's generator cannot decode {policy.architecture} ({fault})"
        raise ModelError(f"model: {problem}; take another architecture")


def _read(policy: Policy) -> str | None:
    """See whether prompts must be read alone; returns why they cannot be read at all."""
    try:
        padded = _off(policy, (1,))
        policy.reads_alone = padded > ROUNDING and can_merge(policy)
        policy.reads_alone = policy.reads_alone and _off(policy, (1,)) < padded / 4  # else padding is not why
    except FAULTS as error:
        return first_line(error)
    return None


def _fault(policy: Policy) -> str | None:
    """What is wrong with completions that are sampled as the policy now says."""
    try:
        off = _off(policy, (1, 2))
    except FAULTS as error:
        return first_line(error)
    exact = policy.model(mx.array([[1]])).dtype == mx.float32 and not gpu_ways()
    return (
        None if off <= (ROUNDING if exact else HALF_OFF) else f"its samples are not those of their scores, by {off:.2g}"
    )


def _off(policy: Policy, counts: Sequence[int]) -> float:
    """How far sampled tokens' log-probabilities are at most from those that scoring gives, with so many samples a prompt."""
    how = Sampling(policy.temperature, 1.0, 3)
    found = [
        (TokenRow(PROMPTS[p], r.tokens), r.logps) for n in counts for p, _, r in generate(policy, PROMPTS, n, how, 0)
    ]
    scores = policy.logps([row for row, _ in found])
    return max(float(np.abs(np.array(logps) - own).max()) for (_, logps), own in zip(found, scores, strict=True))
