"""vpd-mlx: teach small language models from language feedback, on MLX.

`import vpd_mlx as vpd` loads nothing else: each name below is imported from its module when it is first used.
"""

from __future__ import annotations

import importlib

TYPE_CHECKING = False  # `typing` alone would take most of the time
if TYPE_CHECKING:
    from vpd_mlx.api import Run, Session, evaluate, load_recipe, load_run, train
    from vpd_mlx.errors import VpdError
    from vpd_mlx.recipe import Recipe
    from vpd_mlx.tasks import Task
    from vpd_mlx.types import Context, Group, Problem, Rollout, Verdict

__version__ = "0.1.0"

__all__ = [
    "Context",
    "Group",
    "Problem",
    "Recipe",
    "Rollout",
    "Run",
    "Session",
    "Task",
    "Verdict",
    "VpdError",
    "evaluate",
    "load_recipe",
    "load_run",
    "train",
]

_HOMES = {
    **dict.fromkeys(("Run", "Session", "evaluate", "load_recipe", "load_run", "train"), "api"),
    **dict.fromkeys(("Context", "Group", "Problem", "Rollout", "Verdict"), "types"),
    "Recipe": "recipe",
    "Task": "tasks",
    "VpdError": "errors",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
