"""Attention in blocks: the numbers and gradients of mlx's own, in less memory."""

from __future__ import annotations

import gc

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from fakes import tiny_policy
from mlx.utils import tree_flatten
from mlx_lm.models import base, llama

from vpd_mlx.engine import attention
from vpd_mlx.engine.attention import Band, blocked, bounded, left_to_mlx
from vpd_mlx.engine.recompute import recompute_blocks
from vpd_mlx.engine.settings import LoraSettings
from vpd_mlx.types import TokenRow

T, K = 11, 15


def arrays(queries: int = T, keys: int = K, heads: int = 4, rows: int = 2, size: int = 8) -> list[mx.array]:
    mx.random.seed(0)
    shapes = [(rows, heads, queries, size), (rows, heads // 2, keys, size), (rows, heads // 2, keys, size)]
    return [mx.random.normal(s) for s in (*shapes, shapes[0])]


def band(queries: int, keys: int, window: int) -> mx.array:
    ahead = (mx.arange(queries) + keys - queries)[:, None] - mx.arange(keys)[None]
    return (ahead >= 0) & (ahead < window)


def padded() -> mx.array:
    """Rows whose first keys are padding, differently many."""
    return (mx.arange(K)[None, None, None] >= mx.array([1, 3])[:, None, None, None]) & band(T, K, K)


MASKS = {
    "none": (None, None),
    "causal": ("causal", "causal"),
    "window": (Band(4), band(T, K, 4)),
    "wide window": (Band(99), "causal"),
    "array": (padded(), padded()),
    "one row of an array": (mx.arange(K)[None] > 2, mx.arange(K)[None] > 2),
    "added": (mx.where(padded(), 0.5, -1e9), mx.where(padded(), 0.5, -1e9)),
}


@pytest.mark.parametrize("sinks", [None, mx.array([0.5, -1.0, 2.0, 0.0])], ids=["", "sinks"])
@pytest.mark.parametrize("kind", MASKS)
def test_blocks_give_the_numbers_and_gradients_of_the_whole(kind: str, sinks: mx.array | None):
    mask, whole = MASKS[kind]
    *inputs, weights = arrays()

    def plain(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=whole, sinks=sinks)

    (wanted,), gradients = mx.vjp(plain, inputs, [weights])
    for size in (3, 64):
        (out,), found = mx.vjp(lambda *a, n=size: blocked(*a, 0.3, mask, sinks, n), inputs, [weights])
        np.testing.assert_allclose(np.array(out), np.array(wanted), atol=1e-6, rtol=1e-5)
        for ours, theirs in zip(found, gradients, strict=True):
            np.testing.assert_allclose(np.array(ours), np.array(theirs), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("mask", ["causal", Band(256)])
def test_a_long_rows_scores_are_never_whole(monkeypatch, mask):
    """Forward and backward; the peak grows with the row, where that of the whole grows with its square."""
    monkeypatch.delenv("VPD_MLX_GPU_PATHS", raising=False)  # a GPU's blocks hold a row of this length whole
    *inputs, weights = arrays(1024, 1024, heads=8, rows=1)
    mx.eval(inputs, weights)
    scores = 8 * 1024 * 1024 * 4
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(mx.vjp(lambda *a: blocked(*a, 0.3, mask), inputs, [weights]))
    assert mx.get_peak_memory() - before < scores / 2  # mlx's own holds more than three of them


def test_half_precision_sums_gradients_of_keys_in_float32():
    *inputs, weights = arrays(96, 96)
    exact = mx.vjp(lambda *a: blocked(*a, 0.3, "causal"), inputs, [weights])[1]
    inputs, weights = [x.astype(mx.bfloat16) for x in inputs], weights.astype(mx.bfloat16)
    found = mx.vjp(lambda *a: blocked(*a, 0.3, "causal", None, 3), inputs, [weights])[1]
    whole = mx.vjp(lambda *a: mx.fast.scaled_dot_product_attention(*a, scale=0.3, mask="causal"), inputs, [weights])[1]

    def error(gradients: list[mx.array]) -> float:
        return max(float(mx.abs(a - b).max()) for a, b in zip(gradients, exact, strict=True))

    assert all(g.dtype == mx.bfloat16 for g in found)
    assert error(found) < 1.1 * error(whole)


@pytest.mark.parametrize(
    ("kind", "dtype", "size", "mask", "sinks", "left"),
    [
        ("cpu", mx.float32, 64, "causal", False, False),
        ("metal", mx.float32, 64, "causal", False, True),
        ("metal", mx.bfloat16, 128, None, False, True),
        ("metal", mx.bfloat16, 32, "causal", False, False),
        ("metal", mx.bfloat16, 128, "causal", True, False),
        ("metal", mx.bfloat16, 128, Band(4), False, False),
        ("metal", mx.bfloat16, 128, mx.array([[True]]), False, False),
        ("cuda", mx.bfloat16, 128, "causal", False, True),
        ("cuda", mx.float32, 128, "causal", False, False),
        ("cuda", mx.float16, 256, "causal", False, False),
    ],
)
def test_what_mlx_bounds_itself_is_left_to_it(kind, dtype, size, mask, sinks, left):
    q, k, v, _ = (x.astype(dtype) for x in arrays(128, 128, size=size))
    assert left_to_mlx(kind, q, k, v, mask, sinks=sinks, graded=True) == left
    if kind == "cuda" and left:
        assert not left_to_mlx(kind, q[:, :, 1:], k, v, mask, sinks=sinks, graded=True)  # 127 queries
    assert not left_to_mlx(
        kind, k, q[:, :, :3], q[:, :, :3], "causal", sinks=False, graded=True
    )  # more queries than keys


def test_scoring_is_not_left_to_metal_where_it_computes_whole_scores_without_a_gradient():
    for size, left in ((128, True), (256, False)):
        inputs = arrays(size=size)[:3]
        assert left_to_mlx("metal", *inputs, "causal", sinks=False, graded=True)
        assert left_to_mlx("metal", *inputs, "causal", sinks=False, graded=False) == left
    policy = tiny_policy()
    for switch, graded in ((policy.model.train, True), (policy.model.eval, False)):
        switch()
        with bounded(policy.model) as use:
            assert use.graded == graded


def test_metals_own_way_needs_a_version_and_no_order_against_it(monkeypatch):
    inputs = arrays(size=64)[:3]
    assert left_to_mlx("metal", *inputs, "causal", sinks=False, graded=True)
    monkeypatch.setenv("MLX_SDPA_VJP_FALLBACK", "1")
    assert not left_to_mlx("metal", *inputs, "causal", sinks=False, graded=True)
    monkeypatch.delenv("MLX_SDPA_VJP_FALLBACK")
    monkeypatch.setattr(attention.metadata, "version", lambda name: "0.32.2")
    assert not left_to_mlx("metal", *inputs, "causal", sinks=False, graded=True)


def test_the_models_name_for_attention_is_ours_for_the_time_of_a_pass():
    policy, plain = tiny_policy(), base.scaled_dot_product_attention
    with bounded(policy.model, 1) as use, bounded(policy.model, 1) as inner:
        assert llama.scaled_dot_product_attention is use
        policy.model(mx.array([[1, 2, 3]]))
        assert (use.calls, inner.calls) == (2, 0)
    assert llama.scaled_dot_product_attention is plain
    with pytest.raises(KeyError), bounded(policy.model):
        raise KeyError
    assert llama.scaled_dot_product_attention is plain


def test_metals_backward_meets_no_sinks_without_an_array_mask(monkeypatch):
    """It raises there, for rows of any length."""
    *inputs, _ = arrays(3, 3, size=64)
    sinks, masks, real = mx.zeros(4), [], mx.fast.scaled_dot_product_attention

    def watched(*args: mx.array, mask: object, **kwargs: object) -> mx.array:
        masks.append(mask)
        return real(*args, mask=mask, **kwargs)

    monkeypatch.setattr(attention, "device_kind", lambda: "metal")
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", watched)
    use = attention.Use(512, None, graded=True)
    for mask in ("causal", None):
        wanted = real(*inputs, scale=0.3, mask=mask, sinks=sinks)
        assert mx.allclose(use(*inputs, None, 0.3, mask, sinks), wanted, atol=1e-6)
    assert [isinstance(m, mx.array) for m in masks] == [True, True]
    use(*inputs, None, 0.3, "causal")
    assert masks[-1] == "causal"


WINDOW = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4}


@pytest.mark.parametrize(("kind", "settings"), [("llama", {}), ("llama", WINDOW), ("gpt_oss", {"sliding_window": 4})])
def test_a_policy_bounds_long_rows_to_the_same_gradient(monkeypatch, kind: str, settings: dict):
    """Separate and shared, with blocks recomputed and not, and never by an array of all positions."""
    masks: list[object] = []

    def watched(*args: object) -> mx.array:
        masks.append(args[4])
        return blocked(*args)

    monkeypatch.setattr(attention, "blocked", watched)
    if kind == "gpt_oss":
        settings = {**settings, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}
    policy = tiny_policy(kind, LoraSettings(rank=2), **settings)
    policy.set_adapter({k: v + 0.05 for k, v in policy.adapter.items()})
    rows = [TokenRow((5, 6, 7, 8, 9), (1, 2, 3, 4, 5, 6)), TokenRow((7, 8), (3, 4)), TokenRow((5, 6, 7, 8, 9), (9, 8))]
    weights = mx.random.normal((10, 32), key=mx.random.key(3))

    def gradient(*, shared: bool, long: int | None) -> dict[str, mx.array]:
        policy.long = long
        run = nn.value_and_grad(policy.model, lambda: (policy.hidden(rows, shared=shared)[0] * weights).sum())
        return dict(tree_flatten(run()[1]))

    assert policy.long == 512
    wanted = gradient(shared=False, long=None)
    for recomputed in (False, True):
        if recomputed:
            recompute_blocks(policy.model)
        for shared in (False, True):
            masks.clear()
            with bounded(policy.model, 1, size=3):
                found = gradient(shared=shared, long=1)
            passes = 3 if shared else 1
            assert len(masks) == 2 * passes * (2 if recomputed else 1)
            assert not any(isinstance(m, mx.array) for m in masks)
            for name, value in found.items():
                np.testing.assert_allclose(np.array(value), np.array(wanted[name]), atol=2e-5, rtol=1e-4, err_msg=name)


def test_short_rows_stay_with_mlx_to_the_bit():
    policy = tiny_policy()
    rows = [TokenRow((5, 6, 7, 8), (1, 2, 3)), TokenRow((5, 6, 7, 8), (3, 4))]
    found = policy.hidden(rows)[0]
    policy.long = None
    assert mx.array_equal(found, policy.hidden(rows)[0])


def test_a_model_with_attention_of_its_own_is_noted_and_left_as_it_is():
    policy = tiny_policy("gemma2", head_dim=16)
    assert policy.long is None
    assert any("attention is computed in a way of its own" in n for n in policy.notes)
    rows = [TokenRow(tuple(range(1, 9)), (1, 2, 3))]
    assert mx.isfinite(policy.hidden(rows)[0]).all()
