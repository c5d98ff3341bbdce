"""What training changed: a trained adapter and the base model on the same problems, with the same seed."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from vpd_mlx.common.files import read_rows
from vpd_mlx.common.functions import NOTHING, Handed
from vpd_mlx.engine.models import lora_of
from vpd_mlx.errors import DataError
from vpd_mlx.recipe import Recipe
from vpd_mlx.run.evaluate import Measured, compared, measure, summed
from vpd_mlx.run.progress import Progress
from vpd_mlx.run.selection import apart
from vpd_mlx.run.step import Trainer
from vpd_mlx.types import Problem

__all__ = ["evaluate_change"]


def evaluate_change(
    recipe: Recipe,
    adapter: Path | None,
    run: Path | None,
    split: Literal["held-out", "train"],
    *,
    base: bool = True,
    greedy: bool = False,
    progress: Progress | None = None,
    handed: Handed = NOTHING,
) -> dict[str, Any]:
    """Every figure of the model with its adapter and, if `base`, of the model without it and of their difference, as JSON.

    Raises:
        DataError: a held-out problem is among those that `run` was trained on.
        VpdError: data, model or recipe are unusable, or the verifier failed.
    """
    if adapter is not None:
        recipe = recipe.model_copy(update={"lora": lora_of(adapter), "adapter": None})
    trainer, before = Trainer.build(recipe, progress, handed=handed), None
    with contextlib.closing(trainer.sources):
        _, reported = apart(recipe, trainer.task)
        problems = (trainer.task.train if split == "train" else reported)[: recipe.evaluation.problems]
        if split != "train" and run is not None and trainer.task.held_out != trainer.task.train:
            _refuse_trained(run, problems)
        if adapter is not None:
            trainer.policy.load_adapter(adapter)
            if base:
                with trainer.policy.adapter_off():
                    before = measure(trainer, problems, greedy_only=greedy)
        found = measure(trainer, problems, greedy_only=greedy)
    out = {
        "model": recipe.model,
        "adapter": None if adapter is None else str(adapter),
        "task": recipe.task.kind,
        "split": split,
        "seed": recipe.seed,
        "temperature": 0.0 if greedy else recipe.evaluation.temperature,
        **_figures(found),
    }
    if before is not None:
        out["base"] = _figures(before)
        out["difference"] = {k: {**asdict(p), "verdict": p.verdict} for k, p in compared(before, found).items()}
    return out


def _figures(measured: Measured) -> dict[str, Any]:
    return {**summed(measured), "greedy_by_problem": measured.figures["student_greedy"]}


def _refuse_trained(run: Path, problems: Sequence[Problem]) -> None:
    """A problem that a run was trained on does not test it, whatever its data file says now.

    Raises:
        DataError: a problem's prompt is among the run's rollouts.
    """
    trained = {row["prompt"] for row in read_rows(run / "rollouts.jsonl")}
    for problem in problems:
        # Only the last message of a conversation is logged, and several may share it.
        if len(problem.messages) == 1 and problem.prompt in trained:
            raise DataError(f"row {problem.id}: {run} was trained on this prompt; take it out")
