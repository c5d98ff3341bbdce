"""One network, one copy of its weights: load, adapt, score, switch adapters, save.

Student and teacher are this same network under two prompts. The initial model is this network with its adapter off; an
EMA teacher or a teacher's own adapter is this network with other adapter tensors put in for a moment. Only LoRA tensors
ever exist twice.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import numpy.typing as npt
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.trainer import grad_checkpoint
from mlx_lm.tuner.utils import linear_to_lora_layers

from vpd_mlx import losses
from vpd_mlx.common.seeds import phase_seed
from vpd_mlx.engine.batching import micro_batches, pad, share
from vpd_mlx.engine.heads import Head, chunk_size, map_tokens
from vpd_mlx.engine.prefix import Capture, extended
from vpd_mlx.engine.ranks import ALONE, Ranks
from vpd_mlx.engine.settings import LoraSettings
from vpd_mlx.errors import ConfigError, Fault, ModelError, RunError
from vpd_mlx.types import TokenRow

__all__ = ["Adapter", "Policy", "lora_of"]

Adapter = dict[str, mx.array]
"""Name -> tensor of every LoRA matrix, float32."""

T = TypeVar("T")
# How mlx says that memory ran out: when allocating, or from a failed command buffer on Metal.
OUT_OF_MEMORY = ("Unable to allocate", "Insufficient Memory", "OutOfMemory", "greater than the maximum allowed buffer")
LEAST_TOKENS = 64  # micro-batches are not halved below this: they hold single sequences by then
GPU_MULTIPLE = 32  # lengths on the GPU are padded to this, so that kernels see few shapes
PROBE = tuple(range(1, 9))


class Policy:
    """A frozen mlx-lm model with LoRA on top.

    Attributes:
        model: the mlx-lm module, its base frozen.
        tokenizer: mlx-lm's tokenizer wrapper.
        path: what it was loaded from.
        head: hidden states (m, D) -> float32-able logits (m, V).
        shares_prompts: whether one pass over a prompt serves all its completions in updates.
        widest: most rows that may be decoded side by side; None has no bound.
        notes: what a user should know of how this model is handled, e.g. a fallback.
        ranks: who else holds this policy and shares its passes.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, path: str, *, micro_batch_tokens: int = 8192) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.path = path
        self.notes: list[str] = []
        self.ranks: Ranks = ALONE
        self.widest: int | None = None
        self._lora_config: dict[str, Any] = {}
        self._micro_batch_tokens = micro_batch_tokens
        self._head_chunk: int | None = None
        self._multiple = 1
        if mx.default_device() == mx.Device(mx.cpu):
            mx.disable_compile()  # on the CPU a compiled kernel costs a run of the C++ compiler, and saves nothing
        else:
            self._multiple = GPU_MULTIPLE
        self._probe()

    # --- loading

    @classmethod
    def load(
        cls,
        path: str,
        lora: LoraSettings | None,
        *,
        seed: int = 0,
        revision: str | None = None,
        micro_batch_tokens: int = 8192,
        head_chunk: int | None = None,
        gradient_checkpointing: bool = False,
    ) -> Policy:
        """Load a model folder or hub id and put a fresh adapter on it.

        Raises:
            ModelError: the model is not there or cannot be loaded.
            ConfigError: `lora` does not fit it.
        """
        model, tokenizer = _load(path, revision)
        model.freeze()
        policy = cls(model, tokenizer, path, micro_batch_tokens=micro_batch_tokens)
        policy._head_chunk = head_chunk
        if lora is not None:
            policy.adapt(lora, seed)
        if gradient_checkpointing:
            # A checkpointed block takes its cache for a constant: the prompt's share of the gradient would be lost.
            policy.shares_prompts = False
            _checkpoint_blocks(model)
        return policy

    def adapt(self, lora: LoraSettings, seed: int) -> None:
        """Put LoRA on the frozen base: A uniform from `seed`, B zero, so the network is unchanged at first."""
        _check_lora(self.model, lora)
        parameters: dict[str, Any] = {"rank": lora.rank, "scale": lora.scale, "dropout": lora.dropout}
        if lora.keys is not None:
            parameters["keys"] = list(lora.keys)
        layers = lora.layers if lora.layers > 0 else len(self.model.layers)
        mx.random.seed(phase_seed(seed, 0, "lora"))
        linear_to_lora_layers(self.model, layers, dict(parameters))
        self._lora_config = {"fine_tune_type": "lora", "num_layers": layers, "lora_parameters": parameters}
        self.model.eval()
        mx.eval(self.model.parameters())
        self._probe()

    def _probe(self) -> None:
        """Find out, on a few tokens, what this architecture allows; what it does not is noted."""
        self.notes = []
        self._body, self.head = self._split()
        self.shares_prompts = self._can_share()
        if not self.shares_prompts:
            self.notes.append(
                f"{self.architecture}: a prompt's keys cannot be shared among its completions, so updates read it once for "
                "each (slower, the same numbers)"
            )

    @property
    def architecture(self) -> str:
        """mlx-lm's name of the model's kind."""
        return type(self.model).__module__.rsplit(".", 1)[-1]

    def _split(self) -> tuple[Any, Head]:
        """Body and head, if a probe shows that head(body(x)) is the model; else the whole and identity."""
        # inner holds embed_tokens; some architectures wrap it once more
        outer = getattr(self.model, "language_model", self.model)
        inner = getattr(outer, "model", None) or getattr(outer, "transformer", None)
        probe = mx.array([PROBE])
        full = self.model(probe).astype(mx.float32)
        self.vocabulary = int(full.shape[-1])
        candidates: list[Head] = []
        if inner is not None and callable(inner):
            projection = getattr(outer, "lm_head", None)
            embedding = getattr(inner, "embed_tokens", None) or getattr(inner, "wte", None)
            linear = projection if projection is not None else getattr(embedding, "as_linear", None)
            touched = _is_adapted(projection) or _is_adapted(embedding)
            if linear is not None and not touched:
                candidates.append(linear)
                args = getattr(outer, "args", None)
                for name in ("logit_scale", "logits_scaling", "final_logit_softcapping"):
                    value = getattr(args, name, None)
                    if isinstance(value, int | float) and value:
                        candidates += [_scaled(linear, value), _scaled(linear, 1 / value), _capped(linear, value)]
        for head in candidates:
            try:
                states = inner(probe)  # type: ignore[misc]
                logits = head(states).astype(mx.float32)
            except (TypeError, ValueError, AttributeError):
                break  # this architecture's inner call is of another shape: take the whole model
            tolerance = 1e-4 * float(mx.abs(full).max()) + 1e-6
            if logits.shape == full.shape and float(mx.abs(logits - full).max()) <= tolerance:
                return inner, head
        self.notes.append(
            f"{self.architecture}: body and head cannot be run apart, so losses hold whole "
            "logits (more memory, the same numbers)"
        )
        return self.model, lambda logits: logits

    def _can_share(self) -> bool:
        """Whether a probe shows that a prompt read once gives its completions the states that reading it each time does."""
        caches = make_prompt_cache(self.model)
        if any(type(c).__name__ not in ("KVCache", "RotatingKVCache") for c in caches):
            return False  # recurrent layers keep no keys to share
        rows = [
            TokenRow(PROBE[:5], PROBE[:3]),
            TokenRow(PROBE[:5], PROBE[2:6]),
            TokenRow(PROBE[2:4], PROBE[:2]),
            TokenRow(PROBE[2:4], (1,)),
        ]
        self.shares_prompts = False
        want, _ = self.hidden(rows)
        self.shares_prompts = True
        try:
            got, _ = self.hidden(rows)
            mx.eval(got)
        except (TypeError, ValueError, AttributeError, IndexError):
            return False  # this architecture wants more of a cache than keys, values and a mask
        full_precision = want.dtype == mx.float32
        want, got = want.astype(mx.float32), got.astype(mx.float32)
        tolerance = (1e-4 if full_precision else 3e-2) * float(mx.abs(want).max()) + 1e-6
        return float(mx.abs(got - want).max()) <= tolerance

    # --- scoring

    @property
    def head_chunk(self) -> int:
        """Completion tokens per vocabulary-sized chunk."""
        return self._head_chunk or chunk_size(self.vocabulary)

    def split(self, rows: Sequence[TokenRow]) -> list[list[int]]:
        """Indices of rows per micro-batch."""
        return micro_batches(rows, self._micro_batch_tokens, shared=self.shares_prompts)

    def fit_half(self, rows: Sequence[TokenRow]) -> bool:
        """Whether rows fit half a micro-batch."""
        return len(micro_batches(rows, self._micro_batch_tokens // 2, shared=self.shares_prompts)) == 1

    def within_memory(self, run: Callable[[], T]) -> T:
        """What `run` returns. Where memory runs out, micro-batches are halved for good and `run` starts over.

        Raises:
            RuntimeError: anything else, or there is nothing left to halve.
        """
        while True:
            try:
                return run()
            except RuntimeError as error:
                if (
                    not any(words in str(error) for words in OUT_OF_MEMORY)
                    or self._micro_batch_tokens < 2 * LEAST_TOKENS
                ):
                    raise
                self._micro_batch_tokens //= 2
                self.notes.append(
                    f"memory ran out: memory.micro_batch_tokens is {self._micro_batch_tokens} from here on, and the update "
                    "starts over; lower it in the recipe to save the detour"
                )
                mx.clear_cache()

    def hidden(self, rows: Sequence[TokenRow]) -> tuple[mx.array, mx.array]:
        """States that predict each completion token, and these tokens: (M, D) and (M,), rows in order."""
        shared = share(rows, self._multiple) if self.shares_prompts else None
        if shared is None:
            padded = pad(rows, self._multiple)
            states = self._body(mx.array(padded.inputs))
            flat = states.reshape(-1, states.shape[-1])
            return flat[mx.array(padded.positions)], mx.array(padded.targets)
        captures = [Capture() for _ in self.model.layers]
        states = self._body(mx.array(shared.prompts), cache=captures)
        flat = states.reshape(-1, states.shape[-1])
        if shared.completions.size:
            caches = extended(captures, mx.array(shared.parents), mx.array(shared.lengths))
            added = self._body(mx.array(shared.completions), cache=caches)
            flat = mx.concatenate([flat, added.reshape(-1, added.shape[-1])])
        return flat[mx.array(shared.positions)], mx.array(shared.targets)

    def logps(self, rows: Sequence[TokenRow]) -> list[npt.NDArray[np.float32]]:
        """Log-probability of every completion token, float32, by a forward pass without gradient: per row (T_i,)."""

        return self._map_rows(rows, lambda part: self._logps(*self.hidden(part)))

    def scores(self, rows: Sequence[TokenRow], states: mx.array, targets: mx.array) -> list[npt.NDArray[np.float32]]:
        """`logps` from what `hidden` gave for these rows, also within a function whose gradient is being taken.

        There every array that hangs together with the states would keep what it was made from until the end, whole logits
        among it: they are copied first.
        """
        loose = mx.array(np.array(states.astype(mx.float32))).astype(states.dtype)
        return _per_row(self._logps(loose, targets), rows)

    def _logps(self, states: mx.array, targets: mx.array) -> npt.NDArray[np.float32]:
        def token_logps(
            logits: mx.array, fixed: Mapping[str, mx.array], _head: Head
        ) -> tuple[mx.array, dict[str, mx.array]]:
            return losses.token_logps(logits, fixed["targets"]), {}

        return np.array(map_tokens(self.head, token_logps, states, {"targets": targets}, self.head_chunk)["loss"])

    def _map_rows(self, rows: Sequence[TokenRow], values_of: Callable[[list[TokenRow]], Any]) -> list[Any]:
        """Values of all completion tokens, micro-batch by micro-batch, cut up by row again."""

        def run() -> list[Any]:
            out: list[Any] = [None] * len(rows)
            for indices in self.split(rows):
                part = [rows[i] for i in indices]
                for i, piece in zip(indices, _per_row(values_of(part), part), strict=True):
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

    # --- adapters

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

    @contextlib.contextmanager
    def adapter_off(self) -> Iterator[None]:
        """Within the block the network is the initial model."""
        modules = [m for m in self.model.modules() if "lora_b" in m]
        scales = [m.scale for m in modules]
        for m in modules:
            m.scale = 0.0
        try:
            yield
        finally:
            for m, scale in zip(modules, scales, strict=True):
                m.scale = scale

    @property
    def has_dropout(self) -> bool:
        """Whether a pass with dropout on differs from one without."""
        return bool(self._lora_config.get("lora_parameters", {}).get("dropout"))

    @contextlib.contextmanager
    def dropout_on(self) -> Iterator[None]:
        """Within the block dropout is live, where the recipe asks for any."""
        self.model.train()
        try:
            yield
        finally:
            self.model.eval()

    def load_adapter(self, folder: Path) -> None:
        """Take up the adapter of a run.

        Raises:
            ModelError: there is none, or it does not fit this model and LoRA configuration.
        """
        path = folder / "adapters.safetensors"
        if not path.is_file():
            raise ModelError(f"{path}: no such adapter; finish or resume the run first")
        loaded: Any = mx.load(str(path))
        mine = self.adapter
        wrong = sorted(set(mine) ^ set(loaded)) or [k for k in mine if mine[k].shape != loaded[k].shape]
        if wrong:
            raise ModelError(f"{path}: does not fit the model ({wrong[0]} differs); use the run's own model and recipe")
        self.set_adapter(dict(loaded))

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter as mlx-lm reads it: `adapters.safetensors` and `adapter_config.json`.

        Raises:
            RunError: it cannot be written; an older adapter there is untouched then.
        """
        config = {**self._lora_config, "model": self.path}
        partial = folder / "adapters.partial.safetensors"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            mx.save_safetensors(str(partial), self.adapter)
            (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            os.replace(partial, folder / "adapters.safetensors")
        except (OSError, RuntimeError) as error:  # mlx reports a failed write as RuntimeError
            partial.unlink(missing_ok=True)
            raise RunError(
                f"{folder}: the adapter cannot be written ({error}); free space or mend the permissions, then go on with "
                "--resume"
            ) from error


def lora_of(folder: Path) -> LoraSettings:
    """The LoRA settings of an adapter folder in mlx-lm's format, whoever trained it.

    Raises:
        ModelError: there is none, it is not LoRA, or its settings cannot be read.
    """
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind, parameters = config.get("fine_tune_type", "lora"), config["lora_parameters"]
        if kind != "lora":
            raise ModelError(f"{path}: fine_tune_type is {kind!r}; only LoRA adapters can be evaluated")
        return LoraSettings(
            rank=parameters["rank"],
            scale=float(parameters["scale"]),
            dropout=float(parameters.get("dropout", 0.0)),
            layers=config["num_layers"],
            keys=parameters.get("keys"),
        )
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); give an adapter folder of mlx-lm's") from None
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:  # ValueError: JSON, or a value that LoRA cannot have
        what = " ".join(str(error).split())
        raise ModelError(f"{path}: is no adapter's config ({type(error).__name__}: {what}); export it anew") from None


def _per_row(values: Any, rows: Sequence[TokenRow]) -> list[Any]:
    pieces, start = [], 0
    for row in rows:
        pieces.append(values[start : start + len(row.completion)])
        start += len(row.completion)
    return pieces


def _scaled(linear: Head, factor: float) -> Head:
    return lambda h: linear(h) * factor


def _capped(linear: Head, cap: float) -> Head:
    return lambda h: mx.tanh(linear(h) / cap) * cap


def _checkpoint_blocks(model: nn.Module) -> None:
    """Recompute this model's blocks in the backward pass.

    mlx-lm's function changes the blocks' class, for every model of the process: these blocks get a class of their own first.
    """
    own: dict[type, type] = {}
    for block in model.layers:
        kind = type(block)
        if kind not in own:
            own[kind] = type(kind.__name__, (kind,), {"__module__": kind.__module__})
            block.__class__ = own[kind]
            grad_checkpoint(block)
        block.__class__ = own[kind]


def _is_adapted(module: Any) -> bool:
    return module is not None and "lora_b" in module


def _load(path: str, revision: str | None) -> tuple[nn.Module, Any]:
    if (os.path.isabs(path) or path.startswith((".", "~"))) and not Path(path).expanduser().is_dir():
        raise ModelError(f"model: there is no folder {path}; give a model folder in mlx-lm's format, or a hub id")
    try:
        model, tokenizer = mlx_lm.load(
            str(Path(path).expanduser()) if Path(path).expanduser().is_dir() else path, revision=revision
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"model: {path!r} is no local folder and cannot be had from the hub ({first}); "
            "check the name, the network, or download it first"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"model: {path!r} cannot be loaded ({first}); it must be a complete model in mlx-lm's format"
        ) from error
    return model, tokenizer


def _check_lora(model: nn.Module, lora: LoraSettings) -> None:
    blocks = len(model.layers)
    if lora.layers > blocks:
        fault = Fault(
            "lora.layers", f"{lora.layers} is more than the model's {blocks} blocks", f"use -1 or 1 to {blocks}"
        )
        raise ConfigError([fault])
    if lora.keys is None:
        return
    chosen = model.layers[-lora.layers :] if lora.layers > 0 else model.layers
    linear = ("Linear", "QuantizedLinear", "SwitchLinear", "QuantizedSwitchLinear", "Embedding", "QuantizedEmbedding")
    known = {k for block in chosen for k, m in block.named_modules() if type(m).__name__ in linear}
    known |= {k for k, m in model.named_modules() if type(m).__name__ in linear}
    faults = []
    for key in lora.keys:
        if key in known:
            continue
        short = sorted(k for k in known if ".layers." not in k)
        close = difflib.get_close_matches(key, short, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"use some of: {', '.join(short)}"
        faults.append(Fault("lora.keys", f"{key!r} matches no linear layer of the model", hint))
    if not lora.keys:
        faults.append(Fault("lora.keys", "[] adapts nothing", "name layers, or use null for all"))
    if faults:
        raise ConfigError(faults)
