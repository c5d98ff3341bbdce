"""What half precision costs: gradients with and without a loss scale, log-probabilities of the sampler and of the updates.

`python -m benchmarks.precision` prints the table of docs/gpu.md; `VPD_MLX_GPU_PATHS=1` takes a GPU's ways.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3
from mlx_lm.utils import load_tokenizer

from benchmarks.models import COMMON, TOKENIZER
from vpd_mlx.engine import learner
from vpd_mlx.engine.heads import target_logps
from vpd_mlx.engine.learner import Pass, accumulate
from vpd_mlx.engine.policy import Policy
from vpd_mlx.engine.sampling import Sampling, generate
from vpd_mlx.engine.settings import LoraSettings
from vpd_mlx.types import TokenRow

__all__ = ["figures"]

VOCABULARY = 4096
BATCH = 40_000  # tokens over which a loss is a mean: the weights that gradients are measured under


def _policy(dtype: mx.Dtype) -> Policy:
    """A random Qwen3 in a dtype, not quantised, its logits spread like a language model's, with a LoRA that is not zero."""
    mx.random.seed(0)
    model = qwen3.Model(qwen3.ModelArgs.from_dict({**COMMON, "vocab_size": VOCABULARY, "tie_word_embeddings": False}))
    model.lm_head.weight = 8.0 * model.lm_head.weight
    model.set_dtype(dtype)
    model.freeze()
    policy = Policy(model, load_tokenizer(TOKENIZER), "random")
    policy.adapt(LoraSettings(rank=8), 0)
    tensors = enumerate(policy.adapter.items())
    policy.set_adapter({k: v + 0.02 * mx.random.normal(v.shape, key=mx.random.key(i)) for i, (k, v) in tensors})
    return policy


def _rounded(dtype: mx.Dtype) -> Policy:
    """The same, with the weights that `dtype` has left, computed in float32."""
    policy = _policy(dtype)
    policy.model.set_dtype(mx.float32)
    return policy


def _pass(policy: Policy, rows: list[TokenRow]) -> tuple[Pass, np.ndarray]:
    """A pass over the rows, weighted as in a batch of `BATCH` tokens, and its gradient."""
    weights = [np.full(len(r.completion), 1 / BATCH, np.float32) for r in rows]
    done = accumulate(policy, rows, weights, None, target_logps, 0)
    return done, np.concatenate([np.array(g).flatten() for _, g in tree_flatten(done.gradients)])


def _off(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def figures(dtype: mx.Dtype) -> Iterator[tuple[str, str]]:
    """(what, figure) of a dtype."""
    policy, prompts = _policy(dtype), [tuple(range(10, 80)), tuple(range(5, 40))]
    drawn = list(generate(policy, prompts, 8, Sampling(1.0, 1.0, 24), 0))
    rows = [TokenRow(prompts[p], r.tokens) for p, _, r in drawn]
    _, wanted = _pass(_rounded(dtype), rows)
    done, gradient = _pass(policy, rows)
    yield "gradient, relative distance from float32's", f"{_off(gradient, wanted):.2%}"
    real, learner.loss_scale = learner.loss_scale, lambda *_: 1.0
    try:
        yield "the same without a loss scale", f"{_off(_pass(policy, rows)[1], wanted):.2%}"
    finally:
        learner.loss_scale = real
    scored = np.concatenate(policy.logps(rows))
    sampled = np.concatenate([np.array(r.logps) for *_, r in drawn])
    exact = np.concatenate(_rounded(dtype).logps(rows))
    yield "sampled log-probabilities against float32, rms", f"{_rms(sampled - exact):.1e}"
    logits = policy.head(mx.concatenate(policy.states(rows)))
    ids = mx.array(np.concatenate([r.completion for r in rows]))[:, None]
    short = mx.take_along_axis(logits - mx.logsumexp(logits, axis=-1, keepdims=True), ids, axis=-1)[:, 0]
    yield "the same with logarithms in the dtype, rms", f"{_rms(np.array(short.astype(mx.float32)) - exact):.1e}"
    yield "scored log-probabilities against float32, rms", f"{_rms(scored - exact):.1e}"
    ratio = np.exp(np.concatenate([c["loss"] for c in done.columns]) - scored)
    yield "ratio of the pass with a gradient to the one without", f"{ratio.min():.6f} to {ratio.max():.6f}"
    ratio = np.exp(scored - sampled)
    yield "ratio of scores to samples", f"{ratio.min():.4f} to {ratio.max():.4f}"


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt((x**2).mean()))


def main() -> None:
    """Print the table."""
    kinds = (mx.float32, mx.bfloat16, mx.float16)
    columns = [list(figures(dtype)) for dtype in kinds]
    print(f"| | {' | '.join(str(d).removeprefix('mlx.core.') for d in kinds)} |\n|---|---|---|---|")
    for row in zip(*columns, strict=True):
        print(f"| {row[0][0]} | {' | '.join(figure for _, figure in row)} |")


if __name__ == "__main__":
    main()
