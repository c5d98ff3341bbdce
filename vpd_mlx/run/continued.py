"""The adapter that a run continues: where it is, and the LoRA settings that come with it."""

from __future__ import annotations

import json
from pathlib import Path

from vpd_mlx.engine.models import lora_of
from vpd_mlx.errors import ConfigError, Fault
from vpd_mlx.recipe import Recipe

__all__ = ["START", "adapter_folder", "adapter_model", "continued", "start_of"]

START = "start"  # in the run folder: the adapter before the first step, where it is not a fresh one
CONFIG = "adapter_config.json"


def adapter_folder(path: Path) -> Path:
    """The adapter's folder, which a run's folder has inside."""
    inside = path / "adapters"
    return inside if not (path / CONFIG).is_file() and (inside / CONFIG).is_file() else path


def adapter_model(folder: Path) -> str | None:
    """The model that an adapter was trained on, if its config tells; `models.lora_of` has read that before."""
    model = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("model")
    return model if isinstance(model, str) and model else None


def start_of(recipe: Recipe, out: Path, *, resume: bool) -> Path | None:
    """The folder of the adapter to begin with, None for a fresh one; on resume what the run began with."""
    if resume and (out / START / "adapters.safetensors").is_file():
        return out / START
    return None if recipe.adapter is None else adapter_folder(Path(recipe.adapter))


def continued(recipe: Recipe) -> Recipe:
    """The recipe with the LoRA settings of the adapter that it continues, but for dropout, which is no part of an adapter.

    Raises:
        ConfigError: the recipe asks for other ones.
        ModelError: the adapter's config cannot be read.
    """
    if recipe.adapter is None:
        return recipe
    folder, own = adapter_folder(Path(recipe.adapter)), recipe.lora
    theirs = lora_of(folder)
    given = own.model_fields_set
    faults = [
        Fault(
            f"lora.{key}", f"{mine!r}, and the adapter {folder} has {its!r}", f"leave lora.{key} out, or give {its!r}"
        )
        for key in ("rank", "scale", "layers", "keys")
        if key in given and (mine := getattr(own, key)) != (its := getattr(theirs, key))
    ]
    if faults:
        raise ConfigError(faults)
    dropout = own.dropout if "dropout" in given else theirs.dropout
    return recipe.model_copy(update={"lora": theirs.model_copy(update={"dropout": dropout})})
