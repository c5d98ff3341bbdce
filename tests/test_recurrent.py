"""Recurrent and convolution layers: prompts shared through their state."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from fakes import tiny_policy
from mlx.utils import tree_flatten

from vpd_mlx.engine.policy import Policy
from vpd_mlx.engine.recompute import recompute_blocks
from vpd_mlx.engine.sampling import Sampling, generate
from vpd_mlx.engine.settings import LoraSettings
from vpd_mlx.types import TokenRow

DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
         "linear_conv_kernel_dim": 4, "full_attention_interval": 2, "head_dim": 8, "max_position_embeddings": 512,
         "rope_theta": 1e4}  # fmt: skip
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_n_groups": 1,
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
    found = list(generate(policy, prompts, 3, Sampling(1.0, 1.0, 5), 0))
    assert len(found) == 6
    for p, _, r in found:
        np.testing.assert_allclose(policy.logps([TokenRow(prompts[p], r.tokens)])[0], r.logps, atol=1e-5)
