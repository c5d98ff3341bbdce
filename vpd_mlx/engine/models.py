"""Models and adapters: read and written in mlx-lm's format, and what a model's architecture allows.

Where its head comes off and whether completions can share a prompt is found out by running the model on a few tokens, so that no
list of architectures has to be kept.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import mlx_lm.utils
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    StrictDataclassError,
)
from mlx.utils import tree_flatten
from mlx_lm.models.cache import CacheList, make_prompt_cache

from vpd_mlx.common.hub import hub_fault, reaching_hub
from vpd_mlx.engine.attention import bounded
from vpd_mlx.engine.caches import layout
from vpd_mlx.engine.device import close, gpu_ways
from vpd_mlx.engine.heads import Head
from vpd_mlx.engine.keys import chosen_keys
from vpd_mlx.engine.memory import out_of_memory
from vpd_mlx.engine.settings import LoraSettings
from vpd_mlx.errors import ModelError, RunError
from vpd_mlx.types import TokenRow

__all__ = ["Adapter", "first_line", "load_tokenizer", "local", "lora_of"]

Adapter = dict[str, mx.array]
"""Name -> tensor of every LoRA matrix, float32."""

TOKENIZER_FILES = ["*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja"]
PROBE = tuple(range(1, 9))
ALIKE = 0.2  # of the largest logit: far more than two ways to compute the same differ by in half precision


def local(path: str, *, file: bool = False) -> Path:
    """The path as one on this machine; it may be a name on the hub instead. With `file` a config.json counts, too.

    Raises:
        ModelError: it can only be a path, and there is nothing.
    """
    found = Path(path).expanduser()
    if (os.path.isabs(path) or path.startswith((".", "~"))) and not (found.is_dir() or (file and found.is_file())):
        raise ModelError(f"model: there is no folder {path}; give a model folder in mlx-lm's format, or a hub id")
    return found


def load_model(path: str, revision: str | None) -> tuple[nn.Module, Any]:
    """Model, frozen, and tokenizer from a folder or the hub.

    Raises:
        ModelError: there is no such model, or it cannot be loaded.
    """
    folder = local(path)
    try:
        with contextlib.nullcontext() if folder.is_dir() else reaching_hub():
            model, tokenizer = mlx_lm.load(str(folder) if folder.is_dir() else path, revision=revision)
        model.freeze()
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError) as error:
        raise ModelError(f"model: {path!r} is no local folder, and on the hub: {hub_fault(error)}") from None
    except StrictDataclassError as error:  # transformers reads the config too, for the tokenizer
        problem = f"{path!r} has a config.json that transformers refuses ({first_line(error.__cause__ or error)})"
        raise ModelError(f"model: {problem}; correct it, or take another copy of the model") from error
    except (Exception, SystemExit) as error:
        what = first_line(error) if isinstance(error, Exception) else "mlx-lm's file of its architecture exits"
        problem = f"{path!r} cannot be loaded ({what})"
        raise ModelError(f"model: {problem}; it must be a complete model in mlx-lm's format") from error
    if not tokenizer.encode("a 1", add_special_tokens=False):
        raise ModelError(f"model: {path!r} has no tokenizer; put its files, such as tokenizer.json, beside the weights")
    return model, tokenizer


def load_tokenizer(path: str, revision: str | None) -> Any:
    """The tokenizer alone, from a folder or the hub: its few files, not the weights.

    Raises:
        ModelError: there is none.
    """
    folder = local(path)
    try:
        if not folder.is_dir():
            with reaching_hub():
                folder = Path(snapshot_download(path, revision=revision, allow_patterns=TOKENIZER_FILES))
        return mlx_lm.utils.load_tokenizer(folder)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError) as error:
        raise ModelError(f"model: {path!r} is no local folder, and on the hub: {hub_fault(error)}") from None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        problem = f"{path!r} has no tokenizer that can be loaded ({first_line(error)})"
        raise ModelError(f"model: {problem}; put its files, such as tokenizer.json, beside the weights") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its kind where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def outer_and_inner(model: nn.Module) -> tuple[Any, Any]:
    """The module with the head, and the one below, which holds the embedding and the blocks; None where there is none."""
    outer = getattr(model, "language_model", model)  # some architectures wrap it once more
    return outer, next((m for n in ("model", "transformer", "backbone") if (m := getattr(outer, n, None))), None)


def split_head(model: nn.Module) -> tuple[Any, Head | None, int]:
    """(body, head, vocabulary) such that head(body(x)) is model(x); (model, None, vocabulary) where none is found."""
    outer, inner = outer_and_inner(model)
    probe = mx.array([PROBE])
    full = _run(model, probe)  # (1, T, V)
    tolerance = 1e-4 * float(mx.abs(full).max()) + 1e-6
    for head in heads(outer, inner) if callable(inner) else []:
        try:
            logits = head(inner(probe, cache=None)).astype(mx.float32)
        except (TypeError, ValueError, AttributeError):
            break  # this architecture calls its inner model in another way
        if logits.shape == full.shape and float(mx.abs(logits - full).max()) <= tolerance:
            return inner, head, int(full.shape[-1])
    return model, None, int(full.shape[-1])


def _run(model: nn.Module, ids: mx.array) -> mx.array:
    """Logits (1, T, V), float32, of an architecture that is computed as our passes need it.

    Raises:
        ModelError: it fails, sees later tokens, or gives other logits without a cache than with one.
    """
    name = architecture_of(model)
    try:
        logits: mx.array = model(ids)
        fewer: mx.array = model(ids[:, : ids.shape[1] // 2])
        cached: mx.array = model(ids, cache=make_prompt_cache(model))
        mx.eval(logits, fewer, cached)
    except Exception as error:  # whatever its architecture raises, nothing works without this
        if out_of_memory(error):
            raise
        problem = f"{name} cannot be run on {mx.default_device()} ({_what(error)})"
        raise ModelError(f"model: {problem}; take another architecture or device") from error
    allowed = 1e-3 if logits.dtype == mx.float32 and not gpu_ways() else ALIKE
    logits = logits.astype(mx.float32)
    for other, problem in ((fewer, "lets tokens see later ones"), (cached, "gives other scores than it decodes by")):
        here = logits[:, : other.shape[1]]
        most = float(mx.abs(mx.where(mx.isinf(here), 0.0, here)).max())
        if not float(mx.abs(mx.where(here == other, 0.0, here - other)).max()) <= allowed * most + 1e-6:
            raise ModelError(f"model: {name}, as mlx-lm computes it, {problem}; take another architecture")
    return logits


def architecture_of(model: nn.Module) -> str:
    """mlx-lm's name of the model's kind."""
    return type(model).__module__.rsplit(".", 1)[-1]


def _what(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def check_gradient(model: nn.Module, hidden: Callable[..., tuple[mx.array, mx.array]]) -> None:
    """See that mlx has a gradient of the adapter in this architecture. Its graph alone is built, nothing is computed.

    Raises:
        ModelError: it has none.
    """
    rows = [TokenRow(PROBE[:3], PROBE[:2])]
    model.train()
    try:
        nn.value_and_grad(model, lambda: hidden(rows, shared=False)[0].sum())()
    except Exception as error:
        problem = f"{architecture_of(model)} has no gradient in mlx ({_what(error)})"
        raise ModelError(f"model: {problem}; take another architecture") from error
    finally:
        model.eval()


def heads(outer: Any, inner: Any) -> list[Head]:
    """What may turn the body's states into logits: the projection or the embedding, scaled or capped as the arguments say."""
    projection = getattr(outer, "lm_head", None)
    embedding = next((m for n in ("embed_tokens", "wte", "embeddings") if (m := getattr(inner, n, None))), None)
    linear: Head | None = projection if projection is not None else getattr(embedding, "as_linear", None)
    if linear is None or _is_adapted(projection) or _is_adapted(embedding):
        return []
    found, args = [linear], getattr(outer, "args", None)
    for name in ("logit_scale", "logits_scaling", "final_logit_softcapping"):
        value = getattr(args, name, None)
        if isinstance(value, int | float) and value:
            found += [_scaled(linear, value), _scaled(linear, 1 / value), _capped(linear, value)]
    if (out := getattr(args, "lm_head_multiplier", None)) and (into := getattr(args, "embedding_multiplier", None)):
        found.append(_scaled(linear, out / into))  # an embedding that is kept multiplied
    return found


def _scaled(linear: Head, factor: float) -> Head:
    return lambda h: linear(h) * factor


def _capped(linear: Head, cap: float) -> Head:
    return lambda h: mx.tanh(linear(h) / cap) * cap


def _is_adapted(module: Any) -> bool:
    return module is not None and "lora_b" in module


def can_share_prompts(model: nn.Module, hidden: Callable[..., tuple[mx.array, mx.array]]) -> bool:
    """Whether a prompt that is read once gives its completions the states, by `Policy.hidden`, that reading it for each does.

    `hidden` shares when it is told to, whatever that saves. A GPU has kernels by length and for gradients, and may multiply
    float32 in TF32: there the rows are longer than 64 tokens, the adapter's gradient is compared too, and tolerances are wider.
    """
    if layout(make_prompt_cache(model)) is None:
        return False  # a layer keeps what we know no way to hand on
    long, short = (PROBE * 9 if gpu_ways() else PROBE[:5]), PROBE[2:4]
    rows = [TokenRow(long, PROBE[:3]), TokenRow(long, PROBE[2:6]), TokenRow(short, PROBE[:2]), TokenRow(short, (1,))]

    def states(shared: bool) -> mx.array:
        return hidden(rows, shared=shared)[0]

    def gradient(shared: bool) -> mx.array:
        def total() -> mx.array:
            x = states(shared).astype(mx.float32)
            found: mx.array = (x * mx.cos(mx.arange(x.size)).reshape(x.shape)).sum() / x.size**0.5
            return found

        return mx.concatenate([g.flatten() for _, g in tree_flatten(nn.value_and_grad(model, total)()[1])])

    separate = states(shared=False)
    try:
        same = close(states(shared=True), separate)
        if same and gpu_ways() and tree_flatten(model.trainable_parameters()):
            found, wanted = (gradient(shared).astype(separate.dtype) for shared in (True, False))
            same = close(found, wanted, half=1e-1)
    except (TypeError, ValueError, AttributeError, IndexError):
        return False  # this architecture needs more from a cache than keys, values and a mask
    return same


def can_bound_attention(model: nn.Module, hidden: Callable[..., tuple[mx.array, mx.array]], *, shares: bool) -> bool:
    """Whether every block calls mlx-lm's function for attention, and its states stay the same when that is `bounded`.

    `shares` says whether completions share their prompt.
    """
    attending = sum(_attends(c) for c in make_prompt_cache(model))
    rows = [TokenRow(PROBE[2:4], PROBE[:6]), TokenRow(PROBE[2:4], PROBE[3:5])]
    plain, _ = hidden(rows, shared=False)
    try:
        with bounded(model, least=1) as use:
            found, _ = hidden(rows, shared=shares, long=1)
        mx.eval(found)
    except (TypeError, ValueError, AttributeError, IndexError):
        return False  # this architecture handles masks or caches in its own way
    passes = 2 if shares else 1
    return use.calls >= attending * passes and close(found, plain)


def _attends(cache: Any) -> bool:
    """Whether this cache, or one in it, is for attention."""
    if isinstance(cache, CacheList):
        return any(_attends(part) for part in cache.caches)
    return type(cache).__name__ in ("KVCache", "RotatingKVCache")


def config_of(model: nn.Module, lora: LoraSettings) -> dict[str, Any]:
    """`lora` as mlx-lm's `adapter_config.json` has it, for this model; `lora_of` reads it back.

    Raises:
        ConfigError: `lora` does not fit the model (`keys.chosen_keys`).
    """
    parameters: dict[str, Any] = {"rank": lora.rank, "scale": lora.scale, "dropout": lora.dropout}
    if (keys := chosen_keys(model, lora)) is not None:
        parameters["keys"] = keys
    layers = lora.layers if lora.layers > 0 else len(model.layers)
    return {"fine_tune_type": "lora", "num_layers": layers, "lora_parameters": parameters}


def lora_of(folder: Path) -> LoraSettings:
    """The LoRA settings of an adapter folder in mlx-lm's format, whatever program trained it.

    Raises:
        ModelError: there is no config, it is not LoRA's, or its settings cannot be read.
    """
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind, parameters = config.get("fine_tune_type", "lora"), config["lora_parameters"]
        if kind != "lora":
            raise ModelError(f"{path}: fine_tune_type is {kind!r}; only LoRA adapters can be used")
        scale, dropout = float(parameters["scale"]), float(parameters.get("dropout", 0.0))
        layers, keys = config["num_layers"], parameters.get("keys") or _keys_of(folder)
        return LoraSettings(rank=parameters["rank"], scale=scale, dropout=dropout, layers=layers, keys=keys)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); give an adapter folder of mlx-lm's") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # ValueError: bad JSON or a bad value
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ModelError(f"{path}: is not an adapter's config ({what}); export it again") from None


def _keys_of(folder: Path) -> list[str] | None:
    """The layers that an adapter of another program is on, where it has matrices for each expert; None for all of a block."""
    path = folder / "adapters.safetensors"
    tensors: Any = mx.load(str(path)) if path.is_file() else {}
    if all(t.ndim < 3 for t in tensors.values()):
        return None
    return sorted({name.rpartition(".")[0].partition(".layers.")[2].partition(".")[2] for name in tensors})


def load_adapter(folder: Path, like: Adapter) -> Adapter:
    """The adapter in a folder, which must have the names and shapes of `like`.

    Raises:
        ModelError: there is none, or it does not fit.
    """
    path = folder / "adapters.safetensors"
    if not path.is_file():
        raise ModelError(f"{path}: no such adapter; finish or resume the run first")
    try:
        loaded: Adapter = {k: v.astype(mx.float32) for k, v in dict(mx.load(str(path))).items()}  # type: ignore[arg-type]
        mx.eval(loaded)
    except (OSError, RuntimeError, ValueError) as error:
        what = f"cannot be read ({first_line(error)})"
        raise ModelError(f"{path}: {what}; resume the run, which writes it anew, or copy it again") from None
    wrong = sorted(set(like) ^ set(loaded)) or [k for k in like if like[k].shape != loaded[k].shape]
    if wrong:
        raise ModelError(f"{path}: does not fit the model ({wrong[0]} differs); use the run's own model and recipe")
    return loaded


def save_adapter(folder: Path, adapter: Adapter, config: dict[str, Any]) -> None:
    """Write an adapter folder.

    Raises:
        RunError: it cannot be written; an older adapter there stays as it is.
    """
    partial = folder / "adapters.partial.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        mx.save_safetensors(str(partial), adapter)
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, folder / "adapters.safetensors")
    except (OSError, RuntimeError) as error:  # mlx reports a failed write as RuntimeError
        partial.unlink(missing_ok=True)
        remedy = "free space or fix the permissions, then resume the run"
        raise RunError(f"{folder}: the adapter cannot be written ({error}); {remedy}") from error
