"""One update: the ranks' gradients summed, clipped, and applied to the adapter by AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from vpd_mlx.common.stats import mean
from vpd_mlx.engine.policy import Policy
from vpd_mlx.engine.settings import OptimizerSettings

__all__ = ["AdamStep", "Learner", "Metrics", "adam_step", "update_metrics"]

Metrics = dict[str, Any]

AdamStep = Callable[[Any, Any, Any, mx.array], tuple[Any, Any]]


def adam_step(adam: optim.AdamW) -> AdamStep:
    """(parameters, gradients, optimizer's state, factor on the gradients) -> (parameters, state), as trees of arrays.

    All that changes from update to update comes in as an array, so that one trace of `mx.compile` serves every update. On a GPU
    that is a kernel for each tensor in the place of a dozen; on the CPU compilation is off, see `Policy`.
    """

    def step(parameters: Any, gradients: Any, state: Any, factor: mx.array) -> tuple[Any, Any]:
        adam.state = state
        moved = adam.apply_gradients(tree_map(lambda g: g * factor.astype(g.dtype), gradients), parameters)
        return moved, adam.state

    return step


class Learner:
    """AdamW over the adapter with linear warm-up and clipping. An update whose gradient is not finite is skipped."""

    def __init__(self, cfg: OptimizerSettings, ratio: float = 1.0) -> None:
        self.cfg = cfg
        self.rate = cfg.learning_rate * ratio
        self.updates = 0
        self.skipped = 0
        self._adam = optim.AdamW(
            learning_rate=self.rate,
            betas=[cfg.beta1, cfg.beta2],
            weight_decay=cfg.weight_decay,
            bias_correction=True,  # off by default in mlx
        )
        self._ready = False
        self._step: AdamStep = mx.compile(adam_step(self._adam))

    def prepare(self, policy: Policy) -> None:
        """Make room for the moments now, not in the first update."""
        if not self._ready:
            self._adam.init(policy.model.trainable_parameters())
            self._ready = True
            mx.eval(self._adam.state)

    def apply(self, policy: Policy, gradients: Any) -> Metrics:
        """Move the policy's adapter by one update, by the gradients of all ranks; returns `grad_norm`, `rate`, `applied`."""
        gradients = policy.ranks.sum(gradients)
        # One wait for the device, not one for every tensor.
        squares: Any = mx.stack([mx.square(g).sum() for _, g in tree_flatten(gradients)]).tolist()
        norm = math.sqrt(sum(squares))
        if not math.isfinite(norm):
            self.skipped += 1
            return {"grad_norm": None, "rate": 0.0, "applied": 0}
        self.updates += 1
        rate = self.rate * min(1.0, self.updates / max(1, self.cfg.warmup_steps))
        most = self.cfg.grad_clip
        factor = mx.array(1.0 if most is None or norm <= most else most / norm, mx.float32)
        self.prepare(policy)
        self._adam.learning_rate = rate
        parameters, self._adam.state = self._step(
            policy.model.trainable_parameters(), gradients, self._adam.state, factor
        )
        policy.model.update(parameters)
        mx.eval(policy.model.trainable_parameters(), self._adam.state)
        return {"grad_norm": norm, "rate": rate, "applied": 1}

    def arrays(self) -> dict[str, mx.array]:
        """The moments by name, for a checkpoint."""
        return dict(tree_flatten(self._adam.state))

    def scalars(self) -> dict[str, int]:
        """How many updates were made and how many skipped, for a checkpoint."""
        return {"updates": self.updates, "skipped": self.skipped}

    def restore(self, arrays: Mapping[str, mx.array], scalars: Mapping[str, int]) -> None:
        """Continue from what `arrays` and `scalars` gave."""
        self._adam.state = tree_unflatten(list(arrays.items()))
        self._ready = True
        self.updates, self.skipped = scalars["updates"], scalars["skipped"]


def update_metrics(updates: Sequence[Metrics]) -> Metrics:
    """`grad_norm` (mean before clipping), `rate`, and how many updates were made or left out as not finite."""
    norms = [u["grad_norm"] for u in updates if u["grad_norm"] is not None]
    return {
        "grad_norm": mean(norms),
        "rate": updates[-1]["rate"] if updates else 0.0,
        "updates": sum(u["applied"] for u in updates),
        "nonfinite": sum(1 - u["applied"] for u in updates),
    }
