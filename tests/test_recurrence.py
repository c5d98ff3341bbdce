"""The gated delta rule in chunks: mlx-lm's, value and gradient, and where it is put in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from fakes import tiny_policy
from mlx_lm.models import gated_delta, qwen3_5
from test_recurrent import DELTA, HYBRIDS

from vpd_mlx.engine import recurrence
from vpd_mlx.engine.device import compiles
from vpd_mlx.engine.recurrence import PLAIN, Rule, agrees, chunked, install, inverse

B, T, HK, HV, DK, DV = 2, 21, 1, 2, 8, 6


@pytest.fixture(autouse=True)
def _compilation_as_in_a_run() -> None:
    """mlx-lm compiles the gates, on a CPU by g++."""
    if not compiles():
        mx.disable_compile()


def inputs(seed: int = 0) -> dict[str, mx.array]:
    """What a layer hands over, the last state of other tokens among it."""
    shapes = {"q": (HK, DK), "k": (HK, DK), "v": (HV, DV), "a": (HV,), "b": (HV,)}
    made = {n: mx.random.normal((B, T, *s), key=mx.random.key(seed + i)) for i, (n, s) in enumerate(shapes.items())}
    made["q"], made["k"] = gated_delta.normalize_qk(made["q"], made["k"], inv_scale=DK**-0.5, eps=1e-6)
    made["state"] = mx.random.normal((B, HV, DV, DK), key=mx.random.key(seed + 9))
    return made


def run(
    rule: Callable[..., Any], x: dict[str, mx.array], a_log: float, mask: mx.array | None, **how: Any
) -> list[mx.array]:
    """Outputs, last state, and the gradient of a function of both for every input."""
    real = mx.ones((B, T)) if mask is None else mask

    def total(*given: mx.array) -> tuple[mx.array, ...]:
        *rest, state = given
        gates = x["a"].shape[2:]
        rates = mx.full((HV, 1)[: len(gates)], a_log)
        out, last = rule(*rest, rates, mx.ones(gates), state, mask, use_kernel=False, **how)
        out = out * real[..., None, None]
        return (mx.sin(out).sum() + mx.cos(last).sum(), out, last)

    (_, out, last), gradients = mx.value_and_grad(total, argnums=tuple(range(6)))(*x.values())
    return [out, last, *gradients]


def same(x: dict[str, mx.array], a_log: float = 0.0, mask: mx.array | None = None, size: int = 8, **how: Any) -> None:
    found, wanted = (run(rule, x, a_log, mask, **how) for rule in (Rule(size=size), PLAIN))
    for one, other in zip(found, wanted, strict=True):
        largest = float(mx.abs(other).max())
        np.testing.assert_allclose(np.array(one), np.array(other), atol=1e-5 * max(largest, 1e-3))


@pytest.mark.parametrize("a_log", [-30.0, 0.0, 3.0, 9.0], ids=["no decay", "some", "strong", "underflow"])
def test_chunks_give_the_recurrences_values_and_gradients(a_log: float):
    """Lengths that are no multiple of the chunk, a state to start from, two value heads to a key head."""
    same(inputs(), a_log)


def test_a_weak_decay_after_a_strong_one_keeps_its_digits():
    """e^(G_i - G_j) from a difference of sums would be off by a percent here."""
    x = inputs()
    x["a"] = mx.where((mx.arange(T) % 7 == 2)[:, None], 3e5, -3.0) * mx.ones((B, T, HV))
    same(x, size=16)


def test_a_token_that_repeats_is_no_trouble():
    """All powers of L but the last grow like binomials: an inverse made of them has no digit left in a chunk of 64."""
    lower = mx.tril(mx.ones((64, 64)), -1)
    wanted = np.eye(64) - np.eye(64, k=-1)
    np.testing.assert_allclose(np.array(inverse(lower)), wanted, atol=1e-6)
    x = inputs()
    x["k"] = mx.broadcast_to(x["k"][:, :1], x["k"].shape)
    x["b"] = mx.full((B, T, HV), 20.0)  # each token replaces what the one before wrote
    same(x, -30.0, size=16)


def test_masked_tokens_leave_the_state_as_it_is():
    lengths = mx.array([[13], [T]])
    same(inputs(), mask=mx.arange(T) < lengths)


@pytest.mark.parametrize("how", [{"lower_bound": -5.0}, {"allow_neg_eigval": True}])
def test_other_gates(how: dict[str, Any]):
    same(inputs(), **how)


@pytest.mark.parametrize("a_log", [-30.0, 0.0, 9.0])
def test_a_gate_for_each_channel(a_log: float):
    x = inputs()
    x["a"] = 2 * mx.random.normal((B, T, HV, DK), key=mx.random.key(7))
    same(x, a_log, mask=mx.arange(T) < mx.array([[13], [T]]))


def test_half_precision_goes_in_and_comes_out():
    x = {n: v.astype(mx.bfloat16) for n, v in inputs().items()}
    x["state"] = x["state"].astype(mx.float32)
    fixed = (mx.zeros(HV), mx.ones(HV))
    for one, other in zip(*(rule(*list(x.values())[:5], *fixed, x["state"]) for rule in (Rule(), PLAIN)), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(*(np.array(v.astype(mx.float32)) for v in (one, other)), atol=3e-2)


def test_a_model_gets_it_and_others_keep_mlx_lms():
    policy = tiny_policy("qwen3_5", **DELTA)
    layer = policy.model.layers[0].linear_attn
    assert isinstance(recurrence.rule_of(type(layer)), Rule)
    assert type(layer).__module__ == "mlx_lm.models.qwen3_5"
    assert isinstance(layer, qwen3_5.GatedDeltaNet)
    assert recurrence.rule_of(qwen3_5.GatedDeltaNet) is PLAIN is qwen3_5.gated_delta_update
    assert install(policy.model) is None  # again: it stays
    assert install(tiny_policy().model) is None  # has no such layer


def test_what_does_not_agree_is_noted_and_left_to_mlx_lm(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(recurrence, "chunked", lambda *x: tuple(1.01 * y for y in chunked(*x)))
    policy = tiny_policy("qwen3_next", **HYBRIDS["qwen3_next"])
    assert recurrence.rule_of(type(policy.model.layers[0].linear_attn)) is PLAIN
    assert any("token by token" in note for note in policy.notes)


def test_kernels_are_taken_where_mlx_has_them(monkeypatch: pytest.MonkeyPatch):
    """Here mlx's function agrees and falls back to a token at a time, which its graph shows."""
    heads = {"each": 1, "keys": 4, "values": 4, "channels": False, "dtype": mx.float32, "how": {}}
    monkeypatch.setattr(recurrence, "GPU_CHUNK", 4)
    assert not agrees(Rule(kernels=True, size=4), **heads)
    monkeypatch.setattr(recurrence, "_has_kernels", lambda results: True)
    assert agrees(Rule(kernels=True, size=4), **heads)
    monkeypatch.setattr(recurrence, "device_kind", lambda: "metal")
    policy = tiny_policy("qwen3_5", **DELTA)
    assert recurrence.rule_of(type(policy.model.layers[0].linear_attn)).kernels
    assert not policy.notes
