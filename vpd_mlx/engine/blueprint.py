"""A policy whose weights are not there: what its passes would hold, by their shapes (`shapes`)."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tuner.lora import LoRASwitchLinear

from vpd_mlx.engine import lora as adapters
from vpd_mlx.engine import models
from vpd_mlx.engine.attention import BLOCK_BYTES, GPU_FACTOR, LONG, NAME, PLAIN
from vpd_mlx.engine.batching import pad, shared_prompts
from vpd_mlx.engine.caches import layout
from vpd_mlx.engine.device import gpu_ways
from vpd_mlx.engine.heads import Head, TokenLoss, chunked
from vpd_mlx.engine.policy import Policy
from vpd_mlx.engine.sampling import Sampling
from vpd_mlx.engine.settings import LoraSettings, MemorySettings
from vpd_mlx.engine.shapes import Peak, build, nbytes, peak
from vpd_mlx.types import TokenRow

__all__ = ["Blueprint"]


CHUNKS = 3  # of a loss: where the second is queued, the first is not through, and a third comes after


class Blueprint(Policy):
    """The policy of a config.json, with an adapter. Nothing of it can be evaluated.

    Attributes:
        weights: bytes of the frozen base.
        adapter_bytes: bytes of the adapter.
        experts_per_token: how many experts each token goes through, where there are any.
    """

    weights = 0
    adapter_bytes = 0
    experts_per_token = 1

    @classmethod
    def of(cls, config: Mapping[str, Any], lora: LoraSettings, memory: MemorySettings) -> Self:
        """Put it together.

        Raises:
            ConfigError: `lora` does not fit the model.
            KeyError, ValueError, TypeError, AttributeError: mlx-lm does not know it, or the config lacks something.
        """
        blueprint = cls(build(config), SimpleNamespace(eos_token_ids={0}), "", memory)
        per_token = (config.get(key) for key in ("num_experts_per_tok", "experts_per_token", "moe_topk"))
        blueprint.experts_per_token = next((int(n) for n in per_token if n), 1)
        blueprint.adapt(lora, 0)
        return blueprint

    def adapt(self, lora: LoraSettings, seed: int) -> None:
        """Put LoRA on, without evaluating it."""
        config = models.config_of(self.model, lora)
        adapters.adapt(self.model, config)
        self._lora_config = config
        self.model.train()  # else the adapter's layers evaluate their matrices
        self.adapter_bytes = nbytes(self.model.trainable_parameters())
        self.weights = nbytes(self.model.parameters()) - self.adapter_bytes
        self._probe()

    def _probe(self) -> None:
        """What `Policy` tries on a few tokens is taken from the shapes of their results."""
        self.long = None  # mlx does not hand out the graph of bounded attention: `_hollow` stands in
        outer, inner = models.outer_and_inner(self.model)
        heads = models.heads(outer, inner) if callable(inner) else []
        self._body: Any = inner if heads else self.model
        self._plain_head: Head = heads[0] if heads else lambda logits: logits
        self.temper(self.temperature)
        states = self._body(mx.array([[1, 2]]))
        self.width, self.dtype = int(states.shape[-1]), states.dtype
        self.vocabulary = int(self._plain_head(states).shape[-1])
        found = layout(make_prompt_cache(self.model))
        self._layout, self._unpadded, self.shares_prompts = found or [], False, found is not None
        if self.shares_prompts and not self._shares():
            self._unpadded = True
            self.shares_prompts = self._shares()

    def _shares(self) -> bool:
        """What `models.can_share_prompts` finds on real weights, as far as shapes tell."""
        rows = [TokenRow((1, 2, 3, 4, 5), (1, 2, 3)), TokenRow((1, 2, 3), (1, 2))]
        try:
            self.hidden(rows, shared=True)
        except (TypeError, ValueError, AttributeError, IndexError):
            return False
        return True

    def _inputs(self) -> dict[str, mx.array]:
        return dict(tree_flatten(self.model.parameters()))

    def _peak(self, results: Any) -> Peak:
        """`shapes.peak` of what `results` returns, as a function of all weights."""
        weights = self._inputs()

        def function(named: dict[str, mx.array]) -> list[mx.array]:
            self.model.update(tree_unflatten(list(named.items())))
            found: list[mx.array] = results()
            return found

        try:
            return peak(function, weights)
        finally:
            self.model.update(tree_unflatten(list(weights.items())))

    def hidden(
        self, rows: Sequence[TokenRow], *, shared: bool | None = None, long: int | None = None
    ) -> tuple[mx.array, mx.array]:
        """`Policy.hidden`, with attention that holds what bounded attention does."""
        homes = {id(m): m for m in (sys.modules[type(part).__module__] for part in self.model.modules())}.values()
        swapped = [home for home in homes if getattr(home, NAME, None) is PLAIN]
        try:
            for home in swapped:
                setattr(home, NAME, _hollow)
            return super().hidden(rows, shared=shared, long=long)
        finally:
            for home in swapped:
                setattr(home, NAME, PLAIN)

    def gradient(self, rows: Sequence[TokenRow]) -> tuple[int, int]:
        """Most bytes at a time in one micro-batch's gradient, and the bytes there when the loss, not among them, begins."""

        def loss() -> tuple[mx.array, mx.array]:
            states, _ = self.hidden(rows)
            return states.astype(mx.float32).sum(), states

        def results() -> list[mx.array]:
            (value, states), gradient = nn.value_and_grad(self.model, loss)()
            return [states, value, *(g for _, g in tree_flatten(gradient))]

        # mlx does not hand out the graph of a gradient of experts' matrices: what that keeps is counted by hand.
        named = {k: m for k, m in self.model.named_modules() if isinstance(m, LoRASwitchLinear)}
        experts = list(named.values())
        kept = sum(nbytes(m.trainable_parameters()) for m in experts)
        each = 4 * self.positions(rows) * self.experts_per_token  # inputs and products, float32
        kept += sum(each * m.lora_a.shape[1] for m in experts)
        # `up_proj` reads what `gate_proj` beside it has kept.
        inputs = {k.replace("up_proj", "gate_proj"): m.lora_a.shape[2] for k, m in named.items()}
        kept += each * sum(inputs.values())
        for m in experts:
            m.freeze(keys=["lora_a", "lora_b"], recurse=False)
        found = self._peak(results)
        for m in experts:
            m.unfreeze(keys=["lora_a", "lora_b"], recurse=False)
        kept += 5 * BLOCK_BYTES * (GPU_FACTOR if gpu_ways() else 1) if self._long(rows) else 0
        return int(kept) + found.highest, int(kept) + found.first

    def loss(self, token_loss: TokenLoss, needs: Sequence[str], tokens: int) -> int:
        """Most bytes at a time in the loss of so many tokens and its gradient, chunk by chunk.

        `needs` are the names of its constants: `teacher` and `initial` are hidden states, the others a number for each token.
        """
        count = min(CHUNKS * self.head_chunk, tokens)
        shapes = {name: (count, self.width) if name in ("teacher", "initial") else (count,) for name in needs}

        def results() -> list[mx.array]:
            fixed = {"targets": mx.zeros(count, mx.int32)}
            # Values of their own: mlx merges what is computed twice, and a teacher equal to the student would cost nothing.
            for value, (name, shape) in enumerate(shapes.items(), 1):
                fixed[name] = mx.full(shape, value, self.dtype if len(shape) == 2 else mx.float32)
            hidden, weights = mx.zeros((count, self.width), self.dtype), mx.ones(count)
            total, gradient, columns = chunked(self.head, token_loss, hidden, weights, fixed, self.head_chunk)
            return [total, *columns.values(), gradient]

        return self._peak(results).highest + self.state_bytes(tokens)

    def _long(self, rows: Sequence[TokenRow]) -> bool:
        return max(len(r.prompt) + len(r.completion) for r in rows) > LONG

    def positions(self, rows: Sequence[TokenRow]) -> int:
        """Tokens that a micro-batch passes through the blocks, padding included."""
        together = shared_prompts(rows, self._multiple) if self.shares_prompts else None
        return (
            pad(rows, self._multiple).inputs.size
            if together is None
            else together.prompts.size + together.completions.size
        )

    def state_bytes(self, tokens: int) -> int:
        """Bytes of the hidden states of so many tokens."""
        return int(tokens * self.width * self.dtype.size)

    def prefill(self, rows: int, tokens: int) -> int:
        """Most bytes at a time when so many prompts of so many tokens are read, beside the keys and values that stay."""

        def results() -> list[mx.array]:
            cache = make_prompt_cache(self.model)
            self.model(mx.zeros((rows, tokens), mx.int32), cache=cache)
            return [x for c in cache for x in _arrays(c)]

        found = self._peak(results)
        return max(0, found.highest - found.results)

    def sampling(self, rows: int, how: Sampling) -> int:
        """Most bytes at a time when a token is drawn for each of so many rows, from the logits on."""
        dtype = self._plain_head(mx.zeros((1, self.width), self.dtype)).dtype

        def results() -> list[mx.array]:
            # from the input's dtype on, as `sampling` goes
            logits = (mx.zeros((rows, self.vocabulary), dtype) + 1).astype(mx.float32)
            logps = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            return [make_sampler(how.temperature, how.top_p if how.top_p < 1 else 0.0)(logps), logps]

        return self._peak(results).highest

    def layers(self) -> list[tuple[float, float]]:
        """Of each layer that keeps something of a row's tokens: bytes a token, and the most tokens that it keeps."""
        cache = make_prompt_cache(self.model)
        self.model(mx.array([[1]]), cache=cache)
        out = []
        for layer in cache:
            arrays = _arrays(layer)
            if getattr(layer, "keys", None) is None:  # a state of fixed size
                out.append((float(sum(a.nbytes for a in arrays)), 1.0))
                continue
            per_token = sum(math.prod(a.shape[:2]) * a.shape[-1] * a.dtype.size for a in arrays)
            out.append((float(per_token), float(getattr(layer, "max_size", None) or math.inf)))
        return out


def _hollow(
    queries: mx.array, keys: mx.array, values: mx.array, cache: Any, scale: float, mask: Any, sinks: Any = None
) -> mx.array:
    """In the place of mlx-lm's attention over long rows: it keeps queries, keys and values for the gradient, and no scores."""
    if keys.shape[2] < LONG:
        out: mx.array = PLAIN(queries, keys, values, cache, scale, mask, sinks)
        return out
    seen = (keys.sum(axis=-1, keepdims=True) * values).sum(axis=(1, 2), keepdims=True)  # (B, 1, 1, D)
    return queries.sum(axis=-1, keepdims=True) * seen


def _arrays(cache: Any) -> list[mx.array]:
    if getattr(cache, "keys", None) is not None:
        return [cache.keys, cache.values]
    return [x for _, x in tree_flatten(cache.state) if isinstance(x, mx.array)]
