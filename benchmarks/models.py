"""Small random models: only shapes matter for time and memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
from mlx_lm.models import qwen3, qwen3_5
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.utils import quantize_model

from vpd_mlx.engine.lora import Lora
from vpd_mlx.engine.policy import Policy
from vpd_mlx.engine.settings import LoraSettings, MemorySettings

__all__ = ["half", "load", "make", "make_hybrid"]

TOKENIZER = Path(__file__).parent.parent / "recipes" / "quickstart" / "model"
MEMORY = MemorySettings()
COMMON = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}

# In the proportions of Qwen3.5 0.8B but for attention: its scores are 3 % of that model's work at 640 tokens, and with as many
# heads and dimensions, by its width, they would be a third of the work here.
HYBRID = {
    "model_type": "qwen3_5",
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "intermediate_size": 336,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "linear_num_key_heads": 6,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}


def make(folder: Path, vocabulary: int, **settings: int) -> Path:
    """A Qwen3 of hidden size 64 and 2 blocks, 4 bits, with the given vocabulary and settings; the last token ends a text."""
    mx.random.seed(0)
    config = {**COMMON, "vocab_size": vocabulary, **settings}
    model = qwen3.Model(qwen3.ModelArgs.from_dict(config))
    model, config = quantize_model(model, config, 32, 4)
    shutil.copytree(TOKENIZER, folder)
    model.save_weights(str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": vocabulary - 1}))
    return folder


def make_hybrid(folder: Path, vocabulary: int) -> Path:
    """A Qwen3.5 of hidden size 96 and 4 blocks, float32; the last token ends a text."""
    mx.random.seed(0)
    config = {**HYBRID, "vocab_size": vocabulary}
    model = qwen3_5.Model(qwen3_5.ModelArgs.from_dict(config))
    shutil.copytree(TOKENIZER, folder)
    model.save_weights(str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": vocabulary - 1}))
    return folder


def load(folder: Path, memory: MemorySettings = MEMORY) -> Policy:
    """The model with a LoRA of rank 8 whose B is not zero, so that student and teacher differ."""
    policy = Policy.load(str(folder), LoraSettings(rank=8), memory)
    policy.tokenizer._eos_token_ids = {policy.vocabulary - 1}
    policy.set_adapter({k: v + 0.01 for k, v in policy.adapter.items()})
    mx.eval(policy.model.parameters())
    return policy


def half(folder: Path, layers: str) -> Policy:
    """The model in bfloat16, as a Mac would have it; `layers` are `lean` LoRA, `mlx-lm`'s, or `plain`, without an adapter."""
    policy = Policy.load(str(folder), None)
    policy.tokenizer._eos_token_ids = {policy.vocabulary - 1}
    policy.model.set_dtype(mx.bfloat16)
    if layers != "plain":
        policy.adapt(LoraSettings(rank=8), 0)
    if layers == "mlx-lm":
        for layer in policy.model.modules():
            if type(layer) is Lora:
                layer.__class__ = LoRALinear
    mx.eval(policy.model.parameters())
    return policy
