"""What of a recipe may change when its run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vpd_mlx.common.files import read_rows
from vpd_mlx.errors import ConfigError, Fault
from vpd_mlx.recipe import Recipe

__all__ = ["MAY_CHANGE", "check_resume"]

MAY_CHANGE = (
    "steps",
    "evaluation.every",
    "checkpoint.",
    "memory.limit_gb",
    "memory.cache_limit_gb",
    "memory.wired_limit_gb",
    "description",
    "logging.",
)


def check_resume(folder: Path, before: Recipe, after: Recipe, where: str) -> None:
    """Refuse to resume a run under a recipe that would make another run of it.

    Raises:
        ConfigError: a key differs that may not, or more steps are done than are asked for.
    """
    rows = read_rows(folder / "metrics.jsonl")
    done = int(rows[-1]["step"]) if rows else 0
    if after.steps < before.steps and after.steps < done:
        short = f"{after.steps}, and {done} are done"
        raise ConfigError([Fault("steps", short, "ask for more, or take an earlier checkpoint's adapter")], where)
    changed = [key for key in _changed(before.model_dump(), after.model_dump()) if not key.startswith(MAY_CHANGE)]
    if changed:
        keys = ", ".join(k.removesuffix(".") for k in MAY_CHANGE)
        remedy = f"start a new run for that; on resume only these may change: {keys}"
        raise ConfigError([Fault(key, "differs from the run's recipe", remedy) for key in changed], where)


def _changed(before: Any, after: Any, path: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [*before, *(k for k in after if k not in before)]
        return [c for k in keys for c in _changed(before.get(k), after.get(k), f"{path}.{k}" if path else k)]
    return [] if before == after else [path]
