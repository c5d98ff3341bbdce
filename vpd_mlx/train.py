"""The loop: roll out, grade, add contexts, let the algorithm learn, log, keep. It knows no algorithm."""

from __future__ import annotations

import hashlib
import platform
import random
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from vpd_mlx import __version__
from vpd_mlx.algos import ALGORITHMS, Algorithm, State, Step
from vpd_mlx.checkpoint import Checkpoint, find_checkpoint, write_checkpoint
from vpd_mlx.collect import Batch, collect
from vpd_mlx.config import Recipe, dump
from vpd_mlx.errors import ConfigError, DataError, Fault, RunError, SourceError, VpdError
from vpd_mlx.evaluate import Measured, evaluate, measure
from vpd_mlx.feedback import Host, Sources, add_context, build_sources
from vpd_mlx.heartbeat import Heartbeat
from vpd_mlx.loggers import Told
from vpd_mlx.metrics import Clock, overlap
from vpd_mlx.plan import check_fits, memory_limit, plan
from vpd_mlx.policy import Policy, phase_seed
from vpd_mlx.progress import Progress, Silent
from vpd_mlx.prompts import Prompter
from vpd_mlx.ranks import ALONE, Ranks
from vpd_mlx.rollout import Sampling, default_streams, generate, probe_batches
from vpd_mlx.runlog import NoLog, RunLog, write_atomic
from vpd_mlx.tasks import Task, build_task, notices, prove
from vpd_mlx.types import Group, Problem, Rollout
from vpd_mlx.watch import Warnings

__all__ = ["Stop", "Trainer", "problems_of_step", "train"]

FAILURES_IN_A_ROW = 64  # a source that fails so often without one success is broken, not unlucky
NONFINITE_IN_A_ROW = 5


@dataclass
class Stop:
    """Set from outside, a signal handler for one, to end the run at the next safe moment."""

    signal: int | None = None


class _Interrupted(Exception):
    pass


@dataclass(frozen=True)
class _Share:
    """What a rank's part of a step's rollouts came to: groups with contexts, or why there are none."""

    batch: Batch = field(default_factory=lambda: Batch([], []))
    groups: Sequence[Group] = ()
    stop: int | None = None
    source_error: str | None = None
    error: str | None = None


def problems_of_step(problems: Sequence[Problem], step: int, count: int, seed: int) -> list[Problem]:
    """The `count` problems of a step, counted from 1: epoch after epoch, each in an order of its own.

    A pure function of its arguments, so that a resume needs no cursor.
    """
    chosen: list[Problem] = []
    at = (step - 1) * count
    while len(chosen) < count:
        epoch, offset = divmod(at + len(chosen), len(problems))
        order = list(range(len(problems)))
        random.Random(phase_seed(seed, epoch, "order")).shuffle(order)
        chosen += [problems[i] for i in order[offset : offset + count - len(chosen)]]
    return chosen


@dataclass
class Trainer:
    """One run, its parts put together."""

    recipe: Recipe
    policy: Policy
    prompter: Prompter
    task: Task
    sources: Sources
    algorithm: Algorithm
    progress: Progress = field(default_factory=Silent)
    stop: Stop = field(default_factory=Stop)

    def __post_init__(self) -> None:
        self.failures_in_a_row = 0
        self.nonfinite_in_a_row = 0
        self._said = len(self.policy.notes)

    @classmethod
    def build(
        cls, recipe: Recipe, progress: Progress | None = None, stop: Stop | None = None, ranks: Ranks = ALONE
    ) -> Trainer:
        """Load and check everything that a run needs; writes nothing.

        Raises:
            VpdError: data, model or recipe are not usable, with the place and the remedy.
        """
        progress, stop = progress or Silent(), stop or Stop()
        task = build_task(recipe)
        if not task.train or not task.held_out:
            side = "train on" if not task.train else "evaluate on"
            raise DataError(f"task: no problem to {side}; widen the task's filter or add rows")
        prove(task)
        policy = load_policy(recipe)
        policy.ranks = ranks
        _check_ranks(recipe, policy, task)
        prompter = build_prompter(recipe, policy)
        _check_prompts(prompter, (*task.train, *task.held_out))

        def ask(prompts: Sequence[tuple[int, ...]]) -> list[str]:
            # The model's own critiques: sampled like rollouts, seeded by what is asked.
            how = Sampling(
                recipe.rollout.temperature,
                recipe.rollout.top_p,
                recipe.feedback.critique_tokens,
                streams=recipe.memory.rollout_streams or default_streams(),
            )
            seed = phase_seed(recipe.seed, hash(tuple(prompts)) & 0xFFFFFFFF, "critique")
            texts = {p: r.text for p, _, r in generate(policy, prompts, 1, how, seed)}
            return [texts[i] for i in range(len(prompts))]

        return cls(
            recipe=recipe,
            policy=policy,
            prompter=prompter,
            task=task,
            sources=build_sources(
                recipe.feedback, prompter, ask, _host(progress, stop), {p.id for p in (*task.train, *task.held_out)}
            ),
            algorithm=ALGORITHMS[recipe.algorithm](recipe, policy),
            progress=progress,
            stop=stop,
        )

    # --- one step

    @property
    def ranks(self) -> Ranks:
        """Who else takes part."""
        return self.policy.ranks

    def roll_out(self, step: int, clock: Clock) -> tuple[Batch, list[Group]]:
        """Graded rollouts of a step, and the same with contexts: those of all ranks."""
        problems = problems_of_step(self.task.train, step, self.recipe.rollout.prompts, self.recipe.seed)
        if self.ranks.size == 1:
            batch, groups = self._roll_out(problems, step, clock)
        else:
            share = self._share(problems, step, clock)
            with clock("ranks"):
                batch, groups = self._together(self.ranks.gather(share))
        self._count_failures(batch)
        self._say_failures(groups)
        self._show_one(groups)
        return batch, groups

    def _share(self, problems: Sequence[Problem], step: int, clock: Clock) -> _Share:
        """This rank's part. What ends it must reach the others, who wait for it."""
        try:
            batch, groups = self._roll_out([problems[i] for i in self.ranks.own(len(problems))], step, clock)
            return _Share(batch, groups, stop=self.stop.signal)
        except _Interrupted:
            return _Share(stop=self.stop.signal)
        except SourceError as error:
            return _Share(source_error=str(error))
        except VpdError as error:
            return _Share(error=str(error))

    def _together(self, shares: Sequence[_Share]) -> tuple[Batch, list[Group]]:
        for rank, share in enumerate(shares):
            if share.source_error is not None:
                raise SourceError(f"rank {rank}: {share.source_error}")
            if share.error is not None:
                raise RunError(f"rank {rank}: {share.error}")
        self._stop_together([s.stop for s in shares])
        batch = Batch([g for s in shares for g in s.batch.groups], [f for s in shares for f in s.batch.failures])
        return batch, [g for s in shares for g in s.groups]

    def _stop_together(self, signals: Sequence[int | None]) -> None:
        """Stop where all know of it; a signal that came in since then waits for the next time."""
        told = next((s for s in signals if s is not None), None)
        if told is not None:
            self.stop.signal = told
            raise _Interrupted

    def _roll_out(self, problems: Sequence[Problem], step: int, clock: Clock) -> tuple[Batch, list[Group]]:
        cfg = self.recipe.rollout

        def moved(done: int, total: int) -> None:
            self._interruptible()
            self.progress.phase("rollout", done, total)

        with clock("rollout"):
            batch = collect(
                self.policy,
                self.prompter,
                self.task.verify,
                problems,
                cfg.group_size,
                Sampling(
                    cfg.temperature,
                    cfg.top_p,
                    cfg.max_completion_tokens,
                    self.recipe.memory.rollout_rows,
                    self.recipe.memory.rollout_streams or default_streams(),
                ),
                threshold=cfg.success_threshold,
                seed=self.ranks.seed(phase_seed(self.recipe.seed, step, "rollout")),
                moved=moved,
                heard=self.sources.early,
            )
        with clock("feedback"):
            self.progress.phase("feedback")
            return batch, add_context(self.sources, batch.groups, self.prompter, self.recipe.feedback)

    def _show_one(self, groups: Sequence[Group]) -> None:
        """To whoever watches: a failure of which something was said, where there is one."""
        told = [(g, r) for g in groups for r in g.rollouts if r.context is not None and not r.success]
        for group, rollout in (told or [(g, r) for g in groups for r in g.rollouts])[:1]:
            self.progress.sample(group.problem.messages[-1]["content"], rollout)

    def _say_failures(self, groups: Sequence[Group]) -> None:
        for name in self.sources:
            whys = [
                f"{g.problem.id}: {r.source_errors[name]}"
                for g in groups
                for r in g.rollouts
                if name in r.source_errors
            ]
            if whys:
                self.progress.note(
                    f"{name} failed on {len(whys)} completions, which get no context from it; first {whys[0]}"
                )

    def step(self, number: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Step `number`, from prompts to an updated adapter: (metrics, a row for each rollout)."""
        clock = Clock()
        start = time.perf_counter()
        mx.reset_peak_memory()
        batch, groups = self.roll_out(number, clock)
        with clock("rollout"):
            mx.clear_cache()
        if self.ranks.size == 1:  # several have just agreed to go on
            self._interruptible()
        self.progress.phase("update")
        step = Step(number, self.recipe.seed, clock)
        metrics = self.algorithm(self.policy, groups, step)
        with clock("log"):
            mx.clear_cache()
            row = {
                "step": number,
                **_rollout_metrics(batch, groups),
                **metrics,
                "tokens_per_s": round(sum(len(r.tokens) for r in batch.rollouts) / clock.seconds["rollout"], 1),
                "peak_memory_mb": round(mx.get_peak_memory() / 2**20, 1),
            }
            decode = self.policy.tokenizer.decode
            rows = [_rollout_row(number, g, n, r, decode) for g in groups for n, r in enumerate(g.rollouts)]
            for i, tokens in step.tokens.items():
                rows[i]["shift"] = [round(float(x), 3) for x in tokens["teacher_logp"] - tokens["student_logp"]]
        row["seconds"] = {k: round(v, 4) for k, v in clock.seconds.items()}
        row["seconds"]["total"] = round(time.perf_counter() - start, 4)
        self._count_nonfinite(metrics)
        self._say_new_notes()
        return row, rows

    def _say_new_notes(self) -> None:
        for note in self.policy.notes[self._said :]:
            self.progress.note(note)
        self._said = len(self.policy.notes)

    def evaluate(self, step: int) -> dict[str, Any]:
        """Accuracy on held-out problems."""
        start = time.perf_counter()
        result = evaluate(
            self.policy,
            self.prompter,
            self.task,
            self.sources.for_evaluation(),
            self.recipe,
            step=step,
            progress=self.progress,
        )
        mx.clear_cache()
        return {**result, "seconds": round(time.perf_counter() - start, 3)}

    def measure(self, problems: Sequence[Problem], *, greedy_only: bool = False) -> Measured:
        """Student and teacher on these problems, a value for each."""
        sources = self.sources.for_evaluation()
        found = measure(
            self.policy,
            self.prompter,
            self.task,
            sources,
            self.recipe,
            problems,
            progress=self.progress,
            greedy_only=greedy_only,
        )
        mx.clear_cache()
        return found

    def go_on(self) -> None:
        """Between steps: ends the run here if any rank is to stop."""
        self._stop_together(self.ranks.gather(self.stop.signal))

    def _interruptible(self) -> None:
        if self.stop.signal is not None:
            raise _Interrupted

    def _count_failures(self, batch: Batch) -> None:
        if not batch.failures:
            self.failures_in_a_row = 0
            return
        self.progress.note(
            f"the verifier failed on {len(batch.failures)} completions, which leave the batch; first {batch.failures[0]}"
        )
        self.failures_in_a_row = 0 if batch.rollouts else self.failures_in_a_row + len(batch.failures)
        if not batch.rollouts or self.failures_in_a_row >= FAILURES_IN_A_ROW:
            raise SourceError(
                f"the verifier failed on every completion of this step, first {batch.failures[0]}; mend it, then go on "
                "with --resume"
            )

    def _count_nonfinite(self, metrics: dict[str, Any]) -> None:
        bad = sum(v for k, v in metrics.items() if k.endswith("/nonfinite"))
        self.nonfinite_in_a_row = self.nonfinite_in_a_row + bad if bad else 0
        if bad:
            self.progress.note(f"{bad} update(s) left out: loss or gradient was not finite")
        if self.nonfinite_in_a_row >= NONFINITE_IN_A_ROW:
            raise RunError(
                f"{self.nonfinite_in_a_row} updates in a row were not finite; lower optimizer.learning_rate, then go on "
                "with --resume from the last checkpoint"
            )


def _host(progress: Progress, stop: Stop) -> Host:
    """What sources outside this process may do to the run."""

    def moved(done: int, total: int) -> None:
        if stop.signal is not None:
            raise _Interrupted
        progress.phase("feedback", done, total)

    def ask_to_stop() -> None:
        stop.signal = signal.SIGINT

    return Host(moved, progress.note, lambda: stop.signal is not None, ask_to_stop, progress.paused)


def refuse_what_cannot_fit(recipe: Recipe) -> None:
    """Plan the run's memory before anything is loaded; a tiny local model on a machine of some size is let through.

    Raises:
        ConfigError: a phase needs more memory than there is, with the key to lower.
    """
    limit, folder = memory_limit(recipe), Path(recipe.model)
    size = sum(p.stat().st_size for p in folder.glob("*.safetensors")) if folder.is_dir() else None
    if size is None or (size and size * 50 < limit and limit > 2**30):
        return  # a hub model is planned for by `vpd-mlx plan`; here it is not fetched twice
    check_fits(recipe, plan(recipe), limit)


def _wire(limit_gb: float | None) -> None:
    """Keep the model from being paged out, where the device knows such a limit.

    Raises:
        ConfigError: a limit is asked for, and there is none here, or it is more than the device allows.
    """
    most = mx.device_info().get("max_recommended_working_set_size")
    if most is None and limit_gb is not None:
        fault = Fault(
            "memory.wired_limit_gb", f"{limit_gb:g}: {mx.default_device()} has no wired memory", "leave it null here"
        )
        raise ConfigError([fault])
    if most is None:
        return
    if limit_gb is not None and limit_gb * 2**30 > int(most):
        much = f"{limit_gb:g} is more than this machine's {int(most) / 2**30:.1f}"
        raise ConfigError([Fault("memory.wired_limit_gb", much, "lower it, or leave it null")])
    mx.set_wired_limit(int(most) if limit_gb is None else int(limit_gb * 2**30))


def load_policy(recipe: Recipe) -> Policy:
    """The recipe's model with a fresh adapter."""
    memory = recipe.memory
    if memory.limit_gb is not None:
        mx.set_memory_limit(int(memory.limit_gb * 2**30))
    if memory.cache_limit_gb is not None:
        mx.set_cache_limit(int(memory.cache_limit_gb * 2**30))
    _wire(memory.wired_limit_gb)
    policy = Policy.load(
        recipe.model,
        recipe.lora,
        seed=recipe.seed,
        revision=recipe.model_revision,
        micro_batch_tokens=memory.micro_batch_tokens,
        head_chunk=memory.head_chunk,
        gradient_checkpointing=memory.gradient_checkpointing,
    )
    probe_batches(policy)
    return policy


def build_prompter(recipe: Recipe, policy: Policy) -> Prompter:
    """The recipe's wording and limits with the policy's tokenizer."""
    return Prompter(
        tokenizer=policy.tokenizer,
        templates=recipe.templates,
        thinking=recipe.thinking,
        max_prompt_tokens=recipe.rollout.max_prompt_tokens,
        max_context_tokens=recipe.feedback.max_tokens,
    )


def train(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    stop: Stop | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Train as the recipe says, into the folder `out`; returns the summary. Of several ranks only the first writes there.

    Returns early, with `"interrupted": signal` in it, when `stop` is set: the run can then be resumed.

    Raises:
        VpdError: before anything is written, when something is unusable; later, with a checkpoint left behind, when a
            source fails throughout, numbers are not finite, or the disk is full.
    """
    told = Told(progress or Silent(), recipe.logging)
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


def _run(trainer: Trainer, log: RunLog | NoLog, resume: bool, started: float) -> dict[str, Any]:
    recipe, progress = trainer.recipe, trainer.progress
    run = _Run(trainer, log)
    try:
        run.begin(resume)
        run.evaluate_if_due()
        while run.done < recipe.steps:
            trainer.go_on()
            log.check_space()
            run.advance()
            run.evaluate_if_due()
            if run.done % recipe.checkpoint.every == 0 or run.done == recipe.steps:
                run.checkpoint()
            if run.patience_is_out():
                break
        run.finish()
        result = run.result
    except _Interrupted:
        run.checkpoint()
        run.save_adapter()
        progress.note(f"stopped after step {run.done} of {recipe.steps}; the run can go on with --resume")
        return {"interrupted": trainer.stop.signal, "steps": run.done}
    except (SourceError, RunError):
        run.checkpoint()
        raise
    run.save_adapter()
    summary = {
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
        self._rows = log.read("metrics.jsonl")
        self._best: tuple[int, dict[str, mx.array]] | None = None
        self._snapshot: Checkpoint | None = None
        self._saved: Checkpoint | None = None
        self._began = time.perf_counter()

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
        self._rows = [*self._rows, row]
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
            ranks.agree(f"the adapter after step {self.done}", _digest(self.trainer.policy.adapter))
        return ranks.gather(self.trainer.sources.state())

    def _state(self, sources: list[dict[str, Any]]) -> Checkpoint:
        """All of the run as it stands after a whole step. Arrays are immutable, so this copies nothing."""
        state = self.trainer.algorithm.state()
        return Checkpoint(
            self.done,
            {
                **{f"adapter.{k}": v for k, v in self.trainer.policy.adapter.items()},
                **{f"algorithm.{k}": v for k, v in state.arrays.items()},
                **({} if self._best is None else {f"best.{k}": v for k, v in self._best[1].items()}),
            },
            {
                "best": None if self._best is None else self._best[0],
                "algorithm": state.scalars,
                "offsets": self.log.offsets(),
                "evaluations": list(self.evaluations),
                "seconds": dict(self.seconds),
                "wall": self.wall + time.perf_counter() - self._began,
                "tokens": self.tokens,
                "nonfinite": self.nonfinite,
                "nonfinite_in_a_row": self.trainer.nonfinite_in_a_row,
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
        self.trainer.algorithm.restore(State(part("algorithm"), found.state["algorithm"]))
        self.trainer.nonfinite_in_a_row = found.state["nonfinite_in_a_row"]
        of_ranks = found.state.get("sources_of_ranks", [found.state.get("sources", {})])
        self.trainer.sources.restore(dict(enumerate(of_ranks)).get(self.trainer.ranks.index, {}))
        self._best = None if found.state["best"] is None else (found.state["best"], part("best"))
        self.done = found.step
        self._snapshot = self._saved = found
        self.evaluations = found.state["evaluations"]
        self.seconds = found.state["seconds"]
        self.wall = found.state["wall"]
        self.tokens = found.state["tokens"]
        self.nonfinite = found.state["nonfinite"]
        self.log.cut_back(found.state["offsets"])
        self._rows = self.log.read("metrics.jsonl")


def _three(result: dict[str, Any]) -> dict[str, float | None]:
    return {k: result[k] for k in ("student", "student_greedy", "teacher")}


def _folder_of(out: Path, ranks: Ranks) -> Path:
    """Where a rank that does not write keeps what its feedback sources must keep."""
    folder = out / f"rank-{ranks.index}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _digest(arrays: Mapping[str, mx.array]) -> str:
    found = hashlib.sha256()
    for name in sorted(arrays):
        found.update(name.encode())
        found.update(np.array(arrays[name].astype(mx.float32)).tobytes())
    return found.hexdigest()[:16]


def _check_ranks(recipe: Recipe, policy: Policy, task: Task) -> None:
    """Several ranks must have the same to work with, and each something to do.

    Raises:
        ConfigError: the recipe is not for so many.
        RunError: versions, model or data differ.
    """
    ranks, faults = policy.ranks, []
    if ranks.size == 1:
        return
    if recipe.rollout.prompts < ranks.size:
        faults.append(
            Fault("rollout.prompts", f"{recipe.rollout.prompts} for {ranks.size} ranks", "one a rank at least")
        )
    if "human" in recipe.feedback.sources:
        faults.append(
            Fault("feedback.sources", "human sits at one terminal, not at several ranks", "train on one machine")
        )
    if faults:
        raise ConfigError(faults)
    ranks.agree("versions", f"vpd-mlx {__version__}, mlx {version('mlx')}, mlx-lm {version('mlx-lm')}")
    ranks.agree("the model", _digest(policy.adapter) + f", {policy.architecture}, vocabulary {policy.vocabulary}")
    rows = [(p.id, p.prompt, p.answer) for p in (*task.train, *task.held_out)]
    ranks.agree("the data", hashlib.sha256(repr(rows).encode()).hexdigest()[:16])


def _check_prompts(prompter: Prompter, problems: Sequence[Problem]) -> None:
    """Every prompt must fit before anything is written.

    A prompt has at most one token a byte, template aside, so that short ones need not be encoded.
    """
    frame = len(prompter.encode([{"role": "user", "content": "x"}])) + 16
    for problem in problems:
        size = sum(len(m["content"].encode()) + frame for m in problem.messages)
        size += len(prompter.template("student").encode())
        if size <= prompter.max_prompt_tokens:
            continue
        length = len(prompter.student(problem))
        if length > prompter.max_prompt_tokens:
            raise DataError(
                f"row {problem.id}: its prompt has {length} tokens, more than rollout.max_prompt_tokens "
                f"{prompter.max_prompt_tokens}; raise the limit or take the row out"
            )


# --- what is logged


def _rollout_metrics(batch: Batch, groups: Sequence[Group]) -> dict[str, Any]:
    rollouts = [r for g in groups for r in g.rollouts]
    lengths = np.array([len(r.tokens) for r in rollouts] or [0])
    scores = [r.verdict.score for r in rollouts if r.verdict is not None]
    full = [g for g in groups if g.rollouts]
    right = [sum(r.success for r in g.rollouts) for g in full]
    kinds: dict[str, int] = {}
    copied = []
    for r in rollouts:
        if r.context is not None:
            kinds[r.context.kind] = kinds.get(r.context.kind, 0) + 1
            copied.append(overlap(r.text, r.context.text))
    n = max(1, len(full))
    return {
        "reward": float(np.mean(scores)) if scores else None,
        "success": float(np.mean([r.success for r in rollouts])) if rollouts else None,
        "length": float(lengths.mean()),
        "length_max": int(lengths.max()),
        "truncated": float(np.mean([r.finish == "length" for r in rollouts])) if rollouts else None,
        "groups_mixed": sum(0 < k < len(g.rollouts) for k, g in zip(right, full, strict=True)) / n,
        "groups_all_right": sum(k == len(g.rollouts) for k, g in zip(right, full, strict=True)) / n,
        "groups_all_wrong": sum(k == 0 for k in right) / n,
        "contexts": kinds,
        "contexts_none": sum(r.context is None for r in rollouts),
        "contexts_cut": sum(r.context is not None and r.context.cut for r in rollouts),
        "contexts_failed": sum(bool(r.source_errors) for r in rollouts),
        "overlap": float(np.mean(copied)) if copied else None,
        "verifier_failures": len(batch.failures),
    }


def _rollout_row(
    step: int, group: Group, index: int, rollout: Rollout, decode: Callable[[list[int]], str]
) -> dict[str, Any]:
    """One line of `rollouts.jsonl`. `pieces` are the completion's tokens as text; `shift`, added where there was a teacher,
    is its log-probability of each token less the student's."""
    verdict, context = rollout.verdict, rollout.context
    return {
        "step": step,
        "problem": group.problem.id,
        "sample": index,
        "prompt": group.problem.prompt,
        "completion": rollout.text,
        "score": verdict.score if verdict else None,
        "success": rollout.success,
        "verdict": verdict.text if verdict else "",
        "context": None if context is None else {"kind": context.kind, "text": context.text, "cut": context.cut},
        "tokens": len(rollout.tokens),
        "prompt_tokens": len(group.prompt),
        "teacher_prompt_tokens": None if rollout.teacher_prompt is None else len(rollout.teacher_prompt),
        "finish": rollout.finish,
        "teacher_prompt": None if rollout.teacher_prompt is None else decode(list(rollout.teacher_prompt)),
        "pieces": [decode([t]) for t in rollout.tokens],
        **({"source_errors": dict(rollout.source_errors)} if rollout.source_errors else {}),
    }
