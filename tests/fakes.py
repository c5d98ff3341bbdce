"""A tiny random model and a byte tokenizer, for tests of the engine that need no trained weights."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import jinja2
import mlx.core as mx
from mlx.utils import tree_flatten

from vpd_mlx.engine.learner import Learner
from vpd_mlx.engine.policy import Policy
from vpd_mlx.engine.settings import LoraSettings
from vpd_mlx.types import Message

VOCABULARY = 256
ARGUMENTS = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
}


class Recorder(Learner):
    """Keeps the gradients instead of moving anything."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, mx.array]] = []

    def apply(self, policy: Policy, gradients: Any) -> dict[str, Any]:
        self.gradients.append(dict(tree_flatten(gradients)))
        return {"grad_norm": 1.0, "rate": 0.0, "applied": 1}


class ByteTokenizer:
    """Bytes as tokens; a control character ends a completion, so that a random model soon draws one."""

    chat_template = None
    eos_token_ids = frozenset(range(32))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")


class Chat(ByteTokenizer):
    """A byte tokenizer whose chat template marks the roles."""

    chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"

    def apply_chat_template(self, messages: list[Message], **_: Any) -> list[int]:
        def refuse(why: str) -> None:
            raise jinja2.exceptions.TemplateError(why)

        template = jinja2.Template(self.chat_template)
        return self.encode(template.render(messages=messages, raise_exception=refuse))


def tiny_policy(
    kind: str = "llama", lora: LoraSettings | None = None, dtype: mx.Dtype = mx.float32, **arguments: Any
) -> Policy:
    """A policy of two random blocks of one of mlx-lm's architectures."""
    module = importlib.import_module(f"mlx_lm.models.{kind}")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict({"model_type": kind, **ARGUMENTS, **arguments}))
    model.set_dtype(dtype)
    model.freeze()
    policy = Policy(model, ByteTokenizer(), "tiny")
    if lora is not None:
        policy.adapt(lora, 0)
    return policy
