"""The work that is measured: rollouts, updates and whole steps, on batches of random tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.generate import BatchGenerator
from mlx_lm.sample_utils import make_sampler

from vpd_mlx import losses
from vpd_mlx.algos import ALGORITHMS
from vpd_mlx.algos.base import Step
from vpd_mlx.algos.grpo import policy_gradient_update
from vpd_mlx.algos.m_step import Distillation
from vpd_mlx.algos.samples import gather, teacher_row
from vpd_mlx.algos.settings import GrpoSettings, MStepSettings, TeacherSettings
from vpd_mlx.algos.teacher import Teacher
from vpd_mlx.common.stats import Clock
from vpd_mlx.engine.heads import target_logps
from vpd_mlx.engine.learner import Learner, accumulate, unit_weights
from vpd_mlx.engine.policy import Policy
from vpd_mlx.engine.sampling import Sampling, default_streams, generate
from vpd_mlx.recipe import Recipe, load_recipe
from vpd_mlx.types import Context, Group, Problem, Rollout, Verdict

__all__ = ["Batch", "Updates", "difference", "raw_rollouts", "rollouts", "whole_step"]


@dataclass(frozen=True)
class Batch:
    """`prompts` x `samples` completions of random tokens; half are right, and all have one sibling's solution as context."""

    vocabulary: int
    prompts: int
    samples: int
    prompt: int
    completion: int
    context: int = 32

    @cached_property
    def groups(self) -> list[Group]:
        """As a run would have them."""
        rng = np.random.default_rng(0)

        def ids(n: int) -> tuple[int, ...]:
            return tuple(int(i) for i in rng.integers(1, self.vocabulary - 2, n))

        out = []
        for p in range(self.prompts):
            prompt = ids(self.prompt)
            behind = prompt + ids(self.context)  # the same for all of a group: they share the sibling
            rows = []
            for n in range(self.samples):
                right = n % 2 == 0
                rows.append(
                    Rollout(
                        tokens=ids(self.completion),
                        logps=(-1.0,) * self.completion,
                        text="",
                        finish="length",
                        verdict=Verdict(float(right)),
                        success=right,
                        context=Context("sibling", ""),
                        teacher_prompt=behind,
                    )
                )
            out.append(Group(Problem(str(p), ({"role": "user", "content": ""},)), prompt, tuple(rows)))
        return out


# --- rollouts


def rollouts(
    policy: Policy, groups: Sequence[Group], samples: int, tokens: int, streams: int | None = None
) -> Callable[[], int]:
    """Our rollouts: each prompt is read once, and every token's log-probability is kept."""
    prompts = [g.prompt for g in groups]
    how = Sampling(1.0, 1.0, tokens, streams=streams or default_streams(policy.model))
    return lambda: sum(len(r.tokens) for _, _, r in generate(policy, prompts, samples, how, 0))


def raw_rollouts(policy: Policy, groups: Sequence[Group], samples: int, tokens: int) -> Callable[[], int]:
    """mlx-lm's BatchGenerator as it is, at full width, each row with its own prompt; tokens only."""

    def run() -> int:
        rows = [list(g.prompt) for g in groups for _ in range(samples)]
        generator = BatchGenerator(
            policy.model,
            stop_tokens=[[t] for t in policy.tokenizer.eos_token_ids],
            sampler=make_sampler(temp=1.0),
            completion_batch_size=len(rows),
            prefill_batch_size=len(rows),
        )
        try:
            mx.random.seed(0)
            generator.insert(rows, [tokens] * len(rows))
            found = 0
            while responses := generator.next_generated():
                found += sum(isinstance(r.token, int) for r in responses)
            return found
        finally:
            generator.close()

    return run


# --- passes and updates


class Updates:
    """The passes of an update and their plain counterparts, on one batch."""

    def __init__(self, policy: Policy, batch: Batch, m_step: MStepSettings | None = None) -> None:
        self.policy = policy
        self.samples = gather(batch.groups)
        self.student = [s.student for s in self.samples]
        self.taught = [teacher_row(s) for s in self.samples]
        self.weights = [w / sum(map(len, unit_weights(self.student))) for w in unit_weights(self.student)]
        self.loss = Distillation(
            m_step or MStepSettings(alpha=0.5, top_k=None), Teacher(TeacherSettings(weights="live"), policy)
        )

    def fused(self) -> Any:
        """Divergence and gradient as the M-step computes them: teacher forward, student forward and backward."""
        states = self.loss.teacher.states(self.policy, self.taught)
        return accumulate(self.policy, self.student, self.weights, lambda own: states, self.loss, 0).gradients

    def plain(self) -> Any:
        """The same from whole logits of the completion positions and automatic differentiation."""
        policy, cfg = self.policy, self.loss.cfg
        weights = mx.array(np.concatenate(self.weights))
        teacher = losses.log_softmax(policy.head(policy.hidden(self.taught)[0]).astype(mx.float32))

        def loss() -> mx.array:
            student = losses.log_softmax(policy.head(policy.hidden(self.student)[0]).astype(mx.float32))
            each = losses.divergence_from_logps(student, teacher, alpha=cfg.alpha, top_k=cfg.top_k, tail=cfg.tail)
            return (each * weights).sum()

        value, gradient = nn.value_and_grad(policy.model, loss)()
        mx.eval(value, gradient)
        return gradient

    def student_forward(self) -> Any:
        """Log-probabilities under the student's prompt."""
        return self.policy.logps(self.student)

    def teacher_forward(self) -> Any:
        """Log-probabilities under the teacher's prompt."""
        return self.policy.logps(self.taught)

    def teacher_states(self) -> Any:
        """Hidden states under the teacher's prompt."""
        return self.loss.teacher.states(self.policy, self.taught)

    def student_backward(self) -> Any:
        """Forward and backward of the divergence, with the teacher's states given."""
        if not hasattr(self, "_states"):
            self._states = self.teacher_states()
        return accumulate(self.policy, self.student, self.weights, lambda own: self._states, self.loss, 0).gradients

    def backward_of(self, rows: Any) -> Any:
        """Forward and backward of the log-probability alone."""
        return accumulate(self.policy, rows, self.weights, None, target_logps, 0).gradients

    def teacher_backward(self) -> Any:
        """Forward and backward under the teacher's prompt, as an E-step needs."""
        return self.backward_of(self.taught)

    def grpo(self, recipe: Recipe) -> Any:
        """A GRPO update, with the optimizer's step."""
        return policy_gradient_update(self.policy, self.samples, Learner(recipe.optimizer), GrpoSettings(), seed=0)


def difference(a: Any, b: Any) -> float:
    """Greatest difference of two gradients, relative to the greatest entry."""
    pairs = [(x, y) for (_, x), (_, y) in zip(tree_flatten(a), tree_flatten(b), strict=True)]
    scale = max(float(mx.abs(x).max()) for x, _ in pairs)
    return max(float(mx.abs(x - y).max()) for x, y in pairs) / scale


def whole_step(
    recipe: Recipe, policy: Policy, batch: Batch, *, sample: bool, streams: int | None = None
) -> Callable[[], float]:
    """One step of a run: rollouts if `sample` is set, then the recipe's updates. Returns its seconds."""
    algorithm = ALGORITHMS[recipe.algorithm].load()(recipe, policy)
    roll = rollouts(policy, batch.groups, batch.samples, batch.completion, streams)
    at = [0]

    def run() -> float:
        start = time.perf_counter()
        at[0] += 1
        if sample:
            roll()
        algorithm(policy, batch.groups, Step(at[0], 0, Clock()))
        mx.eval(policy.adapter)
        return time.perf_counter() - start

    return run


def recipe_of(algorithm: str, every: int = 5) -> Recipe:
    """The quickstart's recipe with another algorithm, and a learning rate that changes almost nothing."""
    from vpd_mlx.recipe import builtin_recipes

    changes: dict[str, Any] = {
        "algorithm": algorithm,
        "optimizer.learning_rate": 1e-8,
        "e_step.every": every,
    }
    return load_recipe(builtin_recipes()["quickstart"], list(changes.items()))
