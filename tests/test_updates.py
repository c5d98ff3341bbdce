"""Updates on the real embedded model: exact in any split, each option doing what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from fakes import Recorder
from mlx.utils import tree_flatten, tree_map

from vpd_mlx import losses
from vpd_mlx.algos import ALGORITHMS
from vpd_mlx.algos.base import Step
from vpd_mlx.algos.e_step import EStepResult, bco_update, crossed
from vpd_mlx.algos.grpo import advantages_of, policy_gradient_update
from vpd_mlx.algos.hints import hinted
from vpd_mlx.algos.m_step import Distillation, divergence_update
from vpd_mlx.algos.samples import Sample, gather, minibatches
from vpd_mlx.algos.settings import GrpoSettings, MStepSettings, TeacherSettings
from vpd_mlx.algos.teacher import Teacher
from vpd_mlx.common.stats import Clock
from vpd_mlx.engine.batching import micro_batches, pad
from vpd_mlx.engine.heads import target_logps
from vpd_mlx.engine.learner import Learner, accumulate, unit_weights
from vpd_mlx.engine.policy import Policy
from vpd_mlx.feedback import add_context
from vpd_mlx.feedback.sibling import sibling
from vpd_mlx.feedback.verifier import verifier
from vpd_mlx.run.step import Trainer
from vpd_mlx.types import Context, Rollout, TokenRow

pytestmark = pytest.mark.exact  # bits are compared


def assert_close(a: dict[str, mx.array], b: dict[str, mx.array], tolerance: float = 1e-6) -> None:
    assert a.keys() == b.keys()
    scale = max(float(mx.abs(v).max()) for v in b.values())
    assert scale > 0, "the reference gradient is zero: nothing is compared"
    for k in a:
        np.testing.assert_allclose(np.array(a[k]), np.array(b[k]), atol=tolerance * max(1.0, scale), rtol=1e-4)


@pytest.fixture(scope="module")
def world(request):
    """A trainer whose student has moved away from the start, and a batch with both classes and some without context."""
    from conftest import QUICKSTART, SMALL

    from vpd_mlx.recipe import load_recipe

    recipe = load_recipe(QUICKSTART, [*SMALL.items(), ("rollout.prompts", 6)])
    trainer = Trainer.build(recipe)
    policy = trainer.policy
    policy.set_adapter(
        {
            k: v + 0.02 * mx.random.normal(v.shape, key=mx.random.key(i))
            for i, (k, v) in enumerate(policy.adapter.items())
        }
    )
    for step in range(1, 30):
        _, groups = trainer.roll_out(step, Clock())
        rollouts = [r for g in groups for r in g.rollouts]
        with_context = [r for r in rollouts if r.context is not None]
        if len(with_context) < len(rollouts) and {r.success for r in with_context} == {True, False}:
            return trainer, groups
    raise AssertionError("no batch with both classes and a rollout without context")


def plain_logps(policy: Policy, rows: list[TokenRow]) -> list[mx.array]:
    """By a forward pass of each row alone through mlx-lm's own model."""
    out = []
    for row in rows:
        ids = mx.array([[*row.prompt, *row.completion]])
        logits = policy.model(ids[:, :-1]).astype(mx.float32)[0, len(row.prompt) - 1 :]
        out.append(losses.token_logps(logits, mx.array(row.completion)))
    return out


def test_right_padding_and_chunks_change_nothing(world):
    trainer, groups = world
    policy = trainer.policy
    rows = [s.student for s in gather(groups)]
    assert len({len(r.completion) for r in rows}) > 1
    for got, want in zip(policy.logps(rows), plain_logps(policy, rows), strict=True):
        np.testing.assert_allclose(got, np.array(want), atol=2e-5)


@pytest.mark.parametrize("budget", [64, 10**6])
@pytest.mark.parametrize(("length_normalise", "anchor"), [(False, 0.0), (True, 0.0), (False, 0.7)])
def test_e_step_is_the_autograd_of_the_bco_loss(world, budget, length_normalise, anchor):
    trainer, groups = world
    policy, samples = trainer.policy, gather(groups)
    cfg = trainer.recipe.e_step.model_copy(update={"length_normalise": length_normalise, "anchor": anchor})
    learner = Recorder()
    teacher = Teacher(TeacherSettings(weights="live"), policy)
    policy._micro_batch_tokens, before = budget, policy._micro_batch_tokens
    try:
        result = bco_update(policy, samples, learner, cfg, previous_delta=None, seed=0, teacher=teacher)
    finally:
        policy._micro_batch_tokens = before
    chosen = [s for s in samples if s.teacher is not None]
    labels = mx.array([int(s.rollout.success) for s in chosen])
    lengths = mx.array([len(s.student.completion) for s in chosen]) if length_normalise else mx.ones(len(chosen))
    old = mx.stack([x.sum() for x in plain_logps(policy, [s.student for s in chosen])])

    def loss() -> mx.array:
        tokens = plain_logps(policy, [s.teacher for s in chosen])
        new = mx.stack([x.sum() for x in tokens])
        held = mx.stack([x.mean() for x, s in zip(tokens, chosen, strict=True) if s.rollout.success]).mean()
        return losses.bco_loss(new / lengths, old / lengths, labels, beta=cfg.beta)[0] - anchor * held

    value, gradient = nn.value_and_grad(policy.model, loss)()
    assert_close(learner.gradients[0], dict(tree_flatten(gradient)))
    if not anchor:
        assert result.metrics["loss"] == pytest.approx(value.item(), abs=1e-5)
    assert result.metrics["n_right"] + result.metrics["n_wrong"] == len(chosen) < len(samples)


def test_the_floor_pulls_up_displaced_successes_alone(world):
    trainer, groups = world
    policy, learner = trainer.policy, Recorder()
    teacher = Teacher(TeacherSettings(weights="live"), policy)
    rows = [s for s in gather(groups) if s.teacher is not None]
    sides = (plain_logps(policy, [s.teacher for s in rows]), plain_logps(policy, [s.student for s in rows]))
    shift = [(t.sum() - b.sum()).item() for t, b in zip(*sides, strict=True)]
    # Every other one by this shift counts as right, whatever it is: some are likelier to the teacher, some to the student.
    order = sorted(range(len(rows)), key=shift.__getitem__)
    chosen = samples = [
        replace(rows[i], rollout=replace(rows[i].rollout, success=n % 2 == 0)) for n, i in enumerate(order)
    ]
    right = [s for s in chosen if s.rollout.success]
    labels = mx.array([int(s.rollout.success) for s in chosen])
    old = mx.stack([x.sum() for x in plain_logps(policy, [s.student for s in chosen])])

    def held(tokens: list[mx.array]) -> mx.array:
        base = plain_logps(policy, [s.student for s in right])
        each = [
            mx.maximum(mx.stop_gradient(b).sum() - t.sum(), 0.0) / len(t) for t, b in zip(tokens, base, strict=True)
        ]
        return mx.stack(each).mean()

    def loss() -> mx.array:
        tokens = plain_logps(policy, [s.teacher for s in chosen])
        bco = losses.bco_loss(mx.stack([x.sum() for x in tokens]), old, labels, beta=0.1)[0]
        return bco + 0.7 * held([x for x, s in zip(tokens, chosen, strict=True) if s.rollout.success])

    cfg = trainer.recipe.e_step.model_copy(update={"floor": 0.7})
    result = bco_update(policy, samples, learner, cfg, previous_delta=None, seed=0, teacher=teacher)
    assert 0 < result.metrics["displaced"] < 1, "successes of both kinds are needed"
    assert_close(learner.gradients[0], dict(tree_flatten(nn.value_and_grad(policy.model, loss)()[1])))


def test_a_teacher_that_tells_right_from_wrong_is_left_alone(world):
    trainer, groups = world
    policy, teacher = trainer.policy, Teacher(TeacherSettings(weights="live"), trainer.policy)
    samples = [s for s in gather(groups) if s.teacher is not None]
    # One failure counts as right: this teacher tells the true classes apart without fail.
    at = next(i for i, s in enumerate(samples) if not s.rollout.success)
    samples[at] = replace(samples[at], rollout=replace(samples[at].rollout, success=True))

    def update(until: float | None, minibatch: int | None = None) -> tuple[Recorder, EStepResult]:
        learner = Recorder()
        cfg = trainer.recipe.e_step.model_copy(update={"until_auc": until, "minibatch_prompts": minibatch})
        return learner, bco_update(policy, samples, learner, cfg, previous_delta=None, seed=0, teacher=teacher)

    plain, want = update(None)
    surely = want.metrics["auc"]
    assert 0.5 < surely < 1, "the limits below must lie on either side of it"
    for limit, minibatch in ((surely, None), (0.5, None), (0.5, 1)):
        left, found = update(limit, minibatch)
        assert not left.gradients
        assert (found.metrics["skipped"], found.metrics["needless"]) == (0, 1)
        assert found.metrics["auc"] == pytest.approx(surely)
        assert "grad_norm" not in found.metrics
    trained, found = update(1.0)
    assert (found.metrics["needless"], found.metrics["loss"]) == (0, pytest.approx(want.metrics["loss"]))
    assert "needless" not in want.metrics
    assert_close(trained.gradients[0], plain.gradients[0])


@pytest.mark.parametrize("length_normalise", [False, True])
def test_a_share_of_the_tokens_makes_up_the_reward(world, length_normalise):
    trainer, groups = world
    policy, samples, learner = trainer.policy, gather(groups), Recorder()
    teacher = Teacher(TeacherSettings(weights="live"), policy)
    chosen = [s for s in samples if s.teacher is not None]
    labels = mx.array([int(s.rollout.success) for s in chosen])
    base = plain_logps(policy, [s.student for s in chosen])
    first = plain_logps(policy, [s.teacher for s in chosen])
    counted = []
    for b, f in zip(base, first, strict=True):
        apart = np.abs(np.array(f - b))
        counted.append(mx.array((apart >= np.sort(apart)[-round(0.5 * len(apart))]).astype(np.float32)))
    assert any(c.size > float(c.sum()) > 1 for c in counted)
    lengths = mx.stack([c.sum() for c in counted]) if length_normalise else mx.ones(len(chosen))

    def sums(tokens: list[mx.array]) -> mx.array:
        return mx.stack([(t * c).sum() for t, c in zip(tokens, counted, strict=True)]) / lengths

    def loss() -> mx.array:
        tokens = plain_logps(policy, [s.teacher for s in chosen])
        return losses.bco_loss(sums(tokens), mx.stop_gradient(sums(base)), labels, beta=0.1)[0]

    cfg = trainer.recipe.e_step.model_copy(update={"token_share": 0.5, "length_normalise": length_normalise})
    result = bco_update(policy, samples, learner, cfg, previous_delta=None, seed=0, teacher=teacher)
    value, gradient = nn.value_and_grad(policy.model, loss)()
    assert result.metrics["loss"] == pytest.approx(value.item(), abs=1e-5)
    assert_close(learner.gradients[0], dict(tree_flatten(gradient)))


def test_what_the_teacher_knows_behind_its_own_hint_it_learns_behind_a_failures(world):
    trainer, groups = world
    words_first = add_context(
        {"verifier": verifier, "sibling": sibling}, groups, trainer.prompter, trainer.recipe.feedback
    )
    policy, samples, learner = trainer.policy, gather(words_first), Recorder()
    teacher = Teacher(TeacherSettings(weights="live"), policy)
    pairs = hinted(samples)
    assert pairs
    assert all(p.learns.completion == p.teaches.completion and p.learns.prompt != p.teaches.prompt for p in pairs)

    def logps(row: TokenRow) -> mx.array:
        ids = mx.array([[*row.prompt, *row.completion]])
        return losses.log_softmax(policy.model(ids[:, :-1])[0, len(row.prompt) - 1 :])

    def loss() -> mx.array:
        each = []
        for p in pairs:
            own = mx.stop_gradient(logps(p.teaches))
            each.append((mx.exp(own) * (own - logps(p.learns))).sum(axis=-1).mean())
        return 0.7 * mx.stack(each).mean()

    bare = trainer.recipe.e_step
    for cfg in (bare, bare.model_copy(update={"hints": 0.7})):
        bco_update(policy, samples, learner, cfg, previous_delta=None, seed=0, teacher=teacher)
    without, with_it = learner.gradients
    added = {k: with_it[k] - without[k] for k in with_it}
    assert_close(added, dict(tree_flatten(nn.value_and_grad(policy.model, loss)()[1])), 1e-5)


def test_the_e_step_goes_on_from_its_own_forward_pass(world, monkeypatch):
    trainer, groups = world
    policy, samples, learner = trainer.policy, gather(groups), Recorder()
    teacher = Teacher(TeacherSettings(weights="live"), policy)
    passes, whole = [], policy.hidden
    monkeypatch.setattr(policy, "hidden", lambda rows: passes.append(len(rows)) or whole(rows))

    def e_step(until: float | None = None) -> int:
        passes.clear()
        cfg = trainer.recipe.e_step.model_copy(update={"until_auc": until})
        bco_update(policy, samples, learner, cfg, previous_delta=None, seed=0, teacher=teacher)
        return len(passes)

    assert e_step(0.5) == 2  # the student's and the teacher's
    assert not learner.gradients, "the second says that the teacher needs no training"
    assert e_step() == 2
    monkeypatch.setattr(type(policy), "has_dropout", True)  # whose rewards come from a pass of their own
    assert e_step() == 3
    one, two = learner.gradients
    assert all(np.array_equal(one[k], two[k]) for k in one)
    assert any(np.array(v).any() for v in one.values())


@pytest.mark.parametrize("budget", [64, 10**6])
@pytest.mark.parametrize("chunk", [1, 7, 4096])
@pytest.mark.parametrize("options", [{}, {"weighting": "token"}, {"top_k": 5}, {"importance_clip": 2.0, "alpha": 1.0}])
def test_m_step_is_the_autograd_of_the_plain_divergence(world, budget, chunk, options):
    trainer, groups = world
    policy, samples = trainer.policy, gather(groups)
    cfg = MStepSettings(**{"alpha": 0.5, **options})
    learner = Recorder()
    teacher = Teacher(TeacherSettings(weights="live"), policy)
    before = policy._micro_batch_tokens, policy._head_chunk
    policy._micro_batch_tokens, policy._head_chunk = budget, chunk
    try:
        divergence_update(policy, samples, learner, cfg, teacher, seed=0)
    finally:
        policy._micro_batch_tokens, policy._head_chunk = before
    chosen = [s for s in samples if s.teacher is not None]
    tokens = sum(len(s.student.completion) for s in chosen)

    def logits(row: TokenRow) -> mx.array:
        ids = mx.array([[*row.prompt, *row.completion]])
        return policy.model(ids[:, :-1]).astype(mx.float32)[:, len(row.prompt) - 1 :]

    def loss() -> mx.array:
        total = mx.array(0.0)
        for s in chosen:
            student = logits(s.student)
            each = losses.divergence(student, logits(s.teacher), alpha=cfg.alpha, top_k=cfg.top_k, tail=cfg.tail)
            if cfg.importance_clip is not None:
                now = losses.token_logps(student, mx.array([s.student.completion]))
                each = each * losses.importance_weights(now, mx.array([s.rollout.logps]), clip=cfg.importance_clip)
            weight = tokens if cfg.weighting == "token" else each.size * len(samples)
            total = total + each.sum() / weight
        return total

    _, gradient = nn.value_and_grad(policy.model, loss)()
    assert_close(learner.gradients[0], dict(tree_flatten(gradient)))


@pytest.mark.parametrize("budget", [64, 10**6])
def test_policy_gradient_is_the_autograd_of_the_plain_loss(world, budget):
    trainer, groups = world
    policy, samples = trainer.policy, gather(groups)
    cfg = GrpoSettings()
    learner = Recorder()
    policy._micro_batch_tokens, before = budget, policy._micro_batch_tokens
    try:
        policy_gradient_update(policy, samples, learner, cfg, seed=0)
    finally:
        policy._micro_batch_tokens = before
    advantages = advantages_of(samples, cfg)
    tokens = sum(len(s.student.completion) for s in samples)

    def loss() -> mx.array:
        total = mx.array(0.0)
        for _s, a, now in zip(samples, advantages, plain_logps(policy, [s.student for s in samples]), strict=True):
            ones = mx.ones((1, now.size))
            value, _ = losses.policy_gradient_loss(
                now[None], mx.stop_gradient(now)[None], mx.array([float(a)]), ones, clip_low=0.2, clip_high=0.28
            )
            total = total + value * now.size / tokens
        return total

    _, gradient = nn.value_and_grad(policy.model, loss)()
    assert_close(learner.gradients[0], dict(tree_flatten(gradient)))


@pytest.mark.parametrize("weighting", ["sequence", "token"])
def test_srpo_is_the_autograd_of_one_loss_for_right_and_another_for_wrong(world, weighting):
    from conftest import QUICKSTART, SMALL

    from vpd_mlx.recipe import load_recipe

    trainer, groups = world
    policy = trainer.policy
    keys = {"algorithm": "srpo", "teacher.weights": "live", "hybrid.distill": 0.7, "hybrid.reward": 0.3}
    keys |= {"m_step.weighting": weighting}
    recipe = load_recipe(QUICKSTART, list({**SMALL, "rollout.prompts": 6, **keys}.items()))
    mixed = next(n for n, g in enumerate(groups) if {r.success for r in g.rollouts} == {True, False})
    bare = [  # a wrong one without a context, in a group where its advantage is not 0
        replace(
            g, rollouts=tuple(r if r.success else replace(r, context=None, teacher_prompt=None) for r in g.rollouts)
        )
        if n == mixed
        else g
        for n, g in enumerate(groups)
    ]
    samples = gather(bare)
    advantages = advantages_of(samples, GrpoSettings())
    routed = [s.teacher is not None and not s.rollout.success for s in samples]
    assert any(routed)
    assert any(advantages[i] > 0 for i, s in enumerate(samples) if s.rollout.success)
    assert any(advantages[i] < 0 for i, s in enumerate(samples) if not s.rollout.success and not routed[i])
    algorithm = ALGORITHMS["srpo"].load()(recipe, policy)
    learner = algorithm.learner = Recorder()
    step = Step(1, 0, Clock())
    metrics = algorithm(policy, bare, step)
    tokens = sum(len(s.student.completion) for s in samples)

    def logits(row: TokenRow) -> mx.array:
        ids = mx.array([[*row.prompt, *row.completion]])
        return policy.model(ids[:, :-1]).astype(mx.float32)[:, len(row.prompt) - 1 :]

    def loss() -> mx.array:
        total = mx.array(0.0)
        for s, a, wrong in zip(samples, advantages, routed, strict=True):
            student = logits(s.student)
            if wrong:
                each = losses.divergence(student, logits(s.teacher), alpha=recipe.m_step.alpha)
                total = total + 0.7 * each.sum() / (tokens if weighting == "token" else each.size * len(samples))
            else:
                # The ratio is 1, so that the surrogate's gradient is that of -A log pi, here and behind every clip.
                now = losses.token_logps(student, mx.array([s.student.completion]))
                total = total - 0.3 * float(a) * mx.exp(now - mx.stop_gradient(now)).sum() / tokens
        return total

    value, gradient = nn.value_and_grad(policy.model, loss)()
    assert_close(learner.gradients[0], dict(tree_flatten(gradient)))
    assert metrics["student/loss"] == pytest.approx(value.item(), abs=1e-5)
    assert set(step.tokens) == {i for i, wrong in enumerate(routed) if wrong}
    assert metrics["student/sequences"] == len(samples)
    assert metrics["student/divergence_wrong"] == metrics["student/divergence"] > 0


def test_ratio_is_one_on_the_first_minibatch_and_not_after(world):
    trainer, groups = world
    policy, start = trainer.policy, trainer.policy.adapter
    try:
        learner = Learner(trainer.recipe.optimizer.model_copy(update={"learning_rate": 1e-2, "warmup_steps": 0}))
        once, _ = policy_gradient_update(policy, gather(groups), learner, GrpoSettings(), seed=0)
        assert once["ratio_min"] == once["ratio_max"] == 1.0
        policy.set_adapter(start)
        learner = Learner(trainer.recipe.optimizer.model_copy(update={"learning_rate": 1e-2, "warmup_steps": 0}))
        first, _ = policy_gradient_update(policy, gather(groups), learner, GrpoSettings(epochs=2), seed=0)
        assert first["updates"] == 2
        assert first["ratio_max"] - first["ratio_min"] > 1e-3
    finally:
        policy.set_adapter(start)


def test_advantages_with_a_rollout_missing_follow_the_same_formula(world):
    samples = gather(world[1])
    for scale in ("none", "group", "batch"):
        whole = advantages_of(samples, GrpoSettings(scale=scale))
        for g in {s.group for s in samples}:
            assert whole[[other.group == g for other in samples]].sum() == pytest.approx(0.0, abs=1e-5)
        ragged = advantages_of(samples[1:], GrpoSettings(scale=scale))
        same = [i for i, s in enumerate(samples) if s.group != samples[0].group]
        if scale != "batch":  # another group's members do not change the rest
            np.testing.assert_allclose(ragged[[i - 1 for i in same]], whole[same], atol=1e-6)


def test_minibatches_keep_groups_whole(world):
    samples = gather(world[1])
    parts = minibatches(samples, 4)
    assert sorted(i for p in parts for i in p) == list(range(len(samples)))
    assert [len({samples[i].group for i in p}) for p in parts] == [4, 2]
    assert minibatches(samples, None) == [list(range(len(samples)))]


def test_several_passes_of_an_e_step_keep_the_prior_and_the_reward_shift_of_its_beginning(world):
    trainer, groups = world
    policy, samples = trainer.policy, gather(groups)
    before = policy.adapter

    class Nudge(Recorder):
        def apply(self, policy, gradients):
            policy.set_adapter({k: 1.1 * v for k, v in policy.adapter.items()})
            return super().apply(policy, gradients)

    cfg = trainer.recipe.e_step.model_copy(update={"epochs": 2})
    teacher = Teacher(TeacherSettings(weights="live"), policy)
    chosen = [s for s in samples if s.teacher is not None]
    labels = mx.array([int(s.rollout.success) for s in chosen])
    old = mx.stack([x.sum() for x in plain_logps(policy, [s.student for s in chosen])])
    learner = Nudge()
    try:
        result = bco_update(policy, samples, learner, cfg, previous_delta=None, seed=0, teacher=teacher)
        policy.set_adapter({k: 1.1 * v for k, v in before.items()})

        def loss() -> mx.array:
            new = mx.stack([x.sum() for x in plain_logps(policy, [s.teacher for s in chosen])])
            return losses.bco_loss(new, old, labels, beta=cfg.beta, delta=result.delta)[0]

        _, gradient = nn.value_and_grad(policy.model, loss)()
    finally:
        policy.set_adapter(before)
    assert len(learner.gradients) == 2
    assert_close(learner.gradients[1], dict(tree_flatten(gradient)))


def test_a_batch_with_one_class_skips_the_e_step(world):
    trainer, groups = world
    failures = [s for s in gather(groups) if not s.rollout.success]
    teacher = Teacher(TeacherSettings(weights="live"), trainer.policy)
    learner = Recorder()
    result = bco_update(
        trainer.policy, failures, learner, trainer.recipe.e_step, previous_delta=0.5, seed=0, teacher=teacher
    )
    assert result.metrics["skipped"] == 1
    assert result.delta == 0.5
    assert not learner.gradients


def test_without_contexts_the_m_step_leaves_the_student_alone(world):
    trainer, groups = world
    bare = [
        replace(g, rollouts=tuple(replace(r, context=None, teacher_prompt=None) for r in g.rollouts)) for g in groups
    ]
    teacher = Teacher(TeacherSettings(weights="live"), trainer.policy)
    learner = Recorder()
    metrics, seen = divergence_update(trainer.policy, gather(bare), learner, MStepSettings(), teacher, seed=0)
    assert not learner.gradients
    assert not seen
    assert metrics["updates"] == 0


def test_one_prompt_on_both_sides_gives_no_divergence(world):
    trainer, groups = world
    same = [
        replace(
            g, rollouts=tuple(replace(r, context=Context("sibling", "x"), teacher_prompt=g.prompt) for r in g.rollouts)
        )
        for g in groups
    ]
    learner = Recorder()
    teacher = Teacher(TeacherSettings(weights="live"), trainer.policy)
    metrics, _ = divergence_update(trainer.policy, gather(same), learner, MStepSettings(), teacher, seed=0)
    assert abs(metrics["divergence"]) < 1e-6
    assert max(float(mx.abs(g).max()) for g in learner.gradients[0].values()) < 1e-6


def test_an_update_that_is_not_finite_is_left_out(world):
    trainer = world[0]
    policy = trainer.policy
    learner = Learner(trainer.recipe.optimizer)
    before = policy.adapter
    gradients = dict(before.items())
    name = next(iter(gradients))
    gradients[name] = gradients[name] * float("nan")
    from mlx.utils import tree_unflatten

    out = learner.apply(policy, tree_unflatten(list(gradients.items())))
    assert out == {"grad_norm": None, "rate": 0.0, "applied": 0}
    assert learner.skipped == 1
    assert all(mx.array_equal(before[k], v).item() for k, v in policy.adapter.items())


def test_warm_up_and_clipping(world):
    trainer = world[0]
    policy, start = trainer.policy, trainer.policy.adapter
    cfg = trainer.recipe.optimizer.model_copy(update={"warmup_steps": 4, "learning_rate": 1e-3, "grad_clip": 1e-3})
    learner = Learner(cfg, ratio=0.5)
    from mlx.utils import tree_unflatten

    gradients = tree_unflatten([(k, mx.ones_like(v)) for k, v in start.items()])
    rates = [learner.apply(policy, gradients)["rate"] for _ in range(5)]
    policy.set_adapter(start)
    assert rates == pytest.approx([1.25e-4, 2.5e-4, 3.75e-4, 5e-4, 5e-4])


def test_warm_up_goes_by_the_steps_of_the_run_and_starts_again_at_a_reset(world):
    trainer = world[0]
    policy, start = trainer.policy, trainer.policy.adapter
    cfg = trainer.recipe.optimizer.model_copy(update={"warmup_steps": 10, "learning_rate": 1e-3})
    gradients = tree_map(mx.ones_like, policy.model.trainable_parameters())

    def rate(learner: Learner, step: int) -> float:
        learner.begin(step)
        return learner.apply(policy, gradients)["rate"]

    e_step = Learner(cfg)  # before every fifth M-step
    assert [rate(e_step, n) for n in (5, 10, 15)] == pytest.approx([5e-4, 1e-3, 1e-3])
    by_updates = Learner(cfg.model_copy(update={"warmup_by": "updates"}))
    assert [rate(by_updates, n) for n in (5, 10, 15)] == pytest.approx([1e-4, 2e-4, 3e-4])
    e_step.reset(policy, 0.5)
    resumed = Learner(cfg)
    resumed.restore(e_step.arrays(), e_step.scalars())
    for learner in (e_step, resumed):
        assert [rate(learner, n) for n in (17, 20, 25, 30)] == pytest.approx([1e-4, 2.5e-4, 5e-4, 5e-4])
    policy.set_adapter(start)


COMPILED_UPDATES = """
import json, sys
import mlx.core as mx
from mlx.utils import tree_flatten, tree_map
from vpd_mlx.engine import learner as optimizer
from vpd_mlx.engine.settings import OptimizerSettings

class Model:
    def __init__(self):
        self.tree = {"a": mx.arange(12.0).reshape(3, 4) / 7, "b": {"c": mx.ones((5,)) / 3}}
    def trainable_parameters(self):
        return self.tree
    def update(self, tree):
        self.tree = tree

class Alone:
    def sum(self, gradients):
        return gradients

class Policy:
    model, ranks = Model(), Alone()

(mx.enable_compile if sys.argv[1] == "on" else mx.disable_compile)()
traces, plain = [], optimizer.adam_step
def counted(adam):
    step = plain(adam)
    return lambda *given: traces.append(1) or step(*given)
optimizer.adam_step = counted
policy = Policy()
learner = optimizer.Learner(OptimizerSettings(learning_rate=0.01, warmup_steps=3, grad_clip=2.0))
for i in range(5):  # the rate rises, and some of the gradients are clipped
    learner.apply(policy, {"a": mx.sin(policy.model.tree["a"] * (i + 1)), "b": {"c": policy.model.tree["b"]["c"] * i}})
print(json.dumps({"traces": len(traces), "found": [v.flatten().tolist() for _, v in tree_flatten(policy.model.tree)]}))
"""


@pytest.mark.long  # on a CPU mlx runs a C++ compiler for it
def test_compiled_updates_are_one_trace_and_the_same_numbers():
    run = {
        how: json.loads(subprocess.check_output([sys.executable, "-c", COMPILED_UPDATES, how])) for how in ("on", "off")
    }
    assert (run["on"]["traces"], run["off"]["traces"]) == (1, 5)
    for on, off in zip(run["on"]["found"], run["off"]["found"], strict=True):
        assert on == pytest.approx(off, abs=1e-6)


# --- no dead options: each changes the adapter that two steps lead to

OPTIONS = [
    ("vpd", {"e_step.every": 1}),
    ("vpd", {"e_step.beta": 0.5}),
    ("vpd", {"e_step.prior": "fixed"}),
    ("vpd", {"e_step.delta": "ema"}),
    ("vpd", {"e_step.delta": "ema", "e_step.delta_rate": 0.9}),
    ("vpd", {"e_step.length_normalise": True}),
    ("vpd", {"e_step.minibatch_prompts": 2}),
    ("vpd", {"e_step.epochs": 2}),
    ("vpd", {"e_step.contexts": "crossed"}),
    ("vpd", {"e_step.anchor": 0.5}),
    ("vpd", {"e_step.token_share": 0.5}),
    ("vpd", {"e_step.until_auc": 0.5}),
    ("vpd", {"e_step.contexts": "own", "e_step.hints": 0.5}),
    ("vpd", {"e_step.learning_rate_ratio": 0.1}),
    *(("vpd", {"teacher.weights": w}) for w in ("ema", "trust_region", "adapter", "gated")),
    ("vpd", {"m_step.alpha": 0.2}),
    ("vpd", {"m_step.top_k": 3}),
    ("vpd", {"m_step.top_k": 3, "m_step.tail": False}),
    ("vpd", {"m_step.weighting": "token"}),
    ("vpd", {"m_step.entry_clip": 0.01}),
    ("vpd", {"m_step.pass_rate_weights": True}),
    ("joint", {"m_step.pass_rate_weights": True}),
    ("vpd", {"m_step.importance_clip": 1.01}),
    ("vpd", {"m_step.minibatch_prompts": 3}),
    ("vpd", {"m_step.epochs": 2}),
    ("vpd", {"lora.dropout": 0.2}),
    ("vpd", {"lora.scale": 4.0}),
    ("vpd", {"lora.layers": 1}),
    ("vpd", {"lora.keys": ["self_attn.q_proj"]}),
    ("vpd", {"optimizer.weight_decay": 0.5}),
    ("vpd", {"optimizer.beta1": 0.5}),
    ("vpd", {"optimizer.beta2": 0.5}),
    ("vpd", {"optimizer.grad_clip": 0.01}),
    ("vpd", {"optimizer.warmup_steps": 0}),
    ("vpd", {"optimizer.warmup_by": "updates"}),
    ("vpd", {"seed": 1}),
    ("sdpo", {"teacher.ema_rate": 0.5}),
    ("sdpo", {"teacher.weights": "live"}),
    ("sdpo", {"teacher.weights": "trust_region", "teacher.trust_region": 0.1}),
    ("grpo", {"grpo.scale": "group"}),
    ("grpo", {"grpo.scale": "batch"}),
    ("grpo", {"grpo.weighting": "sequence"}),
    ("grpo", {"grpo.kl": 0.5}),
    ("grpo", {"grpo.epochs": 2}),
    ("grpo", {"grpo.epochs": 3, "grpo.clip_low": 0.001}),
    ("grpo", {"grpo.epochs": 3, "grpo.clip_high": 0.001}),
    ("grpo", {"grpo.epochs": 3, "grpo.dual_clip": 1.001, "grpo.clip_low": 0.9}),
    ("grpo", {"grpo.minibatch_prompts": 2}),
    ("grpo", {"grpo.drop_uniform_groups": True, "grpo.weighting": "token"}),
    ("joint", {"hybrid.distill": 0.9}),
    ("joint", {"hybrid.reward": 0.9}),
    ("joint", {"m_step.alpha": 0.0}),
    ("reshape", {"hybrid.distill": 0.9}),
    ("reshape", {"hybrid.reward": 0.9}),
    ("reweight", {"hybrid.mix": 0.5}),
    ("reweight", {"hybrid.mix_decay_steps": 2}),
    ("reweight", {"hybrid.weight_clip": 0.6}),
    ("srpo", {"hybrid.distill": 0.9}),
    ("srpo", {"hybrid.reward": 0.9}),
    ("srpo", {"m_step.alpha": 0.0}),
    ("srpo", {"grpo.epochs": 2}),
    ("srpo", {"m_step.pass_rate_weights": True}),
]
LOUD = {
    "optimizer.learning_rate": 1e-2,
    "optimizer.warmup_steps": 2,
    "optimizer.grad_clip": None,
    "e_step.learning_rate_ratio": 1.0,
}


@pytest.fixture(scope="module")
def after_two_steps(world):
    """Adapter after two steps on one fixed batch, by algorithm and overrides; each computed once."""
    from conftest import QUICKSTART, SMALL

    from vpd_mlx.recipe import load_recipe

    trainer, groups = world
    # The checker's words first: then failures and successes of one group have contexts of different kinds.
    words_first = add_context(
        {"verifier": verifier, "sibling": sibling}, groups, trainer.prompter, trainer.recipe.feedback
    )
    known: dict[str, dict[str, np.ndarray]] = {}
    loaded: dict[str, tuple[Policy, dict[str, mx.array]]] = {}

    def untrained(recipe) -> Policy:
        key = f"{recipe.lora} {recipe.seed}"
        if key not in loaded:
            policy = Policy.load(recipe.model, recipe.lora, seed=recipe.seed)
            loaded[key] = policy, policy.adapter
        policy, start = loaded[key]
        policy.set_adapter(start)
        return policy

    def run(algorithm: str, overrides: dict) -> dict[str, np.ndarray]:
        key = f"{algorithm} {overrides}"
        if key not in known:
            # A slow teacher would hide what some options of the E-step do within two steps.
            teacher = {"teacher.weights": "ema" if algorithm == "sdpo" else "live", "algorithm": algorithm}
            settings = {**SMALL, "rollout.prompts": 6, "e_step.every": 2, **LOUD, **teacher, **overrides}
            recipe = load_recipe(QUICKSTART, list(settings.items()))
            policy = untrained(recipe)
            algo = ALGORITHMS[algorithm].load()(recipe, policy)
            for number in (1, 2, 3, 4) if "e_step.delta" in overrides else (1, 2):
                algo(
                    policy,
                    words_first if "e_step.contexts" in overrides else groups,
                    Step(number, recipe.seed, Clock()),
                )
            known[key] = {k: np.array(v) for k, v in policy.adapter.items()}
        return known[key]

    return run


def base_of(overrides: dict) -> dict:
    """What an option is compared with: the same without it, or its own neighbour where it needs company."""
    last = list(overrides)[-1] if len(overrides) > 1 else None
    companions = {
        "e_step.delta_rate": {"e_step.delta": "ema"},
        "e_step.hints": {"e_step.contexts": "own"},
        "m_step.tail": {"m_step.top_k": 3},
        "teacher.trust_region": {"teacher.weights": "trust_region"},
        "grpo.clip_low": {"grpo.epochs": 3},
        "grpo.clip_high": {"grpo.epochs": 3},
    }
    if last == "grpo.clip_low" and "grpo.dual_clip" in overrides:
        return {"grpo.epochs": 3, "grpo.clip_low": 0.9}
    if last == "grpo.weighting":
        return {}
    if overrides == {"e_step.contexts": "crossed"}:
        return {"e_step.contexts": "own"}
    if overrides == {"e_step.delta": "ema"}:
        return {"e_step.delta": "fresh"}
    return companions.get(last, {}) if last else {}


@pytest.mark.parametrize(("algorithm", "overrides"), OPTIONS, ids=lambda x: str(x))
def test_no_option_is_dead(after_two_steps, algorithm, overrides):
    with_it = after_two_steps(algorithm, overrides)
    without = after_two_steps(algorithm, base_of(overrides))
    assert with_it.keys() != without.keys() or any(not np.array_equal(with_it[k], without[k]) for k in with_it)
    assert all(np.isfinite(v).all() for v in with_it.values())


def test_a_frozen_teacher_is_a_live_one_when_a_batch_is_one_update(world, after_two_steps):
    several = {"m_step.minibatch_prompts": 3}
    a = after_two_steps("vpd", {"teacher.weights": "frozen"})
    b = after_two_steps("vpd", {})
    assert all(np.array_equal(a[k], b[k]) for k in a)
    c = after_two_steps("vpd", {**several, "teacher.weights": "frozen"})
    d = after_two_steps("vpd", several)
    assert any(not np.array_equal(c[k], d[k]) for k in c)


def test_sdpo_with_a_live_teacher_is_vpd_without_e_steps(after_two_steps):
    sdpo = after_two_steps("sdpo", {"teacher.weights": "live"})
    vpd = after_two_steps("vpd", {"e_step.every": 10**6})
    assert sdpo.keys() == vpd.keys()
    assert all(np.array_equal(sdpo[k], vpd[k]) for k in sdpo)


def test_micro_batches_do_not_change_what_is_learned(world):
    trainer, groups = world
    policy, samples = trainer.policy, gather(groups)
    chosen = [s for s in samples if s.teacher is not None]
    teacher = Teacher(TeacherSettings(weights="live"), policy)
    loss = Distillation(MStepSettings(), teacher)
    rows = [s.student for s in chosen]
    states = teacher.states(policy, [s.teacher for s in chosen])
    weights = [np.full(len(r.completion), 0.1, np.float32) for r in rows]
    found = []
    for budget in (32, 100, 10**6):
        policy._micro_batch_tokens, before = budget, policy._micro_batch_tokens
        found.append(accumulate(policy, rows, weights, lambda own: [states[i] for i in own], loss, 0))
        policy._micro_batch_tokens = before
    for other in found[1:]:
        assert_close(dict(tree_flatten(other.gradients)), dict(tree_flatten(found[0].gradients)))
        assert other.loss == pytest.approx(found[0].loss, abs=1e-5)


def test_padding_puts_each_target_behind_the_position_that_predicts_it():
    padded = pad([TokenRow((5, 6, 7), (8, 9)), TokenRow((1,), (2, 3, 4))], multiple=8)
    assert padded.inputs.shape == (2, 8)
    assert padded.targets.tolist() == [8, 9, 2, 3, 4]
    flat = padded.inputs.reshape(-1)
    assert flat[padded.positions].tolist() == [7, 8, 1, 2, 3]


def test_sample_order_is_that_of_the_groups(world):
    samples = gather(world[1])
    assert all(isinstance(s, Sample) for s in samples)
    assert [s.group for s in samples] == sorted(s.group for s in samples)


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_shared_prompts_give_the_same_states_and_gradients(world, kind, multiple):
    trainer, groups = world
    policy = trainer.policy
    rows = [getattr(s, kind) for s in gather(groups) if s.teacher is not None]
    rows.append(TokenRow(rows[0].prompt, rows[0].completion[:1]))  # one token: nothing to extend
    assert policy.shares_prompts

    def run(share: bool, part: list[TokenRow]):
        policy.shares_prompts = share
        before, policy._multiple = policy._multiple, multiple
        weights = mx.random.normal((sum(len(r.completion) for r in part), 64), key=mx.random.key(3))
        try:
            value, gradient = nn.value_and_grad(policy.model, lambda: (policy.hidden(part)[0] * weights).sum())()
            return policy.hidden(part), value, dict(tree_flatten(gradient))
        finally:
            policy.shares_prompts, policy._multiple = True, before

    for part in (rows, [TokenRow(r.prompt, r.completion[:1]) for r in rows]):
        (states, targets), _, gradient = run(True, part)
        (want, want_targets), _, want_gradient = run(False, part)
        assert mx.array_equal(targets, want_targets).item()
        np.testing.assert_allclose(np.array(states), np.array(want), atol=1e-5, rtol=1e-4)
        assert_close(gradient, want_gradient, 1e-5)


def test_micro_batches_keep_to_the_budget_and_prompts_together():
    rows = [TokenRow(tuple([p] * (10 + p)), (1,) * n) for p in range(4) for n in (2, 5, 3)]
    for shared in (False, True):
        for budget in (1, 30, 60, 10**6):
            batches = micro_batches(rows, budget, shared=shared)
            assert sorted(i for b in batches for i in b) == list(range(len(rows)))
            for b in batches:
                part = [rows[i] for i in b]
                cost = len(b) * max(len(r.prompt) + len(r.completion) for r in part)
                if shared:
                    prompts = {r.prompt for r in part}
                    cost = len(prompts) * max(map(len, prompts)) + len(b) * max(len(r.completion) for r in part)
                assert cost <= budget or len(b) == 1
    assert len(micro_batches(rows, 60, shared=True)) < len(micro_batches(rows, 60))


def test_crossed_contexts_pair_a_failures_words_with_a_right_answer():
    def sample(
        group: int, tokens: tuple[int, ...], right: bool, kind: str | None, prompt: tuple[int, ...] = (9,)
    ) -> Sample:
        rollout = Rollout(
            tokens=tokens,
            logps=(0.0,) * len(tokens),
            text="",
            finish="stop",
            success=right,
            context=None if kind is None else Context(kind, "words"),
            teacher_prompt=None if kind is None else prompt,
        )
        return Sample(group, TokenRow((1,), tokens), None if kind is None else TokenRow(prompt, tokens), rollout)

    samples = [
        sample(0, (5,), False, "verifier", (9, 1)),
        sample(0, (6, 7), True, "sibling"),
        sample(0, (8,), True, None),
        sample(0, (5, 5), False, "sibling", (9, 2)),
        sample(1, (5,), False, "verifier", (9, 3)),
        sample(0, (5, 4), False, "attempts", (9, 4)),
    ]
    out = crossed(samples)
    assert out[:6] == samples
    (extra,) = out[6:]  # not for contexts that show a sibling's answer, not in the group without a success
    assert extra.teacher == TokenRow((9, 1), (6, 7))
    assert extra.student == samples[1].student
    assert extra.rollout.success
    assert extra.rollout.context == samples[0].rollout.context


def test_when_memory_runs_out_micro_batches_are_halved_to_the_same_result(world, monkeypatch):
    trainer, groups = world
    policy, samples = trainer.policy, gather(groups)
    teacher = Teacher(TeacherSettings(weights="live"), policy)
    whole, halved = Recorder(), Recorder()
    divergence_update(policy, samples, whole, MStepSettings(), teacher, seed=0)
    real, before, notes = policy.hidden, policy._micro_batch_tokens, list(policy.notes)
    widest: list[int] = []

    def scarce(rows):
        if len(rows) > 12:
            raise RuntimeError("[malloc] Unable to allocate 4096 bytes.")
        widest.append(len(rows))
        return real(rows)

    monkeypatch.setattr(policy, "hidden", scarce)
    try:
        divergence_update(policy, samples, halved, MStepSettings(), teacher, seed=0)
        assert policy._micro_batch_tokens < before
        assert "memory ran out" in policy.notes[-1]
        assert max(widest) <= 12
        assert_close(halved.gradients[0], whole.gradients[0])
        monkeypatch.setattr(policy, "hidden", lambda rows: (_ for _ in ()).throw(RuntimeError("another fault")))
        with pytest.raises(RuntimeError, match="another fault"):
            policy.logps([samples[0].student])
        monkeypatch.setattr(
            policy, "hidden", lambda rows: (_ for _ in ()).throw(RuntimeError("[malloc] Unable to allocate"))
        )
        with pytest.raises(RuntimeError, match="Unable to allocate"):  # nothing left to halve: no endless loop
            policy.logps([samples[0].student])
    finally:
        policy._micro_batch_tokens, policy.notes = before, notes


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_blocks_are_one_models_own(dropout: float):
    """Recomputing blocks changes no gradient, shared prompt or not, dropout or not, and no other model of the process."""
    from conftest import QUICKSTART

    from vpd_mlx.engine.policy import Policy
    from vpd_mlx.engine.settings import LoraSettings, MemorySettings

    path, lora = str(QUICKSTART.parent / "model"), LoraSettings(rank=4, dropout=dropout)
    plain = Policy.load(path, lora, seed=1)
    before = type(plain.model.layers[0]).__call__
    thrifty = Policy.load(path, lora, MemorySettings(gradient_checkpointing=True), seed=1)
    assert type(plain.model.layers[0]).__call__ is before
    assert type(thrifty.model.layers[0]).__call__ is not before
    moved = {k: v + 0.05 for k, v in plain.adapter.items()}
    rows = [TokenRow((5, 6, 7), (8, 9)), TokenRow((5, 6, 7), (3, 4, 2)), TokenRow((6,), (1,))]
    for shares in (True, False):
        found = []
        for policy in (plain, thrifty):
            assert policy.shares_prompts
            policy.set_adapter(moved)
            policy.shares_prompts = shares
            done = [accumulate(policy, rows, unit_weights(rows), None, target_logps, seed=s) for s in (0, 1)]
            policy.shares_prompts = True
            assert all(mx.array_equal(v, moved[k]) for k, v in policy.adapter.items())
            found.append([dict(tree_flatten(d.gradients)) for d in done])
        for one, two in zip(*found, strict=True):
            assert_close(two, one, 1e-6)
        # the same masks, and other ones with another seed
        assert all(mx.array_equal(v, found[0][1][k]) for k, v in found[0][0].items()) == (dropout == 0)
