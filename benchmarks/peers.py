"""The peers' own code, served to benchmarks/run.py from an environment of their own: JSON lines in, JSON lines out.

It imports nothing of this project, only rollouts and GRPO gradients of mlx-lm-lora, unsloth-zoo (its MLX part) and
inductive-mlxrl, and mlx-tune's rollouts. Each is called as its own trainer calls it, without a reference model.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map
from mlx_lm import load
from mlx_lm.tuner.utils import linear_to_lora_layers

MODELS: dict[str, Any] = {}
Ids = list[list[int]]


def only_mlx_of_unsloth() -> None:
    """Let unsloth_zoo.mlx be imported without the package's own __init__, which asks for unsloth and, on Linux, for torch."""
    for folder in sys.path:
        if (Path(folder) / "unsloth_zoo" / "mlx").is_dir():
            package = types.ModuleType("unsloth_zoo")
            package.__path__ = [str(Path(folder) / "unsloth_zoo")]
            sys.modules["unsloth_zoo"] = package
            return


def model_of(folder: str) -> tuple[Any, Any]:
    """Model with a LoRA of rank 8 on all layers, as in benchmarks/models.py, and the tokenizer."""
    if folder not in MODELS:
        model, tokenizer = load(folder)
        model.freeze()
        mx.random.seed(0)
        linear_to_lora_layers(model, len(model.layers), {"rank": 8, "scale": 2.0, "dropout": 0.0})
        tokenizer._eos_token_ids = {model.args.vocab_size - 1}
        mx.eval(model.parameters())
        MODELS[folder] = model, tokenizer
    return MODELS[folder]


# --- rollouts: (prompts x samples) completions in order


def rollouts_lora(folder: str, prompts: Ids, samples: int, tokens: int, batch: int) -> Ids:
    """By mlx-lm-lora at a batch size."""
    from mlx_lm_lora.trainer.grpo_trainer import generate_grpo

    model, tokenizer = model_of(folder)
    done, _, _ = generate_grpo(model, tokenizer, prompts, tokens, samples, batch, "", 1.0, 1.0, 0, 0.0)
    return [c.tolist() for c in done]


def rollouts_tune(folder: str, prompts: Ids, samples: int, tokens: int) -> Ids:
    """By mlx-tune, one completion after another."""
    from mlx_tune.losses import build_shared_prompt_cache, fork_prompt_cache, generate_with_log_probs

    model, tokenizer = model_of(folder)
    out = []
    for prompt in prompts:
        shared = build_shared_prompt_cache(model, mx.array(prompt))
        for _ in range(samples):
            fork = fork_prompt_cache(model, shared)
            ids, logps = generate_with_log_probs(model, tokenizer, mx.array(prompt), tokens, 1.0, fork)
            mx.eval(ids, logps)
            out.append(ids.tolist()[len(prompt) :])
    return out


def rollouts_unsloth(folder: str, prompts: Ids, samples: int, tokens: int) -> Ids:
    """By unsloth-zoo: a request and a seed for each completion, up to 32 side by side."""
    from unsloth_zoo.mlx.generate import GenerationDefaults, GenerationRequest, SamplingParams, generate_batch

    model, tokenizer = model_of(folder)
    rows = [p for p in prompts for _ in range(samples)]
    requests = [
        GenerationRequest(prompt_token_ids=p, max_tokens=tokens, sampling=SamplingParams(temperature=1.0, seed=i))
        for i, p in enumerate(rows)
    ]
    how = GenerationDefaults(max_tokens=tokens, stop_token_ids=tuple(tokenizer.eos_token_ids))
    return [list(r.token_ids) for r in generate_batch(model, tokenizer, requests, defaults=how)]


def rollouts_mlxrl(folder: str, prompts: Ids, samples: int, tokens: int) -> Ids:
    """By inductive-mlxrl, all groups together. No token ends a text: after one it would begin again, row by row."""
    from mlxrl.rollout.naive import SamplingConfig
    from mlxrl.rollout.optimized import generate_prompt_set_from_prefix_caches, prefill_prompt_once

    model, tokenizer = model_of(folder)
    how = SamplingConfig(max_tokens=tokens, temperature=1.0, top_p=1.0)
    prefixes = [prefill_prompt_once(model, p) for p in prompts]
    found = generate_prompt_set_from_prefix_caches(model, tokenizer, prefixes, samples, how, frozenset())
    return [list(ids) for ids, _, _ in found]


# --- GRPO's gradient on given completions, `chunk` rows at a time; every other one is right


def gradient_lora(folder: str, prompts: Ids, completions: Ids, chunk: int) -> Any:
    """Of mlx-lm-lora."""
    from mlx_lm_lora.trainer.grpo_trainer import _grpo_value_and_grad, grpo_loss

    model, _ = model_of(folder)
    model.train()
    each = len(completions) // len(prompts)
    (loss, _, _), gradient = _grpo_value_and_grad(
        nn.value_and_grad(model, grpo_loss),
        model,
        chunk,
        batch=(prompts, prompts, [""] * len(prompts), [""] * len(prompts), None),
        completions=[mx.array(c) for c in completions],
        completion_texts=[""] * len(completions),
        batch_indices=[i // each for i in range(len(completions))],
        advantages=mx.array([1.0 if i % 2 else -1.0 for i in range(len(completions))]),
        reward_metrics={},
        beta=0.0,
        epsilon=0.2,
        epsilon_high=0.28,
        ref_model=None,
        grpo_loss_type="grpo",
        importance_sampling_level="token",
        max_tokens=max(map(len, completions)),
    )
    mx.eval(loss, gradient)
    return gradient


def gradient_unsloth(folder: str, prompts: Ids, completions: Ids, chunk: int, fused: bool = False) -> Any:
    """Of unsloth-zoo, its fused loss or the plain one; without its checkpointing, which recomputes every block."""
    from unsloth_zoo.mlx.grpo import GRPOObjective, make_grpo_cce_loss_fn, make_grpo_loss_fn

    model, _ = model_of(folder)
    model.train()
    objective = GRPOObjective(loss_type="grpo", beta=0.0, epsilon_high=0.28)
    loss_fn = make_grpo_cce_loss_fn(model, objective) if fused else make_grpo_loss_fn(objective)
    each = len(completions) // len(prompts)
    rows = [prompts[i // each] + c for i, c in enumerate(completions)]
    total: Any = None
    for start in range(0, len(rows), chunk):
        own = rows[start : start + chunk]
        width = max(map(len, own))
        batch = mx.array([r + [0] * (width - len(r)) for r in own])
        lengths = mx.array([[len(prompts[(start + i) // each]), len(r)] for i, r in enumerate(own)])
        signs = mx.array([1.0 if (start + i) % 2 else -1.0 for i in range(len(own))])
        arguments = (batch, lengths, mx.array([1.0, 1.0]), signs, mx.ones(len(own), mx.int32))
        (loss, _, _), gradient = nn.value_and_grad(model, loss_fn)(model, *arguments)
        total = gradient if total is None else tree_map(lambda a, b: a + b, total, gradient)
        mx.eval(loss, total)
    return total


def gradient_mlxrl(folder: str, prompts: Ids, completions: Ids, chunk: int) -> Any:
    """Of inductive-mlxrl, whose step has its optimizer in it: one that changes nothing."""
    from mlxrl.algo.grpo import algorithm_by_name
    from mlxrl.policy.logprobs import prepare_completion_logprob_inputs
    from mlxrl.train.grpo import GRPOBatch, optimizer_step

    model, _ = model_of(folder)
    each, width = len(completions) // len(prompts), max(map(len, completions))
    given = tuple(tuple(prompts[i // each]) for i in range(len(completions)))
    rows = tuple(map(tuple, completions))
    mask = mx.array([[1.0] * len(c) + [0.0] * (width - len(c)) for c in rows])
    inputs = prepare_completion_logprob_inputs(given, rows, pad_token_id=0)
    signs = mx.array([1.0 if i % 2 else -1.0 for i in range(len(rows))])
    old = mx.zeros((len(rows), width))
    batch = GRPOBatch(given, rows, signs, signs, old, old, mask, reference_is_policy=True, logprob_inputs=inputs)
    kept: list[Any] = []

    class Keep(optim.SGD):
        def update(self, _model: nn.Module, gradients: Any) -> None:
            kept.append(gradients)

    optimizer_step(model, Keep(0.0), batch, 0.0, 0, algorithm_by_name("grpo"), micro_batch_size=chunk)
    return kept[0]


ROLLOUTS: dict[str, Callable[..., Ids]] = {
    "lora": rollouts_lora,
    "tune": rollouts_tune,
    "unsloth": rollouts_unsloth,
    "mlxrl": rollouts_mlxrl,
}
GRADIENTS: dict[str, Callable[..., Any]] = {
    "lora": gradient_lora,
    "unsloth": gradient_unsloth,
    "mlxrl": gradient_mlxrl,
}


def rollouts(peer: str, **work: Any) -> int:
    """Tokens sampled."""
    return sum(map(len, ROLLOUTS[peer](**work)))


def grpo(peer: str, **work: Any) -> int:
    """One GRPO gradient; returns its rows."""
    GRADIENTS[peer](**work)
    return len(work["completions"])


def step(peer: str, folder: str, prompts: Ids, samples: int, tokens: int, chunk: int) -> int:
    """Rollouts, their gradient and AdamW's update, at a rate that changes almost nothing; returns the tokens sampled."""
    more = {"batch": 4} if peer == "lora" else {}
    completions = ROLLOUTS[peer](folder, prompts, samples, tokens, **more)
    gradient = GRADIENTS[peer](folder, prompts, completions, chunk)
    model, _ = model_of(folder)
    optimizer = OPTIMIZERS.setdefault(folder, optim.AdamW(1e-8))
    optimizer.update(model, gradient)
    mx.eval(model.trainable_parameters(), optimizer.state)
    return sum(map(len, completions))


OPTIMIZERS: dict[str, optim.Optimizer] = {}


def versions() -> dict[str, str]:
    """Versions of the packages."""
    names = ("mlx", "mlx-lm", "mlx-lm-lora", "mlx-tune", "unsloth-zoo", "inductive-mlxrl")
    return {n: importlib.metadata.version(n) for n in names}


JOBS: dict[str, Callable[..., int]] = {"rollouts": rollouts, "grpo": grpo, "step": step}


def main() -> None:
    """Answer requests until the input ends."""
    only_mlx_of_unsloth()
    mx.disable_compile()  # as vpd-mlx does on a CPU, where compiling runs the C++ compiler
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "versions":
            answer: dict[str, Any] = dict(versions())
        else:
            gc.collect()
            mx.clear_cache()
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            start = time.perf_counter()
            result = JOBS[request["do"]](**request["with"])
            seconds = time.perf_counter() - start
            answer = {"seconds": seconds, "peak": mx.get_peak_memory() - before, "result": result}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
