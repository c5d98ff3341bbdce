"""Estimate memory and time of the shipped recipes for Qwen3 models on some Macs, and write the tables into their READMEs.

    python docs/make_estimates.py [--check]

Nothing here is measured on a Mac. Memory follows from shapes: quantised weights, LoRA with its moments, the caches of the rows
that are decoded at once, and the activations that a checkpointed backward pass keeps. Time follows from two limits: decoding
reads all weights once a token for all rows, training and prefill are bound by arithmetic. The share of a machine's peak that is
reached is an assumption, stated in the tables.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from vpd_mlx.recipe import Recipe, load_recipe

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- estimates: made by docs/make_estimates.py -->", "<!-- end of estimates -->"
BITS = 4.5  # 4 bits, and a scale and a bias of 16 bits for every 64 weights
VOCABULARY = 151_936
SHARE = 0.35  # of a machine's peak arithmetic and bandwidth that is reached
OTHER = 0.75  # GiB for the program, Metal and what lies between


@dataclass(frozen=True)
class Model:
    """Shapes from its config.json."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    tied: bool

    @property
    def block(self) -> int:
        """Weights of one block."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def weights(self) -> int:
        """All weights."""
        return self.layers * self.block + (1 if self.tied else 2) * VOCABULARY * self.hidden

    def lora(self, rank: int) -> int:
        """LoRA weights at a rank, on all seven projections of a block."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        sides = [(self.hidden, q), (self.hidden, kv), (self.hidden, kv), (q, self.hidden)]
        sides += [(self.hidden, self.intermediate)] * 3
        return self.layers * rank * sum(a + b for a, b in sides)


@dataclass(frozen=True)
class Mac:
    """A machine: memory in GB, bandwidth in GB/s, peak arithmetic of its GPU in TFLOPS. Apple's and reviewers' figures."""

    name: str
    memory: int
    bandwidth: float
    tflops: float


MODELS = (
    Model("0.6B", 1024, 28, 16, 8, 128, 3072, tied=True),
    Model("1.7B", 2048, 28, 16, 8, 128, 6144, tied=True),
    Model("4B", 2560, 36, 32, 8, 128, 9728, tied=True),
    Model("8B", 4096, 36, 32, 8, 128, 12288, tied=False),
)
MACS = (Mac("M1, 16 GB", 16, 68, 2.6), Mac("M2 Pro, 32 GB", 32, 200, 6.8), Mac("M4 Max, 64 GB", 64, 546, 18.4))
# Mean tokens of a prompt and of a completion, assumed: thinking makes the latter many times longer.
LENGTHS = {
    "gsm8k": (120, 300),
    "sciknoweval": (200, 500),
    "livecodebench": (600, 1500),
    "dapo_math": (150, 1200),
    "own_task": (60, 20),
    # Completions of a small model that end within 512 tokens, or are cut there.
    "gsm8k-mac": (120, 250),
    "sciknoweval-mac": (200, 250),
    "livecodebench-mac": (600, 400),
    "dapo_math-mac": (150, 420),
}


def memory(recipe: Recipe, model: Model) -> float:
    """Peak in GiB, at the longest sequences that the recipe allows."""
    longest = max(recipe.rollout.max_prompt_tokens, recipe.max_teacher_tokens) + recipe.rollout.max_completion_tokens
    total = recipe.rollout.prompts * recipe.rollout.group_size
    rows = min(total, recipe.memory.rollout_rows or total)
    weights = model.weights * BITS / 8
    adapter = 4 * model.lora(recipe.lora.rank) * 5  # float32: itself, and two moments of each of two optimizers
    cache = 2 * 2 * model.layers * model.kv_heads * model.head_dim * longest * rows
    tokens = max(recipe.memory.micro_batch_tokens, longest)
    kept = 2 * tokens * model.hidden * model.layers  # one input a block, the rest is computed again
    within = 2 * tokens * (6 * model.hidden + 6 * model.intermediate + 4 * model.heads * model.head_dim)
    states = 2 * total * LENGTHS[recipe.name][1] * model.hidden  # the teacher's hidden states
    return (weights + adapter + max(cache, kept + within + states)) / 2**30 + OTHER


def minutes(recipe: Recipe, model: Model, mac: Mac) -> float:
    """Minutes a step, with an E-step every F steps."""
    prompt, completion = LENGTHS[recipe.name]
    total = recipe.rollout.prompts * recipe.rollout.group_size
    rows = min(total, recipe.memory.rollout_rows or total)
    waves = total / rows
    reads = waves * completion * 1.6 * model.weights * BITS / 8 / (mac.bandwidth * 1e9)  # rows end unevenly
    once = 2 * (model.layers * model.block + VOCABULARY * model.hidden)  # operations of a forward pass, a token
    decode = max(reads, once * total * completion / (mac.tflops * 1e12))
    # M: teacher forward, student forward, again for the checkpoint, backward. E: two forwards, and the same for the teacher.
    passes = 1 + 1 + 1 + 2 + (2 + 1 + 1 + 2) / recipe.e_step.every
    train = passes * once * total * (completion + prompt / recipe.rollout.group_size + 64) / (mac.tflops * 1e12)
    return (decode + train) / SHARE / 60


def whole(recipe: Recipe, model: Model, mac: Mac) -> float:
    """Minutes of a run: its steps, and evaluations of samples, greedy and teacher's completions before and after."""
    _, completion = LENGTHS[recipe.name]
    cfg = recipe.evaluation
    evaluations = 2 if cfg.every is None else 1 + -(-recipe.steps // cfg.every)
    tokens = evaluations * cfg.problems * (cfg.samples + 2) * completion
    rows = recipe.memory.rollout_rows or cfg.problems * cfg.samples
    reads = tokens / rows * 1.6 * model.weights * BITS / 8 / (mac.bandwidth * 1e9)
    once = 2 * (model.layers * model.block + VOCABULARY * model.hidden)
    return recipe.steps * minutes(recipe, model, mac) + max(reads, once * tokens / (mac.tflops * 1e12)) / SHARE / 60


def duration(minutes_: float) -> str:
    """Minutes as text, no more precise than an estimate."""
    if minutes_ < 1.5:
        return f"{max(1, round(minutes_ * 12)) * 5} s"
    return f"{minutes_:.0f} min" if minutes_ < 90 else f"{minutes_ / 60:.0f} h"


def _cell(recipe: Recipe, model: Model, mac: Mac, *, run: bool) -> str:
    """Time of a step, or of a run, with fewer rows decoded at once if they do not fit."""
    rows = given = recipe.memory.rollout_rows
    while memory(recipe, model) > 0.7 * mac.memory:
        rows = (rows or recipe.rollout.prompts * recipe.rollout.group_size) // 2
        if not rows:
            return "does not fit"
        recipe = recipe.model_copy(update={"memory": recipe.memory.model_copy(update={"rollout_rows": rows})})
    fewer = f", `memory.rollout_rows` {rows}" if rows != given else ""
    if run:
        return f"{duration(whole(recipe, model, mac))}{fewer}"
    return f"{duration(minutes(recipe, model, mac))} a step{fewer}"


def table(recipe: Recipe, *, run: bool) -> str:
    """The recipe's table: of a step, or of a whole run."""
    prompt, completion = LENGTHS[recipe.name]
    lengths = f"prompts of {prompt} and completions of {completion} tokens on average"
    if run:
        intro = f"`mac.yaml`, all {recipe.steps} steps and the evaluations before and after, with {lengths}:"
    else:
        intro = (
            "**Estimates**, not measurements: peak memory at the longest sequences that the recipe allows, and time of one "
            f"step with {lengths}, at {SHARE:.0%} of each machine's peak. `vpd-mlx plan` measures the memory of your own "
            "model's shapes, `vpd-mlx plan --time` your machine's time."
        )
    lines = [
        intro,
        "",
        "| Qwen3, 4 bits | peak memory | " + " | ".join(m.name for m in MACS) + " |",
        "|---|---|" + "---|" * len(MACS),
    ]
    for model in MODELS[:2] if run else MODELS:
        cells = [_cell(recipe, model, mac, run=run) for mac in MACS]
        lines.append(f"| {model.name} | {memory(recipe, model):.1f} GB | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Write the tables, or check that they are up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where a table is out of date")
    check = parser.parse_args().check
    stale = []
    for page in sorted({ROOT / "recipes" / name.removesuffix("-mac") / "README.md" for name in LENGTHS}):
        text = page.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        tables = table(load_recipe(page.parent / f"{page.parent.name}.yaml"), run=False)
        if (small := page.parent / "mac.yaml").exists():
            tables += f"\n\n{table(load_recipe(small), run=True)}"
        new = f"{before}{BEGIN}\n\n{tables}\n\n{END}{rest.partition(END)[2]}"
        if new != text:
            stale.append(str(page.relative_to(ROOT)))
            if not check:
                page.write_text(new, encoding="utf-8")
    if check and stale:
        sys.exit(f"out of date: {', '.join(stale)}; run python docs/make_estimates.py")


if __name__ == "__main__":
    main()
