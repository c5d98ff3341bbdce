"""What a resume may change of a run: how long it goes on, how it is watched and kept, and where its files have moved to."""

from __future__ import annotations

import filecmp
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vpd_mlx.errors import ConfigError, Fault, config_error
from vpd_mlx.recipe import Recipe, check_recipe, load_recipe
from vpd_mlx.run.checkpoint import newest_state
from vpd_mlx.run.log import RECIPE_FILE

__all__ = ["check_resume"]

MAY_CHANGE = (
    "steps",
    "on_collapse",
    "on_no_gap",
    "evaluation.every",
    "evaluation.selection_every",
    "checkpoint.",
    "memory.limit_gb",
    "memory.cache_limit_gb",
    "memory.wired_limit_gb",
    "description",
    "logging.",
    "retain.",
)


def check_resume(folder: Path, after: Recipe, where: str) -> None:
    """Refuse to resume a run under a recipe that would make another run of it.

    The run's recipe is that of its newest whole checkpoint: `config.yaml` may have been edited since. Before the first
    checkpoint, and for runs of earlier versions, whose checkpoints hold none, it is that of `config.yaml`.

    Raises:
        ConfigError: a key differs that may not, or more steps are done than are asked for.
        RunError: the run has checkpoints, and none is whole.
    """
    _, state, _ = newest_state(folder / "checkpoints")
    done, recorded = state.get("step", 0), state.get("recipe")
    if after.steps < done:
        short = f"{after.steps}, and {done} are done"
        raise config_error("steps", short, "ask for more, or take an earlier checkpoint's adapter", where)
    if recorded is None:
        before = load_recipe(folder / RECIPE_FILE)
    else:
        before = check_recipe(recorded, f"{folder}, as checkpointed", folder)
    keys = ", ".join(k.removesuffix(".") for k in MAY_CHANGE)
    remedy = (
        f"start a new run for that; on resume only these may change: {keys}, and the place of files that have moved"
    )
    paths = {"model", *after.path_keys()}
    faults = [
        Fault(key, f"differs from the run's recipe ({new!r}, not {old!r})", remedy)
        for key, old, new in _changed(before.model_dump(), after.model_dump())
        if not key.startswith(MAY_CHANGE) and not (key in paths and _moved(old, new))
    ]
    if faults:
        raise ConfigError(faults, where)


def _moved(old: Any, new: Any) -> bool:
    """Whether one path took the other's place: nothing is left there, or there is a copy."""
    if not isinstance(old, str) or not isinstance(new, str) or not Path(new).exists():
        return False
    if not Path(old).exists():
        return True
    return Path(old).is_file() and Path(new).is_file() and filecmp.cmp(old, new, shallow=False)


def _changed(before: Any, after: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) of everything that differs."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in [*before, *(k for k in after if k not in before)]:
            yield from _changed(before.get(key), after.get(key), f"{path}.{key}" if path else key)
    elif before != after:
        yield path, before, after
