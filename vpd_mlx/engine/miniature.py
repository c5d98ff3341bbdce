"""A config.json made small: the same architecture, each kind of layer once, and few of everything.

What an architecture allows is found by running it (`models`). On the miniature that takes a second and no weights, and says the
same, since what differs between architectures is their code.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from mlx_lm.utils import _get_classes

__all__ = ["miniature", "text_arguments"]

MOST_LAYERS = 8
LAYERS = re.compile(r"^(num_hidden_layers|num_layers|n_layers?|num_transformer_layers)$")
# The first pattern that matches a key caps its number.
CAPS = [
    (r"vocab_size|num_vocab", 256),
    (r"max_position|n_positions|n_ctx|model_max_length|max_sequence_length|max_seq_len|^block_size$", 512),
    (r"sliding_window_pattern|_interval$|_period$|layer_group_size|interleave_moe_layer_step|every_n_layers", 2),
    (r"_layer_offset$|kv_reuse_layers$|first_k_dense|num_dense_layers|shared_experts?$", 1),
    (r"window|chunk_size|index_topk|candidate_topk|candidate_block", 8),
    (r"per_tok|topk_group", 2),
    (r"top_?k|moe_k$", 2),
    (r"^n_group$|n_groups|o_groups", 2),
    (r"experts?$|expert_num$|moe_capacity", 4),
    (r"heads(_per_layer)?$|n_head$|shared_head$|query_groups|attention_groups", 4),
    (r"per_layer_input$", 16),
    (r"head_dim$|d_head$|kv_channels|hidden_size_per_head|state|d_conv_inner", 16),
    (r"rank$|rank_dim$|latent", 32),
    (r"intermediate|ffn?_hidden|ff_dim|n_inner|mlp_hidden|expert_dim", 128),
    (r"hidden_size$|hidden_dim$|n_embd|d_model|model_dim|block_dim|d_ssm|lru_width|dim_model_base|embedding_size", 64),
]
KEY_HEADS = re.compile(r"(key_value|kv)_heads$|attention_groups$")
# What an architecture's code takes for granted: so many layers; this vocabulary, some of whose tokens it names.
LEAST_LAYERS = {"llama4": 4}
KEPT = {"phi3small": ("vocab_size",)}
HEADS = ("num_attention_heads", "n_heads", "n_head", "num_heads")
OF_INDICES = re.compile(r"layers?$|idxs?$|layer_ids$")
TEXT = re.compile(r"^Text\w*(Args|Config)$")
ELSEWHERE = re.compile(r"vision|audio|image|video|quantization")


def miniature(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json like this one whose model has some ten thousand parameters, in float32 and not quantised.

    Raises:
        ValueError: mlx-lm does not know the architecture.
    """
    model, arguments = _get_classes(dict(config))
    return _shrunk(config, arguments, model)


def text_arguments(model: type, text: Mapping[str, Any]) -> Any:
    """The arguments of the text model in a model of several parts, where `text` are its settings; None if that can't be told."""
    homes = [sys.modules[c.__module__] for c in model.__mro__ if c.__module__.startswith("mlx_lm.models.")]
    named = (v for home in homes for k, v in vars(home).items() if TEXT.match(k) and dataclasses.is_dataclass(v))
    if (own := next(named, None)) is not None:
        return own
    try:
        return _get_classes(dict(text))[1]
    except (KeyError, ValueError):  # of no type, or of one that mlx-lm has no file for
        others = (v for home in homes for v in vars(home).values() if isinstance(v, ModuleType))
        return next((v.ModelArgs for v in others if hasattr(v, "ModelArgs")), None)


def _completed(config: Mapping[str, Any], arguments: Any) -> dict[str, Any]:
    """With the defaults of mlx-lm's arguments for what it leaves out."""
    fields = dataclasses.fields(arguments) if arguments else ()
    defaults = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING and f.default is not None}
    return {**defaults, **config}


def _shrunk(config: Mapping[str, Any], arguments: Any = None, model: type | None = None) -> dict[str, Any]:
    parts = model is not None and any(f.name == "text_config" for f in dataclasses.fields(arguments))
    if model is not None and parts and "text_config" not in config:  # then it is the text's
        arguments, model = text_arguments(model, config), None
    config = _completed(config, arguments)
    layers = next((int(v) for k, v in config.items() if LAYERS.match(k) and v), None)
    home = arguments.__module__.rsplit(".", 1)[-1] if arguments else ""
    chosen = _chosen(config, layers, LEAST_LAYERS.get(home, 2)) if layers else []
    small = {k: _small(k, v, config, layers, chosen) for k, v in config.items() if not ELSEWHERE.search(k)}
    small |= {k: config[k] for k in KEPT.get(home, ())}
    if model is not None and isinstance(text := config.get("text_config"), Mapping):
        small["text_config"] = _shrunk(text, text_arguments(model, text))
    small |= {k: "float32" for k in ("torch_dtype", "dtype") if k in config}
    if {"qk_head_dim", "qk_nope_head_dim", "qk_rope_head_dim"} <= {k for k, v in small.items() if v}:
        small["qk_head_dim"] = small["qk_nope_head_dim"] + small["qk_rope_head_dim"]
    if small.get("num_kv_shared_layers"):  # each kind of layer once with keys of its own, and once without
        small["num_kv_shared_layers"] = len(chosen) // 2
    return small


def _small(key: str, value: Any, config: Mapping[str, Any], layers: int | None, chosen: Sequence[int]) -> Any:
    if isinstance(value, dict):
        return _factors(value, config) if key.startswith("rope") else _shrunk(value)
    if LAYERS.match(key) and layers:
        return len(chosen)
    if isinstance(value, list | tuple) or (_letters_of(key, value) and len(value) == layers):
        return _picked(key, value, layers, chosen)
    if isinstance(value, bool) or not isinstance(value, int):
        return "".join(dict.fromkeys(str(value))) if _letters_of(key, value) else value  # a pattern that repeats
    if KEY_HEADS.search(key) and value > 1:
        heads = next((config[k] for k in HEADS if config.get(k)), None)
        return 4 if value == heads else 2
    cap = next((most for pattern, most in CAPS if re.search(pattern, key)), value)
    return min(value, cap)


def _letters_of(key: str, value: Any) -> bool:
    """Whether each letter of a text says the kind of a layer."""
    return isinstance(value, str) and "pattern" in key


def _factors(rope: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings of heads of 16: longrope has a factor for each pair of dimensions."""
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    pairs = int(16 * partial) // 2
    return {k: v[:pairs] if k in ("short_factor", "long_factor") else v for k, v in rope.items()}


def _picked(key: str, value: Any, layers: int | None, chosen: Sequence[int]) -> Any:
    """What a list says of the chosen layers: an entry for each layer, or the indices of some."""
    if layers and len(value) == layers:
        found = [_capped(key, value[i]) for i in chosen]
        return "".join(found) if isinstance(value, str) else found
    if _indices(key, value, layers):
        return [at for at, i in enumerate(chosen) if i in value]
    return value


def _capped(key: str, value: Any) -> Any:
    return _small(key, value, {}, None, []) if isinstance(value, int) and not isinstance(value, bool) else value


def _indices(key: str, value: Any, layers: int | None) -> bool:
    numbers = isinstance(value, list | tuple) and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    return bool(layers and numbers and OF_INDICES.search(key) and all(v < layers for v in value))


def _chosen(config: Mapping[str, Any], layers: int, least: int) -> list[int]:
    """The first layer of each kind, at least so many in all: kinds differ in what the config's lists say of them."""
    whole = [v for k, v in config.items() if (isinstance(v, list | tuple) or _letters_of(k, v)) and len(v) == layers]
    columns = [v for v in whole if all(isinstance(e, str | int) for e in v)]
    marked = [v for k, v in config.items() if isinstance(v, list | tuple) and v and _indices(k, v, layers)]
    kinds: dict[tuple[Any, ...], int] = {}
    for i in range(layers):
        kinds.setdefault((*(c[i] for c in columns), *(i in m for m in marked if len(m) != layers)), i)
    chosen = list(kinds.values())[:MOST_LAYERS]
    chosen += [i for i in range(layers) if i not in chosen][: max(0, least - len(chosen))]
    return chosen * 2 if config.get("num_kv_shared_layers") else chosen
