"""What a model's architecture allows: where its head comes off, whether completions can share a prompt, what LoRA adapts.

Found out by running the model on a few tokens, so that no list of architectures has to be kept.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.trainer import grad_checkpoint

from vpd_mlx.engine.heads import Head
from vpd_mlx.engine.settings import LoraSettings
from vpd_mlx.errors import ConfigError, Fault, ModelError
from vpd_mlx.types import TokenRow

__all__ = ["can_share_prompts", "check_lora", "checkpoint_blocks", "load_model", "split_head"]

PROBE = tuple(range(1, 9))
LINEAR = ("Linear", "QuantizedLinear", "SwitchLinear", "QuantizedSwitchLinear", "Embedding", "QuantizedEmbedding")


def load_model(path: str, revision: str | None) -> tuple[nn.Module, Any]:
    """Model and tokenizer from a folder or the hub.

    Raises:
        ModelError: there is no such model, or it cannot be loaded.
    """
    folder = Path(path).expanduser()
    if (os.path.isabs(path) or path.startswith((".", "~"))) and not folder.is_dir():
        raise ModelError(f"model: there is no folder {path}; give a model folder in mlx-lm's format, or a hub id")
    try:
        model, tokenizer = mlx_lm.load(str(folder) if folder.is_dir() else path, revision=revision)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError) as error:
        raise ModelError(
            f"model: {path!r} is no local folder and was not found on the hub ({_first_line(error)}); "
            "check the name and the network, or download it first"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ModelError(
            f"model: {path!r} cannot be loaded ({_first_line(error)}); it must be a complete model in mlx-lm's format"
        ) from error
    return model, tokenizer


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def split_head(model: nn.Module) -> tuple[Any, Head | None, int]:
    """(body, head, vocabulary) such that head(body(x)) is model(x); (model, None, vocabulary) where none is found."""
    # inner holds embed_tokens; some architectures wrap it once more
    outer = getattr(model, "language_model", model)
    inner: Any = getattr(outer, "model", None) or getattr(outer, "transformer", None)
    probe = mx.array([PROBE])
    full = model(probe).astype(mx.float32)  # (1, T, V)
    tolerance = 1e-4 * float(mx.abs(full).max()) + 1e-6
    for head in _heads(outer, inner) if callable(inner) else []:
        try:
            logits = head(inner(probe)).astype(mx.float32)
        except (TypeError, ValueError, AttributeError):
            break  # this architecture calls its inner model in another way
        if logits.shape == full.shape and float(mx.abs(logits - full).max()) <= tolerance:
            return inner, head, int(full.shape[-1])
    return model, None, int(full.shape[-1])


def _heads(outer: Any, inner: Any) -> list[Head]:
    """What may turn the body's states into logits: the projection or the embedding, scaled or capped as the arguments say."""
    projection = getattr(outer, "lm_head", None)
    embedding = getattr(inner, "embed_tokens", None) or getattr(inner, "wte", None)
    linear: Head | None = projection if projection is not None else getattr(embedding, "as_linear", None)
    if linear is None or _is_adapted(projection) or _is_adapted(embedding):
        return []
    found = [linear]
    for name in ("logit_scale", "logits_scaling", "final_logit_softcapping"):
        value = getattr(getattr(outer, "args", None), name, None)
        if isinstance(value, int | float) and value:
            found += [_scaled(linear, value), _scaled(linear, 1 / value), _capped(linear, value)]
    return found


def _scaled(linear: Head, factor: float) -> Head:
    return lambda h: linear(h) * factor


def _capped(linear: Head, cap: float) -> Head:
    return lambda h: mx.tanh(linear(h) / cap) * cap


def _is_adapted(module: Any) -> bool:
    return module is not None and "lora_b" in module


def can_share_prompts(model: nn.Module, states: Callable[[Sequence[TokenRow], bool], mx.array]) -> bool:
    """Whether a prompt that is read once gives its completions the states that reading it for each of them does.

    `states` is (rows, whether they share their prompts) -> hidden states (M, D) of their completion positions.
    """
    caches = make_prompt_cache(model)
    if any(type(c).__name__ not in ("KVCache", "RotatingKVCache") for c in caches):
        return False  # recurrent layers keep no keys to share
    long, short = PROBE[:5], PROBE[2:4]
    rows = [TokenRow(long, PROBE[:3]), TokenRow(long, PROBE[2:6]), TokenRow(short, PROBE[:2]), TokenRow(short, (1,))]
    separate = states(rows, False)
    try:
        shared = states(rows, True)
        mx.eval(shared)
    except (TypeError, ValueError, AttributeError, IndexError):
        return False  # this architecture needs more from a cache than keys, values and a mask
    full_precision = separate.dtype == mx.float32
    separate, shared = separate.astype(mx.float32), shared.astype(mx.float32)
    tolerance = (1e-4 if full_precision else 3e-2) * float(mx.abs(separate).max()) + 1e-6
    return float(mx.abs(shared - separate).max()) <= tolerance


def checkpoint_blocks(model: nn.Module) -> None:
    """Recompute this model's blocks in the backward pass.

    mlx-lm's function changes the blocks' class, for every model of the process: these blocks get a class of their own first.
    """
    own: dict[type, type] = {}
    for block in model.layers:
        kind = type(block)
        if kind not in own:
            own[kind] = type(kind.__name__, (kind,), {"__module__": kind.__module__})
            block.__class__ = own[kind]
            grad_checkpoint(block)
        block.__class__ = own[kind]


def check_lora(model: nn.Module, lora: LoraSettings) -> None:
    """See that the model has the blocks and the layers that `lora` names.

    Raises:
        ConfigError: it does not; every wrong key is named, with what the model has.
    """
    blocks = len(model.layers)
    if lora.layers > blocks:
        problem = f"{lora.layers} is more than the model's {blocks} blocks"
        raise ConfigError([Fault("lora.layers", problem, f"use -1 or 1 to {blocks}")])
    if lora.keys is None:
        return
    chosen = model.layers[-lora.layers :] if lora.layers > 0 else model.layers
    known = {k for m in (*chosen, model) for k, layer in m.named_modules() if type(layer).__name__ in LINEAR}
    short_names = sorted(k for k in known if ".layers." not in k)
    faults = []
    for key in (k for k in lora.keys if k not in known):
        close = difflib.get_close_matches(key, short_names, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"use some of: {', '.join(short_names)}"
        faults.append(Fault("lora.keys", f"{key!r} matches no linear layer of the model", hint))
    if not lora.keys:
        faults.append(Fault("lora.keys", "[] adapts nothing", "name layers, or use null for all"))
    if faults:
        raise ConfigError(faults)
