"""Which weights stand behind the teacher's prompt.

The teacher is the student's own network under another prompt. `live` takes it as it is, `frozen` as it was when the batch
began, `ema` a slow copy of the adapter, `trust_region` logits between the initial model's and the student's, `adapter` a
second LoRA on the same base, which the E-step trains and the M-step reads. Only LoRA tensors ever exist twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import mlx.core as mx

from vpd_mlx.algos.base import Stateful
from vpd_mlx.algos.settings import TeacherKind, TeacherSettings
from vpd_mlx.engine.heads import Head
from vpd_mlx.engine.learner import Floats
from vpd_mlx.engine.models import Adapter
from vpd_mlx.engine.policy import Policy
from vpd_mlx.types import TokenRow

__all__ = ["Teacher"]


class Teacher(Stateful):
    """Gives the teacher's hidden states, and its logits from them within a chunk of the head."""

    def __init__(self, cfg: TeacherSettings, policy: Policy) -> None:
        self.kind: TeacherKind = cfg.weights
        self.cfg = cfg
        # The EMA and the teacher's own adapter start as the student's; a frozen teacher is there for one batch.
        self.weights: Adapter | None = policy.adapter if self.kind in ("ema", "adapter") else None

    def begin_batch(self, policy: Policy) -> None:
        """Before the first update of a batch of rollouts."""
        if self.kind == "frozen":
            self.weights = policy.adapter

    def end_batch(self, policy: Policy) -> None:
        """After the last update of a batch: the EMA takes in the student."""
        if self.kind == "frozen":
            self.weights = None
        if self.kind == "ema" and self.weights is not None:
            rate = self.cfg.ema_rate
            self.weights = {k: (1 - rate) * self.weights[k] + rate * v for k, v in policy.adapter.items()}
            mx.eval(self.weights)

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

    def states(self, policy: Policy, rows: Sequence[TokenRow]) -> list[dict[str, mx.array]]:
        """Hidden states of the completion positions under the teacher's weights, per row, without gradient."""
        if self.kind == "trust_region":
            live = policy.states(rows)
            with policy.as_begun():
                initial = policy.states(rows)
            return [{"teacher": a, "initial": b} for a, b in zip(live, initial, strict=True)]
        with contextlib.nullcontext() if self.weights is None else policy.using(self.weights):
            return [{"teacher": s} for s in policy.states(rows)]

    def logps(self, policy: Policy, rows: Sequence[TokenRow]) -> list[Floats]:
        """Log-probabilities of the completions' tokens under the teacher's weights, per row, for all kinds but `trust_region`.

        Raises:
            ValueError: the teacher is a `trust_region`, which is no set of weights.
        """
        if self.kind == "trust_region":
            raise ValueError("a trust region mixes logits: take them by `states` and `logits`")
        with contextlib.nullcontext() if self.weights is None else policy.using(self.weights):
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

    def arrays(self) -> dict[str, mx.array]:
        """Its own weights, if it has any."""
        return dict(self.weights or {})

    def restore(self, arrays: Mapping[str, mx.array], _scalars: None) -> None:
        """Take up a checkpoint's weights."""
        if arrays:
            self.weights = dict(arrays)
