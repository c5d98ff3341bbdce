"""One network, one copy of its weights: load, adapt, score, switch adapters, save.

Student and teacher are this same network under two prompts. The initial model is this network with its adapter off, or with the
one that the run began with; an EMA teacher or a teacher's own adapter is this network with other adapter tensors put in for a
moment. Only LoRA tensors ever exist twice.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache

from vpd_mlx.common.seeds import phase_seed
from vpd_mlx.engine import lora as adapters
from vpd_mlx.engine import models, recurrence
from vpd_mlx.engine.attention import LONG, bounded
from vpd_mlx.engine.batching import by_row, micro_batches, pad, shared_prompts
from vpd_mlx.engine.caches import layout
from vpd_mlx.engine.device import compiles, gpu_ways
from vpd_mlx.engine.heads import Head, chunk_size, map_tokens, scored_logps, tempered
from vpd_mlx.engine.memory import out_of_memory
from vpd_mlx.engine.models import Adapter
from vpd_mlx.engine.passes import states_of
from vpd_mlx.engine.ranks import ALONE, Ranks
from vpd_mlx.engine.recompute import recompute_blocks
from vpd_mlx.engine.settings import LoraSettings, MemorySettings
from vpd_mlx.engine.softcap import take_masks_of_rows
from vpd_mlx.types import TokenRow

__all__ = ["Policy"]

T = TypeVar("T")
LEAST_TOKENS = 64  # micro-batches are not halved below this: they hold single sequences by then
DEFAULTS = MemorySettings()
GPU_MULTIPLE = 32  # lengths on the GPU are padded to this, so that kernels see few shapes

WHOLE_LOGITS = "body and head cannot run apart, so losses hold whole logits (more memory, same numbers)"
OWN_PROMPTS = "completions cannot share their prompt's pass, so updates read it for each (slower, same numbers)"
OWN_ATTENTION = (
    "attention is computed in a way of its own, so a long row's scores are held whole (more memory, same numbers)"
)


class Policy:
    """A frozen mlx-lm model with LoRA on top.

    Attributes:
        model: the mlx-lm module, its base frozen.
        tokenizer: mlx-lm's tokenizer wrapper.
        path: what it was loaded from.
        head: hidden states (m, D) -> float32-able logits (m, V), over `temperature`.
        temperature: at which completions to learn from are sampled: the policy is softmax(logits / temperature).
        shares_prompts: whether one pass over a prompt serves all its completions in updates.
        long: keys from which on attention is bounded (`attention.bounded`); None where the architecture does not allow it.
        widest: most rows that this architecture can decode side by side; None has no bound.
        reads_alone: whether rollouts read each prompt by itself, as this architecture takes no notice of padding.
        rollout_rows: most rows that memory had room for side by side; None until it ran out in a rollout.
        start: the adapter that training begins with, where it is not a fresh one, which changes nothing.
        notes: what a user should know of how this model is handled, e.g. a fallback.
        ranks: who else trains this policy.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, path: str, memory: MemorySettings = DEFAULTS) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.path = path
        self.notes: list[str] = []
        self.ranks: Ranks = ALONE
        self.widest: int | None = None
        self.reads_alone = False
        self.rollout_rows: int | None = None
        self.temperature = 1.0
        self.start: Adapter | None = None
        self._lora_config: dict[str, Any] = {}
        self._micro_batch_tokens = memory.micro_batch_tokens
        self._head_chunk = memory.head_chunk
        self._multiple = GPU_MULTIPLE if gpu_ways() else 1
        if not compiles():
            mx.disable_compile()
        take_masks_of_rows(model)
        self._token_by_token = recurrence.install(model)
        self._probe()

    @classmethod
    def load(
        cls,
        path: str,
        lora: LoraSettings | None,
        memory: MemorySettings = DEFAULTS,
        *,
        seed: int = 0,
        revision: str | None = None,
    ) -> Policy:
        """Load a model folder or hub id and put a fresh adapter on it.

        Raises:
            ModelError: the model is not there or cannot be loaded.
            ConfigError: `lora` does not fit it.
        """
        model, tokenizer = models.load_model(path, revision)
        policy = cls(model, tokenizer, path, memory)
        if lora is not None:
            policy.adapt(lora, seed)
        if memory.gradient_checkpointing:
            recompute_blocks(model)
        return policy

    def adapt(self, lora: LoraSettings, seed: int) -> None:
        """Put LoRA on the frozen base: A uniform from `seed`, B zero, so the network is unchanged at first."""
        config = models.config_of(self.model, lora)
        mx.random.seed(phase_seed(seed, 0, "lora"))
        adapters.adapt(self.model, config)
        self._lora_config = config
        mx.eval(self.model.parameters())
        self._probe()
        models.check_gradient(self.model, self.hidden)

    def temper(self, temperature: float) -> None:
        """From here on score, and take gradients of, the distribution that is sampled at this temperature.

        Ratios, divergences and implicit rewards compare policies; the policy is what the completions come from.
        """
        self.temperature = temperature
        self.head: Head = tempered(self._plain_head, temperature)

    def _probe(self) -> None:
        """Find out, on a few tokens, what this architecture allows, and note what it does not."""
        self.notes, self.shares_prompts, self._unpadded = [], False, False
        self._layout = layout(make_prompt_cache(self.model)) or []
        self.long: int | None = None
        self._body, head, self.vocabulary = models.split_head(self.model)
        self._plain_head: Head = head or (lambda logits: logits)
        self.temper(self.temperature)
        self.shares_prompts = models.can_share_prompts(self.model, self.hidden)
        if not self.shares_prompts:  # perhaps it takes no notice of padding
            self._unpadded = True
            self.shares_prompts = self._unpadded = models.can_share_prompts(self.model, self.hidden)
        self.long = LONG if models.can_bound_attention(self.model, self.hidden, shares=self.shares_prompts) else None
        found = {
            WHOLE_LOGITS: head is None,
            f"{self._token_by_token}, so it goes token by token (slower, same numbers)": self._token_by_token,
            OWN_PROMPTS: not self.shares_prompts,
            OWN_ATTENTION: self.long is None,
        }
        self.notes += [f"{self.architecture}: {note}" for note, holds in found.items() if holds]

    @property
    def architecture(self) -> str:
        """mlx-lm's name of the model's kind."""
        return models.architecture_of(self.model)

    @property
    def head_chunk(self) -> int:
        """Completion tokens per vocabulary-sized chunk."""
        return self._head_chunk or chunk_size(self.vocabulary)

    def split(self, rows: Sequence[TokenRow], parts: int = 1) -> list[list[int]]:
        """Indices of rows per micro-batch, or per one of so many equal parts of a micro-batch."""
        budget = self._micro_batch_tokens // parts
        return micro_batches(rows, budget, shared=self.shares_prompts, multiple=self._multiple)

    def within_memory(self, run: Callable[[], T]) -> T:
        """What `run` returns. When memory runs out, micro-batches are halved for good, down to a floor, and `run` starts over."""
        while True:
            try:
                return run()
            except RuntimeError as error:
                if not out_of_memory(error) or self._micro_batch_tokens < 2 * LEAST_TOKENS:
                    raise
                self._micro_batch_tokens //= 2
                self.notes.append(
                    f"memory ran out: memory.micro_batch_tokens is {self._micro_batch_tokens} from here on, and the update "
                    "starts over; lower it in the recipe to avoid this"
                )
                mx.clear_cache()

    def hidden(
        self, rows: Sequence[TokenRow], *, shared: bool | None = None, long: int | None = None
    ) -> tuple[mx.array, mx.array]:
        """States that predict each completion token, and these tokens: (M, D) and (M,), rows in order.

        `shared` says whether rows read a common prompt once; None does so where the architecture allows it and it saves work.
        Attention over `long` keys or more is bounded; None stands for the policy's own number.
        """
        long = long or self.long
        apart = shared is False or (shared is None and not self.shares_prompts)
        together = None if apart else shared_prompts(rows, self._multiple, always=bool(shared))
        tokens = together or pad(rows, self._multiple)
        with contextlib.nullcontext() if long is None else bounded(self.model, long):
            how = {"banded": self.shares_prompts, "unpadded": self._unpadded}
            return states_of(self._body, self._layout, tokens, long, **how)

    def logps(self, rows: Sequence[TokenRow]) -> list[npt.NDArray[np.float32]]:
        """Log-probability of every completion token, float32, by a forward pass without gradient: per row (T_i,)."""
        return self._map_rows(rows, lambda part: self._logps(*self.hidden(part)))

    def scores(self, rows: Sequence[TokenRow], states: mx.array, targets: mx.array) -> list[npt.NDArray[np.float32]]:
        """`logps` from what `hidden` gave for these rows, also within a function whose gradient is being taken.

        There every array computed from the states would keep its inputs, whole logits among them, alive until the end: so the
        states are copied first.
        """
        loose = mx.array(np.array(states.astype(mx.float32))).astype(states.dtype)
        return by_row(self._logps(loose, targets), rows)

    def _logps(self, states: mx.array, targets: mx.array) -> npt.NDArray[np.float32]:
        found = map_tokens(self.head, scored_logps, states, {"targets": targets}, self.head_chunk)
        return np.array(found["loss"])

    def _map_rows(self, rows: Sequence[TokenRow], values_of: Callable[[list[TokenRow]], Any]) -> list[Any]:
        """Values of all completion tokens, micro-batch by micro-batch, cut up by row again."""

        def run() -> list[Any]:
            out: list[Any] = [None] * len(rows)
            for indices in self.split(rows):
                part = [rows[i] for i in indices]
                for i, piece in zip(indices, by_row(values_of(part), part), strict=True):
                    out[i] = piece
            return out

        return self.within_memory(run)

    def states(self, rows: Sequence[TokenRow]) -> list[mx.array]:
        """Hidden states of the completion positions, without gradient: per row (T_i, D)."""

        def pieces(part: list[TokenRow]) -> Any:
            states = mx.stop_gradient(self.hidden(part)[0])
            mx.eval(states)
            return states

        return self._map_rows(rows, pieces)

    @property
    def adapter(self) -> Adapter:
        """The adapter's tensors, by name. Arrays are immutable: this is a snapshot."""
        return dict(tree_flatten(self.model.trainable_parameters()))

    @property
    def fingerprint(self) -> str:
        """A short hash of the adapter: equal where every bit is."""
        found = hashlib.sha256()
        for name, tensor in sorted(self.adapter.items()):
            found.update(name.encode())
            found.update(np.array(tensor.astype(mx.float32)).tobytes())
        return found.hexdigest()[:16]

    def set_adapter(self, adapter: Adapter) -> None:
        """Put these tensors in."""
        self.model.update(tree_unflatten(list(adapter.items())))

    @contextlib.contextmanager
    def using(self, adapter: Adapter) -> Iterator[None]:
        """Within the block the network has this adapter."""
        before = self.adapter
        self.set_adapter(adapter)
        try:
            yield
        finally:
            self.set_adapter(before)

    def adapter_off(self) -> contextlib.AbstractContextManager[None]:
        """A block within which the network is the base alone."""
        return adapters.switched_off(self.model)

    def as_begun(self) -> contextlib.AbstractContextManager[None]:
        """A block within which the network is as it was before the first step: the base, with `start` where there is one."""
        return self.adapter_off() if self.start is None else self.using(self.start)

    @property
    def has_dropout(self) -> bool:
        """Whether a pass with dropout on differs from one without."""
        return bool(self._lora_config.get("lora_parameters", {}).get("dropout"))

    @contextlib.contextmanager
    def dropout_on(self) -> Iterator[None]:
        """Within the block dropout is live, where the recipe sets any."""
        self.model.train()
        try:
            yield
        finally:
            self.model.eval()

    def load_adapter(self, folder: Path) -> None:
        """Put in the adapter of a run's folder, which must fit (`models.load_adapter`)."""
        self.set_adapter(models.load_adapter(folder, self.adapter))

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter as mlx-lm reads it (`models.save_adapter`)."""
        models.save_adapter(folder, self.adapter, {**self._lora_config, "model": self.path})
