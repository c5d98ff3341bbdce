"""How much memory a run will take at most, phase by phase, from the model's config.json alone.

The model is put together from its shapes (`engine.blueprint`), and the graphs of its passes are walked, at the longest prompts
and completions: nothing is loaded, and nothing is computed.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from huggingface_hub import hf_hub_download

from vpd_mlx.algos.demand import demand
from vpd_mlx.common.hub import hub_fault, reaching_hub
from vpd_mlx.common.text import size
from vpd_mlx.engine.blueprint import Blueprint
from vpd_mlx.engine.device import compiles
from vpd_mlx.engine.models import first_line, local
from vpd_mlx.engine.sampling import PREFILL, Sampling, default_streams
from vpd_mlx.errors import ConfigError, Fault, ModelError, VpdError, config_error
from vpd_mlx.recipe import Recipe
from vpd_mlx.types import Context, Group, Problem, Rollout, TokenRow, Verdict

__all__ = ["Plan", "check_fits", "memory_limit", "model_config", "plan"]

CACHE_STEP = 256  # mlx-lm's caches grow by so many positions
READ_MIDWAY = 2  # times a gradient's bytes, see `learner.accumulate_weighed`; measured are 1.7 to 2.2
MARGIN = 0.05  # of what is not weights: buffers are handed back late, and come in sizes of their own


@dataclass(frozen=True)
class Plan:
    """Peak bytes of each phase, weights included, and the lengths in tokens that they hold for."""

    weights: int
    adapter: int
    phases: dict[str, int]
    blocks: int
    rows: int
    prompt: int
    teacher_prompt: int
    completion: int


def model_config(model: str, revision: str | None) -> dict[str, Any]:
    """A model's config.json, itself or from its folder, or alone from the hub.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    place, name = local(model, file=True), "config.json"
    try:
        path = place / name if place.is_dir() else place
        if not place.exists():
            with reaching_hub():
                path = Path(hf_hub_download(model, name, revision=revision))
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return config
    except (OSError, ValueError) as error:
        if not place.exists():
            raise ModelError(f"model: {model!r} is no local folder, and on the hub: {hub_fault(error)}") from None
        problem = f"no config.json of {model!r} ({first_line(error)})"
        raise ModelError(f"model: {problem}; give a model folder, its config.json or a hub id") from None


def _groups(
    recipe: Recipe, count: int, prompt: int, teacher_prompt: int, completion: int, vocabulary: int
) -> list[Group]:
    """Groups of made-up rollouts: every other one is right, each has a context of its own."""
    rng = np.random.default_rng(0)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(int(i) for i in rng.integers(1, min(vocabulary, 32000), n))

    def rollout(right: bool) -> Rollout:
        tokens, logps, verdict = ids(completion), (-1.0,) * completion, Verdict(float(right))
        return Rollout(tokens, logps, "", "length", verdict, right, Context("verifier", ""), ids(teacher_prompt))

    per_group = recipe.rollout.group_size
    return [
        Group(Problem(str(g), ()), ids(prompt), tuple(rollout((g * per_group + n) % 2 == 0) for n in range(per_group)))
        for g in range(count)
    ]


def _grown(positions: int) -> int:
    return -(-positions // CACHE_STEP) * CACHE_STEP


@dataclass(frozen=True)
class _Lengths:
    """Longest prompt, teacher's prompt and completion, in tokens."""

    prompt: int
    teacher: int
    completion: int


def plan(recipe: Recipe, *, prompt: int | None = None, context: int | None = None) -> Plan:
    """Peak memory of each phase when prompts and completions are as long as the recipe lets them be.

    `prompt` and `context` are the longest of the data in tokens, where known, instead of the recipe's limits.

    Raises:
        ModelError: no config, or an architecture that mlx-lm does not know.
    """
    config, rollout = model_config(recipe.model, recipe.model_revision), recipe.rollout
    longest = min(prompt or rollout.max_prompt_tokens, rollout.max_prompt_tokens)
    teacher_prompt = min(longest + (context or recipe.feedback.max_tokens), recipe.max_teacher_tokens)
    lengths = _Lengths(longest, teacher_prompt, rollout.max_completion_tokens)
    mx.disable_compile()  # a compiled part of a graph hides what it holds
    try:
        blueprint = Blueprint.of(config, recipe.lora, recipe.memory)
        blueprint.temper(recipe.rollout.temperature)
        update, held = _update(recipe, config, blueprint, lengths)
        moments = {**_decoding(recipe, blueprint, lengths), "update": update}
    except VpdError:
        raise
    except (Exception, SystemExit) as error:  # whatever mlx-lm's file of an architecture raises
        what = f"{type(error).__name__}: {first_line(error)}"
        problem = f"{recipe.model!r} cannot be planned for ({what})"
        raise ModelError(f"model: {problem}; it needs an architecture that mlx-lm knows") from error
    finally:
        if compiles():
            mx.enable_compile()
    weights, adapter = blueprint.weights, blueprint.adapter_bytes
    phases = {name: weights + adapter + held + int((1 + MARGIN) * more) for name, more in moments.items()}
    blocks, rows = len(blueprint.model.layers), rollout.prompts * rollout.group_size
    return Plan(weights, adapter, phases, blocks, rows, longest, teacher_prompt, lengths.completion)


def _update(recipe: Recipe, config: dict[str, Any], blueprint: Blueprint, lengths: _Lengths) -> tuple[int, int]:
    """Bytes of an update's fullest moment beside weights, adapter and what the algorithm holds; and the latter."""
    rollout, memory = recipe.rollout, recipe.memory
    # Peak memory is that of the fullest micro-batch: two micro-batches' worth of groups find it.
    tokens = rollout.group_size * (lengths.teacher + lengths.completion)
    count = min(rollout.prompts, 2 + 2 * memory.micro_batch_tokens // tokens)
    groups = _groups(recipe, count, lengths.prompt, lengths.teacher, lengths.completion, blueprint.vocabulary)
    needs = demand(recipe, blueprint, groups, blueprint.adapter_bytes)
    batches = []
    for update in needs.updates:
        parts = [[update.rows[i] for i in part] for part in blueprint.split(update.rows)]
        fullest = max(parts, key=blueprint.positions)
        midway = update.read_midway and not blueprint.has_dropout and len(blueprint.split(update.rows, 2)) == 1
        loss = blueprint.loss(update.loss, update.needs, sum(len(r.completion) for r in fullest))
        batches.append((blueprint.positions(fullest), READ_MIDWAY if midway else 1, loss, fullest, len(parts)))
    # The graph of the largest alone: that of a whole model takes a second.
    positions, factor, _, rows, parts_of_it = max(batches, key=lambda batch: batch[0] * batch[1])
    highest, first = _gradient(recipe, config, blueprint, rows)
    most = max(factor * highest, *(first * n // positions + loss for n, _, loss, *_ in batches))
    if parts_of_it > 1:
        most += blueprint.adapter_bytes  # the sum of gradients so far
    states = needs.states * blueprint.state_bytes(rollout.prompts * rollout.group_size * lengths.completion)
    # New weights and moments are made beside the old ones.
    return max(most + states, 5 * blueprint.adapter_bytes), needs.held


def _gradient(recipe: Recipe, config: dict[str, Any], blueprint: Blueprint, rows: list[TokenRow]) -> tuple[int, int]:
    """`Blueprint.gradient`; if blocks are recomputed, of each only its input stays, and one at a time is whole."""
    adapted = recipe.lora.layers if recipe.lora.layers > 0 else len(blueprint.model.layers)
    if not recipe.memory.gradient_checkpointing or adapted == 1:
        return blueprint.gradient(rows)
    last = Blueprint.of(config, recipe.lora.model_copy(update={"layers": 1}), recipe.memory)
    highest, first = last.gradient(rows)
    others = (adapted - 1) * blueprint.state_bytes(blueprint.positions(rows))
    others += blueprint.adapter_bytes - last.adapter_bytes
    return highest + others, first + others


def _decoding(recipe: Recipe, blueprint: Blueprint, lengths: _Lengths) -> dict[str, int]:
    """Bytes of the fullest moments of rollouts and evaluations, beside weights, adapter and what the algorithm holds."""
    rollout, cfg = recipe.rollout, recipe.evaluation
    total = rollout.prompts * rollout.group_size
    rows = min(total, recipe.memory.rollout_rows or total)
    layers = blueprint.layers()

    def kept(count: int, tokens: int) -> int:
        return int(count * sum(each * min(tokens, most) for each, most in layers))

    def decoding(count: int, prompt: int, how: Sampling) -> int:
        length = prompt + _grown(lengths.completion)
        # While a layer's keys grow or lose rows, and then its values, the old and the new ones are held side by side.
        one = int(count * max(each * min(length, most) for each, most in layers)) // 2
        # Where rows wait for places, mlx-lm's generator keeps two tokens' log-probabilities, and we a third copy.
        waiting = 0 if count == total else 3 * 4 * blueprint.vocabulary * count
        return kept(count, length) + one + waiting + blueprint.sampling(count, how)

    # Prompts with several samples are read one by one, and their keys copied to the rows' own.
    first = kept(-(-rows // rollout.group_size), _grown(lengths.prompt)) + kept(rows, lengths.prompt + 1)
    own = max(first, decoding(rows, lengths.prompt, Sampling(rollout.temperature, rollout.top_p, lengths.completion)))
    # Evaluations read as many side by side as there are problems, or places.
    tokens = lengths.teacher if recipe.entry.contexts else lengths.prompt
    width = min(rows, cfg.problems)
    # mlx-lm's generator copies their keys when they begin to decode.
    part = -(-width // (recipe.memory.rollout_streams or default_streams(blueprint.model)))
    reading = kept(width + part, _grown(tokens)) + blueprint.prefill(part, min(tokens, PREFILL))
    wide = min(rows, cfg.problems * cfg.samples)
    how = Sampling(cfg.temperature, cfg.top_p, lengths.completion)
    return {"rollout": own, "evaluation": max(reading, decoding(wide, tokens, how))}


def memory_limit(recipe: Recipe) -> int:
    """Bytes that a run may take: the recipe's limit, else the GPU's working set, else the machine's memory."""
    if recipe.memory.limit_gb is not None:
        return int(recipe.memory.limit_gb * 2**30)
    info = mx.device_info(mx.default_device())
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(info.get("max_recommended_working_set_size", info.get("memory_size", machine)))


def check_fits(recipe: Recipe, planned: Plan, limit: int) -> None:
    """Refuse what cannot fit, and name the key to lower.

    Raises:
        ConfigError: a phase needs more than `limit` bytes.
    """
    if planned.weights > limit:
        problem = f"its weights take {size(planned.weights)} of {size(limit)}"
        raise config_error("model", problem, "use a smaller model or fewer bits")
    faults = []
    for phase, peak in planned.phases.items():
        if peak > limit:
            key, remedy = _remedy(recipe, planned, phase)
            problem = f"{getattr(recipe.memory, key)}: the {phase} phase would take {size(peak)} of {size(limit)}"
            faults.append(Fault(f"memory.{key}", problem, remedy))
    if faults:
        raise ConfigError(faults, "memory")


def _remedy(recipe: Recipe, planned: Plan, phase: str) -> tuple[str, str]:
    """The key of `memory` that helps first in this phase, and what to do with it and with all others that help."""
    lengths = "rollout.max_prompt_tokens or rollout.max_completion_tokens"
    memory = recipe.memory
    if phase != "update":
        rows = min(planned.rows, memory.rollout_rows or planned.rows)
        return "rollout_rows", f"set it below {rows}, or lower {lengths}" if rows > 1 else f"lower {lengths}"
    longest = recipe.rollout.max_prompt_tokens + recipe.rollout.max_completion_tokens
    ways = [f"lower it (not below the longest sequence, {longest})"] if memory.micro_batch_tokens > longest else []
    ways += [] if memory.gradient_checkpointing else ["set memory.gradient_checkpointing to true"]
    return "micro_batch_tokens", ", or ".join([*ways, f"lower {lengths}, lora.rank or lora.layers"])
