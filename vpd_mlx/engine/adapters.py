"""Adapter folders in mlx-lm's format: `adapters.safetensors` and `adapter_config.json`."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from vpd_mlx.engine.settings import LoraSettings
from vpd_mlx.errors import ModelError, RunError

__all__ = ["Adapter", "config_of", "fingerprint", "load_adapter", "lora_of", "save_adapter"]

Adapter = dict[str, mx.array]
"""Name -> tensor of every LoRA matrix, float32."""


def fingerprint(adapter: Adapter) -> str:
    """A short hash: equal where every name and bit is."""
    found = hashlib.sha256()
    for name, tensor in sorted(adapter.items()):
        found.update(name.encode())
        found.update(np.array(tensor.astype(mx.float32)).tobytes())
    return found.hexdigest()[:16]


def config_of(lora: LoraSettings, blocks: int) -> dict[str, Any]:
    """`lora` as mlx-lm's `adapter_config.json` has it, for a model of so many blocks; `lora_of` reads it back."""
    parameters: dict[str, Any] = {"rank": lora.rank, "scale": lora.scale, "dropout": lora.dropout}
    if lora.keys is not None:
        parameters["keys"] = list(lora.keys)
    layers = lora.layers if lora.layers > 0 else blocks
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
            raise ModelError(f"{path}: fine_tune_type is {kind!r}; only LoRA adapters can be evaluated")
        return LoraSettings(
            rank=parameters["rank"],
            scale=float(parameters["scale"]),
            dropout=float(parameters.get("dropout", 0.0)),
            layers=config["num_layers"],
            keys=parameters.get("keys"),
        )
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); give an adapter folder of mlx-lm's") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # ValueError: bad JSON or a bad value
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ModelError(f"{path}: is not an adapter's config ({what}); export it again") from None


def load_adapter(folder: Path, like: Adapter) -> Adapter:
    """The adapter in a folder, which must have the names and shapes of `like`.

    Raises:
        ModelError: there is none, or it does not fit.
    """
    path = folder / "adapters.safetensors"
    if not path.is_file():
        raise ModelError(f"{path}: no such adapter; finish or resume the run first")
    loaded: Adapter = dict(mx.load(str(path)))  # type: ignore[arg-type]
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
        remedy = "free space or fix the permissions, then go on with --resume"
        raise RunError(f"{folder}: the adapter cannot be written ({error}); {remedy}") from error
