"""Which weights stand behind the teacher's prompt.

The teacher is the student's own network under another prompt. `live` takes it as it is, `frozen` as it was when the batch
began, `ema` a slow copy of the adapter, `trust_region` logits between the initial model's and the student's, `adapter` a
second LoRA on the same base, which the E-step trains and the M-step reads. `gated` stands still until the student has got better
(arXiv 2606.03532): a teacher that follows by the clock can copy a student that is drifting. Only LoRA tensors ever exist twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import mlx.core as mx

from vpd_mlx.algos.base import Algorithm, Metrics, Stateful
from vpd_mlx.algos.samples import Sample, score
from vpd_mlx.algos.settings import TeacherKind, TeacherSettings
from vpd_mlx.common.stats import mean
from vpd_mlx.engine.heads import Head
from vpd_mlx.engine.learner import Floats
from vpd_mlx.engine.models import Adapter
from vpd_mlx.engine.policy import Policy
from vpd_mlx.types import TokenRow

__all__ = ["Gate", "Teacher", "teaching"]

RECENT = 3  # batches over which the gate takes the mean reward
LONGER = 2.0  # factor by which the mean length may have grown or shrunk since the first batch
CUT_OFF = 0.1  # share of completions by which the cut-off ones may have grown since then


@dataclass
class Gate:
    """When a `gated` teacher is renewed: once the mean reward of the last batches exceeds what it was at the last renewal.

    The first batch sets that bar. The batch's lengths must be sane, too: their mean within a factor of two of the first batch's,
    the share of cut-off completions at most 0.1 above its. To ask for both is arXiv 2606.03532's, how they are measured is ours.
    """

    rewards: list[float] = field(default_factory=list)  # of the last batches
    bar: float | None = None
    length: float | None = None  # mean of the first batch, in tokens
    truncated: float = 0.0  # share of the first batch

    def opens(self, reward: float, length: float, truncated: float) -> bool:
        """Take in a batch's means, and say whether the teacher is renewed after it."""
        self.rewards = [*self.rewards, reward][-RECENT:]
        now = sum(self.rewards) / len(self.rewards)
        if self.length is None:
            self.length, self.truncated = length, truncated
        if self.bar is None:
            self.bar = now
            return False
        sane = self.length / LONGER <= length <= self.length * LONGER and truncated <= self.truncated + CUT_OFF
        if now <= self.bar or not sane:
            return False
        self.bar = now
        return True

    def begin_again(self) -> None:
        """Set a new bar by the next batch; lengths are still compared with the run's first batch."""
        self.rewards, self.bar = [], None


class Teacher(Stateful):
    """Gives the teacher's hidden states, and its logits from them within a chunk of the head."""

    def __init__(self, cfg: TeacherSettings, policy: Policy) -> None:
        if cfg.weights is None:
            raise ValueError("no kind of teacher is named: take the recipe's section by `TeacherSettings.of`")
        self.kind: TeacherKind = cfg.weights
        self.cfg = cfg
        # These three start as the student's; a frozen teacher is there for one batch.
        self.weights: Adapter | None = policy.adapter if self.kind in ("ema", "adapter", "gated") else None
        self.gate = Gate()

    def begin_batch(self, policy: Policy) -> None:
        """Before the first update of a batch of rollouts."""
        if self.kind == "frozen":
            self.weights = policy.adapter

    def end_batch(self, policy: Policy, samples: Sequence[Sample]) -> Metrics:
        """After the last update of a batch: the EMA takes in the student, a gated teacher may become it. Returns what to log."""
        if self.kind == "frozen":
            self.weights = None
        if self.kind == "ema" and self.weights is not None:
            rate = self.cfg.ema_rate
            self.weights = {k: (1 - rate) * self.weights[k] + rate * v for k, v in policy.adapter.items()}
            mx.eval(self.weights)
        if self.kind != "gated":
            return {}
        rollouts = [s.rollout for s in samples]
        reward, length = mean([score(s) for s in samples]), mean([float(len(r.tokens)) for r in rollouts])
        truncated = mean([float(r.finish == "length") for r in rollouts])
        if reward is None or length is None or truncated is None or not self.gate.opens(reward, length, truncated):
            return {"teacher/refreshed": 0}
        self.weights = policy.adapter
        return {"teacher/refreshed": 1}

    @contextlib.contextmanager
    def e_step_weights(self, policy: Policy) -> Iterator[None]:
        """Within the block the network is the one that the E-step trains: the student's, or the teacher's own adapter."""
        if self.kind != "adapter" or self.weights is None:
            yield
            return
        student = policy.adapter
        policy.set_adapter(self.weights)
        try:
            yield
            self.weights = policy.adapter
        finally:
            policy.set_adapter(student)

    def standing(self, policy: Policy) -> contextlib.AbstractContextManager[None]:
        """A block within which the network has the weights behind the teacher's prompt, for sampling.

        A trust region mixes logits, which no weights do: the student's stay.
        """
        return contextlib.nullcontext() if self.weights is None else policy.using(self.weights)

    def states(self, policy: Policy, rows: Sequence[TokenRow]) -> list[dict[str, mx.array]]:
        """Hidden states of the completion positions under the teacher's weights, per row, without gradient."""
        if self.kind == "trust_region":
            live = policy.states(rows)
            with policy.as_begun():
                initial = policy.states(rows)
            return [{"teacher": a, "initial": b} for a, b in zip(live, initial, strict=True)]
        with self.standing(policy):
            return [{"teacher": s} for s in policy.states(rows)]

    def logps(self, policy: Policy, rows: Sequence[TokenRow]) -> list[Floats]:
        """Log-probabilities of the completions' tokens under the teacher's weights, per row, for all kinds but `trust_region`.

        Raises:
            ValueError: the teacher is a `trust_region`, which is no set of weights.
        """
        if self.kind == "trust_region":
            raise ValueError("a trust region mixes logits: take them by `states` and `logits`")
        with self.standing(policy):
            return policy.logps(rows)

    def logits(self, fixed: Mapping[str, mx.array], head: Head) -> mx.array:
        """Logits (m, V), float32, from a chunk of `states`."""
        logits = head(fixed["teacher"]).astype(mx.float32)
        if self.kind == "trust_region":
            initial = head(fixed["initial"]).astype(mx.float32)
            logits = initial + self.cfg.trust_region * (logits - initial)
        return logits

    def reset(self, policy: Policy, _rate: float) -> None:
        """Weights of its own start as the student's again."""
        if self.weights is not None:
            self.weights = policy.adapter
        self.gate.begin_again()

    def arrays(self) -> dict[str, mx.array]:
        """Its own weights, if it has any."""
        return dict(self.weights or {})

    def scalars(self) -> dict[str, Any] | None:
        """What the gate goes by."""
        return asdict(self.gate) if self.kind == "gated" else None

    def restore(self, arrays: Mapping[str, mx.array], scalars: Mapping[str, Any] | None) -> None:
        """Take up a checkpoint's weights and gate."""
        if arrays:
            self.weights = dict(arrays)
        if scalars is not None:
            self.gate = Gate(**scalars)


def teaching(algorithm: Algorithm, policy: Policy) -> contextlib.AbstractContextManager[None]:
    """A block within which the network is an algorithm's teacher; it stays the student where the algorithm has none."""
    teacher = algorithm.parts.get("teacher")
    return teacher.standing(policy) if isinstance(teacher, Teacher) else contextlib.nullcontext()
