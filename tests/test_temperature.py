"""Sampled at a temperature, scored at it: the policy is softmax(logits / temperature), on all sides of every loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from fakes import tiny_policy
from mlx.utils import tree_flatten

from vpd_mlx import losses
from vpd_mlx.algos import ALGORITHMS
from vpd_mlx.algos.base import Step
from vpd_mlx.algos.grpo import policy_gradient_update
from vpd_mlx.algos.samples import gather
from vpd_mlx.algos.settings import GrpoSettings
from vpd_mlx.common.stats import Clock
from vpd_mlx.engine.decoding import probe_batches
from vpd_mlx.engine.heads import tempered
from vpd_mlx.engine.learner import Learner
from vpd_mlx.engine.policy import Policy
from vpd_mlx.engine.sampling import Sampling, generate
from vpd_mlx.engine.settings import LoraSettings
from vpd_mlx.recipe import Recipe
from vpd_mlx.run.loop import train
from vpd_mlx.run.progress import Silent
from vpd_mlx.run.setup import load_policy
from vpd_mlx.types import Context, Group, Problem, Rollout, TokenRow, Verdict

T = 0.6


class Descent(Learner):
    """Keeps each gradient and takes a plain step along it, so that what differs by rounding stays close."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, mx.array]] = []

    def apply(self, policy: Policy, gradients: Any) -> dict[str, Any]:
        found = dict(tree_flatten(gradients))
        self.gradients.append(found)
        policy.set_adapter({k: v - found[k] for k, v in policy.adapter.items()})
        return {"grad_norm": 1.0, "rate": 1.0, "applied": 1}


def policy_at(temperature: float, larger: float = 1.0) -> Policy:
    """A random network whose adapter is not zero; its logits are `larger` times as large."""
    policy = tiny_policy(lora=LoraSettings(rank=2))
    adapter = policy.adapter
    policy.set_adapter(
        {k: v + 0.1 * mx.random.normal(v.shape, key=mx.random.key(i)) for i, (k, v) in enumerate(adapter.items())}
    )
    policy.model.lm_head.weight = policy.model.lm_head.weight * larger
    policy.temper(temperature)
    return policy


def batch(policy: Policy) -> list[Group]:
    """Groups with successes and failures, most with a context, sampled at T."""
    prompts = [tuple(b"one"), tuple(b"another")]
    rollouts: list[list[Rollout]] = [[], []]
    for p, n, r in generate(policy, prompts, 4, Sampling(T, 1.0, 6), 0):
        right = n % 2 == 0
        told = Rollout(r.tokens, r.logps, r.text, r.finish, Verdict(float(right)), right)
        if n < 3:
            taught = (*prompts[p], *b" hint")
            context, wrong = Context("sibling", "hint"), ((*prompts[p], *b" wrong"), (*prompts[p], *b" as well"))
            told = replace(told, context=context, teacher_prompt=taught, wrong_prompts=wrong)
        rollouts[p].append(told)
    problems = [Problem(str(p), ({"role": "user", "content": str(p)},)) for p in range(2)]
    return [Group(q, ids, tuple(rs)) for q, ids, rs in zip(problems, prompts, rollouts, strict=True)]


def gradients_of(recipe: Recipe, policy: Policy, groups: list[Group]) -> list[dict[str, np.ndarray]]:
    """Those of all updates of a step."""
    algorithm = recipe.entry.load()(recipe, policy)
    kept = Descent()
    algorithm.learner = kept
    if hasattr(algorithm, "e_learner"):
        algorithm.e_learner = kept
    algorithm(policy, groups, Step(0, 0, Clock()))
    return [{k: np.array(v) for k, v in g.items()} for g in kept.gradients]


def far(a: list[dict[str, np.ndarray]], b: list[dict[str, np.ndarray]]) -> float:
    """The largest difference, over the largest entry."""
    assert len(a) == len(b) > 0
    largest = max(np.abs(v).max() for g in b for v in g.values())
    return float(max(np.abs(x[k] - y[k]).max() for x, y in zip(a, b, strict=True) for k in x) / largest)


@pytest.mark.parametrize(
    ("algorithm", "keys"),
    [
        *((name, {}) for name in ALGORITHMS),
        ("vpd", {"e_step.prior": "fixed", "e_step.anchor": 0.5, "m_step.top_k": 9, "m_step.alpha": 0.0}),
        ("sdpo", {"teacher.weights": "trust_region", "m_step.importance_clip": 2.0, "m_step.epochs": 2}),
        ("grpo", {"grpo.kl": 0.3, "grpo.epochs": 2, "grpo.minibatch_prompts": 1}),
    ],
)
def test_every_update_is_that_of_a_network_with_larger_logits(small: Callable[..., Recipe], algorithm: str, keys):
    """Nothing but the policy's own temperature tells the two apart: so none of the mathematics is left untempered."""
    sources = [ALGORITHMS[algorithm].source or "verifier"]
    recipe = small(algorithm=algorithm, feedback__sources=sources, **{k.replace(".", "__"): v for k, v in keys.items()})
    groups = batch(policy_at(T))
    at_temperature = gradients_of(recipe, policy_at(T), groups)
    assert far(at_temperature, gradients_of(recipe, policy_at(1.0, larger=1 / T), groups)) < 1e-4
    assert far(at_temperature, gradients_of(recipe, policy_at(1.0), groups)) > 1e-2


def test_the_ratio_at_a_temperature_is_the_autograd_of_the_plain_loss():
    policy, learner = policy_at(T), Descent()
    groups = batch(policy)
    samples, start = gather(groups), policy.adapter
    policy_gradient_update(policy, samples, learner, GrpoSettings(epochs=2), seed=0)
    moved = {k: v - learner.gradients[0][k] for k, v in start.items()}
    rows, tokens = [s.student for s in samples], sum(len(s.student.completion) for s in samples)
    advantages = [0.5 if s.rollout.success else -0.5 for s in samples]

    def logps() -> list[mx.array]:
        out = []
        for row in rows:
            logits = policy.model(mx.array([[*row.prompt, *row.completion][:-1]]))[0, len(row.prompt) - 1 :]
            out.append(losses.token_logps(logits / T, mx.array(row.completion)))
        return out

    policy.set_adapter(start)
    old = logps()
    mx.eval(old)

    def loss() -> mx.array:
        each = [
            losses.policy_gradient_tokens(now, before, mx.array(a), clip_low=0.2, clip_high=0.28, dual_clip=3.0)[
                0
            ].sum()
            for now, before, a in zip(logps(), old, advantages, strict=True)
        ]
        return mx.stack(each).sum() / tokens

    for adapter, found in zip((start, moved), learner.gradients, strict=True):
        policy.set_adapter(adapter)
        _, gradient = nn.value_and_grad(policy.model, loss)()
        plain = {k: np.array(v) for k, v in tree_flatten(gradient)}
        assert far([{k: np.array(v) for k, v in found.items()}], [plain]) < 1e-4


@pytest.mark.parametrize("rows", [None, 2])
def test_the_samplers_log_probabilities_are_those_of_what_it_drew_from(rows: int | None):
    policy, prompts = policy_at(T), [tuple(b"one"), tuple(b"another")]
    drawn = list(generate(policy, prompts, 3, Sampling(T, 1.0, 6, rows), 3))
    scored = policy.logps([TokenRow(prompts[p], r.tokens) for p, _, r in drawn])
    for (_, _, r), want in zip(drawn, scored, strict=True):
        np.testing.assert_allclose(r.logps, want, atol=1e-4)
    larger = generate(policy_at(1.0, larger=1 / T), prompts, 3, Sampling(1.0, 1.0, 6, rows), 3)
    assert {(p, n): r.tokens for p, n, r in larger} == {(p, n): r.tokens for p, n, r in drawn}
    cold = [r for _, _, r in generate(policy, prompts, 1, Sampling(0.0, 1.0, 4, rows), 3)]
    policy.temper(1.0)
    for r, want in zip(
        cold, policy.logps([TokenRow(p, r.tokens) for p, r in zip(prompts, cold, strict=True)]), strict=True
    ):
        np.testing.assert_allclose(r.logps, want, atol=1e-4)


def test_only_the_tempered_score_follows_the_reward():
    """One token in a state whose mean advantage is not 0, as in the middle of a completion, every outcome counted."""
    logits, rewards = mx.array([2.0, 1.0, 0.0, -1.0, -3.0]), mx.array([0.0, 1.0, 0.0, 1.0, 1.0])
    chances = mx.softmax(logits / T)

    def surrogate(x: mx.array, score: float, advantages: mx.array) -> mx.array:
        logps = losses.log_softmax(tempered(lambda z: z, score)(x))
        each, _ = losses.policy_gradient_tokens(
            logps, mx.stop_gradient(logps), advantages, clip_low=0.2, clip_high=0.28
        )
        return (chances * each).sum()

    def slope(score: float, advantages: mx.array) -> np.ndarray:
        return np.array(mx.grad(surrogate)(logits, score, advantages))

    truth = np.array(mx.grad(lambda x: -(mx.softmax(x / T) * rewards).sum())(logits))
    np.testing.assert_allclose(slope(T, rewards + 1), truth, atol=1e-6)
    plain = slope(1.0, rewards + 1)
    assert plain @ truth / np.linalg.norm(plain) / np.linalg.norm(truth) < 0.8
    # Where all outcomes are as good, there is nothing to learn; scored untempered, the policy would sharpen all the same.
    np.testing.assert_allclose(slope(T, mx.ones(5)), np.zeros(5), atol=1e-6)
    assert slope(1.0, mx.ones(5))[0] < -0.05


def test_temperature_1_is_the_head_itself(small: Callable[..., Recipe]):
    def head(states: mx.array) -> mx.array:
        return states

    assert tempered(head, 1.0) is head
    policy = policy_at(1.0)
    assert policy.head is policy._plain_head
    assert load_policy(small()).temperature == 1.0
    assert load_policy(small(rollout__temperature=0.7)).temperature == 0.7


def test_what_is_inconsistent_gets_a_note(small: Callable[..., Recipe], tmp_path):
    class Notes(Silent):
        def __init__(self) -> None:
            self.all: list[str] = []

        def note(self, text: str) -> None:
            self.all.append(text)

    assert small().notices() == []
    assert small(rollout__temperature=0.6).notices() == []
    (nucleus,) = small(rollout__top_p=0.9).notices()
    assert nucleus.startswith("rollout.top_p: 0.9 samples from the nucleus")
    (hotter,) = small(rollout__temperature=0.5).notices()
    assert hotter.startswith("evaluation.temperature: 0.6 is above rollout.temperature 0.5")
    notes = Notes()
    recipe = small(rollout__top_p=0.9, rollout__temperature=0.8, steps=1, evaluation__problems=2)
    train(recipe, tmp_path / "run", progress=notes)
    assert nucleus in notes.all


def test_a_tempered_policy_is_not_taken_for_one_that_cannot_be_decoded():
    policy = tiny_policy()
    policy.temper(0.5)
    probe_batches(policy)
    assert (policy.widest, policy.notes) == (None, [])
