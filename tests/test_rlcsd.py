"""RLCSD: what wrong hints a completion gets, and that its update is the autograd of the scaled advantages."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import QUICKSTART, SMALL
from fakes import Recorder
from mlx.utils import tree_flatten

from vpd_mlx import losses
from vpd_mlx.algos import ALGORITHMS
from vpd_mlx.algos.base import Step
from vpd_mlx.algos.grpo import advantages_of
from vpd_mlx.algos.samples import Sample, gather, teacher_row
from vpd_mlx.algos.settings import GrpoSettings
from vpd_mlx.common.stats import Clock
from vpd_mlx.errors import ConfigError
from vpd_mlx.feedback import add_context, add_wrong_hints
from vpd_mlx.feedback.sibling import sibling
from vpd_mlx.recipe import load_recipe
from vpd_mlx.run.step import Trainer
from vpd_mlx.types import Group, Rollout, TokenRow, Verdict

pytestmark = pytest.mark.exact
KEYS = {**SMALL, "algorithm": "rlcsd", "feedback.sources": ["sibling"], "teacher.weights": "live", "rollout.prompts": 2}


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return Trainer.build(load_recipe(QUICKSTART, list(KEYS.items())))


def graded(trainer: Trainer) -> list[Group]:
    """A group of both kinds, and one of wrong answers alone."""

    def group(n: int, *said: str) -> Group:
        problem = trainer.task.train[n]
        encode = trainer.policy.tokenizer.encode
        rollouts = []
        for text in said:
            ids = tuple(encode(text[1:], add_special_tokens=False))
            right = text[0] == "+"
            rollouts.append(Rollout(ids, (-1.0,) * len(ids), text[1:], "stop", Verdict(float(right)), right))
        return Group(problem, trainer.prompter.student(problem), tuple(rollouts))

    groups = [group(0, "-12", "+34", "-56", "-12", "+34", "-7"), group(1, "-1", "-2", "-3", "-4", "-5", "-6")]
    return add_context({"sibling": sibling}, groups, trainer.prompter, trainer.recipe.feedback)


def test_the_contrast_by_hand():
    right, wrong = mx.array([-1.0, -2.0]), mx.log(mx.array([[0.1, 0.5], [0.3, 0.1]]))
    want = [-1.0 - math.log(0.2), -2.0 - math.log(0.3)]
    assert losses.contrast(right, wrong).tolist() == pytest.approx(want, abs=1e-6)
    assert losses.contrast(right, right[None]).tolist() == pytest.approx([0.0, 0.0], abs=1e-6)  # the style alone


def test_wrong_hints_are_the_other_wrong_answers_in_the_words_of_a_solution(trainer: Trainer):
    mixed, wrong = add_wrong_hints(graded(trainer), trainer.prompter, 2)

    def hint(text: str) -> tuple[int, ...]:
        return trainer.prompter.teacher(mixed.problem, "sibling", text)[0]

    first, right, second, again, _, last = mixed.rollouts
    assert first.wrong_prompts == (hint("56"), hint("12"))  # not itself, but another that says the same
    assert right.wrong_prompts == (hint("12"), hint("56"))
    assert second.wrong_prompts == (hint("12"), hint("7"))
    assert again.wrong_prompts == last.wrong_prompts == (hint("12"), hint("56"))
    assert not any(r.wrong_prompts for r in wrong.rollouts)  # without a right one there is nothing to contrast with


def test_the_update_is_the_autograd_of_the_scaled_advantages(trainer: Trainer):
    groups = add_wrong_hints(graded(trainer), trainer.prompter, 4)
    policy, samples = trainer.policy, gather(groups)
    recipe = load_recipe(QUICKSTART, [*KEYS.items(), ("hybrid.mix", 0.8), ("hybrid.weight_clip", 0.9)])
    algorithm = ALGORITHMS["rlcsd"].load()(recipe, policy)
    learner = algorithm.learner = Recorder()
    step = Step(1, 0, Clock())
    algorithm(policy, groups, step)
    advantages = advantages_of(samples, GrpoSettings())

    def logps(row: TokenRow) -> mx.array:
        ids = mx.array([[*row.prompt, *row.completion]])
        logits = policy.model(ids[:, :-1]).astype(mx.float32)[0, len(row.prompt) - 1 :]
        return losses.token_logps(logits, mx.array(row.completion))

    def scale(s: Sample, advantage: float) -> np.ndarray:
        if not s.rollout.wrong_prompts:
            return np.ones(len(s.student.completion))
        wrong = np.stack([np.array(logps(TokenRow(p, s.student.completion))) for p in s.rollout.wrong_prompts])
        apart = np.array(logps(teacher_row(s))) - np.log(np.exp(wrong.astype(np.float64)).mean(axis=0))
        return 0.2 + 0.8 * np.clip(np.exp(np.sign(advantage) * apart), 0.1, 1.9)

    scales = [scale(s, a) for s, a in zip(samples, advantages, strict=True)]
    assert any(0.3 < x < 1.7 and abs(x - 1) > 0.01 for of in scales for x in of), "all are clipped: nothing is compared"
    tokens = sum(len(s.student.completion) for s in samples)

    def loss() -> mx.array:
        total = mx.array(0.0)
        for s, a, of in zip(samples, advantages, scales, strict=True):
            now = logps(s.student)
            ratio = mx.exp(now - mx.stop_gradient(now))
            total = total - (float(a) * mx.array(of.astype(np.float32)) * ratio).sum() / tokens
        return total

    want = dict(tree_flatten(nn.value_and_grad(policy.model, loss)()[1]))
    largest = max(float(mx.abs(v).max()) for v in want.values())
    assert largest > 0
    for k, v in learner.gradients[0].items():
        np.testing.assert_allclose(np.array(v), np.array(want[k]), atol=1e-5 * largest, rtol=1e-4)
    assert set(step.tokens) == {i for i, s in enumerate(samples) if s.rollout.wrong_prompts}


def test_without_wrong_hints_it_is_grpo(trainer: Trainer):
    groups = graded(trainer)
    recorders = []
    for name in ("rlcsd", "grpo"):
        recipe = load_recipe(QUICKSTART, [*KEYS.items(), ("algorithm", name)])
        algorithm = ALGORITHMS[name].load()(recipe, trainer.policy)
        recorders.append(Recorder())
        algorithm.learner = recorders[-1]
        algorithm(trainer.policy, groups, Step(1, 0, Clock()))
    ours, plain = (r.gradients[0] for r in recorders)
    assert all(bool(mx.array_equal(ours[k], plain[k])) for k in plain)


def test_what_it_cannot_use_is_refused():
    for keys, path in (
        ({"feedback.sources": ["verifier"]}, "feedback.sources"),
        ({"feedback.sources": ["verifier", "sibling"]}, "feedback.sources"),
        ({"teacher.weights": "trust_region"}, "teacher.weights"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_recipe(QUICKSTART, list({**KEYS, **keys}.items()))
        assert path in {f.path for f in caught.value.faults}


def test_a_step_asks_for_wrong_hints(trainer: Trainer):
    for step in range(1, 30):
        _, groups = trainer.roll_out(step, Clock())
        if any(r.wrong_prompts for g in groups for r in g.rollouts):
            break
    for g in groups:
        wrong = {r.text for r in g.rollouts if not r.success}
        for r in g.rollouts:
            assert len(r.wrong_prompts) <= min(4, len(wrong))
            assert not r.wrong_prompts or r.context is not None
    assert any(r.wrong_prompts for g in groups for r in g.rollouts)
