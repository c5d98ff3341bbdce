"""A GPU's ways on a CPU, and half precision: the same numbers as the plain model's in float32, as far as the dtype allows.

`make gpu-test` runs all of the engine's tests in a GPU's ways; here are those that are cheap, both ways side by side.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from fakes import tiny_policy
from mlx.utils import tree_flatten
from test_architectures import make
from test_temperature import Descent, batch

from vpd_mlx import losses
from vpd_mlx.algos import grpo
from vpd_mlx.algos.grpo import policy_gradient_update
from vpd_mlx.algos.samples import gather
from vpd_mlx.algos.settings import GrpoSettings
from vpd_mlx.engine import caches, device, learner, precision
from vpd_mlx.engine.batching import micro_batches, shared_prompts
from vpd_mlx.engine.heads import chunk_size, target_logps
from vpd_mlx.engine.learner import accumulate
from vpd_mlx.engine.policy import Policy
from vpd_mlx.engine.precision import REACH, loss_scale
from vpd_mlx.engine.sampling import Sampling, default_streams, generate
from vpd_mlx.engine.settings import LoraSettings
from vpd_mlx.recipe import Recipe
from vpd_mlx.run.loop import train
from vpd_mlx.types import TokenRow

SWITCH = "VPD_MLX_GPU_PATHS"
# Of the largest entry: what rounding does to log-probabilities and gradients of a network of two blocks.
ROUNDING = {mx.float32: 1e-5, mx.float16: 5e-3, mx.bfloat16: 4e-2}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's ways, but for compilation, which costs minutes of the C++ compiler."""
    monkeypatch.setenv(SWITCH, "1")
    monkeypatch.setattr("vpd_mlx.engine.policy.compiles", lambda: False)


@pytest.fixture(params=["cpu", "gpu"])
def ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv(SWITCH, raising=False)
    if request.param == "gpu":
        request.getfixturevalue("gpu")
    return request.param


LORA = LoraSettings(rank=4)


def moved(dtype: mx.Dtype = mx.float32, kind: str = "llama", lora: LoraSettings = LORA, **arguments) -> Policy:
    """A network whose adapter is not zero, and whose base is rounded to `dtype`."""
    policy = tiny_policy(kind, lora, dtype, **arguments)
    keys = enumerate(policy.adapter.items())
    policy.set_adapter({k: v + 0.02 * mx.random.normal(v.shape, key=mx.random.key(i)) for i, (k, v) in keys})
    return policy


def in_float32(dtype: mx.Dtype) -> Policy:
    """`moved(dtype)` with the same rounded base, computed in float32."""
    policy = moved(dtype)
    policy.model.set_dtype(mx.float32)
    return policy


def some_rows() -> list[TokenRow]:
    """Long prompts, four completions each, so that sharing them pays under any padding."""
    rng = random.Random(0)
    prompts = [tuple(rng.randrange(32, 250) for _ in range(n)) for n in (70, 41)]
    return [TokenRow(p, tuple(rng.randrange(32, 250) for _ in range(2 + 7 * n))) for p in prompts for n in range(4)]


def gradient_of(policy: Policy, rows: list[TokenRow], weight: float) -> np.ndarray:
    """That of the weighted sum of all log-probabilities, over the weight."""
    weights = [np.full(len(r.completion), weight, np.float32) for r in rows]
    done = accumulate(policy, rows, weights, None, target_logps, 0)
    return np.concatenate([np.array(g).flatten() for _, g in tree_flatten(done.gradients)]) / weight


def plain(policy: Policy, rows: list[TokenRow]) -> tuple[list[np.ndarray], np.ndarray]:
    """Log-probabilities and gradient of their sum, row by row through mlx-lm's own model."""

    def scores() -> list[mx.array]:
        out = []
        for row in rows:
            logits = policy.model(mx.array([[*row.prompt, *row.completion][:-1]]))[0, len(row.prompt) - 1 :]
            out.append(losses.token_logps(logits, mx.array(row.completion)))
        return out

    _, gradient = nn.value_and_grad(policy.model, lambda: mx.concatenate(scores()).sum())()
    return [np.array(s) for s in scores()], np.concatenate([np.array(g).flatten() for _, g in tree_flatten(gradient)])


def apart(a: np.ndarray, b: np.ndarray) -> float:
    """|a - b| / |b|."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_one_switch_decides(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mx, "disable_compile", lambda: None)
    found = {}
    for how in ("0", "1"):
        monkeypatch.setenv(SWITCH, how)
        found[how] = (
            default_streams(nn.QuantizedLinear(64, 64)),
            chunk_size(151_936),
            chunk_size(1_000),
            tiny_policy()._multiple,
        )
    assert found == {"0": (2, 3, 458, 1), "1": (1, 64, 6_400, 32)}
    assert device.compiles() == (shutil.which("g++") is not None)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert not device.compiles()


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_scores_gradients_and_samples_are_the_plain_models(ways: str, dtype: mx.Dtype, monkeypatch: pytest.MonkeyPatch):
    policy, rows, allowed = moved(dtype), some_rows(), ROUNDING[dtype]
    assert policy.shares_prompts
    assert shared_prompts(rows, policy._multiple) is not None  # not only where the probe insists
    scores, gradient = plain(in_float32(dtype), rows)
    np.testing.assert_allclose(np.concatenate(policy.logps(rows)), np.concatenate(scores), atol=4 * allowed)
    assert apart(gradient_of(policy, rows, 1.0), gradient) < allowed
    prompts = [rows[0].prompt, rows[-1].prompt]
    for at_once in (None, 3):
        drawn = list(generate(policy, prompts, 3, Sampling(1.0, 1.0, 6, at_once, streams=None), 1))
        for (_, _, r), want in zip(
            drawn, policy.logps([TokenRow(prompts[p], r.tokens) for p, _, r in drawn]), strict=True
        ):
            np.testing.assert_allclose(r.logps, want, atol=4 * allowed)


def test_the_sampler_takes_logarithms_in_float32():
    """Row by row as at once: the nearest float32 to the log-softmax of the model's own bfloat16 logits."""
    policy, prompt = moved(mx.bfloat16), some_rows()[0].prompt
    for rows, samples in ((None, 2), (1, 2)):
        for _, _, r in generate(policy, [prompt], samples, Sampling(1.0, 1.0, 1, rows), 0):
            logits = np.array(policy.model(mx.array([prompt]))[0, -1].astype(mx.float32), np.float64)
            assert r.logps[0] == pytest.approx(logits[r.tokens[0]] - np.log(np.exp(logits).sum()), abs=4e-3)
            assert r.logps[0] != float(mx.array(r.logps[0]).astype(mx.bfloat16))


def test_a_float16_gradient_survives_small_weights(monkeypatch: pytest.MonkeyPatch):
    """Weights of a batch of 40,000 tokens: within 1 % of float32's, and ninety times as far without a scale."""
    rows, weight = some_rows(), 1 / 40_000
    wanted = gradient_of(in_float32(mx.float16), rows, weight)
    policy = moved(mx.float16)
    assert apart(gradient_of(policy, rows, weight), wanted) < 0.01
    monkeypatch.setattr(learner, "loss_scale", lambda *_: 1.0)
    assert apart(gradient_of(policy, rows, weight), wanted) > 0.02


def test_a_gradient_that_overflows_is_taken_again_with_less(monkeypatch: pytest.MonkeyPatch):
    rows, wanted = some_rows(), gradient_of(in_float32(mx.float16), some_rows(), 1.0)
    policy, taken = moved(mx.float16), []
    real = learner.loss_scale
    monkeypatch.setattr(learner, "loss_scale", lambda d, w, reach: taken.append(reach) or real(d, w, reach * 2.0**9))
    assert apart(gradient_of(policy, rows, 1.0), wanted) < 0.01
    assert taken[0] == REACH > taken[-1] >= REACH * precision.SMALLER**3
    assert policy.notes.count(precision.OVERFLOWED) == 1
    # What is not finite at any scale is handed on, for the update to be left out and counted.
    policy.set_adapter({k: v * float("nan") for k, v in policy.adapter.items()})
    assert not np.isfinite(gradient_of(policy, rows, 1.0)).any()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_ratio_begins_at_1(dropout: float, monkeypatch: pytest.MonkeyPatch):
    """Exactly, on any kernel: the first update's pass finds what is old from then on, and none is made for it before."""
    policy = moved(mx.bfloat16, lora=LoraSettings(rank=4, dropout=dropout))
    samples, asked = gather(batch(policy)), []
    real = grpo.scored
    monkeypatch.setattr(grpo, "scored", lambda policy, rows: asked.append(len(rows)) or real(policy, rows))
    metrics, seen = policy_gradient_update(policy, samples, Descent(), GrpoSettings(epochs=2), seed=0)
    assert asked == ([len(samples)] if dropout else [])  # what drops out in one pass does not in another
    assert all((columns["ratio"] == 1).all() for columns in seen.values()) == (not dropout)
    assert metrics["ratio_max"] > 1.001
    _, seen = policy_gradient_update(policy, samples, Descent(), GrpoSettings(minibatch_prompts=1), seed=0)
    assert not all(
        (columns["ratio"] == 1).all() for columns in seen.values()
    )  # the second minibatch's policy has moved


def test_a_scale_is_a_power_of_two_and_float32_needs_none():
    weights = np.full(1000, 1 / 3000, np.float32)
    assert loss_scale(mx.float32, weights, REACH) == loss_scale(mx.bfloat16, weights, REACH) == 1.0
    assert loss_scale(mx.float16, np.zeros(3, np.float32), REACH) == 1.0
    scale = loss_scale(mx.float16, weights, REACH)
    assert np.frexp(scale)[0] == 0.5
    assert REACH / 2 < scale * weights.sum() <= REACH


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_the_probe_has_probed(gpu: None, kind: str, monkeypatch: pytest.MonkeyPatch):
    """The shared way runs with rows of over 64 tokens, and what is wrong with its states or its gradient is found."""
    read: list[int] = []
    real = caches.Extend.__init__

    def extend(self, prompt, parents, lengths):
        read.append(int(lengths.max()))
        real(self, prompt, parents, lengths)

    monkeypatch.setattr(caches.Extend, "__init__", extend)
    arguments = {"head_dim": 16} if kind == "gemma2" else {}
    policy = moved(kind=kind, **arguments)
    assert policy.shares_prompts
    assert not policy._unpadded
    assert max(read) > 64

    def detached(self, prompt, parents, lengths):
        real(self, prompt, parents, lengths)
        self._prompt = [mx.stop_gradient(self._prompt[0]), self._prompt[1]]

    monkeypatch.setattr(caches.Extend, "__init__", detached)
    assert moved(kind=kind, **arguments)._unpadded  # which reads each prompt by itself, without that


def test_gemma2_trains_in_a_gpus_ways(gpu: None, small: Callable[..., Recipe], tmp_path: Path):
    """Its soft cap takes no mask for each row as it comes: believed to, a batch died in `broadcast_shapes`."""
    settings = {"head_dim": 16, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 5.0}
    model = make(tmp_path / "m", "gemma2", settings, None)
    recipe = small(model=str(model), rollout__prompts=2, evaluation__problems=2, evaluation__samples=1)
    train(recipe, tmp_path / "run")
    assert (tmp_path / "run" / "adapters" / "adapters.safetensors").is_file()


def test_micro_batches_count_what_is_read_once_padded():
    rows = [TokenRow((1,) * 40, (2,) * n) for n in (3, 9, 20, 25)] * 3
    for shared in (False, True):
        batches = micro_batches(rows, 512, shared=shared, multiple=32)
        assert sorted(i for b in batches for i in b) == list(range(12))
        for b in batches:
            assert len(b) * 64 + shared * (64 - len(b) * 32) <= 512
    assert [len(b) for b in micro_batches(rows, 512, multiple=32)] == [8, 4]
    assert len(micro_batches(rows, 512)) > len(micro_batches(rows, 512, shared=True, multiple=32))
