"""One step of a run: roll out, grade, add contexts, let the algorithm learn, say what to log. It knows no algorithm."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import mlx.core as mx

from vpd_mlx.algos.base import Step
from vpd_mlx.common.seeds import phase_seed
from vpd_mlx.common.stats import Clock
from vpd_mlx.engine.experts import watched
from vpd_mlx.engine.ranks import Ranks
from vpd_mlx.engine.sampling import Sampling
from vpd_mlx.errors import RunError, SourceError, VpdError
from vpd_mlx.feedback import add_context, add_wrong_hints
from vpd_mlx.run.collect import Batch, collect, student_prompts
from vpd_mlx.run.evaluate import evaluate
from vpd_mlx.run.progress import Interrupted
from vpd_mlx.run.records import AnswerRow, RolloutRow, rollout_metrics, rollout_row
from vpd_mlx.run.selection import apart
from vpd_mlx.run.setup import Parts
from vpd_mlx.run.style import PROMPTS, Style
from vpd_mlx.tasks import expected
from vpd_mlx.types import Group, Problem

__all__ = ["Trainer", "ask_again", "problems_of_step"]

Row = TypeVar("Row")
FAILURES_IN_A_ROW = 64  # a verifier that fails so often without one success is broken, not unlucky
NONFINITE_IN_A_ROW = 5
FINITE = "start a new run with a lower optimizer.learning_rate; nonfinite/ has the completions of these steps"
OPENINGS = 3  # first tokens of the completions that are logged, the commonest


@dataclass(frozen=True)
class _RankRollouts:
    """One rank's part of a step's rollouts: groups with contexts, or the reason why there are none."""

    batch: Batch = field(default_factory=lambda: Batch([], []))
    groups: Sequence[Group] = ()
    stop: int | None = None
    error: tuple[type[VpdError], str] | None = None


def problems_of_step(problems: Sequence[Row], step: int, count: int, seed: int) -> list[Row]:
    """The `count` problems of a step, counted from 1: epoch after epoch, each in an order of its own.

    A pure function of its arguments, so that a resume needs no cursor.
    """
    chosen: list[Row] = []
    at = (step - 1) * count
    while len(chosen) < count:
        epoch, offset = divmod(at + len(chosen), len(problems))
        order = list(range(len(problems)))
        random.Random(phase_seed(seed, epoch, "order")).shuffle(order)
        chosen += [problems[i] for i in order[offset : offset + count - len(chosen)]]
    return chosen


def ask_again(problems: Sequence[Problem], again: Sequence[Problem]) -> list[Problem]:
    """As many problems, with `again` in place of the last of them, unless they are there already."""
    new = [p for p in again if p.id not in {q.id for q in problems}]
    return [*problems[: len(problems) - len(new)], *new] if len(new) < len(problems) else list(new[: len(problems)])


@dataclass
class Trainer(Parts):
    """A run's parts at work."""

    def __post_init__(self) -> None:
        self.failures_in_a_row = 0
        self.nonfinite_in_a_row = 0
        self._notes_shown = len(self.policy.notes)
        self._style: Style | None = None

    @property
    def ranks(self) -> Ranks:
        """This process's place among those that train together."""
        return self.policy.ranks

    def step(self, number: int) -> tuple[dict[str, Any], list[RolloutRow]]:
        """Step `number`, from prompts to an updated adapter: (metrics, a row for each rollout)."""
        clock = Clock()
        start = clock.now()
        mx.reset_peak_memory()
        batch, groups = self.roll_out(number, clock)
        row, rows = self.learn(number, batch, groups, clock)
        row["seconds"]["total"] = round(clock.now() - start, 4)
        return row, rows

    # --- rollouts

    def roll_out(self, step: int, clock: Clock) -> tuple[Batch, list[Group]]:
        """Graded rollouts of a step, and the same with contexts: those of all ranks."""
        problems = problems_of_step(self.task.train, step, self.recipe.rollout.prompts, self.recipe.seed)
        problems = ask_again(problems, self.sources.again(max(1, len(problems) // 2)))
        if self.ranks.size == 1:
            batch, groups = self._roll_out(problems, step, clock)
        else:
            mine = self._roll_out_own(problems, step, clock)
            with clock("ranks"):
                batch, groups = self._merge(self.ranks.gather(mine))
        self._count_failures(batch)
        self._note_source_errors(groups)
        self._show_one(groups)
        with clock("rollout"):
            mx.clear_cache()
        if self.ranks.size == 1:  # several ranks have just agreed to go on
            self.stop.check()
        return batch, groups

    def _roll_out_own(self, problems: Sequence[Problem], step: int, clock: Clock) -> _RankRollouts:
        """This rank's part. Whatever ends it must reach the other ranks, which wait for it."""
        try:
            batch, groups = self._roll_out([problems[i] for i in self.ranks.own_range(len(problems))], step, clock)
            return _RankRollouts(batch, groups, stop=self.stop.signal)
        except Interrupted:
            return _RankRollouts(stop=self.stop.signal)
        except VpdError as error:
            return _RankRollouts(error=(SourceError if isinstance(error, SourceError) else RunError, str(error)))

    def _merge(self, parts: Sequence[_RankRollouts]) -> tuple[Batch, list[Group]]:
        for rank, part in enumerate(parts):
            if part.error is not None:
                kind, reason = part.error
                raise kind(f"rank {rank}: {reason}")
        self._stop_together([p.stop for p in parts])
        batch = Batch([g for p in parts for g in p.batch.groups], [f for p in parts for f in p.batch.failures])
        return batch, [g for p in parts for g in p.groups]

    def _roll_out(self, problems: Sequence[Problem], step: int, clock: Clock) -> tuple[Batch, list[Group]]:
        cfg, memory = self.recipe.rollout, self.recipe.memory

        def on_progress(done: int, total: int) -> None:
            self.stop.check()
            self.progress.phase("rollout", done, total)

        with clock("rollout"):
            batch = collect(
                self.policy,
                self.task.verify,
                problems,
                student_prompts(self.prompter, problems),
                cfg.group_size,
                Sampling(
                    cfg.temperature, cfg.top_p, cfg.max_completion_tokens, memory.rollout_rows, memory.rollout_streams
                ),
                threshold=cfg.success_threshold,
                seed=self.ranks.seed(phase_seed(self.recipe.seed, step, "rollout")),
                on_progress=on_progress,
                on_graded=self.sources.prefetch,
            )
        with clock("feedback"):
            self.progress.phase("feedback")
            groups = add_context(self.sources, batch.groups, self.prompter, self.recipe.feedback)
            if most := self.recipe.entry.wrong_hints:
                groups = add_wrong_hints(groups, self.prompter, most)
            return batch, groups

    # --- learning

    @property
    def style(self) -> Style:
        """The student's style on a few training problems, the same throughout the run."""
        if self._style is None:
            problems = problems_of_step(self.task.train, 1, min(PROMPTS, len(self.task.train)), self.recipe.seed)
            self._style = Style(self.policy, [self.prompter.student(p) for p in problems])
        return self._style

    def learn(
        self, number: int, batch: Batch, groups: Sequence[Group], clock: Clock
    ) -> tuple[dict[str, Any], list[RolloutRow]]:
        """Let the algorithm learn from the groups of step `number`: (metrics, a row for each rollout)."""
        self.progress.phase("update")
        step = Step(number, self.recipe.seed, clock)
        metrics = self.algorithm(self.policy, groups, step)
        with clock("watch"), watched(self.policy.model) as load:
            style = self.style.shift()
        with clock("log"):
            mx.clear_cache()
            row = {
                "step": number,
                **rollout_metrics(batch, groups),
                **metrics,
                **self.sources.figures(),
                "style/first_token": style,
                **load.figures(),
                "tokens_per_s": round(sum(len(r.tokens) for r in batch.rollouts) / clock.seconds["rollout"], 1),
                "peak_memory_mb": round(mx.get_peak_memory() / 2**20, 1),
            }
            decode = self.policy.tokenizer.decode
            wanted = [expected(self.task, g.problem) for g in groups]
            both = list(zip(groups, wanted, strict=True))
            rows = [rollout_row(number, g, n, want, decode) for g, want in both for n in range(len(g.rollouts))]
            openings = Counter(row["pieces"][0] for row in rows if row["pieces"])
            row["first_tokens"] = openings.most_common(OPENINGS)
            for i, tokens in step.tokens.items():
                rows[i]["shift"] = [round(float(x), 3) for x in tokens["teacher_logp"] - tokens["student_logp"]]
        row["seconds"] = {k: round(v, 4) for k, v in clock.seconds.items()}
        self._count_nonfinite(metrics)
        for note in self.policy.notes[self._notes_shown :]:
            self.progress.note(note)
        self._notes_shown = len(self.policy.notes)
        return row, rows

    # --- evaluation

    def evaluate(self, step: int) -> tuple[dict[str, Any], list[AnswerRow]]:
        """Accuracy on held-out problems after `step` steps, and the answers to them."""
        _, reported = apart(self.recipe, self.task)
        return evaluate(self, reported[: self.recipe.evaluation.problems], step)

    # --- stopping

    def check_stop(self) -> None:
        """Between steps: ends the run here if any rank is to stop."""
        self._stop_together(self.ranks.gather(self.stop.signal))

    def _stop_together(self, signals: Sequence[int | None]) -> None:
        """Stop where all ranks know of it; a signal that came in since then waits for the next time."""
        first = next((s for s in signals if s is not None), None)
        if first is not None:
            self.stop.signal = first
            raise Interrupted

    # --- what is shown and counted

    def _show_one(self, groups: Sequence[Group]) -> None:
        """Show one failed completion that got feedback, else the first completion."""
        every = [(g, r) for g in groups for r in g.rollouts]
        failed = [(g, r) for g, r in every if r.context is not None and not r.success]
        for group, rollout in (failed or every)[:1]:
            self.progress.sample(group.problem.prompt, rollout, expected(self.task, group.problem))

    def _note_source_errors(self, groups: Sequence[Group]) -> None:
        rollouts = [(g.problem.id, r.source_errors) for g in groups for r in g.rollouts]
        for name in self.sources:
            reasons = [f"{problem}: {errors[name]}" for problem, errors in rollouts if name in errors]
            if reasons:
                self.progress.note(
                    f"{name} failed on {len(reasons)} completions, which get no context from it; first {reasons[0]}"
                )

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
                f"the verifier failed on every completion of this step, first {batch.failures[0]}; fix it, then "
                "resume the run"
            )

    def _count_nonfinite(self, metrics: dict[str, Any]) -> None:
        bad = sum(v for k, v in metrics.items() if k.endswith("/nonfinite"))
        self.nonfinite_in_a_row = self.nonfinite_in_a_row + bad if bad else 0
        if bad:
            self.progress.note(f"{bad} update(s) left out: loss or gradient was not finite")
        if self.nonfinite_in_a_row >= NONFINITE_IN_A_ROW:
            raise RunError(f"{self.nonfinite_in_a_row} updates in a row were not finite; {FINITE}")
