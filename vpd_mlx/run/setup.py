"""What a run is put together from, loaded and checked before anything is written: task, model, prompts, sources, ranks."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import mlx.core as mx

from vpd_mlx import __version__
from vpd_mlx.algos.base import Algorithm, Function
from vpd_mlx.common.functions import NOTHING, PREFIX, Handed
from vpd_mlx.common.seeds import phase_seed
from vpd_mlx.engine.decoding import probe_batches
from vpd_mlx.engine.models import load_adapter
from vpd_mlx.engine.policy import Policy
from vpd_mlx.engine.ranks import ALONE, Ranks
from vpd_mlx.engine.sampling import Sampling, generate
from vpd_mlx.errors import ConfigError, DataError, Fault, ModelError, config_error
from vpd_mlx.feedback import SOURCES, Sources, build_sources
from vpd_mlx.feedback.base import Generate, Host
from vpd_mlx.feedback.prompts import NoRoom, Prompter
from vpd_mlx.recipe import Recipe
from vpd_mlx.run.collect import rows_at_once, student_prompts
from vpd_mlx.run.continued import continued, start_of
from vpd_mlx.run.plan import check_fits, memory_limit, model_config, plan
from vpd_mlx.run.progress import Progress, Silent, Stop
from vpd_mlx.tasks import Task, build_task, fingerprint, prove
from vpd_mlx.tasks.general import TEXT, passages
from vpd_mlx.types import Problem

__all__ = ["Parts", "build_prompter", "check_ranks", "check_room", "load_policy", "refuse_what_cannot_fit"]

CACHE_SHARE = 4  # a quarter of what the GPU may take, about 2.7 GB on a Mac of 16 GB; MLX's own bound is all of it


@dataclass
class Parts:
    """All that a step works with."""

    recipe: Recipe
    policy: Policy
    prompter: Prompter
    task: Task
    sources: Sources
    algorithm: Algorithm
    progress: Progress = field(default_factory=Silent)
    stop: Stop = field(default_factory=Stop)

    @classmethod
    def build(
        cls,
        recipe: Recipe,
        progress: Progress | None = None,
        stop: Stop | None = None,
        ranks: Ranks = ALONE,
        handed: Handed = NOTHING,
        start: Path | None = None,
    ) -> Self:
        """Load and check everything that a run needs; writes nothing. `start` is the adapter to begin with, if there is one.

        Raises:
            VpdError: data, model or recipe are unusable; the message gives the place and the remedy.
        """
        progress, stop = progress or Silent(), stop or Stop()
        if start is None and recipe.adapter is not None:
            recipe, start = continued(recipe), start_of(recipe, Path(), resume=False)
        task = build_task(recipe, handed)
        for side, rows in (("train", task.train), ("evaluate", task.held_out)):
            if not rows:
                raise DataError(f"task: no problem to {side} on; widen the task's filter or add rows")
        prove(task)
        if TEXT in recipe.retain.checks:
            passages(recipe.retain.text)
        _check_sources(recipe, task)
        with nullcontext() if Path(recipe.model).exists() else progress.paused():  # downloads show bars of their own
            policy = load_policy(recipe)
        policy.ranks = ranks
        if start is not None:
            policy.start = ranks.from_first(lambda: load_adapter(start, policy.adapter))
            policy.set_adapter(policy.start)
        check_ranks(recipe, policy, task)
        prompter = build_prompter(recipe, policy.tokenizer)
        prompter.check_style()
        problems = (*task.train, *task.held_out)
        _check_prompts(prompter, problems)
        check_room(recipe, prompter, task.train)
        ask, host = _critic(recipe, policy), _host(progress, stop)
        sources = build_sources(recipe.feedback, prompter, ask, host, {p.id for p in problems}, handed.sources)
        algorithm = recipe.entry.load()(recipe, policy) if handed.algorithm is None else Function(handed.algorithm)
        return cls(recipe, policy, prompter, task, sources, algorithm, progress, stop)


def _critic(recipe: Recipe, policy: Policy) -> Generate:
    """The model's own critiques: sampled like rollouts, with a seed that depends on the prompts."""

    def ask(prompts: Sequence[tuple[int, ...]], max_tokens: int) -> list[str]:
        cfg = recipe.rollout
        streams = recipe.memory.rollout_streams
        how = Sampling(cfg.temperature, cfg.top_p, max_tokens, rows_at_once(recipe), streams)
        seed = phase_seed(recipe.seed, hash(tuple(prompts)) & 0xFFFFFFFF, "critique")
        texts = {p: r.text for p, _, r in generate(policy, prompts, 1, how, seed)}
        return [texts[i] for i in range(len(prompts))]

    return ask


def _host(progress: Progress, stop: Stop) -> Host:
    """What sources outside this process may do to the run."""

    def on_answer(done: int, total: int) -> None:
        stop.check()
        progress.phase("feedback", done, total)

    def ask_to_stop() -> None:
        stop.signal = signal.SIGINT

    return Host(on_answer, progress.note, lambda: stop.signal is not None, ask_to_stop, progress.paused)


def refuse_what_cannot_fit(recipe: Recipe) -> None:
    """Plan the run's memory before anything is loaded; a tiny local model on a machine of some size is let through.

    Of a model on the hub only its config.json is fetched.

    Raises:
        ConfigError: a phase needs more memory than there is, with the keys that help.
        ModelError: the model cannot be planned for.
    """
    if recipe.algorithm.startswith(PREFIX):
        return  # a function of a Python program: only a run of it would tell
    limit, folder = memory_limit(recipe), Path(recipe.model)
    size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    tiny = size and size * 50 < limit and limit > 2**30
    if tiny:
        return
    try:
        model_config(recipe.model, recipe.model_revision)
    except ModelError:
        return  # there is no such model: loading it says so, and what to do
    check_fits(recipe, plan(recipe), limit)


def _wire(limit_gb: float | None) -> None:
    """Keep the model from being paged out if the device has such a limit; a limit that it cannot keep is a `ConfigError`."""
    most = mx.device_info().get("max_recommended_working_set_size")
    if most is None and limit_gb is not None:
        problem = f"{limit_gb:g}: {mx.default_device()} has no wired memory"
        raise config_error("memory.wired_limit_gb", problem, "leave it null here")
    if most is None:
        return
    if limit_gb is not None and limit_gb * 2**30 > int(most):
        problem = f"{limit_gb:g} is more than this machine's {int(most) / 2**30:.1f}"
        raise config_error("memory.wired_limit_gb", problem, "lower it, or leave it null")
    mx.set_wired_limit(int(most) if limit_gb is None else int(limit_gb * 2**30))


def _bound_cache(limit_gb: float | None) -> None:
    """Bound the buffers that MLX keeps for reuse; where the recipe does not, by a share of the GPU's memory."""
    info = mx.device_info()
    most = info.get("max_recommended_working_set_size", info.get("total_memory"))
    if limit_gb is not None:
        mx.set_cache_limit(int(limit_gb * 2**30))
    elif most is not None:
        mx.set_cache_limit(int(most) // CACHE_SHARE)


def load_policy(recipe: Recipe) -> Policy:
    """The recipe's model with a fresh adapter."""
    memory = recipe.memory
    if memory.limit_gb is not None:
        mx.set_memory_limit(int(memory.limit_gb * 2**30))
    _bound_cache(memory.cache_limit_gb)
    _wire(memory.wired_limit_gb)
    policy = Policy.load(recipe.model, recipe.lora, memory, seed=recipe.seed, revision=recipe.model_revision)
    policy.temper(recipe.rollout.temperature)
    probe_batches(policy)
    return policy


def build_prompter(recipe: Recipe, tokenizer: Any) -> Prompter:
    """The recipe's wording and limits with the model's tokenizer."""
    prompt, context = recipe.rollout.max_prompt_tokens, recipe.feedback.max_tokens
    return Prompter(tokenizer, recipe.templates, recipe.thinking, prompt, context, recipe.max_teacher_tokens)


def _check_prompts(prompter: Prompter, problems: Sequence[Problem]) -> None:
    """Raise a `DataError` if a prompt is longer than the limit."""
    frame = len(prompter.encode([{"role": "user", "content": "x"}])) + 16
    template = len(prompter.template("student").encode())
    # A prompt has at most one token per byte, apart from its template: short ones need not be encoded.
    sizes = [template + sum(len(m["content"].encode()) + frame for m in p.messages) for p in problems]
    long = [p for p, size in zip(problems, sizes, strict=True) if size > prompter.max_prompt_tokens]
    student_prompts(prompter, long)


def check_room(recipe: Recipe, prompter: Prompter, problems: Sequence[Problem]) -> None:
    """See that each source's wording leaves room for a context with the shortest problem: else it would with none.

    Raises:
        ConfigError: one does not; every step would go without feedback.
    """
    if not recipe.entry.contexts:
        return
    shortest = min(problems, key=lambda p: sum(len(m["content"]) for m in p.messages))
    for name in recipe.feedback.sources:
        template = SOURCES[name].template
        try:
            prompter.teacher(shortest, template, "x")
            if name == "critique":
                template = "critic"
                prompter.critic(shortest, "x", "x")
        except NoRoom as error:
            problem, _, remedy = str(error).removeprefix("no room: ").partition("; ")
            raise config_error(f"templates.{template}", f"fits no problem, as {problem}", remedy) from None


def check_ranks(recipe: Recipe, policy: Policy, task: Task) -> None:
    """Several ranks must have the same to work with, and each something to do.

    Raises:
        ConfigError: the recipe is not for so many.
        RunError: versions, model or data differ.
    """
    ranks, prompts = policy.ranks, recipe.rollout.prompts
    if ranks.size == 1:
        return
    few = Fault("rollout.prompts", f"{prompts} for {ranks.size} ranks", "give each rank at least one")
    faults = [few] if prompts < ranks.size else []
    faults += [
        Fault("feedback.sources", f"{name} cannot serve several ranks", "train on one machine")
        for name in recipe.feedback.sources
        if SOURCES[name].single_rank
    ]
    if faults:
        raise ConfigError(faults)
    ranks.agree("versions", f"vpd-mlx {__version__}, mlx {version('mlx')}, mlx-lm {version('mlx-lm')}")
    ranks.agree("the model", policy.fingerprint + f", {policy.architecture}, vocabulary {policy.vocabulary}")
    ranks.agree("the data", fingerprint(task))


def _check_sources(recipe: Recipe, task: Task) -> None:
    """Raise a `DataError` if reference solutions are the only feedback and no row to train on has one."""
    if recipe.feedback.sources == ["reference"] and recipe.entry.contexts and not any(p.reference for p in task.train):
        column = getattr(recipe.task, "reference", None)
        where = f"column {column!r} (task.reference)" if column else "task"
        problem = f"reference is the only source, and no row has a reference solution in its {where}"
        raise DataError(f"feedback.sources: {problem}; add them, or name another source")
