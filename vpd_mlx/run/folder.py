"""Reads a run folder, of a run at any stage: a missing file, field or figure is None, never an error and never a zero."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from vpd_mlx.common.settings import parse_yaml
from vpd_mlx.common.stats import Paired, paired
from vpd_mlx.common.text import interval, number
from vpd_mlx.errors import ConfigError, DataError, wrong_option
from vpd_mlx.run.answers import Answered, pairs
from vpd_mlx.run.commented import Commented, commented
from vpd_mlx.run.forgetting import Retained, retained
from vpd_mlx.run.log import RECIPE_FILE
from vpd_mlx.run.records import FORMAT, MetricsRow, Summary, upgraded

__all__ = [
    "NO_CONTEXT",
    "Evaluation",
    "LoggedRollout",
    "Run",
    "by_dotted_key",
    "find_run",
    "greedy_by_problem",
    "load_run",
    "short_names",
    "system_messages",
]

NO_CONTEXT = "none"


@dataclass(frozen=True)
class LoggedRollout:
    """Where a rollout stands in `rollouts.jsonl`, and what it can be chosen by."""

    offset: int
    step: int
    problem: str
    right: bool
    kind: str


class Evaluation(dict[str, Any]):
    """A row of `evals.jsonl`, empty if there was no evaluation; its main figures are attributes, None if missing."""

    @property
    def student(self) -> float | None:
        """Mean score of the student's sampled completions, 0..1."""
        return number(self.get("student"))

    @property
    def student_greedy(self) -> float | None:
        """Mean score of the student's likeliest completions, 0..1."""
        return number(self.get("student_greedy"))

    @property
    def teacher(self) -> float | None:
        """Mean score of the teacher, who has read the feedback, 0..1."""
        return number(self.get("teacher"))


@dataclass(frozen=True)
class Run:
    """One run folder. `rollouts` is an index; `read` fetches the rows, so that a long run need not fit in memory."""

    path: Path
    config: dict[str, Any]
    metrics: list[MetricsRow]
    evals: list[Evaluation]
    summary: Summary
    rollouts: list[LoggedRollout] = field(repr=False)

    @property
    def name(self) -> str:
        """The recipe's name."""
        return str(self.config.get("name") or self.path.resolve().name)

    @property
    def algorithm(self) -> str:
        """The recipe's algorithm."""
        return str(self.config.get("algorithm") or "?")

    @property
    def done(self) -> int:
        """The last step that was logged, 0 before the first."""
        return int(number(self.metrics[-1].get("step")) or 0) if self.metrics else 0

    @property
    def planned(self) -> int | None:
        """The steps that the recipe asks for."""
        steps = number(self.config.get("steps"))
        return None if steps is None else int(steps)

    @property
    def finished(self) -> bool:
        """All planned steps are done and summed up."""
        return bool(self.summary) and (self.planned is None or self.done >= self.planned)

    @property
    def adapters(self) -> Path:
        """The folder of the adapter that the run hands over; it is there once the run has ended or was stopped."""
        return self.path / "adapters"

    @property
    def before(self) -> Evaluation:
        """The evaluation before the first step; empty if there is none."""
        return self.evals[0] if self.evals and not number(self.evals[0].get("step")) else Evaluation()

    @property
    def after(self) -> Evaluation:
        """The evaluation of the adapter that the run hands over, made after at least one step; empty if there is none."""
        return self.evaluation if number(self.evaluation.get("step")) else Evaluation()

    @property
    def evaluation(self) -> Evaluation:
        """The evaluation of the adapter that the run hands over; while it goes on, the newest."""
        of = number(self.summary.get("adapter_of_step"))
        chosen = [e for e in self.evals if of is not None and number(e.get("step")) == of]
        return (chosen or self.evals or [Evaluation()])[-1]

    @property
    def evaluated(self) -> int:
        """The step after which `evaluation` was made, 0 before the first."""
        return int(number(self.evaluation.get("step")) or 0)

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Seconds by phase over all logged steps and evaluations, the longest first."""
        total: dict[str, float] = {}
        for row in self.metrics:
            phases = row.get("seconds")
            for phase, value in (phases if isinstance(phases, dict) else {}).items():
                if phase != "total" and (seconds := number(value)) is not None:
                    total[phase] = total.get(phase, 0.0) + seconds
        if evaluation := sum(number(e.get("seconds")) or 0.0 for e in self.evals):
            total["evaluation"] = total.get("evaluation", 0.0) + evaluation
        return dict(sorted(total.items(), key=lambda item: -item[1]))

    @cached_property
    def peak_memory_mb(self) -> float | None:
        """The largest peak of any step, in MiB."""
        return max(self.series("peak_memory_mb")[1], default=None)

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """(steps, values) of a metric, from the rows that have a number for it."""
        return _series(self.metrics, key)

    def evaluations(self, key: str) -> tuple[list[int], list[float], list[tuple[float, float]]]:
        """(steps, values, 95 % intervals) of an evaluation's figure; without an interval it is the value twice."""
        steps, values = _series(self.evals, key)
        rows = {int(number(e.get("step")) or 0): e for e in self.evals}
        return steps, values, [interval(rows[s], key) or (v, v) for s, v in zip(steps, values, strict=True)]

    def read(self, entries: Sequence[LoggedRollout]) -> Iterator[dict[str, Any]]:
        """The rows of these rollouts, in the given order."""
        if not entries:
            return
        with (self.path / "rollouts.jsonl").open("rb") as f:
            for entry in entries:
                f.seek(entry.offset)
                yield json.loads(f.readline())

    @cached_property
    def answers(self) -> list[Answered]:
        """The likeliest answers to held-out problems, before training and by the adapter that the run hands over.

        Empty without an evaluation after at least one step, and for runs that logged no answers.
        """
        step = self.evaluated
        return pairs(list(self.answer_rows()), step) if step else []

    def answer_rows(self) -> Iterator[dict[str, Any]]:
        """The rows of `answers.jsonl`: none for a run that logged none."""
        return (row for _, row in _rows(self.path / "answers.jsonl"))

    @cached_property
    def retained(self) -> list[Retained]:
        """The general checks before training and by the newest adapter that they were made of; empty without `retain`."""
        return retained([row for _, row in _rows(self.path / "general.jsonl")])

    @cached_property
    def comments(self) -> list[Commented]:
        """What a person gave on the page of `feedback.human: page`, each with the answers to its problem before and after."""
        return commented([row for _, row in _rows(self.path / "human.jsonl")], self.rollouts)

    def greedy(self) -> dict[str, float]:
        """Greedy score by held-out problem at `evaluation`, before or after training; empty if it was not logged."""
        return greedy_by_problem(self.evaluation)

    def hash_by_problem(self) -> dict[str, str]:
        """Hash of each of these problems' content; empty for runs that logged none."""
        found = self.evaluation.get("hash_by_problem")
        return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}

    def change(self) -> Paired | None:
        """Greedy accuracy after training less before, paired by problem."""
        return paired(greedy_by_problem(self.before), greedy_by_problem(self.after))


def load_run(path: Path) -> Run:
    """Read a run folder, of a run that ended, goes on or broke off.

    Raises:
        ConfigError: there is no run.
        DataError: a file of it is broken, or was written by a newer version.
    """
    _check_run(path)
    try:
        config = parse_yaml(_text(path / RECIPE_FILE), str(path / RECIPE_FILE))
    except ConfigError as error:
        raise DataError(str(error)) from None
    summary: Any = {}
    if (path / "summary.json").is_file():
        try:
            summary = json.loads(_text(path / "summary.json"))
        except json.JSONDecodeError as error:
            raise DataError(f"{path / 'summary.json'}: broken JSON ({error}); remove the file") from None
    summary = upgraded(summary) if isinstance(summary, dict) else {}
    if (number(summary.get("format")) or 1) > FORMAT:
        raise DataError(f"{path}: written by a newer vpd-mlx (folder format {summary['format']}); update vpd-mlx")
    entries: list[LoggedRollout] = []
    for offset, row in _rows(path / "rollouts.jsonl"):
        context = row.get("context")
        kind = str(context.get("kind")) if isinstance(context, dict) else NO_CONTEXT
        step = int(number(row.get("step")) or 0)
        entries.append(LoggedRollout(offset, step, str(row.get("problem", "?")), bool(row.get("success")), kind))
    return Run(
        path=path,
        config=config if isinstance(config, dict) else {},
        metrics=[cast(MetricsRow, upgraded(row)) for _, row in _rows(path / "metrics.jsonl")],
        # In the order of steps: that of an adapter which is handed over after a collapse may come last.
        evals=sorted(
            (Evaluation(row) for _, row in _rows(path / "evals.jsonl")), key=lambda row: number(row.get("step")) or 0
        ),
        summary=cast(Summary, summary),
        rollouts=entries,
    )


def find_run(name: str) -> Path:
    """A run's folder, given as such or as its name under runs/.

    Raises:
        ConfigError: there is no run.
    """
    path, named = Path(name).expanduser(), Path("runs") / name
    if not (path / RECIPE_FILE).is_file() and (named / RECIPE_FILE).is_file():
        return named
    _check_run(path)
    return path


def _check_run(path: Path) -> None:
    if not (path / RECIPE_FILE).is_file():
        there = "holds no run" if path.is_dir() else "does not exist, so holds no run"
        remedy = "give the folder of a run, e.g. runs/quickstart"
        raise wrong_option("RUN", f"{path} {there} ({RECIPE_FILE} is missing)", remedy)


def system_messages(folder: Path) -> list[str | None]:
    """The different system messages of a run's held-out problems, None for a problem without; empty if none was logged."""
    return list(dict.fromkeys(row["system"] for _, row in _rows(folder / "answers.jsonl") if "system" in row))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); check the file and its permissions") from None


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(byte offset, row) of each whole line; a last line without its newline is still being written."""
    if not path.is_file():
        return
    offset = 0
    try:
        with path.open("rb") as f:
            for count, line in enumerate(f, 1):
                if line.endswith(b"\n") and line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise DataError(f"{path}:{count}: got {type(row).__name__}, not an object; remove the line")
                    yield offset, row
                offset += len(line)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    except ValueError as error:  # broken JSON, or bytes that are no UTF-8
        raise DataError(f"{path}:{count}: broken JSON ({error}); remove the line") from None


def _series(rows: Sequence[Mapping[str, object]], key: str) -> tuple[list[int], list[float]]:
    both = [(number(row.get("step")), number(row.get(key))) for row in rows]
    found = [(int(step), value) for step, value in both if step is not None and value is not None]
    return [step for step, _ in found], [value for _, value in found]


def greedy_by_problem(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """The scores of an evaluation's greedy completions by problem; empty if they were not logged."""
    scores = evaluation.get("greedy_by_problem")
    if not isinstance(scores, dict):
        return {}
    return {str(k): value for k, v in scores.items() if (value := number(v)) is not None}


def by_dotted_key(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested recipe by dotted keys."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            out |= by_dotted_key(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def short_names(paths: Sequence[Path]) -> list[str]:
    """A short name for each folder: as many of its last parts as tell all of them apart."""
    parts = [p.resolve().parts for p in paths]
    for n in range(1, max(len(p) for p in parts) + 1):
        names = ["/".join(p[-n:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(p[-1:])} ({i})" for i, p in enumerate(parts, 1)]
