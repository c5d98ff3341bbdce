"""How much memory a run will take at most, phase by phase, from the model's config alone.

The model itself is not loaded. Networks of two and of three of its blocks, with random weights of its shapes, type and bits, take
a step of the recipe's own algorithm on made-up rollouts, at the longest prompts and completions. Every further block adds what
the third one adds; the caches of the rollout phase follow from the shapes of keys and values.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from huggingface_hub import hf_hub_download
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import _get_classes

from vpd_mlx.algos.base import Algorithm, Step, save_parts
from vpd_mlx.common.stats import Clock
from vpd_mlx.common.text import size
from vpd_mlx.engine.models import first_line
from vpd_mlx.engine.policy import Policy
from vpd_mlx.errors import ConfigError, Fault, ModelError, config_error
from vpd_mlx.recipe import Recipe
from vpd_mlx.types import Context, Group, Problem, Rollout, TokenRow, Verdict

__all__ = ["Plan", "check_fits", "memory_limit", "plan", "read_model_config"]

CACHE_STEP = 256  # mlx-lm's caches grow by so many positions


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


def read_model_config(recipe: Recipe) -> dict[str, Any]:
    """The model's config.json, from its folder or alone from the hub.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    local, name = Path(recipe.model), "config.json"
    try:
        path = local / name if local.is_dir() else hf_hub_download(recipe.model, name, revision=recipe.model_revision)
        config: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        return config
    except (OSError, ValueError) as error:
        problem = f"no config.json of {recipe.model!r} ({first_line(error)})"
        raise ModelError(f"model: {problem}; give a model folder or a hub id") from None


def _build(config: dict[str, Any], blocks: int) -> nn.Module:
    kind, arguments = _get_classes(config)
    whole = config["num_hidden_layers"]
    # a list with one entry per block says what kind of block each one is
    few = {k: v[:blocks] if isinstance(v, list) and len(v) == whole else v for k, v in config.items()}
    model = kind(arguments.from_dict({**few, "num_hidden_layers": blocks}))
    model.set_dtype(getattr(mx, str(config.get("torch_dtype", config.get("dtype", "float32"))), mx.float32))
    if (quantisation := config.get("quantization")) is not None:
        width, bits = quantisation["group_size"], quantisation["bits"]

        def fits(_path: str, module: nn.Module) -> bool:
            return hasattr(module, "to_quantized") and module.weight.shape[-1] % width == 0

        nn.quantize(model, group_size=width, bits=bits, class_predicate=fits)
    mx.eval(model.parameters())
    return model


def _bytes(tree: Any) -> int:
    return sum(int(v.nbytes) for _, v in tree_flatten(tree))


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


def plan(recipe: Recipe, *, prompt: int | None = None, context: int | None = None) -> Plan:
    """Peak memory of each phase when prompts and completions are as long as the recipe lets them be.

    `prompt` and `context` are the longest of the data in tokens, where known, instead of the recipe's limits.

    Raises:
        ModelError: no config, or an architecture that mlx-lm does not know.
    """
    config = read_model_config(recipe)
    rollout = recipe.rollout
    longest = min(prompt or rollout.max_prompt_tokens, rollout.max_prompt_tokens)
    teacher_prompt = min(longest + (context or recipe.feedback.max_tokens), recipe.max_teacher_tokens)
    rows = rollout.prompts * rollout.group_size
    try:
        blocks = int(config["num_hidden_layers"])
        vocabulary = int(config["vocab_size"])
        few = 2 if blocks > 2 else 1  # the first block hides behind the head's own peak
        found = [_probe(recipe, config, n, longest, teacher_prompt, vocabulary) for n in (few, few + 1)]
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(
            f"model: {recipe.model!r} cannot be planned for ({type(error).__name__}: {error}); it needs a dense architecture "
            "that mlx-lm knows"
        ) from error

    def whole(key: str) -> int:
        one, two = found[0][key], found[1][key]
        return int(one + (blocks - few) * (two - one))

    weights, adapter = whole("weights"), whole("adapter")
    decoded = min(rows, recipe.memory.rollout_rows or rows)
    length = _grown(longest + rollout.max_completion_tokens)
    cache = whole("cache_per_token") * length * decoded
    # a prompt's own cache, from which its rows' are made
    prompts = whole("cache_per_token") * _grown(longest) * -(-decoded // rollout.group_size)
    # while one block's cache grows, its old and its new copy are held side by side
    growth = (found[1]["cache_per_token"] - found[0]["cache_per_token"]) * length * decoded
    logits = 3 * 4 * vocabulary * decoded
    sampling = weights + adapter + whole("held") + cache + prompts + growth + logits
    phases = {"rollout": sampling, "update": whole("update")}
    return Plan(weights, adapter, phases, blocks, rows, longest, teacher_prompt, rollout.max_completion_tokens)


def _probe(
    recipe: Recipe, config: dict[str, Any], blocks: int, prompt: int, teacher_prompt: int, vocabulary: int
) -> dict[str, int]:
    model = _build(config, blocks)
    model.freeze()
    before = mx.get_active_memory()
    policy = Policy(model, SimpleNamespace(eos_token_ids={0}), recipe.model, recipe.memory)
    policy.temper(recipe.rollout.temperature)
    # `lora.layers` counts from the last block; of two or three blocks all are adapted, as all would be.
    policy.adapt(recipe.lora.model_copy(update={"layers": -1}), 0)
    cache = make_prompt_cache(model)
    model(mx.array([[1, 2, 3, 4]]), cache=cache)
    per_token = sum(
        int(np.prod(c.keys.shape[:2])) * (c.keys.shape[-1] + c.values.shape[-1]) * c.keys.dtype.size for c in cache
    )
    del cache
    completion = recipe.rollout.max_completion_tokens
    # Peak memory is that of the fullest micro-batch: two micro-batches' worth of groups find it.
    tokens = recipe.rollout.group_size * (teacher_prompt + completion)
    count = min(recipe.rollout.prompts, 2 + 2 * recipe.memory.micro_batch_tokens // tokens)
    groups = _groups(recipe, count, prompt, teacher_prompt, completion, vocabulary)
    trained = _bytes(model.trainable_parameters())
    # Active memory that is not this network's: what else the process holds.
    foreign = max(0, before - _bytes(model.parameters()) + trained)
    algorithm: Algorithm = recipe.entry.load()(recipe, policy)
    # A first step, of few tokens, makes the optimizers' moments and the teacher's weights.
    algorithm(policy, _groups(recipe, count, 2, 3, 2, vocabulary), Step(0, 0, Clock()))
    mx.clear_cache()
    mx.reset_peak_memory()
    algorithm(policy, groups, Step(0, 0, Clock()))
    peak = int(mx.get_peak_memory()) - foreign
    if recipe.entry.contexts:
        # The teacher's hidden states of the whole batch stay until the update is through.
        states, _ = policy.hidden([TokenRow(groups[0].prompt, groups[0].rollouts[0].tokens)])
        peak += (recipe.rollout.prompts - count) * recipe.rollout.group_size * int(states.nbytes)
    return {
        "weights": _bytes(model.parameters()) - trained,
        "adapter": trained,
        "held": _bytes(save_parts(algorithm.parts)[0]),
        "update": peak,
        "cache_per_token": per_token,
    }


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
    sequences = "rollout.max_prompt_tokens, rollout.max_completion_tokens or lora.rank"
    keys = {
        "update": ("micro_batch_tokens", f"lower it (not below the longest sequence), or lower {sequences}"),
        "rollout": ("rollout_rows", f"set it below {planned.rows}, or lower rollout.max_completion_tokens"),
    }
    faults = []
    for phase, peak in planned.phases.items():
        if peak > limit:
            key, remedy = keys[phase]
            problem = f"{getattr(recipe.memory, key)}: the {phase} phase would take {size(peak)} of {size(limit)}"
            faults.append(Fault(f"memory.{key}", problem, remedy))
    if faults:
        raise ConfigError(faults, "memory")
