"""The loop: step after step, evaluations, logs, checkpoints, and the ways in which a run ends."""

from __future__ import annotations

import importlib
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from vpd_mlx import __version__
from vpd_mlx.algos.base import restore_parts, save_parts
from vpd_mlx.common.files import write_atomic
from vpd_mlx.engine.heartbeat import Heartbeat
from vpd_mlx.engine.ranks import ALONE, Ranks
from vpd_mlx.errors import RunError, SourceError
from vpd_mlx.recipe import Recipe, dump
from vpd_mlx.run.checkpoint import Checkpoint, find_checkpoint, write_checkpoint
from vpd_mlx.run.log import NoLog, RunLog
from vpd_mlx.run.progress import Interrupted, Progress, Silent, Stop
from vpd_mlx.run.records import FORMAT, Summary, upgraded
from vpd_mlx.run.setup import refuse_what_cannot_fit
from vpd_mlx.run.step import Trainer
from vpd_mlx.run.warnings import Warnings
from vpd_mlx.tasks import fingerprint, notices

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
) -> Summary:
    """Train as the recipe says, into the folder `out`; returns the summary. Of several ranks only the first writes there.

    Returns early, with `"interrupted": signal` in it, when `stop` is set: the run can then be resumed.

    Raises:
        VpdError: before anything is written, when something is unusable; later, with a checkpoint left behind, when a
            source fails throughout, numbers are not finite, or the disk is full.
    """
    services = importlib.import_module("vpd_mlx.report.services")  # a room above this one: a process of its own is next
    told = services.Told(progress or Silent(), recipe.logging)
    progress = told
    started = time.perf_counter()
    refuse_what_cannot_fit(recipe)
    trainer = Trainer.build(recipe, progress, stop, ranks)
    for note in (*trainer.policy.notes, *notices(trainer.task)):
        progress.note(note)
    trainer.sources.ready()
    log: RunLog | NoLog = NoLog()
    if ranks.first:
        log = RunLog.reopen(out) if resume else RunLog.create(out, dump(recipe), overwrite=overwrite)
    try:
        if resume and ranks.first:
            write_atomic(out / "config.yaml", dump(recipe))
        ranks.gather(None)  # the first has the folder
        if ranks.first:
            trainer.sources.open(out)
        elif trainer.sources.outside():
            trainer.sources.open(_folder_of(out, ranks))
        if ranks.first:
            told.open(out, recipe.model_dump(mode="json"))
        with Heartbeat(ranks):
            return _run(trainer, log, resume, started)
    finally:
        trainer.sources.close()
        told.close()
        log.close()


def _run(trainer: Trainer, log: RunLog | NoLog, resume: bool, started: float) -> Summary:
    recipe, progress = trainer.recipe, trainer.progress
    run = _Run(trainer, log)
    try:
        run.begin(resume)
        run.evaluate_if_due()
        while run.done < recipe.steps:
            trainer.check_stop()
            log.check_space()
            run.advance()
            run.evaluate_if_due()
            if run.done % recipe.checkpoint.every == 0 or run.done == recipe.steps:
                run.checkpoint()
            if run.patience_is_out():
                break
        run.finish()
        result = run.result
    except Interrupted:
        run.checkpoint()
        run.save_adapter()
        progress.note(f"stopped after step {run.done} of {recipe.steps}; the run can go on with --resume")
        return {"interrupted": trainer.stop.signal or 0, "steps": run.done}
    except (SourceError, RunError):
        run.checkpoint()
        raise
    run.save_adapter()
    summary: Summary = {
        "format": FORMAT,
        "name": recipe.name,
        "algorithm": recipe.algorithm,
        "seed": recipe.seed,
        "steps": run.done,
        "adapter_of_step": result["step"],
        "before": _three(run.evaluations[0]),
        "after": _three(result),
        "problems": result["problems"],
        "tokens": run.tokens,
        "seconds": {
            k: round(v, 2) for k, v in {**run.seconds, "wall": run.wall + time.perf_counter() - started}.items()
        },
        "nonfinite_updates": run.nonfinite,
        "ranks": trainer.ranks.size,
        "versions": {
            "vpd-mlx": __version__,
            "mlx": version("mlx"),
            "mlx-lm": version("mlx-lm"),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "device": str(mx.default_device()),
        },
    }
    log.finish(summary)
    return summary


class _Run:
    """Where a run stands, and what a checkpoint must say of it."""

    def __init__(self, trainer: Trainer, log: RunLog | NoLog) -> None:
        self.trainer = trainer
        self.log = log
        self.done = 0
        self.evaluations: list[dict[str, Any]] = []
        self.seconds: dict[str, float] = {}
        self.wall = 0.0
        self.tokens = 0
        self.nonfinite = 0
        self.result: dict[str, Any] = {}
        self._warnings = Warnings()
        self._rows = [upgraded(row) for row in log.read("metrics.jsonl")]
        self._best: tuple[int, dict[str, mx.array]] | None = None
        self._snapshot: Checkpoint | None = None
        self._saved: Checkpoint | None = None
        self._began = time.perf_counter()
        self._task = fingerprint(trainer.task)

    @property
    def last_evaluated(self) -> int:
        """The step of the newest evaluation, -1 before the first."""
        return int(self.evaluations[-1]["step"]) if self.evaluations else -1

    def begin(self, resume: bool) -> None:
        """Take up the newest checkpoint, or start with an evaluation of the student as it is."""
        found, notes = self.trainer.ranks.from_first(
            lambda: find_checkpoint(self.log.path / "checkpoints") if resume else (None, [])
        )
        for note in notes:
            self.trainer.progress.note(note)
        if found is not None:
            self._restore(found)
            self.trainer.progress.note(f"going on after step {self.done} of {self.trainer.recipe.steps}")
            return
        self.log.cut_back({})
        self.evaluate_if_due()
        self.checkpoint()

    def advance(self) -> None:
        """One more step, logged and, when due, evaluated and kept."""
        recipe, trainer = self.trainer.recipe, self.trainer
        row, rollouts = trainer.step(self.done + 1)
        row = upgraded(row)
        self.done += 1
        sources = self._settle()
        self.log.append("metrics.jsonl", [row])
        self.log.append("rollouts.jsonl", rollouts)
        for phase, seconds in row["seconds"].items():
            if phase != "total":
                self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        self.tokens += sum(r["tokens"] for r in rollouts)
        self.nonfinite += sum(v for k, v in row.items() if k.endswith("/nonfinite"))
        per_step = sum(self.seconds.get(k, 0.0) for k in self.seconds if k != "evaluation") / self.done
        left = per_step * (recipe.steps - self.done) + float(self.evaluations[-1]["seconds"])
        trainer.progress.step(self.done, recipe.steps, row, left)
        self._rows.append(row)
        for text in self._warnings.new(self._rows, self.evaluations):
            trainer.progress.note(f"step {self.done}: {text}")
        if any(v for k, v in row.items() if k.endswith("/nonfinite")):
            # for whoever looks for the reason
            self.log.keep("nonfinite", f"step-{self.done:06d}.jsonl", rollouts)
        self._snapshot = self._state(sources)

    def patience_is_out(self) -> bool:
        """Whether the recipe's number of evaluations has passed without a better student."""
        patience = self.trainer.recipe.evaluation.patience
        values = [e["student"] or 0.0 for e in self.evaluations]
        if patience is None or len(values) - 1 - values.index(max(values)) < patience:
            return False
        self.trainer.progress.note(
            f"stopping early after step {self.done}: no better student in {patience} evaluations (evaluation.patience)"
        )
        return True

    def finish(self) -> None:
        """The evaluation that the run ends with: the last, or with `keep_best` the best, whose adapter is put back."""
        self.evaluate_if_due(last=True)
        self.checkpoint()
        self.result = self.evaluations[-1]
        if self.trainer.recipe.evaluation.keep_best and self._best is not None:
            step, adapter = self._best
            self.result = next(e for e in self.evaluations if e["step"] == step)
            self.trainer.policy.set_adapter(adapter)

    def evaluate_if_due(self, *, last: bool = False) -> None:
        """Evaluate where the run stands, if that is due and not done: before the first step, on the way, at the end."""
        recipe, every = self.trainer.recipe, self.trainer.recipe.evaluation.every
        due = last or self.done in (0, recipe.steps) or (every is not None and self.done % every == 0)
        if not due or self.last_evaluated == self.done:
            return
        result = self.trainer.evaluate(self.done)
        sources = self._settle()
        self.evaluations.append(result)
        best = max(e["student"] or 0.0 for e in self.evaluations[:-1]) if self.evaluations[:-1] else -1.0
        if (result["student"] or 0.0) > best:
            self._best = (self.done, self.trainer.policy.adapter)
        self.seconds["evaluation"] = self.seconds.get("evaluation", 0.0) + result["seconds"]
        self.log.append("evals.jsonl", [result])
        self.trainer.progress.evaluation(result["step"], result)
        self._snapshot = self._state(sources)

    def _settle(self) -> list[dict[str, Any]]:
        """The state of each rank's sources, once all ranks have come this far: what is logged has a snapshot, whoever is lost.

        Raises:
            RunError: a rank is lost, or the ranks' adapters have drifted apart.
        """
        ranks = self.trainer.ranks
        if ranks.size > 1:
            ranks.agree(f"the adapter after step {self.done}", self.trainer.policy.fingerprint)
        return ranks.gather(self.trainer.sources.state())

    def _state(self, sources: list[dict[str, Any]]) -> Checkpoint:
        """All of the run as it stands after a whole step. Arrays are immutable, so this copies nothing."""
        arrays, scalars = save_parts(self.trainer.algorithm.parts)
        return Checkpoint(
            self.done,
            {
                **{f"adapter.{k}": v for k, v in self.trainer.policy.adapter.items()},
                **{f"algorithm.{k}": v for k, v in arrays.items()},
                **({} if self._best is None else {f"best.{k}": v for k, v in self._best[1].items()}),
            },
            {
                "best": None if self._best is None else self._best[0],
                "algorithm": scalars,
                "offsets": self.log.offsets(),
                "evaluations": list(self.evaluations),
                "seconds": dict(self.seconds),
                "wall": self.wall + time.perf_counter() - self._began,
                "tokens": self.tokens,
                "nonfinite": self.nonfinite,
                "nonfinite_in_a_row": self.trainer.nonfinite_in_a_row,
                "task": self._task,
                "sources": sources[0],
                **({"sources_of_ranks": sources} if len(sources) > 1 else {}),
            },
        )

    def checkpoint(self) -> None:
        """Write the last snapshot, unless it is on the disk: whatever a broken-off step did since has no part in it."""
        if self._snapshot is None or self._snapshot is self._saved:
            return
        if self.trainer.ranks.first:
            self.log.sync()
            write_checkpoint(self.log.path / "checkpoints", self._snapshot, keep=self.trainer.recipe.checkpoint.keep)
        self._saved = self._snapshot

    def save_adapter(self) -> None:
        """Write the adapter, on the rank that writes."""
        if self.trainer.ranks.first:
            self.trainer.policy.save_adapter(self.log.path / "adapters")

    def _restore(self, found: Checkpoint) -> None:
        def part(name: str) -> dict[str, mx.array]:
            return {k.removeprefix(f"{name}."): v for k, v in found.arrays.items() if k.startswith(f"{name}.")}

        self.trainer.policy.set_adapter(part("adapter"))
        restore_parts(self.trainer.algorithm.parts, part("algorithm"), found.state["algorithm"])
        self.trainer.nonfinite_in_a_row = found.state["nonfinite_in_a_row"]
        of_ranks = found.state.get("sources_of_ranks", [found.state.get("sources", {})])
        self.trainer.sources.restore(dict(enumerate(of_ranks)).get(self.trainer.ranks.index, {}))
        self._best = None if found.state["best"] is None else (found.state["best"], part("best"))
        if found.state.get("task", self._task) != self._task:
            self.trainer.progress.note(
                "the task's rows or its verifier have changed since this run's last checkpoint: from here on it is another run "
                "than an undisturbed one would have been"
            )
        self.done = found.step
        self._snapshot = self._saved = found
        self.evaluations = found.state["evaluations"]
        self.seconds = upgraded(found.state)["seconds"]
        self.wall = found.state["wall"]
        self.tokens = found.state["tokens"]
        self.nonfinite = found.state["nonfinite"]
        self.log.cut_back(found.state["offsets"])
        self._rows = [upgraded(row) for row in self.log.read("metrics.jsonl")]


def _three(result: dict[str, Any]) -> dict[str, float | None]:
    return {k: result[k] for k in ("student", "student_greedy", "teacher")}


def _folder_of(out: Path, ranks: Ranks) -> Path:
    """Where a rank that does not write keeps what its feedback sources must keep."""
    folder = out / f"rank-{ranks.index}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
