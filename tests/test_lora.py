"""The lean LoRA layer is mlx-lm's: the same function, gradient, draws and files, in fewer launches and less memory."""

from __future__ import annotations

import contextlib
import gc
import json
import weakref
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from fakes import tiny_policy
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.utils import load_adapters

from vpd_mlx.engine.heads import target_logps
from vpd_mlx.engine.learner import accumulate, unit_weights
from vpd_mlx.engine.lora import Lora, lean, share
from vpd_mlx.engine.policy import Policy
from vpd_mlx.engine.recompute import recompute_blocks
from vpd_mlx.engine.sampling import Sampling, generate
from vpd_mlx.engine.settings import LoraSettings
from vpd_mlx.types import TokenRow

PROMPT = tuple(range(5, 25))
ROWS = [TokenRow(PROMPT, (30, 31, 32, 33)), TokenRow(PROMPT, (40, 41)), TokenRow((7, 8, 9), (50, 51, 52))]


def filled(policy: Policy, seed: int = 0) -> dict[str, mx.array]:
    """An adapter in which no entry is zero."""
    rng = np.random.default_rng(seed)
    return {k: mx.array(rng.normal(0, 0.1, v.shape).astype(np.float32)) for k, v in policy.adapter.items()}


def take_back(policy: Policy) -> None:
    """Make lean layers, which half precision and a GPU's ways have, mlx-lm's again."""
    for layer in policy.model.modules():
        if type(layer) is Lora:
            layer.__class__ = LoRALinear


def policies(
    kind: str = "llama", dtype: mx.Dtype = mx.float32, dropout: float = 0.0, bits: int | None = 4
) -> list[Policy]:
    """mlx-lm's layers, and lean ones, on the same base and adapter."""
    found = []
    for own in (False, True):
        policy = tiny_policy(kind)
        if bits:
            nn.quantize(policy.model, 32, bits)
        policy.model.set_dtype(dtype)
        policy.adapt(LoraSettings(rank=4, scale=3.0, dropout=dropout), 0)
        take_back(policy)
        if own:
            lean(policy.model)
        policy.set_adapter(filled(policy))
        policy._probe()
        found.append(policy)
    assert not any(isinstance(m, Lora) for m in found[0].model.modules())
    assert not any(type(m) is LoRALinear for m in found[1].model.modules())
    return found


def gradient(policy: Policy) -> dict[str, mx.array]:
    return dict(tree_flatten(accumulate(policy, ROWS, unit_weights(ROWS), None, target_logps, 0).gradients))


def apart(a: dict[str, mx.array], b: dict[str, mx.array]) -> float:
    """Greatest difference, relative to the greatest entry."""
    scale = max(float(mx.abs(v).max()) for v in a.values()) or 1.0
    return max(float(mx.abs(a[k] - b[k]).max()) for k in a) / scale


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_values_and_gradients_are_those_of_mlx_lms_layer(dropout: float, bits: int | None):
    theirs, ours = policies(dropout=dropout, bits=bits)
    other = filled(theirs, 1)
    for name in ("as it is", "off", "other", "back"):
        with contextlib.ExitStack() as stack:
            for policy in (theirs, ours):
                if name != "as it is" and name != "back":
                    stack.enter_context(policy.adapter_off() if name == "off" else policy.using(other))
            a, b = gradient(theirs), gradient(ours)
            assert apart(a, b) < 2e-6, name
            assert (max(float(mx.abs(v).max()) for v in b.values()) == 0) == (name == "off")
            for x, y in zip(theirs.logps(ROWS), ours.logps(ROWS), strict=True):
                np.testing.assert_allclose(x, y, atol=2e-6, err_msg=name)


def test_one_layer_is_mlx_lms_to_a_millionth():
    mx.random.seed(0)
    layer = LoRALinear.from_base(nn.Linear(64, 48).to_quantized(32, 4), r=8, scale=1.7)
    layer.lora_b = mx.random.normal((8, 48)) * 0.1
    x, weights = mx.random.normal((3, 5, 64)), mx.random.normal((3, 5, 48))

    def passes() -> tuple[mx.array, dict[str, mx.array], mx.array]:
        out = layer(x)
        by_input = mx.grad(lambda x: (layer(x) * weights).sum())(x)
        _, by_weight = nn.value_and_grad(layer, lambda: (layer(x) * weights).sum())()
        return out, {k: by_weight[k] for k in ("lora_a", "lora_b")}, by_input

    theirs = passes()
    share([layer])
    ours = passes()
    assert apart({"out": theirs[0], "x": theirs[2]}, {"out": ours[0], "x": ours[2]}) < 1e-6
    for k in ("lora_a", "lora_b"):
        assert apart({k: theirs[1][k]}, {k: ours[1][k]}) < 1e-6


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [("llama", [1, 1, 2, 3]), ("phi3", [1, 1, 1, 1]), ("gemma2", [1, 1, 2, 3]), ("cohere", [1, 1, 5])],
)
def test_layers_that_read_the_same_input_share_a_product(kind: str, sizes: list[int]):
    arguments = {"head_dim": 16} if kind == "gemma2" else {}
    policy = tiny_policy(kind, lora=LoraSettings(rank=4), **arguments)
    take_back(policy)
    policy.set_adapter(filled(policy))
    ids = mx.array([[5, 6, 7, 8]])
    want = policy.model(ids)
    lean(policy.model)
    block = {id(m.inputs): len(m.inputs._layers) for m in policy.model.layers[0].modules() if isinstance(m, Lora)}
    assert sorted(block.values()) == sizes
    assert float(mx.abs(policy.model(ids) - want).max()) < 1e-5


def test_half_precision_is_as_near_to_float32_as_mlx_lms_layer():
    for dtype in (mx.bfloat16, mx.float16):
        theirs, ours = policies(dtype=dtype)
        exact = policies(dtype=dtype)[0]
        exact.model.set_dtype(mx.float32)  # the rounded weights
        exact._probe()
        want = gradient(exact)

        def off(policy: Policy, want: dict[str, mx.array] = want) -> float:
            found = gradient(policy)
            assert {v.dtype for v in found.values()} == {mx.float32}
            wrong = sum(float(mx.square(found[k] - want[k]).sum()) for k in want)
            return (wrong / sum(float(mx.square(v).sum()) for v in want.values())) ** 0.5

        assert off(ours) < 1.1 * off(theirs) < 0.1


def test_checkpointed_blocks_have_the_same_gradient():
    _, plain = policies()
    _, checkpointed = policies()
    recompute_blocks(checkpointed.model)
    assert apart(gradient(plain), gradient(checkpointed)) < 1e-6


def test_weights_are_cast_once_for_a_rollout_and_again_when_they_change():
    _, ours = policies(dtype=mx.bfloat16)
    layer = next(m for m in ours.model.modules() if isinstance(m, Lora))
    how = Sampling(1.0, 1.0, 6, streams=2)

    def rollout() -> list[tuple[int, ...]]:
        return [r.tokens for _, _, r in sorted(generate(ours, [PROMPT, (7, 8, 9)], 2, how, 0), key=lambda r: r[:2])]

    first = rollout()
    cast = layer.inputs._cast
    assert cast is not None
    assert cast.a.dtype == mx.bfloat16
    assert rollout() == first
    assert layer.inputs._cast is cast
    with ours.using({k: 3 * v for k, v in ours.adapter.items()}):
        assert rollout() != first
        assert layer.inputs._cast is not cast
    gradient(ours)
    assert rollout() == first


def test_nothing_is_kept_of_a_pass():
    _, ours = policies(dtype=mx.bfloat16)
    replaced = weakref.ref(ours.adapter["model.layers.0.self_attn.q_proj.lora_a"])
    gradient(ours)
    ours.set_adapter({k: v * 1.0 for k, v in ours.adapter.items()})
    gc.collect()
    assert replaced() is None
    assert all(not m.inputs._products for m in ours.model.modules() if isinstance(m, Lora))


def test_an_input_that_comes_again_meets_the_weights_of_now():
    mx.random.seed(0)
    pair = [LoRALinear.from_base(nn.Linear(16, 8), r=2, scale=1.0) for _ in range(2)]
    share(pair)
    x = mx.random.normal((2, 16))
    for seed in range(2):
        for layer in pair:
            layer.lora_b = mx.random.normal((2, 8), key=mx.random.key(seed))
        for layer in pair:
            want = layer.linear(x) + x @ layer.lora_a @ layer.lora_b
            assert float(mx.abs(layer(x) - want).max()) < 1e-6


def test_the_files_are_mlx_lms(tmp_path: Path):
    theirs, ours = policies()
    ours.save_adapter(tmp_path)
    assert set(mx.load(str(tmp_path / "adapters.safetensors"))) == set(theirs.adapter)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_parameters"]["scale"] == 3.0
    plain = tiny_policy("llama")
    nn.quantize(plain.model, 32, 4)
    ids = mx.array([[5, 6, 7, 8]])
    loaded = load_adapters(plain.model, str(tmp_path))
    loaded.eval()
    assert float(mx.abs(loaded(ids) - ours.model(ids)).max()) < 1e-5
    before = ours.fingerprint
    ours.set_adapter(filled(ours, 1))
    ours.load_adapter(tmp_path)
    assert ours.fingerprint == before


def test_a_cpu_in_float32_keeps_mlx_lms_layer_and_half_precision_does_not(monkeypatch: pytest.MonkeyPatch):
    for ways, dtype, kind in (("0", mx.float32, LoRALinear), ("0", mx.bfloat16, Lora), ("1", mx.float32, Lora)):
        monkeypatch.setenv("VPD_MLX_GPU_PATHS", ways)
        policy = tiny_policy("llama")
        policy.model.set_dtype(dtype)
        policy.adapt(LoraSettings(rank=4), 0)
        assert {type(m) for m in policy.model.modules() if "lora_b" in m} == {kind}
