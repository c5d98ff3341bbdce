"""Every dense architecture that mlx-lm loads: tiny random models, scored and differentiated like any other."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import QUICKSTART
from fakes import tiny_policy
from mlx.utils import tree_flatten
from mlx_lm.utils import quantize_model

from vpd_mlx import losses
from vpd_mlx.engine.decoding import probe_batches
from vpd_mlx.engine.heads import target_logps
from vpd_mlx.engine.learner import accumulate
from vpd_mlx.engine.models import lora_of
from vpd_mlx.engine.policy import Policy
from vpd_mlx.engine.sampling import Sampling, generate
from vpd_mlx.engine.settings import LoraSettings
from vpd_mlx.errors import ModelError
from vpd_mlx.types import TokenRow

COMMON = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "vocab_size": 352,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
# (model type, its own settings, whether body and head come apart, whether prompts are shared)
CASES = [
    ("llama", {}, True, True),
    ("llama", {"tie_word_embeddings": True}, True, True),
    ("llama", {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 6}, True, True),
    ("qwen2", {}, True, True),
    ("qwen3", {"head_dim": 16}, True, True),
    ("phi3", {}, True, True),
    ("gemma", {"head_dim": 16}, True, True),
    ("gemma2", {"head_dim": 16, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 5.0}, True, True),
    ("olmo2", {}, True, True),
    ("granite", {"logits_scaling": 4.0, "attention_multiplier": 0.25, "embedding_multiplier": 2.0,
                 "residual_multiplier": 0.5, "attention_bias": False, "mlp_bias": False}, True, True),
    ("cohere", {"logit_scale": 0.25, "layer_norm_eps": 1e-5}, True, True),
    ("starcoder2", {"norm_epsilon": 1e-5}, True, True),
]  # fmt: skip


def make(folder: Path, kind: str, settings: dict, bits: int | None) -> Path:
    module = importlib.import_module(f"mlx_lm.models.{kind}")
    mx.random.seed(0)
    config = {"model_type": kind, **COMMON, **settings}
    model = module.Model(module.ModelArgs.from_dict(config))

    if bits:
        model, config = quantize_model(model, config, 32, bits)
    shutil.copytree(QUICKSTART.parent / "model", folder)
    model.save_weights(str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 4}))
    return folder


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize(("kind", "settings", "splits", "shares"), CASES, ids=lambda x: str(x)[:24])
def test_scores_and_gradients_are_those_of_the_plain_model(tmp_path: Path, kind, settings, splits, shares, bits):
    policy = Policy.load(str(make(tmp_path / "m", kind, settings, bits)), LoraSettings(rank=4))
    policy.set_adapter({k: v + 0.05 for k, v in policy.adapter.items()})
    assert not [n for n in policy.notes if "cannot run apart" in n] if splits else policy.notes
    assert policy.shares_prompts == shares
    probe_batches(policy)
    assert policy.widest == (None if shares else 1)
    rollouts = [r for _, _, r in generate(policy, [(5, 6, 7, 8, 9, 10, 11), (12, 13)], 3, Sampling(1.0, 1.0, 9), 0)]
    prompts = [(5, 6, 7, 8, 9, 10, 11)] * 3 + [(12, 13)] * 3
    rows = [TokenRow(p, (20 + i, 30, 31, 32)[: 2 + i % 3]) for i, p in enumerate(prompts)]

    def plain() -> mx.array:
        total = mx.array(0.0)
        for row in rows:
            ids = mx.array([[*row.prompt, *row.completion]])
            logits = policy.model(ids[:, :-1]).astype(mx.float32)[0, len(row.prompt) - 1 :]
            total = total + losses.token_logps(logits, mx.array(row.completion)).sum()
        return total

    want, gradient = nn.value_and_grad(policy.model, plain)()
    assert sum(float(x.sum()) for x in policy.logps(rows)) == pytest.approx(float(want), rel=1e-4)
    done = accumulate(
        policy,
        rows,
        [np.ones(len(r.completion), np.float32) for r in rows],
        None,
        target_logps,
        seed=0,
    )
    expected = dict(tree_flatten(gradient))
    for name, value in tree_flatten(done.gradients):
        scale = float(mx.abs(expected[name]).max()) + 1e-3
        assert float(mx.abs(value - expected[name]).max()) < 1e-3 * scale, name
    for p, r in zip(prompts, rollouts, strict=True):
        np.testing.assert_allclose(policy.logps([TokenRow(p, r.tokens)])[0], r.logps, atol=1e-3)


@pytest.mark.parametrize(("kind", "shares"), [("llama", True), ("gemma2", True)])
def test_the_probe_shares_a_prompt_even_when_padding_leaves_nothing_to_save(kind: str, shares: bool):
    """On a GPU lengths are padded to a multiple, and the probe's few tokens would be read separately twice."""
    policy = tiny_policy(kind, **({"head_dim": 16} if kind == "gemma2" else {}))
    policy._multiple = 32
    policy._probe()
    assert policy.shares_prompts == shares


def test_an_adapter_folder_gives_back_tensors_and_settings(tmp_path: Path):
    lora = LoraSettings(rank=3, scale=1.5, layers=1, keys=["self_attn.q_proj"])
    policy = tiny_policy(lora=lora)
    policy.set_adapter({k: v + 0.05 for k, v in policy.adapter.items()})
    policy.save_adapter(tmp_path)
    assert lora_of(tmp_path) == lora
    other = tiny_policy(lora=lora)
    before = other.fingerprint
    other.load_adapter(tmp_path)
    assert before != other.fingerprint == policy.fingerprint
    with pytest.raises(ModelError, match="does not fit the model"):
        tiny_policy(lora=lora.model_copy(update={"rank": 4})).load_adapter(tmp_path)
