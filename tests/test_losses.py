"""The losses against reference numbers, hand-made numbers and edge cases."""

from __future__ import annotations

import json
import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpd_mlx import losses
from vpd_mlx.common.softmax import Softmax

# Computed in float64 with trl 1.16.0 (distillation) and trl 1.0.0 (BCO, delta set to the class midpoint).
VECTORS = json.loads((Path(__file__).parent / "data" / "losses.json").read_text())
CASES = [
    pytest.param(group["inputs"], row, id=f"{g}-{row['kind']}-{row['alpha']}-{row.get('tail')}")
    for g, group in enumerate(VECTORS["distillation"])
    for row in group["outputs"]
]
TOLERANCE = 1e-5


def array(x) -> mx.array:
    return mx.array(np.array(x, np.float32))


def close(got: mx.array, want, tolerance: float = TOLERANCE) -> None:
    np.testing.assert_allclose(np.array(got), np.array(want), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("inputs", "row"), CASES)
def test_distillation_matches_reference(inputs, row):
    student, teacher, ids = (
        array(inputs["student_logits"]),
        array(inputs["teacher_logits"]),
        mx.array(inputs["token_ids"]),
    )

    def per_token(s):
        if row["kind"] == "sampled_token":
            return losses.sampled_token_loss(s, teacher, ids)
        k = {"top_k": row["k"], "tail": row["tail"]} if row["kind"] == "topk" else {}
        value = losses.divergence(s, teacher, alpha=row["alpha"], **k)
        if row["kind"] == "is_clip":
            value = value * losses.importance_weights(
                losses.token_logps(s, ids), array(inputs["old_logp"]), clip=row["clip"]
            )
        return value

    close(per_token(student), row["per_token"])
    if "grad_student_logits" in row:
        close(mx.grad(lambda s: per_token(s).sum())(student), row["grad_student_logits"])


@pytest.mark.parametrize("row", VECTORS["bco"], ids=lambda r: f"beta{r['beta']}-{len(r['reward_pos'])}")
def test_bco_matches_reference(row):
    teacher = array(row["teacher_logp_pos"] + row["teacher_logp_neg"])
    student = array(row["student_logp_pos"] + row["student_logp_neg"])
    n_pos, n_neg = len(row["reward_pos"]), len(row["reward_neg"])
    labels = mx.array([1] * n_pos + [0] * n_neg)
    loss, metrics = losses.bco_loss(teacher, student, labels, beta=row["beta"])
    close(loss, row["loss_sum_of_class_means"])
    close(metrics["delta"], row["delta"])
    close(metrics["rewards"], row["reward_pos"] + row["reward_neg"])
    gradient = mx.grad(lambda t: losses.bco_loss(t, student, labels, beta=row["beta"])[0])(teacher)
    close(gradient, row["grad_teacher_logp_pos"] + row["grad_teacher_logp_neg"])
    analytic = losses.bco_gradient(
        metrics["rewards"], labels, metrics["delta"], beta=row["beta"], n_pos=n_pos, n_neg=n_neg
    )
    close(analytic, np.array(gradient), 1e-6)


def test_bco_anchor_and_delta_get_no_gradient():
    teacher, student, labels = array([-1.0, -2.0, -3.0]), array([-2.0, -2.0, -2.0]), mx.array([1, 0, 1])
    assert not mx.grad(lambda s: losses.bco_loss(teacher, s, labels, beta=0.5)[0])(student).any().item()
    # A constant added to every reward moves delta along with it and changes nothing.
    a = losses.bco_loss(teacher, student, labels, beta=0.5)[0]
    b = losses.bco_loss(teacher + 7.0, student, labels, beta=0.5)[0]
    close(a, b.item(), 1e-6)


def test_bco_by_hand():
    loss, metrics = losses.bco_loss(array([1.0, -1.0]), array([0.0, 0.0]), mx.array([1, 0]), beta=2.0)
    assert metrics["delta"].item() == 0.0
    assert loss.item() == pytest.approx(2 * math.log(1 + math.exp(-2.0)), abs=1e-6)


@pytest.mark.parametrize("labels", [[1, 1, 1], [0, 0, 0]])
def test_bco_one_class_absent_is_zero_with_zero_gradient(labels):
    teacher, student = array([-1.0, -2.0, -3.0]), array([-2.0, -1.0, -9.0])

    def loss(t):
        return losses.bco_loss(t, student, mx.array(labels), beta=0.1)[0]

    assert loss(teacher).item() == 0.0
    assert not mx.grad(loss)(teacher).any().item()
    # With a delta from elsewhere the present class still learns.
    assert losses.bco_loss(teacher, student, mx.array(labels), beta=0.1, delta=0.2)[0].item() > 0


ALPHAS = [0.0, 0.2, 0.5, 1.0]
SUPPORTS = [(None, True), (3, True), (3, False), (50, True), (50, False)]


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(("top_k", "tail"), SUPPORTS)
def test_equal_sides_give_zero_with_zero_gradient(alpha, top_k, tail):
    logits = mx.random.normal((2, 3, 11), key=mx.random.key(0)) * 3

    def total(s):
        return losses.divergence(s, logits, alpha=alpha, top_k=top_k, tail=tail).sum()

    assert abs(total(logits).item()) < 1e-6
    assert mx.abs(mx.grad(total)(logits)).max().item() < 1e-6


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(("top_k", "tail"), SUPPORTS)
@pytest.mark.parametrize("kind", ["gap", "minus_inf", "minus_inf_one_side", "ties"])
def test_extreme_logits_stay_finite(alpha, top_k, tail, kind):
    rng = np.random.default_rng(1)
    student, teacher = (rng.normal(size=(1, 2, 11)).astype(np.float32) for _ in range(2))
    if kind == "gap":
        student[..., 4] += 1e4
        teacher[..., 5] += 1e4
    elif kind == "minus_inf":
        student[..., :3] = teacher[..., :3] = -np.inf
    elif kind == "minus_inf_one_side":
        student[..., :3] = -np.inf
        teacher[..., 6:8] = -np.inf
    else:
        student[...] = 1.0

    def total(s):
        return losses.divergence(s, mx.array(teacher), alpha=alpha, top_k=top_k, tail=tail).sum()

    value, gradient = mx.value_and_grad(total)(mx.array(student))
    assert math.isfinite(value.item())
    assert value.item() >= -1e-6
    assert np.isfinite(np.array(gradient)).all()
    if kind == "minus_inf":  # the same tokens are forbidden on both sides: nothing pulls on them
        assert not np.array(gradient)[..., :3].any()


def test_extreme_logits_keep_log_probabilities_finite():
    logits = mx.array([[-math.inf, 0.0, 1e4], [-math.inf, -math.inf, 3.0]])
    assert np.isfinite(np.array(losses.log_softmax(logits))).all()
    assert np.isfinite(np.array(Softmax.of(logits).logps)).all()
    assert np.isfinite(np.array(losses.entropy(logits))).all()
    assert losses.token_logps(logits, mx.array([2, 2])).tolist() == [0.0, 0.0]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1), st.integers(1, 12), st.booleans())
def test_divergence_is_never_negative_and_shift_invariant(seed, alpha, k, tail):
    s, t = (mx.random.normal((1, 2, 9), key=mx.random.key(seed + i)) * 4 for i in range(2))
    value = losses.divergence(s, t, alpha=alpha, top_k=k, tail=tail)
    assert np.array(value).min() >= -1e-5
    close(losses.divergence(s + 5.0, t - 3.0, alpha=alpha, top_k=k, tail=tail), np.array(value), 1e-4)


def test_a_wide_top_k_is_the_full_vocabulary():
    s, t = (mx.random.normal((1, 4, 9), key=mx.random.key(i)) for i in range(2))
    full = losses.divergence(s, t, alpha=0.3)
    for k in (9, 20):
        for tail in (True, False):
            assert mx.array_equal(losses.divergence(s, t, alpha=0.3, top_k=k, tail=tail), full).item()


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_one_exponential_gives_scores_and_entropy_and_their_gradient(dtype):
    logits = (4 * mx.random.normal((5, 300), key=mx.random.key(1))).astype(dtype)
    logits[0, 3] = -float("inf")
    ids, weights = mx.array([7, 0, 299, 12, 100]), mx.array([1.0, -2.0, 0.5, 0.0, 3.0])

    def plain(x: mx.array) -> mx.array:
        return (losses.token_logps(x, ids) * weights).sum()

    def ours(x: mx.array) -> mx.array:
        softmax = Softmax.of(x)
        free = softmax.entropy + softmax.fixed_logps(ids) + softmax.logps.sum(axis=-1) + softmax.topk_mass(3)
        return (softmax.token_logps(ids) * weights).sum() + 100 * free.sum()  # which has no gradient

    found, want = Softmax.of(logits), losses.log_softmax(logits)
    np.testing.assert_allclose(np.array(found.logps)[:, 4:], np.array(want)[:, 4:], atol=4e-6)
    np.testing.assert_allclose(np.array(found.token_logps(ids)), np.array(losses.token_logps(logits, ids)), atol=2e-6)
    assert mx.array_equal(found.token_logps(ids), found.fixed_logps(ids)).item()
    np.testing.assert_allclose(np.array(found.entropy), np.array(-(mx.exp(want) * want).sum(axis=-1)), atol=5e-6)
    found, want = mx.grad(ours)(logits), mx.grad(plain)(logits)
    assert found.dtype == dtype
    rounding = 1e-6 if dtype == mx.float32 else 0.02
    np.testing.assert_allclose(np.array(found.astype(mx.float32)), np.array(want.astype(mx.float32)), atol=rounding)


def wide(x: mx.array) -> np.ndarray:
    return np.array(x, np.float64)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("scale", [1.0, 5.0, 300.0])  # beyond 88 a probability is 0 in float32
def test_the_written_derivative_of_a_divergence_is_as_exact_as_autodiffs(alpha, scale):
    student, teacher = (scale * mx.random.normal((4, 300), key=mx.random.key(k)) for k in (2, 3))
    weights = mx.array([1.0, 0.2, -0.7, 2.0])

    def plain(x: mx.array) -> mx.array:
        sides = losses.log_softmax(x), losses.log_softmax(teacher)
        return (losses.divergence_from_logps(*sides, alpha=alpha) * weights).sum()

    def ours(x: mx.array) -> mx.array:
        return (losses.divergence_of(Softmax.of(x), Softmax.of(teacher), alpha=alpha) * weights).sum()

    assert ours(student).item() == pytest.approx(plain(student).item(), rel=2e-6, abs=4e-6)
    logps, logqs = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in map(wide, (student, teacher)))
    p = np.exp(logps)
    target = logqs if alpha == 1.0 else np.logaddexp(np.log1p(-alpha) + logps, np.log(max(alpha, 1e-300)) + logqs)
    apart = logps - target
    want = p - np.exp(logqs) if alpha == 0.0 else p * (apart - (p * apart).sum(axis=-1, keepdims=True))
    want = want * wide(weights)[:, None] * (1.0 if alpha == 1.0 else 1.0 - alpha)
    errors = [np.abs(np.array(mx.grad(f)(student)) - want).max() for f in (ours, plain)]
    assert errors[0] < 5e-6 * max(1.0, scale)  # on a CPU mlx's exponentials are exact to 2e-6
    assert errors[0] < 3 * errors[1] + 1e-6
    assert np.abs(want).max() > 1e-5 or scale == 300.0


def test_an_entry_of_the_vocabulary_adds_no_more_than_its_clip():
    student, teacher = mx.log(mx.array([[0.7, 0.2, 0.1]])), mx.log(mx.array([[0.1, 0.3, 0.6]]))
    forward = [0.1 * math.log(0.1 / 0.7), 0.3 * math.log(0.3 / 0.2), 0.6 * math.log(0.6 / 0.1)]  # -0.195, 0.122, 1.075
    clipped = losses.divergence(student, teacher, alpha=0.0, entry_clip=0.15)
    assert clipped.item() == pytest.approx(forward[0] + forward[1] + 0.15, abs=1e-6)
    whole = losses.divergence(student, teacher, alpha=0.0, entry_clip=2.0)
    assert whole.item() == pytest.approx(sum(forward), abs=1e-6)

    def held(alpha: float, clip: float) -> mx.array:
        return mx.grad(lambda x: losses.divergence(x, teacher, alpha=alpha, entry_clip=clip).sum())(student)

    for alpha in (0.0, 0.5, 1.0):
        assert float(mx.abs(held(alpha, 10.0)).max()) > 1e-3
        assert not np.allclose(np.array(held(alpha, 10.0)), np.array(held(alpha, 0.05)), atol=1e-3)


def test_half_right_groups_weigh_most():
    rates = mx.array([0.0, 0.125, 0.5, 0.875, 1.0])
    assert losses.pass_rate_weights(rates).tolist() == pytest.approx([0.0, 0.6614378, 1.0, 0.6614378, 0.0], abs=1e-6)


def test_divergence_pulls_the_student_towards_the_teacher_and_never_moves_the_teacher():
    s, t = mx.zeros((1, 1, 4)), mx.array([[[3.0, 0.0, 0.0, 0.0]]])
    for alpha in ALPHAS:
        gradient = mx.grad(lambda x, a=alpha: losses.divergence(x, t, alpha=a).sum())(s)
        assert gradient[0, 0, 0].item() < 0  # descending raises the token the teacher prefers
        assert mx.all(gradient[0, 0, 1:] > 0).item()
        assert not mx.grad(lambda x, a=alpha: losses.divergence(s, x, alpha=a).sum())(t).any().item()


def test_arguments_outside_their_range_are_refused():
    x = mx.zeros((1, 1, 3))
    with pytest.raises(ValueError, match="alpha is"):
        losses.divergence(x, x, alpha=1.5)
    with pytest.raises(ValueError, match="top_k is 0"):
        losses.divergence(x, x, alpha=0.5, top_k=0)
    with pytest.raises(ValueError, match="scale is 'std'"):
        losses.group_advantages(mx.zeros((1, 2)), scale="std")  # type: ignore[arg-type]


def test_group_advantages_by_hand():
    rewards = array([[1, 0, 0, 1], [1, 1, 1, 1]])
    close(losses.group_advantages(rewards), [[0.5, -0.5, -0.5, 0.5], [0, 0, 0, 0]])
    group = 0.5 / (math.sqrt(1 / 3) + 1e-6)
    close(losses.group_advantages(rewards, scale="group"), [[group, -group, -group, group], [0, 0, 0, 0]])
    batch = 0.5 / (float(np.std([1, 0, 0, 1, 1, 1, 1, 1], ddof=1)) + 1e-6)
    close(losses.group_advantages(rewards, scale="batch"), [[batch, -batch, -batch, batch], [0, 0, 0, 0]])


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "loss", "slope"),
    [
        (0.0, 1.0, -1.0, -1.0),
        (0.1, 1.0, -math.exp(0.1), -math.exp(0.1)),
        (0.5, 1.0, -1.28, 0.0),  # clipped above
        (-0.5, 1.0, -math.exp(-0.5), -math.exp(-0.5)),  # below the range a good token may still rise
        (-0.5, -1.0, 0.8, 0.0),  # clipped below
        (0.5, -1.0, math.exp(0.5), math.exp(0.5)),
        (2.0, -1.0, 3.0, 0.0),  # dual clip
    ],
)
def test_policy_gradient_by_hand(log_ratio, advantage, loss, slope):
    old, mask = array([[-1.0]]), mx.ones((1, 1))

    def total(logps):
        return losses.policy_gradient_loss(
            logps, old, array([advantage]), mask, clip_low=0.2, clip_high=0.28, dual_clip=3.0
        )[0]

    value, gradient = mx.value_and_grad(total)(old + log_ratio)
    assert value.item() == pytest.approx(loss, abs=1e-5)
    assert gradient.item() == pytest.approx(slope, abs=1e-5)


def test_policy_gradient_ignores_what_is_masked():
    logps, old = array([[-1.0, math.nan], [-2.0, -3.0]]), array([[-1.1, -math.inf], [-2.0, -2.5]])
    mask = array([[1, 0], [1, 1]])

    def total(x):
        return losses.policy_gradient_loss(x, old, array([1.0, -0.5]), mask, clip_low=0.2, clip_high=0.28)[0]

    value, gradient = mx.value_and_grad(total)(logps)
    want = (-math.exp(0.1) + 0.5 + 0.5 * 0.8) / 3  # the last ratio, exp(-0.5), is clipped at 0.8
    assert value.item() == pytest.approx(want, abs=1e-5)
    assert gradient[0, 1].item() == 0.0
    nothing, metrics = losses.policy_gradient_loss(
        logps, old, array([1.0, 1.0]), mx.zeros((2, 2)), clip_low=0.2, clip_high=0.28
    )
    assert nothing.item() == 0.0
    assert all(v.item() == 0.0 for v in metrics.values())


def test_policy_gradient_takes_an_advantage_per_token():
    logps = array([[-1.0, -2.0]])
    gradient = mx.grad(
        lambda x: losses.policy_gradient_loss(
            x, logps, array([[2.0, -4.0]]), mx.ones((1, 2)), clip_low=0.2, clip_high=0.28
        )[0]
    )(logps)
    close(gradient, [[-1.0, 2.0]])


def test_ratios_are_bounded_and_without_gradient():
    weights = losses.importance_weights(array([0.0, -1.0, -90.0]), array([-90.0, -1.5, 0.0]), clip=2.0)
    close(weights, [2.0, math.exp(0.5), math.exp(-20.0)])
    assert mx.grad(lambda x: losses.importance_weights(x, array([-1.0]), clip=9.0).sum())(array([-0.5])).item() == 0.0


def test_k3_is_zero_at_equality_and_positive_elsewhere():
    close(losses.k3_kl(array([-1.0, -1.0]), array([-1.0, -2.0])), [0.0, math.exp(-1.0)])
    gradient = mx.grad(lambda x: losses.k3_kl(x, array([-1.0])).sum())(array([-0.5]))
    assert gradient.item() > 0  # descending brings the policy back to the reference


def test_hybrid_advantages_by_hand():
    advantages, teacher, student = array([1.0, 1.0, -1.0]), array([-1.0, -1.0, -1.0]), array([-3.0, -1.1, -3.0])
    close(
        losses.reshaped_advantages(advantages, teacher, student, reward=0.5, distill=0.25),
        [0.5 + 0.5, 0.5 + 0.025, -0.5 + 0.5],
    )
    got = losses.reweighted_advantages(advantages, teacher, student, mix=0.5, clip=0.2)
    close(got, [1.1, 0.5 + 0.5 * math.exp(0.1), -0.9])


def test_entropy_and_mass_by_hand():
    logits = mx.log(array([[0.5, 0.25, 0.25, 0.0]]))
    assert losses.entropy(logits).item() == pytest.approx(1.5 * math.log(2), abs=1e-6)
    softmax = Softmax.of(logits)
    assert softmax.topk_mass(2).item() == pytest.approx(0.75, abs=1e-6)
    assert softmax.topk_mass(9).item() == 1.0


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_logits_are_computed_in_float32(dtype):
    s, t = (mx.random.normal((1, 2, 9), key=mx.random.key(i)).astype(dtype) for i in range(2))
    value = losses.divergence(s, t, alpha=0.5)
    assert value.dtype == mx.float32
    close(value, np.array(losses.divergence(s.astype(mx.float32), t.astype(mx.float32), alpha=0.5)), 1e-7)
