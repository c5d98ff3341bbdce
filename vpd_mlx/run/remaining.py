"""How long a run will still take: a rough estimate from the first evaluation on, a better one after every step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vpd_mlx.recipe import Recipe

__all__ = ["seconds_left"]

PER_SAMPLING = (
    2.0  # seconds of a step to seconds of its sampling, before any step was timed: updates cost about as much
)
LOOKS = ("evaluation", "selection")


def seconds_left(
    recipe: Recipe,
    done: int,
    seconds: Mapping[str, float],
    evaluation: Mapping[str, Any],
    selection: Mapping[str, Any] | None = None,
) -> float:
    """Seconds until all steps are done, with the evaluations and selections on the way and at the end.

    `seconds` are those spent by phase; `evaluation` and `selection` the newest rows of their logs. After no step, a step's time
    follows from how long the evaluation took for each of its completions.
    """
    cfg, steps = recipe.evaluation, recipe.steps
    if done:
        step = sum(spent for phase, spent in seconds.items() if phase not in LOOKS) / done
    else:
        sampled = evaluation["problems"] * (1 + evaluation["samples"]) + evaluation["teacher_problems"]
        completions = recipe.rollout.prompts * recipe.rollout.group_size
        step = PER_SAMPLING * evaluation["seconds"] / max(1, sampled) * completions
    looks = _due(done, steps, cfg.every) * float(evaluation["seconds"])
    if selection is not None:
        looks += _due(done, steps, cfg.selection_every) * float(selection["seconds"])
    return step * (steps - done) + looks


def _due(done: int, steps: int, every: int | None) -> int:
    """How many of the steps after `done` are a multiple of `every`, or the last."""
    if done >= steps:
        return 0
    on_the_way = 0 if every is None else steps // every - done // every
    return on_the_way + (every is None or steps % every != 0)
