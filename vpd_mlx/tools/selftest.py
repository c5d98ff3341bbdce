"""Numerics on this machine: the default device against the CPU, gradients against finite differences, sampling against scoring.

A wrong kernel, or a gradient that silently is zero on one backend, trains nothing while every loss looks fine. So each loss and
each fused path is run on both devices, and each gradient is also compared with a central difference along a random direction,
which no backend's vjp has a part in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.lora import LoRALinear

from vpd_mlx import losses
from vpd_mlx.algos.m_step import Distillation
from vpd_mlx.algos.settings import MStepSettings, TeacherSettings
from vpd_mlx.algos.teacher import Teacher
from vpd_mlx.engine.batching import shared_prompts
from vpd_mlx.engine.heads import TokenLoss, target_logps, weighted_token_loss
from vpd_mlx.engine.learner import Floats, accumulate, adam_step, unit_weights
from vpd_mlx.engine.lora import share
from vpd_mlx.engine.policy import GPU_MULTIPLE, Policy
from vpd_mlx.engine.sampling import Sampling, generate
from vpd_mlx.types import TokenRow

__all__ = ["Check", "checks"]

Parameters = dict[str, mx.array]
Scalar = Callable[[Parameters], mx.array]
DEVICE_TOLERANCE = 2e-3  # relative: GPUs sum in another order
TF32_TOLERANCE = 2e-2  # where matrices are multiplied with ten bits of mantissa, as Apple's GPUs do from M5 on
DIFFERENCE_TOLERANCE = 3e-2  # relative: a central difference in float32
STEP = 3e-2


@dataclass(frozen=True)
class Check:
    """One finding: what was compared, how far apart it was at most, how far it may be."""

    name: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        """Whether the error is allowed; NaN is not."""
        return self.error <= self.allowed


def _normal(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32) * scale)


def _loss_cases() -> Iterator[tuple[str, Scalar, Parameters]]:
    """(name, scalar function, parameters): every public loss, its gradient in the parameters."""
    student, teacher = _normal((2, 5, 64), 0), _normal((2, 5, 64), 1, 2.0)
    # Eight tokens stand clear of the others, so that a small step does not change which are the top k.
    student = student + mx.where(mx.arange(64) % 8 == 3, 6.0, 0.0)
    ids = mx.array(np.random.default_rng(2).integers(0, 64, (2, 5)))
    weights = _normal((2, 5), 3)

    def divergence(p: Parameters, alpha: float, top_k: int | None, tail: bool) -> mx.array:
        return (losses.divergence(p["x"], teacher, alpha=alpha, top_k=top_k, tail=tail) * weights).sum()

    for alpha in (0.0, 0.5, 1.0):
        for top_k, tail in ((None, True), (8, True), (8, False)):
            kept = "" if top_k is None else f" top_k={top_k}{'' if tail else ' no tail'}"
            weighted = partial(divergence, alpha=alpha, top_k=top_k, tail=tail)
            yield f"divergence alpha={alpha:g}{kept}", weighted, {"x": student}
    yield "token log-probabilities", lambda p: (losses.token_logps(p["x"], ids) * weights).sum(), {"x": student}
    sums, anchor = _normal((8,), 4, 3.0), _normal((8,), 5, 3.0)
    labels = mx.array([1, 0, 1, 0, 0, 1, 0, 0])
    yield "BCO", lambda p: losses.bco_loss(p["x"], anchor, labels, beta=0.3, delta=0.1)[0], {"x": sums}
    old, advantages, mask = _normal((2, 5), 6, 0.3), _normal((2,), 7), mx.ones((2, 5))
    policy_gradient = partial(losses.policy_gradient_loss, clip_low=0.9, clip_high=9.0, dual_clip=None)
    yield "policy gradient", lambda p: policy_gradient(p["x"], old, advantages, mask)[0], {"x": old + 0.05}
    yield "k3 KL", lambda p: losses.k3_kl(p["x"], old).sum(), {"x": old + 0.2}

    inputs = _normal((6, 64), 12)
    mx.random.seed(16)
    pair = [LoRALinear.from_base(nn.Linear(64, 32).to_quantized(32, 4), r=4, scale=2.0) for _ in "qk"]
    share(pair)
    output_weights = _normal((6, 32), 13)

    def lora(p: Parameters) -> mx.array:
        pair[0].update({"lora_a": p["a"][0], "lora_b": p["b"]})
        pair[1].update({"lora_a": p["a"][1], "lora_b": p["b"]})
        first, second = (layer(inputs) for layer in pair)
        total: mx.array = (first * second * output_weights).sum()
        return total

    yield "LoRA on quantised layers", lora, {"a": _normal((2, 64, 4), 14, 0.2), "b": _normal((4, 32), 15, 0.2)}


def _relative(a: mx.array, b: mx.array) -> float:
    scale = max(float(np.abs(np.array(b)).max()), 1e-6)
    return float(np.abs(np.array(a) - np.array(b)).max()) / scale


def _value_and_grad(f: Scalar, parameters: Parameters, device: mx.Device) -> tuple[mx.array, Parameters]:
    with mx.stream(device):
        value, gradient = mx.value_and_grad(f)(parameters)
        mx.eval(value, gradient)
    return value, gradient


def _rounds_to_tf32() -> bool:
    """Whether the default device multiplies float32 matrices with about ten bits of mantissa: no more of them, and no fewer."""
    a, b = _normal((64, 512), 20), _normal((512, 64), 21)
    exact = np.array(a, np.float64) @ np.array(b, np.float64)
    return bool(2e-5 < _relative(mx.matmul(a, b), mx.array(exact.astype(np.float32))) < 2e-3)


def _tolerance() -> float:
    return TF32_TOLERANCE if _rounds_to_tf32() else DEVICE_TOLERANCE


def _check_loss(name: str, f: Scalar, parameters: Parameters) -> Iterator[Check]:
    device = mx.default_device()
    value, gradient = _value_and_grad(f, parameters, device)
    cpu_value, cpu_gradient = _value_and_grad(f, parameters, mx.Device(mx.cpu))
    apart = max(_relative(value, cpu_value), *(_relative(gradient[k], cpu_gradient[k]) for k in parameters))
    yield Check(f"{name}: {device.type.name} against CPU", apart, _tolerance())
    direction = {k: _normal(v.shape, 100 + i) for i, (k, v) in enumerate(parameters.items())}
    with mx.stream(mx.cpu):
        up = f({k: v + STEP * direction[k] for k, v in parameters.items()})
        down = f({k: v - STEP * direction[k] for k, v in parameters.items()})
        mx.eval(up, down)
    numeric = (float(up) - float(down)) / (2 * STEP)
    analytic = sum(float((np.array(gradient[k]) * np.array(direction[k])).sum()) for k in parameters)
    scale = float(np.sqrt(sum((np.array(g) ** 2).sum() for g in cpu_gradient.values()))) + 1e-6
    size = float(np.sqrt(sum((np.array(d) ** 2).sum() for d in direction.values())))
    # A random direction sees about 1/sqrt(n) of the gradient's length; compare with that, or with the figure itself.
    reference = max(abs(numeric), scale * size / np.sqrt(sum(v.size for v in parameters.values())) * 0.3)
    yield Check(f"{name}: gradient against differences", abs(numeric - analytic) / reference, DIFFERENCE_TOLERANCE)


def _check_head(policy: Policy) -> Iterator[Check]:
    """The model's head with the token losses of both steps, as `accumulate` runs them."""
    width, ids = policy.model.args.hidden_size, mx.array(np.random.default_rng(8).integers(0, policy.vocabulary, 20))
    hidden = {"x": _normal((20, width), 9)}
    distillation = Distillation(MStepSettings(), Teacher(TeacherSettings(weights="live"), policy))

    def through_head(p: Parameters, loss: TokenLoss, weights: mx.array, **constants: mx.array) -> mx.array:
        return weighted_token_loss(policy.head, loss, p["x"], weights, {"targets": ids, **constants}, chunk=7)[0]

    teacher, weights = _normal((20, width), 10), _normal((20,), 11)
    name = "fused head and divergence, quantised"
    yield from _check_loss(name, lambda p: through_head(p, distillation, weights, teacher=teacher), hidden)

    # Four completions of five tokens. Training weights their log-probabilities by BCO's analytic slope.
    labels, beta, delta = mx.array([1, 0, 0, 1]), 0.3, 0.1

    def sums(p: Parameters) -> mx.array:
        return losses.token_logps(policy.head(p["x"]), ids).reshape(4, 5).sum(axis=1)

    anchor = mx.stop_gradient(sums({"x": hidden["x"] + _normal((20, width), 12, 0.3)}))

    def bco(p: Parameters) -> mx.array:
        return losses.bco_loss(sums(p), anchor, labels, beta=beta, delta=delta)[0]

    def as_trained(p: Parameters) -> mx.array:
        rewards = losses.implicit_rewards(mx.stop_gradient(sums(p)), anchor, beta=beta)
        slopes = losses.bco_gradient(rewards, labels, delta, beta=beta, n_pos=2, n_neg=2)
        return through_head(p, target_logps, mx.repeat(slopes, 5))

    _, ours = _value_and_grad(as_trained, hidden, mx.default_device())
    _, autodiff = _value_and_grad(bco, hidden, mx.Device(mx.cpu))
    yield Check("BCO's analytic gradient against autodiff", _relative(ours["x"], autodiff["x"]), _tolerance())


def _check_model(policy: Policy) -> Iterator[Check]:
    """Sampling against scoring, and shared prompts against separate ones, values and gradients."""
    half = any(v.dtype in (mx.float16, mx.bfloat16) for _, v in tree_flatten(policy.model.parameters()))
    allowed = 0.1 if half else _tolerance()
    # Long enough that sharing it saves positions even where lengths are padded to a multiple.
    message = {"role": "user", "content": "47+38=" * 24}
    prompt = tuple(policy.tokenizer.apply_chat_template([message], add_generation_prompt=True))
    before, shares = policy.adapter, policy.shares_prompts
    # A fresh adapter's second factor is zero: shake it, so that LoRA has a part in what is compared.
    policy.set_adapter({k: v + _normal(v.shape, i, 0.02) for i, (k, v) in enumerate(before.items())})
    try:
        rollouts = [r for _, _, r in generate(policy, [prompt], 8, Sampling(1.0, 1.0, 8), 0)]
        rows = [TokenRow(prompt, r.tokens) for r in rollouts]

        def passes() -> tuple[list[Floats], dict[str, mx.array]]:
            done = accumulate(policy, rows, unit_weights(rows), None, target_logps, 0)
            return policy.logps(rows), dict(tree_flatten(done.gradients))

        policy.shares_prompts = True
        shared, shared_gradient = passes()
        policy.shares_prompts = False
        separate, gradient = passes()
    finally:
        policy.shares_prompts = shares
        policy.set_adapter(before)
    together = shared_prompts(rows, GPU_MULTIPLE)
    yield Check("shared prompts read once under a GPU's padding", 0.0 if together is not None else 1.0, 0.0)
    sampled = [np.array(r.logps) for r in rollouts]
    for name, values in (("sampled log-probabilities", sampled), ("shared prompts", shared)):
        apart = max(float(np.abs(a - b).max()) for a, b in zip(values, separate, strict=True))
        yield Check(f"{name} against separately scored ones", apart, allowed)
    apart = max(_relative(shared_gradient[k], gradient[k]) for k in gradient)
    yield Check("gradient through shared prompts against separate ones", apart, allowed)


def _check_update() -> Check:
    parameters, gradients = {"x": _normal((16, 8), 18)}, {"x": _normal((16, 8), 19, 0.1)}
    adam = optim.AdamW(1e-2, bias_correction=True)
    adam.init(parameters)
    step, factor = adam_step(adam), mx.array(0.5)
    start = tree_map(lambda a: a, adam.state)
    compiled, _ = mx.compile(step)(parameters, gradients, tree_map(lambda a: a, start), factor)
    plain, _ = step(parameters, gradients, start, factor)
    return Check("AdamW compiled against plain", _relative(compiled["x"], plain["x"]), DEVICE_TOLERANCE)


def checks(policy: Policy) -> Iterator[Check]:
    """Every check, as it is made. `policy`: a small model on the default device."""
    for name, f, parameters in _loss_cases():
        yield from _check_loss(name, f, parameters)
    yield _check_update()
    yield from _check_head(policy)
    yield from _check_model(policy)
