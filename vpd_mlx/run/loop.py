"""The loop: step after step, evaluations, logs, checkpoints, and the ways in which a run ends."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vpd_mlx.common.functions import NOTHING, Handed
from vpd_mlx.engine.ranks import ALONE, Heartbeat, Ranks
from vpd_mlx.errors import RunError, SourceError
from vpd_mlx.feedback import check_reachable
from vpd_mlx.recipe import Recipe, dump
from vpd_mlx.run.advice import gap_line
from vpd_mlx.run.awake import awake
from vpd_mlx.run.best import finish, look, patience_is_out
from vpd_mlx.run.collapse import react
from vpd_mlx.run.continued import continued, start_of
from vpd_mlx.run.followers import Followers
from vpd_mlx.run.log import RECIPE_FILE, RunLog, check_free, json_lines
from vpd_mlx.run.progress import Interrupted, Progress, Silent, Stop
from vpd_mlx.run.records import Summary
from vpd_mlx.run.retain import check_after, check_before
from vpd_mlx.run.selection import unchosen
from vpd_mlx.run.setup import refuse_what_cannot_fit
from vpd_mlx.run.start import begin
from vpd_mlx.run.state import RunState
from vpd_mlx.run.step import Trainer
from vpd_mlx.run.warnings import Warnings, no_gap
from vpd_mlx.tasks import notices

__all__ = ["train"]


def train(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    stop: Stop | None = None,
    ranks: Ranks = ALONE,
    handed: Handed = NOTHING,
) -> Summary:
    """Train as the recipe says, into the folder `out`; returns the summary. Of several ranks only the first writes there.

    Returns early, with `"interrupted": signal` in it, when `stop` is set: the run can then be resumed.

    Raises:
        VpdError: before anything is written, if something is unusable; later, with a checkpoint left behind, if a
            source fails throughout, numbers are not finite, or the disk is full.
    """
    started = time.perf_counter()
    progress = progress or Silent()
    followers = Followers(recipe.logging, progress)
    if ranks.first and not resume:
        check_free(out, overwrite=overwrite)  # before anything takes time
    recipe = recipe if resume else continued(recipe)
    start = ranks.from_first(lambda: start_of(recipe, out, resume=resume))
    if recipe.entry.contexts:
        check_reachable(recipe.feedback)
    refuse_what_cannot_fit(recipe)
    trainer = Trainer.build(recipe, progress, stop, ranks, handed, start)
    for note in (*trainer.policy.notes, *notices(trainer.task), *recipe.notices(), *unchosen(recipe, trainer.task)):
        progress.note(note)
    trainer.sources.ready()
    log = RunLog()
    trainer.stop.begun = True
    if ranks.first:
        log = RunLog.reopen(out) if resume else RunLog.create(out, dump(recipe), overwrite=overwrite)
    try:
        for name, text in handed.files.items():
            log.write(name, text)
        ranks.gather(None)  # the first rank has the folder
        if ranks.first or trainer.sources.outside():
            own = out if ranks.first else out / f"rank-{ranks.index}"  # for what sources keep
            own.mkdir(parents=True, exist_ok=True)
            trainer.sources.open(own)
        with awake(), Heartbeat(ranks):
            return _run(RunState(trainer, log, started), followers, resume)
    finally:
        trainer.sources.close()
        followers.close()
        log.close()


def _run(state: RunState, followers: Followers, resume: bool) -> Summary:
    trainer, recipe = state.trainer, state.trainer.recipe
    warnings = Warnings()
    try:
        if resume:
            state.resume()
            state.log.write(RECIPE_FILE, dump(recipe))
        if trainer.ranks.first:
            followers.start(state.log.path)
        begin(state, resume=resume)
        look(state)
        if state.done == 0:
            _check_gap(state, state.evaluations[0])
            check_before(state)
            state.checkpoint()
        trainer.progress.left(state.seconds_left())
        while state.done < recipe.steps and not state.stopped:
            trainer.check_stop()
            state.log.check_space()
            _advance(state, warnings)
            look(state)
            followers.check()
            if state.done % recipe.checkpoint.every == 0 or state.done == recipe.steps:
                state.checkpoint()
            if patience_is_out(state):
                break
        state.refuse_nonfinite()
        result = finish(state)
        check_after(state, result["step"])
    except Interrupted:
        state.checkpoint()
        state.save_adapter()
        trainer.progress.note(f"stopped after step {state.done} of {recipe.steps}; it can be resumed")
        return {"interrupted": trainer.stop.signal or 0, "steps": state.done}
    except (SourceError, RunError):
        state.checkpoint()
        raise
    state.save_adapter()
    summary = state.summary(result)
    state.log.write("summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def _advance(state: RunState, warnings: Warnings) -> None:
    """One more step, logged and counted."""
    log, progress, recipe = state.log, state.trainer.progress, state.trainer.recipe
    row, rollouts = state.trainer.step(state.done + 1)
    state.done += 1
    row |= react(state, row)
    sources = state.settle()
    log.append("metrics.jsonl", [row])
    log.append("rollouts.jsonl", rollouts)
    state.count_step(row, rollouts)
    progress.step(state.done, recipe.steps, row, state.seconds_left())
    for text in warnings.new(state.rows, state.evaluations):
        progress.note(f"step {state.done}: {text}")
    if any(v for k, v in row.items() if k.endswith("/nonfinite")):
        log.write(f"nonfinite/step-{state.done:06d}.jsonl", json_lines(rollouts))  # they may show the reason
    state.take_snapshot(sources)


def _check_gap(state: RunState, row: Mapping[str, Any]) -> None:
    """Before the first step: a teacher no better than the student would only do harm.

    Raises:
        RunError: it is not, and the recipe says to stop then.
    """
    recipe = state.trainer.recipe
    if not recipe.entry.contexts or not no_gap(row):
        return
    target = state.log.path / RECIPE_FILE
    text = f"{gap_line(row)}: training on it would do harm; ask `vpd-mlx probe {target}` what helps"
    if not row["student"] and not recipe.warm_start.steps:
        text += ", let demonstrations make a beginning (warm_start)"
    if recipe.on_no_gap == "stop":
        raise RunError(f"{text}, or set on_no_gap to warn to train all the same")
    state.trainer.progress.note(text)
