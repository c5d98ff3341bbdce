"""Where a run stands: what a checkpoint takes and gives back."""

from __future__ import annotations

import platform
import time
from importlib.metadata import version
from typing import Any

import mlx.core as mx

from vpd_mlx import __version__
from vpd_mlx.algos.base import restore_parts, save_parts
from vpd_mlx.common.text import number
from vpd_mlx.errors import RunError
from vpd_mlx.run.checkpoint import Checkpoint, find_checkpoint, write_checkpoint
from vpd_mlx.run.log import RunLog
from vpd_mlx.run.records import FORMAT, GeneralRow, RolloutRow, SelectionRow, Summary, upgraded
from vpd_mlx.run.remaining import seconds_left
from vpd_mlx.run.step import FINITE, Trainer
from vpd_mlx.tasks import fingerprint

__all__ = ["RunState"]


class RunState:
    """A run after `done` steps.

    Attributes:
        rows: of `metrics.jsonl`, for the warnings.
        evaluations: rows of `evals.jsonl`.
        seconds: by phase, over all steps and evaluations.
        selections: rows of `selection.jsonl`.
        general: rows of `general.jsonl`.
        best: the best adapter's step and the adapter, once there is one: by selections if there are any, else by evaluations.
        initial: the adapter before the first step.
        reverts: how often the run has gone back after a collapse; stopped: whether one has ended it.
    """

    def __init__(self, trainer: Trainer, log: RunLog, started: float) -> None:
        self.trainer = trainer
        self.log = log
        self.done = 0
        self.rows: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        self.selections: list[SelectionRow] = []
        self.general: list[GeneralRow] = []
        self.seconds: dict[str, float] = {}
        self.best: tuple[int, dict[str, mx.array]] | None = None
        self.initial = trainer.policy.adapter
        self.reverts = 0
        self.stopped = False
        self._wall = 0.0
        self._tokens = 0
        self._nonfinite = 0
        self._started = started
        self._task = fingerprint(trainer.task)
        self._snapshot: Checkpoint | None = None
        self._saved: Checkpoint | None = None

    def resume(self) -> None:
        """Take up the newest whole checkpoint, if there is one, and cut the logs back to it."""
        found, notes = self.trainer.ranks.from_first(lambda: find_checkpoint(self.log.path / "checkpoints"))
        for note in notes:
            self.trainer.progress.note(note)
        if found is not None:
            self._restore(found)
            self.trainer.progress.note(f"going on after step {self.done} of {self.trainer.recipe.steps}")
        self.log.cut_back({} if found is None else found.state["offsets"])
        self.rows = self.log.metrics()

    def settle(self) -> list[dict[str, Any]]:
        """The state of each rank's sources, once all ranks have come this far: no row is logged that a rank may lack.

        Raises:
            RunError: a rank is lost, or the ranks' adapters have drifted apart.
        """
        ranks = self.trainer.ranks
        if ranks.size > 1:
            ranks.agree(f"the adapter after step {self.done}", self.trainer.policy.fingerprint)
        return ranks.gather(self.trainer.sources.state())

    def count_step(self, row: dict[str, Any], rollouts: list[RolloutRow]) -> None:
        """Add a step that is logged."""
        self.rows.append(row)
        for phase, seconds in row["seconds"].items():
            if phase != "total":
                self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        self._tokens += sum(r["tokens"] for r in rollouts)
        self._nonfinite += sum(v for k, v in row.items() if k.endswith("/nonfinite"))

    def refuse_nonfinite(self) -> None:
        """At the end of a run too short to be stopped on its way: an adapter without a finite update is no result.

        Raises:
            RunError: updates were left out, and none was made.
        """
        made = sum(number(v) or 0.0 for row in self.rows for k, v in row.items() if k.endswith("/updates"))
        if self._nonfinite and not made:
            raise RunError(f"none of the run's {self._nonfinite} updates was finite; {FINITE}")

    def count_evaluation(self, row: dict[str, Any]) -> None:
        """Add an evaluation; the adapter of the best one is kept where there are no selections."""
        best = max((e["student"] or 0.0 for e in self.evaluations), default=-1.0)
        if (row["student"] or 0.0) > best and not self.selections:
            self.best = (self.done, self.trainer.policy.adapter)
        self.evaluations.append(row)
        self.seconds["evaluation"] = self.seconds.get("evaluation", 0.0) + row["seconds"]

    def count_selection(self, row: SelectionRow) -> None:
        """Add a selection; the adapter of the best one is kept."""
        best = max((s["student"] or 0.0 for s in self.selections), default=-1.0)
        if (row["student"] or 0.0) > best:
            self.best = (self.done, self.trainer.policy.adapter)
        self.selections.append(row)
        self.seconds["selection"] = self.seconds.get("selection", 0.0) + row["seconds"]

    def seconds_left(self) -> float:
        """An estimate, by the steps so far and the newest evaluation and selection."""
        selection = self.selections[-1] if self.selections else None
        return seconds_left(self.trainer.recipe, self.done, self.seconds, self.evaluations[-1], selection)

    def count_general(self, rows: list[GeneralRow]) -> None:
        """Add a round of general checks."""
        self.general += rows
        self.seconds["evaluation"] = self.seconds.get("evaluation", 0.0) + sum(row["seconds"] for row in rows)

    def take_snapshot(self, sources: list[dict[str, Any]]) -> None:
        """Keep all of the run as it stands after a whole step. Arrays are immutable, so this copies nothing."""
        arrays, scalars = save_parts(self.trainer.algorithm.parts)
        step, best = self.best or (None, {})
        parts = {"adapter": self.trainer.policy.adapter, "algorithm": arrays, "best": best}
        state = {
            "best": step,
            "reverts": self.reverts,
            "stopped": self.stopped,
            "algorithm": scalars,
            "offsets": self.log.offsets(),
            "evaluations": list(self.evaluations),
            "selections": list(self.selections),
            "general": list(self.general),
            "seconds": dict(self.seconds),
            "wall": self._wall_now(),
            "tokens": self._tokens,
            "nonfinite": self._nonfinite,
            "nonfinite_in_a_row": self.trainer.nonfinite_in_a_row,
            "recipe": self.trainer.recipe.model_dump(mode="json"),
            "rollout_rows": self.trainer.policy.rollout_rows,
            "task": self._task,
            "sources": sources[0],
            **({"sources_of_ranks": sources} if len(sources) > 1 else {}),
        }
        named = {f"{part}.{name}": array for part, found in parts.items() for name, array in found.items()}
        self._snapshot = Checkpoint(self.done, named, state)

    def checkpoint(self) -> None:
        """Write the last snapshot, unless it is on the disk. Whatever an unfinished step has done since has no part in it."""
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

    def summary(self, result: dict[str, Any]) -> Summary:
        """What `summary.json` says of the run, `result` being the evaluation of the adapter that it hands over."""
        recipe = self.trainer.recipe
        scores = ("student", "student_greedy", "teacher")
        seconds = {**self.seconds, "wall": self._wall_now()}
        return {
            "format": FORMAT,
            "name": recipe.name,
            "algorithm": recipe.algorithm,
            "seed": recipe.seed,
            "steps": self.done,
            "reverts": self.reverts,
            "adapter_of_step": result["step"],
            "selection": self.selections[-1]["problems"] if self.selections else 0,
            "before": {name: self.evaluations[0][name] for name in scores},
            "after": {name: result[name] for name in scores},
            "problems": result["problems"],
            "general": self._general(),
            "tokens": self._tokens,
            "seconds": {phase: round(value, 2) for phase, value in seconds.items()},
            "nonfinite_updates": self._nonfinite,
            "ranks": self.trainer.ranks.size,
            "versions": {
                "vpd-mlx": __version__,
                "mlx": version("mlx"),
                "mlx-lm": version("mlx-lm"),
                "python": platform.python_version(),
                "platform": platform.platform(),
                "device": str(mx.default_device()),
            },
        }

    def _general(self) -> dict[str, dict[str, float | None]]:
        """The general checks' values before and after."""
        found: dict[str, dict[str, float | None]] = {}
        for row in self.general:
            found.setdefault(row["check"], {"before": row["value"]})["after"] = row["value"]
        return found

    def _wall_now(self) -> float:
        return self._wall + time.perf_counter() - self._started

    def _restore(self, found: Checkpoint) -> None:
        def part(name: str) -> dict[str, mx.array]:
            return {k.removeprefix(f"{name}."): v for k, v in found.arrays.items() if k.startswith(f"{name}.")}

        state, trainer = upgraded(found.state), self.trainer
        trainer.policy.set_adapter(part("adapter"))
        trainer.policy.rollout_rows = state.get("rollout_rows")
        restore_parts(trainer.algorithm.parts, part("algorithm"), state["algorithm"])
        trainer.nonfinite_in_a_row = state["nonfinite_in_a_row"]
        of_ranks = state.get("sources_of_ranks", [state.get("sources", {})])
        trainer.sources.restore(dict(enumerate(of_ranks)).get(trainer.ranks.index, {}))
        if state.get("task", self._task) != self._task:
            change = "the task's rows or its verifier have changed since this run's last checkpoint"
            trainer.progress.note(f"{change}: from here on the run differs from an undisturbed one")
        self.done = found.step
        self.evaluations, self.selections = state["evaluations"], state.get("selections", [])
        self.general = state.get("general", [])
        self.seconds = state["seconds"]
        self.best = None if state["best"] is None else (state["best"], part("best"))
        self.reverts = state.get("reverts", 0)
        self.stopped = state.get("stopped", False) and trainer.recipe.on_collapse != "warn"
        self._wall, self._tokens, self._nonfinite = state["wall"], state["tokens"], state["nonfinite"]
        self._snapshot = self._saved = found
