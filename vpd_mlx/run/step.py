"""A run's parts, and one step with them: roll out, grade, add contexts, let the algorithm learn. It knows no algorithm."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from vpd_mlx.algos.base import Algorithm, Step
from vpd_mlx.common.seeds import phase_seed
from vpd_mlx.common.stats import Clock
from vpd_mlx.engine.policy import Policy
from vpd_mlx.engine.ranks import ALONE, Ranks
from vpd_mlx.engine.sampling import Sampling, default_streams, generate
from vpd_mlx.errors import DataError, RunError, SourceError, VpdError
from vpd_mlx.feedback import Host, Sources, add_context, build_sources
from vpd_mlx.prompts import Prompter
from vpd_mlx.recipe import Recipe
from vpd_mlx.run.collect import Batch, collect
from vpd_mlx.run.evaluate import Measured, evaluate, measure
from vpd_mlx.run.progress import Progress, Silent
from vpd_mlx.run.records import rollout_metrics, rollout_row
from vpd_mlx.run.setup import build_prompter, check_prompts, check_ranks, check_sources, load_policy
from vpd_mlx.tasks import Task, build_task, prove
from vpd_mlx.types import Group, Problem

__all__ = ["Interrupted", "Stop", "Trainer", "problems_of_step"]

FAILURES_IN_A_ROW = 64  # a source that fails so often without one success is broken, not unlucky
NONFINITE_IN_A_ROW = 5


@dataclass
class Stop:
    """Set from outside, a signal handler for one, to end the run at the next safe moment."""

    signal: int | None = None


class Interrupted(Exception):
    """The run is to end here; its last snapshot stands."""


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
        check_sources(recipe, task)
        policy = load_policy(recipe)
        policy.ranks = ranks
        check_ranks(recipe, policy, task)
        prompter = build_prompter(recipe, policy)
        check_prompts(prompter, (*task.train, *task.held_out))

        keys: Any = recipe.feedback

        def ask(prompts: Sequence[tuple[int, ...]]) -> list[str]:
            # The model's own critiques: sampled like rollouts, seeded by what is asked.
            how = Sampling(
                recipe.rollout.temperature,
                recipe.rollout.top_p,
                keys.critique_tokens,
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
            algorithm=recipe.entry.load()(recipe, policy),
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
        except Interrupted:
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
            raise Interrupted

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
                **rollout_metrics(batch, groups),
                **metrics,
                "tokens_per_s": round(sum(len(r.tokens) for r in batch.rollouts) / clock.seconds["rollout"], 1),
                "peak_memory_mb": round(mx.get_peak_memory() / 2**20, 1),
            }
            decode = self.policy.tokenizer.decode
            rows = [rollout_row(number, g, n, r, decode) for g in groups for n, r in enumerate(g.rollouts)]
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
            raise Interrupted

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
            raise Interrupted
        progress.phase("feedback", done, total)

    def ask_to_stop() -> None:
        stop.signal = signal.SIGINT

    return Host(moved, progress.note, lambda: stop.signal is not None, ask_to_stop, progress.paused)
