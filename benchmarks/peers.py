"""The peers' own code, served to benchmarks/run.py from an environment of their own: JSON lines in, JSON lines out.

It imports nothing of this project, only mlx-lm-lora's rollouts and GRPO gradient, mlx-tune's rollouts.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import sys
import time
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import load
from mlx_lm.tuner.utils import linear_to_lora_layers

MODELS: dict[str, Any] = {}


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


def rollouts_lora(folder: str, prompts: list[list[int]], samples: int, tokens: int, batch: int) -> int:
    """Tokens sampled by mlx-lm-lora at a batch size."""
    from mlx_lm_lora.trainer.grpo_trainer import generate_grpo

    model, tokenizer = model_of(folder)
    done, _, _ = generate_grpo(model, tokenizer, prompts, tokens, samples, batch, "", 1.0, 1.0, 0, 0.0)
    return sum(c.size for c in done)


def rollouts_tune(folder: str, prompts: list[list[int]], samples: int, tokens: int, batch: int) -> int:
    """Tokens sampled by mlx-tune, one completion after another."""
    from mlx_tune.losses import build_shared_prompt_cache, fork_prompt_cache, generate_with_log_probs

    model, tokenizer = model_of(folder)
    total = 0
    for prompt in prompts:
        shared = build_shared_prompt_cache(model, mx.array(prompt))
        for _ in range(samples):
            fork = fork_prompt_cache(model, shared)
            ids, logps = generate_with_log_probs(model, tokenizer, mx.array(prompt), tokens, 1.0, fork)
            mx.eval(ids, logps)
            total += ids.size - len(prompt)
    return total


def grpo(folder: str, prompts: list[list[int]], completions: list[list[int]], of: list[int], chunk: int) -> int:
    """One GRPO gradient of mlx-lm-lora, `chunk` rows at a time, no reference model."""
    from mlx_lm_lora.trainer.grpo_trainer import _grpo_value_and_grad, grpo_loss

    model, _ = model_of(folder)
    model.train()
    rows = [mx.array(c) for c in completions]
    (loss, _, _), gradient = _grpo_value_and_grad(
        nn.value_and_grad(model, grpo_loss),
        model,
        chunk,
        batch=(prompts, prompts, [""] * len(prompts), [""] * len(prompts), None),
        completions=rows,
        completion_texts=[""] * len(rows),
        batch_indices=of,
        advantages=mx.array([1.0 if i % 2 else -1.0 for i in range(len(rows))]),
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
    return len(rows)


def versions() -> dict[str, str]:
    """Versions of the packages."""
    return {n: importlib.metadata.version(n) for n in ("mlx", "mlx-lm", "mlx-lm-lora", "mlx-tune")}


JOBS = {"rollouts_lora": rollouts_lora, "rollouts_tune": rollouts_tune, "grpo": grpo}


def main() -> None:
    """Answer requests until the input ends."""
    mx.disable_compile()  # as vpd-mlx does on a CPU, where compiling runs the C++ compiler
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "versions":
            answer: dict[str, Any] = versions()
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
