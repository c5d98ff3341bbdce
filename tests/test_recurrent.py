"""Recurrent and convolution layers: prompts shared through their state, and whole runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from command import within
from conftest import SMALL
from fakes import ARGUMENTS, tiny_policy
from mlx.utils import tree_flatten
from test_architectures import make

from vpd_mlx.engine.blueprint import Blueprint
from vpd_mlx.engine.decoding import probe_batches
from vpd_mlx.engine.policy import Policy
from vpd_mlx.engine.recompute import recompute_blocks
from vpd_mlx.engine.sampling import Sampling, generate
from vpd_mlx.engine.settings import LoraSettings, MemorySettings
from vpd_mlx.errors import ModelError
from vpd_mlx.types import TokenRow

DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
         "linear_conv_kernel_dim": 4, "full_attention_interval": 2, "head_dim": 8, "max_position_embeddings": 512,
         "rope_theta": 1e4}  # fmt: skip
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_n_groups": 1,
          "mamba_proj_bias": False, "mamba_conv_bias": True}  # fmt: skip
HYBRIDS: dict[str, dict[str, Any]] = {
    "qwen3_5": DELTA,
    "qwen3_next": {**DELTA, "num_experts": 2, "num_experts_per_tok": 1, "decoder_sparse_step": 1, "mlp_only_layers": [0],
                   "shared_expert_intermediate_size": 32, "moe_intermediate_size": 32, "partial_rotary_factor": 0.5},
    "lfm2": {"norm_eps": 1e-5, "conv_bias": False, "conv_L_cache": 3, "block_dim": 32, "block_ff_dim": 64,
             "block_multiple_of": 8, "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": False,
             "full_attn_idxs": [1], "rope_theta": 1e4, "max_position_embeddings": 512},
    "granitemoehybrid": {**MAMBA2, "layer_types": ["mamba", "attention"], "embedding_multiplier": 2.0,
                         "attention_multiplier": 0.3, "logits_scaling": 2.0, "residual_multiplier": 0.5, "mlp_bias": False,
                         "attention_bias": False, "shared_intermediate_size": 64, "max_position_embeddings": 512},
}  # fmt: skip
MAMBA = {"state_size": 4, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "time_step_rank": 4}
LONG, SHORT = tuple(range(5, 45)), (7,)
ROWS = [
    TokenRow(LONG, (1, 2, 3, 4, 5, 6)),
    TokenRow(SHORT, (3, 4)),
    TokenRow(LONG, (9, 8)),
    TokenRow(LONG[:9], (2,)),
    TokenRow(SHORT, tuple(range(60, 80))),
]


@pytest.fixture(scope="module", params=HYBRIDS)
def policy(request: pytest.FixtureRequest) -> Policy:
    kind = request.param
    made = tiny_policy(kind, LoraSettings(rank=2), **HYBRIDS[kind])
    made.set_adapter({k: v + 0.05 for k, v in made.adapter.items()})
    return made


def gradient(policy: Policy, **how: Any) -> dict[str, mx.array]:
    """Of a fixed function of the states of `ROWS`, as in an update."""
    policy.model.train()
    weights = mx.random.normal((sum(len(r.completion) for r in ROWS), 32), key=mx.random.key(3))
    found = nn.value_and_grad(policy.model, lambda: (policy.hidden(ROWS, **how)[0] * weights).sum())()[1]
    policy.model.eval()
    return dict(tree_flatten(found))


def assert_close(found: dict[str, mx.array], wanted: dict[str, mx.array], tolerance: float = 1e-5) -> None:
    """Each entry relative to the gradient's largest."""
    largest = max(float(mx.abs(v).max()) for v in wanted.values())
    assert largest > 0
    for name, value in wanted.items():
        np.testing.assert_allclose(np.array(found[name]), np.array(value), atol=tolerance * largest, err_msg=name)


def test_a_prompts_state_is_handed_to_its_completions_with_its_gradient(policy: Policy):
    """All at once behind prompts of several lengths, by a pass for each prompt, and with blocks recomputed."""
    assert policy.shares_prompts
    assert not policy.notes
    wanted = gradient(policy, shared=False)
    assert_close(gradient(policy, shared=True), wanted)
    assert_close(gradient(policy, shared=True, long=1), wanted)
    kinds = [type(block) for block in policy.model.layers]
    recompute_blocks(policy.model)
    try:
        for how in ({"shared": True}, {"shared": True, "long": 1}, {"shared": False}):
            assert_close(gradient(policy, **how), wanted)
        assert len(list(generate(policy, [LONG, SHORT], 2, Sampling(1.0, 1.0, 3), 0))) == 4
    finally:
        for block, kind in zip(policy.model.layers, kinds, strict=True):
            block.__class__ = kind


def test_what_is_sampled_behind_a_shared_prompt_is_what_is_scored(policy: Policy):
    prompts = (LONG, LONG[:9])
    probe_batches(policy)
    assert (policy.widest, policy.reads_alone) == (None, False)
    found = list(generate(policy, prompts, 3, Sampling(1.0, 1.0, 5), 0))
    assert len(found) == 6
    for p, _, r in found:
        np.testing.assert_allclose(policy.logps([TokenRow(prompts[p], r.tokens)])[0], r.logps, atol=1e-5)


def test_a_recurrence_without_masks_reads_each_prompt_by_itself():
    policy = tiny_policy("mamba", LoraSettings(rank=2), **MAMBA)
    policy.set_adapter({k: v + 0.05 for k, v in policy.adapter.items()})
    assert any("in a loop, so it goes token by token" in note for note in policy.notes)
    assert policy.shares_prompts
    assert policy._unpadded
    probe_batches(policy)
    assert policy.widest is None
    assert policy.reads_alone  # side by side, the shorter prompt's padding would be read as tokens
    prompts = (LONG, LONG[:9])
    for p, _, r in generate(policy, prompts, 1, Sampling(1.0, 1.0, 5), 0):
        np.testing.assert_allclose(policy.logps([TokenRow(prompts[p], r.tokens)])[0], r.logps, atol=1e-5)
    assert policy._body is policy.model.backbone
    assert_close(gradient(policy, shared=True), gradient(policy, shared=False))


@pytest.mark.parametrize("kind", ["qwen3_5", "lfm2"])
def test_an_update_and_a_rollout_are_planned_from_the_config(kind: str):
    config = {"model_type": kind, **ARGUMENTS, **HYBRIDS[kind]}
    blueprint = Blueprint.of(config, LoraSettings(rank=2), MemorySettings())
    assert blueprint.shares_prompts
    rows = [TokenRow(LONG, (1,) * 6)] * 6
    shared, prefill = blueprint.gradient(rows)[0], blueprint.prefill(2, 40)
    assert prefill > 0
    blueprint.shares_prompts = False
    assert shared < 0.8 * blueprint.gradient(rows)[0]


def test_a_config_that_transformers_refuses_is_named(tmp_path: Path):
    folder = make(tmp_path / "model", "granitemoehybrid", HYBRIDS["granitemoehybrid"], None)
    with pytest.raises(ModelError, match=r"config.json that transformers refuses \(The dimensions for the Mamba head"):
        Policy.load(str(folder), None)


@pytest.mark.long
@pytest.mark.parametrize("kind", HYBRIDS)
def test_ten_steps_resume_to_the_bit_and_what_is_exported_loads(tmp_path: Path, kind: str):
    wider = {"lfm2": {"block_dim": 64}, "granitemoehybrid": {"mamba_d_head": 32}}
    model = make(tmp_path / "model", kind, {**HYBRIDS[kind], **wider.get(kind, {})}, None)
    own = {"model": str(model), "steps": 10, "checkpoint.every": 5, "optimizer.learning_rate": 1e-2}
    changes = [word for key, value in {**SMALL, **own}.items() for word in ("--set", f"{key}={json.dumps(value)}")]

    def run(*words: str) -> None:
        done = within(*words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr

    run("train", "quickstart", *changes, "--out", "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-000010")
    run("train", "--resume", "cut")
    adapters = [(tmp_path / name / "adapters" / "adapters.safetensors").read_bytes() for name in ("whole", "cut")]
    assert adapters[0] == adapters[1]
    for form in ("adapters", "fused"):
        run("export", "whole", "--to", form)
    tokens = mx.array([list(range(5, 45))])
    base = mlx_lm.load(str(model))[0](tokens)
    adapted = mlx_lm.load(str(model), adapter_path=str(tmp_path / "whole" / "export-adapters"))[0](tokens)
    fused = mlx_lm.load(str(tmp_path / "whole" / "export-fused"))[0](tokens)
    assert mx.allclose(adapted, fused, atol=1e-4)
    assert not mx.allclose(adapted, base, atol=1e-2)
