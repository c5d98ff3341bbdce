"""What a run begins with: an adapter that it continues, and demonstrations for a student that succeeds at nothing.

The adapter before the first step is kept in the run folder, `start/`: a resume needs neither the folder that it came from nor the
demonstrations. Where the algorithm speaks of the initial model, it is the base with this adapter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np

from vpd_mlx.algos.base import reset_parts
from vpd_mlx.common.seeds import phase_seed
from vpd_mlx.common.settings import HUB
from vpd_mlx.common.softmax import Softmax
from vpd_mlx.engine.heads import Head, target_logps
from vpd_mlx.engine.learner import Learner, accumulate
from vpd_mlx.errors import DataError, RunError
from vpd_mlx.recipe import Recipe
from vpd_mlx.run.continued import START, adapter_folder, adapter_model
from vpd_mlx.run.evaluate import answered
from vpd_mlx.run.state import RunState
from vpd_mlx.run.step import Trainer, problems_of_step
from vpd_mlx.tasks import Task
from vpd_mlx.tasks.data import DatasetSettings, content, read_all
from vpd_mlx.types import Problem, TokenRow

__all__ = ["begin"]

ASKED, SAMPLES = 16, 4  # training problems, and answers to each, by which a student succeeds at something


def begin(state: RunState, *, resume: bool) -> None:
    """Before anything is looked at: warm the student up, if the recipe says so and it needs it; keep what the run begins with.

    Raises:
        DataError: a demonstration is unusable, or asks what is held out.
        RunError: numbers are not finite.
    """
    trainer, kept = state.trainer, state.log.path / START
    begun = state.done or state.selections or state.evaluations
    if resume and (begun or trainer.ranks.from_first(lambda: kept.is_dir())):
        return
    if trainer.recipe.warm_start.steps:
        _warm_up(trainer)
        state.initial = trainer.policy.adapter
    if (adapter := trainer.recipe.adapter) is not None and not resume:
        trained_on = adapter_model(adapter_folder(Path(adapter)))
        if trained_on is not None and Path(trained_on).name != Path(trainer.recipe.model).name:
            trainer.progress.note(
                f"adapter: was trained on {trained_on}, and the recipe's model is {trainer.recipe.model}"
            )
    if trainer.policy.start is not None and trainer.ranks.first:
        trainer.policy.save_adapter(kept)


def _warm_up(trainer: Trainer) -> None:
    """Supervised steps on demonstrations, unless the student succeeds at something already."""
    cfg, policy, ranks = trainer.recipe.warm_start, trainer.policy, trainer.ranks
    rows = _demonstrations(trainer.recipe, trainer.task)
    asked = problems_of_step(trainer.task.train, 1, min(ASKED, len(trainer.task.train)), trainer.recipe.seed)
    mine = [asked[i] for i in ranks.own_range(len(asked))]
    rollouts = answered(trainer, mine, "warm start", SAMPLES, False).rollouts
    right, total = map(sum, zip(*ranks.gather((sum(r.success for r in rollouts), len(rollouts))), strict=True))
    if right:
        trainer.progress.note(f"warm_start: left out, since the student is right in {right} of {total} answers already")
        return
    tokens = [_tokens(trainer, problem, answer) for problem, answer in rows]
    learner, losses = Learner(trainer.recipe.optimizer), []
    for step in range(1, cfg.steps + 1):
        trainer.check_stop()
        seed = phase_seed(trainer.recipe.seed, step, "warm start")
        part = problems_of_step(tokens, step, min(trainer.recipe.rollout.prompts, len(tokens)), trainer.recipe.seed)
        share = np.float32(1 / sum(len(row.completion) for row in part))
        weights = [np.full(len(row.completion), share, np.float32) for row in part]
        done = accumulate(policy, part, weights, None, _negative_logp, seed)
        learner.apply(policy, done.gradients)
        losses.append(done.loss)
        trainer.progress.phase("warm start", step, cfg.steps)
    if not all(map(math.isfinite, losses)):
        raise RunError("warm_start: the loss is not finite; lower optimizer.learning_rate")
    policy.start = policy.adapter
    reset_parts(trainer.algorithm.parts, policy, 1.0)  # a teacher with weights of its own begins where the student does
    mx.clear_cache()
    trainer.progress.note(
        f"warm_start: the student was right in none of {total} answers, so {cfg.steps} steps on {len(tokens)} demonstrations "
        f"come first; loss {losses[0]:.3g}, at the end {losses[-1]:.3g}"
    )


def _demonstrations(recipe: Recipe, task: Task) -> list[tuple[Problem, str]]:
    """(problem, right answer) of each demonstration: of a file, or of the training rows that have one."""
    source, settings = recipe.warm_start.data, recipe.task
    problems = task.train
    if source is not None:
        if not isinstance(settings, DatasetSettings):
            settings = DatasetSettings(data=source)
        revision = settings.data_revision if source.startswith(HUB) else None
        problems = read_all(settings.model_copy(update={"data": source, "data_revision": revision}))
        held = {content(p): p.id for p in task.held_out}
        for problem in problems:
            if (other := held.get(content(problem))) is not None:
                raise DataError(f"row {problem.id}: demonstrates the held-out row {other}; take one of them out")
    found = [(p, answer) for p in problems if (answer := task.reference_completion(p))]
    if not found:
        where = source or "the task's training rows"
        raise DataError(
            f"warm_start.data: no row of {where} has an answer to demonstrate; add a column answer or reference"
        )
    return found


def _tokens(trainer: Trainer, problem: Problem, answer: str) -> TokenRow:
    tokenizer = trainer.policy.tokenizer
    stop = getattr(tokenizer, "eos_token_id", None)
    if stop is None:
        stop = min(tokenizer.eos_token_ids)
    most = trainer.recipe.rollout.max_completion_tokens
    ids = [*tokenizer.encode(answer, add_special_tokens=False), stop]
    if len(ids) > most:
        what = f"its answer has {len(ids)} tokens, more than rollout.max_completion_tokens {most}"
        raise DataError(f"row {problem.id}: {what}; raise the limit or shorten the answer")
    return TokenRow(trainer.prompter.student(problem), tuple(ids))


def _negative_logp(student: Softmax, fixed: Mapping[str, mx.array], head: Head) -> tuple[mx.array, dict[str, mx.array]]:
    """Supervised fine-tuning's token loss, -log pi(token): (m,) float32."""
    logps, _ = target_logps(student, fixed, head)
    return -logps, {}
