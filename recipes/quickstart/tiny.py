"""Training and saving of the tiny models in `recipes/`: supervised learning of (prompt, answer) samples."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3
from mlx_lm.utils import quantize_model
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

__all__ = ["END", "SPECIALS", "chat_tokenizer", "greedy", "new_model", "quantise", "save", "share", "teach"]

END = "<|end|>"
SPECIALS = ["<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", END]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BATCH, RATE, WARM_UP = 128, 3e-3, 100
GROUP_SIZE = 32

Sample = Callable[[], tuple[Sequence[int], Sequence[int]]]
"""-> (ids of a prompt, ids of its answer with the stop token)"""


def chat_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer with its special tokens named and a chat template."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token=END, clean_up_tokenization_spaces=False
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def new_model(vocabulary: int) -> tuple[qwen3.Model, dict[str, Any]]:
    """A Qwen3 of some 95,000 parameters with random weights, and its configuration."""
    config = qwen3.ModelArgs(
        model_type="qwen3",
        hidden_size=64,
        num_hidden_layers=2,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-6,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        rope_theta=10000.0,
        tie_word_embeddings=True,
    )
    model = qwen3.Model(config)
    print(f"{sum(v.size for _, v in tree_flatten(model.parameters())):,} parameters, vocabulary {vocabulary}")
    return model, asdict(config)


def teach(model: nn.Module, sample: Sample, steps: int) -> None:
    """`steps` updates on batches of fresh samples. Only answers count in the loss."""

    def batch() -> tuple[mx.array, mx.array]:
        rows = [sample() for _ in range(BATCH)]
        width = -(-max(len(p) + len(y) for p, y in rows) // 4) * 4
        ids, weights = np.zeros((BATCH, width), np.int32), np.zeros((BATCH, width), np.float32)
        for i, (p, y) in enumerate(rows):
            ids[i, : len(p) + len(y)] = [*p, *y]
            weights[i, len(p) : len(p) + len(y)] = 1
        return mx.array(ids), mx.array(weights)

    def loss(ids: mx.array, weights: mx.array) -> mx.array:
        per_token = nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:])
        return (per_token * weights[:, 1:]).sum() / weights[:, 1:].sum()

    warm_up = optim.linear_schedule(0, RATE, WARM_UP)
    cosine = optim.cosine_decay(RATE, max(1, steps - WARM_UP), RATE * 0.02)
    adam = optim.AdamW(optim.join_schedules([warm_up, cosine], [WARM_UP]), weight_decay=0.01, bias_correction=True)
    step = nn.value_and_grad(model, loss)
    start = time.perf_counter()
    for k in range(1, steps + 1):
        value, gradients = step(*batch())
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        adam.update(model, gradients)
        mx.eval(value, model.parameters(), adam.state)
        if k % 100 == 0:
            print(f"step {k}: loss {value.item():.4f}, {time.perf_counter() - start:.0f} s", flush=True)


def greedy(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[Sequence[int]], most: int
) -> list[str]:
    """The most likely answer to each prompt, of at most `most` tokens."""
    end = tokenizer.convert_tokens_to_ids(END)
    texts = []
    for prompt in prompts:
        ids = list(prompt)
        while len(ids) < len(prompt) + most and (len(ids) == len(prompt) or ids[-1] != end):
            ids.append(int(mx.argmax(model(mx.array([ids]))[0, -1])))
        texts.append(tokenizer.decode([t for t in ids[len(prompt) :] if t != end]))
    return texts


def share(got: Sequence[str], want: Sequence[str]) -> float:
    """Share of texts that are as wanted, in 0..1."""
    return float(np.mean([g == w for g, w in zip(got, want, strict=True)]))


def quantise(model: nn.Module, config: dict[str, Any], bits: int) -> tuple[nn.Module, dict[str, Any]]:
    """The model quantised to `bits`; 0 leaves it in float32."""
    return quantize_model(model, config, GROUP_SIZE, bits) if bits else (model, config)


def save(model: nn.Module, config: dict[str, Any], tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write it in mlx-lm's format."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_weights(str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")
    tokenizer.save_pretrained(folder)
    print(f"wrote {folder}")
