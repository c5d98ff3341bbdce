"""The recipe's sections about the network: adapter, sampling, optimizer, memory. Imports no mlx."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from vpd_mlx.common.settings import Positive, Section
from vpd_mlx.errors import Fault

__all__ = ["LoraSettings", "MemorySettings", "OptimizerSettings", "RolloutSettings"]


class LoraSettings(Section):
    """The adapter: low-rank matrices on the frozen base (mlx-lm's format)."""

    rank: Positive = Field(16, description="Rank of the two matrices.")
    scale: float = Field(2.0, gt=0, description="Factor of the low-rank product (mlx-lm's `scale`, not alpha / rank).")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout on the adapter's input in updates. Scores and rollouts never drop."
    )
    layers: int = Field(-1, ge=-1, description="Adapt the last n blocks; -1 adapts all.")
    keys: list[str] | None = Field(
        None,
        description="Names of the linear layers within a block, e.g. `self_attn.q_proj`; null adapts all of them but routers "
        "and experts.",
    )
    experts: bool = Field(
        False,
        description="Adapt a mixture's experts too, where `keys` is null: each has matrices of its own. The router stays frozen.",
    )


class RolloutSettings(Section):
    """Sampling in training."""

    prompts: Positive = Field(32, description="Problems per step.")
    group_size: Positive = Field(8, description="Completions per problem.")
    max_prompt_tokens: Positive = Field(2048, description="Longest prompt of the student in tokens.")
    max_completion_tokens: Positive = Field(1024, description="Longest completion in tokens.")
    temperature: float = Field(
        1.0, gt=0, description="Sampling temperature. Updates are of the policy at this temperature, see algorithm.md."
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Nucleus sampling; below 1 updates score what was sampled under another distribution.",
    )
    success_threshold: float = Field(0.5, gt=0, le=1, description="A score of at least this is a success.")

    def notes(self, recipe: Any) -> Iterator[str]:
        """A nucleus cannot be scored."""
        if self.top_p < 1:
            yield (
                f"rollout.top_p: {self.top_p:g} samples from the nucleus, but updates score under the whole distribution, which "
                "biases their gradients; 1 is right, and rollout.temperature below 1 also samples less of the tail"
            )


class OptimizerSettings(Section):
    """AdamW, warm-up, clipping. The E-step and the M-step have moments of their own."""

    learning_rate: float = Field(
        1e-4, gt=0, description="Rate after warm-up. LoRA wants about 10 x a full fine-tune's."
    )
    warmup_steps: int = Field(10, ge=0, description="Steps over which the rate rises linearly to its full value.")
    warmup_by: Literal["steps", "updates"] = Field(
        "steps",
        description="What warm-up counts: `steps` of the run, for E-steps and M-steps alike, or each optimizer's own `updates`, "
        "of which an E-step before every fifth M-step has few.",
    )
    weight_decay: float = Field(0.01, ge=0, description="Decoupled weight decay.")
    beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the first moment.")
    beta2: float = Field(0.999, ge=0, lt=1, description="Decay of the second moment.")
    grad_clip: float | None = Field(1.0, gt=0, description="Largest gradient norm of one update; null clips nothing.")


class MemorySettings(Section):
    """What the run may take of the machine."""

    micro_batch_tokens: Positive = Field(
        8192, description="Most tokens, padding included, in one forward and backward. Changes memory and speed only."
    )
    head_chunk: Positive | None = Field(
        None, description="Completion tokens per vocabulary-sized chunk; null chooses from the vocabulary."
    )
    gradient_checkpointing: bool = Field(False, description="Recompute blocks in the backward pass to save memory.")
    rollout_rows: Positive | None = Field(
        None,
        description="Most sequences decoded side by side, in rollouts, evaluations, critiques and probes; null decodes all of a "
        "step. Halved when memory runs out, and the completions are sampled again.",
    )
    rollout_streams: Positive | None = Field(
        None,
        description="Threads among which the prompts are divided for decoding; null takes 2 for a quantised model on a CPU, "
        "else 1. Another number draws other completions.",
    )
    cache_limit_gb: float | None = Field(
        None,
        gt=0,
        description="Most memory that MLX keeps in freed buffers, for reuse; null takes a quarter of a GPU's working set, and "
        "leaves it on a CPU.",
    )
    limit_gb: float | None = Field(None, gt=0, description="Limit of MLX's memory; null leaves it.")
    wired_limit_gb: float | None = Field(
        None,
        gt=0,
        description="Memory that macOS may not page out; null takes what the GPU's driver recommends. Macs only.",
    )

    def faults(self, recipe: Any) -> Iterator[Fault]:
        """One sequence must fit a micro-batch."""
        rollout = recipe.rollout
        prompt = max(rollout.max_prompt_tokens, recipe.max_teacher_tokens)
        key = "rollout.max_prompt_tokens" if prompt == rollout.max_prompt_tokens else "feedback.max_prompt_tokens"
        longest = prompt + rollout.max_completion_tokens
        if self.micro_batch_tokens < longest:
            yield Fault(
                "memory.micro_batch_tokens",
                f"{self.micro_batch_tokens} cannot hold one sequence of {longest} tokens "
                f"({key} + rollout.max_completion_tokens)",
                f"raise it to {longest} or lower those two",
            )
