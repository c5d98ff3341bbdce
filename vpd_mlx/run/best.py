"""What a run looks at besides its steps: evaluations, selections, and which adapter it hands over at the end."""

from __future__ import annotations

import contextlib
from typing import Any

from vpd_mlx.engine.models import Adapter
from vpd_mlx.run.selection import apart, score
from vpd_mlx.run.state import RunState

__all__ = ["finish", "look", "patience_is_out"]


def look(state: RunState, *, last: bool = False) -> None:
    """Select and evaluate where the run stands, if that is due and not done: before the first step, on the way, at the end.

    At the end the best adapter comes before the last one, so that rows of `evals.jsonl` are in the order of steps.
    """
    cfg = state.trainer.recipe.evaluation
    last = last or state.done == state.trainer.recipe.steps
    if last or state.done % cfg.selection_every == 0:
        _select(state)
    if last and state.selections:
        _evaluate_best(state)
    done = state.evaluations and state.evaluations[-1]["step"] == state.done
    if not done and (last or state.done == 0 or (cfg.every is not None and state.done % cfg.every == 0)):
        _evaluate(state, state.done)


def _select(state: RunState) -> None:
    """Score the adapter of now on the problems that are set aside, if there are any; the best one is kept."""
    trainer = state.trainer
    problems, _ = apart(trainer.recipe, trainer.task)
    if not problems or (state.selections and state.selections[-1]["step"] == state.done):
        return
    row = score(trainer, problems, state.done)
    sources = state.settle()
    state.count_selection(row)
    state.log.append("selection.jsonl", [row])
    trainer.progress.selection(row["step"], row, best=state.best is not None and state.best[0] == row["step"])
    state.take_snapshot(sources)


def _evaluate(state: RunState, step: int, adapter: Adapter | None = None) -> dict[str, Any]:
    """Evaluate the adapter of now, or that of another step; logged and counted."""
    trainer = state.trainer
    with contextlib.nullcontext() if adapter is None else trainer.policy.using(adapter):
        row, answers = trainer.evaluate(step)
    sources = state.settle()
    state.count_evaluation(row)
    state.log.append("evals.jsonl", [row])
    state.log.append("answers.jsonl", answers)
    trainer.progress.evaluation(row["step"], row)
    state.take_snapshot(sources)
    return row


def _evaluate_best(state: RunState) -> dict[str, Any] | None:
    """The evaluation of the best adapter, made now unless it was made in its time; None if there is no such adapter."""
    if state.best is None:
        return None
    step, adapter = state.best
    done = next((e for e in state.evaluations if e["step"] == step), None)
    return _evaluate(state, step, adapter) if done is None else done


def patience_is_out(state: RunState) -> bool:
    """Whether the recipe's number of selections, or of evaluations where there are none, has passed without a better student."""
    patience = state.trainer.recipe.evaluation.patience
    values = [row["student"] or 0.0 for row in state.selections or state.evaluations]
    if patience is None or len(values) - 1 - values.index(max(values)) < patience:
        return False
    what = "selections" if state.selections else "evaluations"
    reason = f"no better student in {patience} {what} (evaluation.patience)"
    state.trainer.progress.note(f"stopping early after step {state.done}: {reason}")
    return True


def finish(state: RunState) -> dict[str, Any]:
    """The evaluation that the run ends with: the last; with `keep_best`, and after a collapse, that of the best adapter, which is
    put back. `keep_best` needs problems to choose by (`selection.apart`)."""
    if not state.stopped:
        look(state, last=True)
    best = _evaluate_best(state) if state.stopped or state.selections else None
    state.checkpoint()
    if best is None or state.best is None:
        return state.evaluations[-1]
    state.trainer.policy.set_adapter(state.best[1])
    return best
