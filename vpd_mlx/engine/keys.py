"""Which layers of a model the adapter is put on.

mlx-lm's own choice, all linear layers of a block, is kept where it can be. Left out are the router of a mixture of experts, which
stays frozen; the experts, unless the recipe asks for them: each would have matrices of its own; and layers whose weight the
architecture reads by itself, of which mlx-lm's LoRA knows nothing. None of these is found by its name.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from vpd_mlx.engine.settings import LoraSettings
from vpd_mlx.errors import ConfigError, Fault

__all__ = ["chosen_keys", "experts_of", "routers_of"]

EXPERTS = ("SwitchLinear", "QuantizedSwitchLinear")
DENSE = ("Linear", "QuantizedLinear")
LINEAR = (*DENSE, *EXPERTS, "Embedding", "QuantizedEmbedding")


def _is(module: Any, kinds: tuple[str, ...]) -> bool:
    return type(module).__name__ in kinds


def experts_of(block: nn.Module) -> dict[str, nn.Module]:
    """Layers of a block that hold a matrix for each expert, by key."""
    return {key: m for key, m in block.named_modules() if _is(m, EXPERTS)}


def routers_of(block: nn.Module) -> set[str]:
    """Keys of the layers of a block that give each expert its score.

    They stand beside the experts, alone or in a module called router or gate, and have an output for each expert.
    """
    found = set()
    for key, module in block.named_modules():
        parts = list(module.children().items())
        flat = [(name, m) for name, m in parts if isinstance(m, nn.Module)]
        experts = next((e for _, m in flat for e in (m, *m.children().values()) if _is(e, EXPERTS)), None)
        if experts is None:
            continue
        for name, m in flat:
            inner = m.named_modules() if _is(m, DENSE) or "router" in name or "gate" in name else []
            for below, layer in inner:
                if _is(layer, DENSE) and layer.weight.shape[0] == experts.weight.shape[0]:
                    found.add(".".join(part for part in (key, name, below) if part))
    return found


def _handled_elsewhere(model: nn.Module) -> set[str]:
    """Keys of linear layers whose weight another part of the architecture reads or sets.

    A weight that is set in every pass is set once and for all: what a pass under a gradient puts there belongs to its graph, and
    must not outlive it.
    """
    found: set[str] = set()
    changed: set[int] = set()
    keys = {id(m): key for block in model.layers for key, m in block.named_modules() if _is(m, DENSE)}
    layers = {id(m): m for m in model.modules() if id(m) in keys}
    plain = {at: type(m) for at, m in layers.items()}

    def get(self: Any, name: str) -> Any:  # a layer itself reads self["weight"]
        if name == "weight":
            found.add(keys[id(self)])
        return nn.Module.__getattr__(self, name)

    def change(self: Any, name: str, value: Any) -> None:
        if name == "weight":
            changed.add(id(self))
        nn.Module.__setattr__(self, name, value)

    def like(kind: type, **methods: Any) -> type:
        return type(kind.__name__, (kind,), methods)

    watched = {kind: like(kind, __getattr__=get, __setattr__=change) for kind in set(plain.values())}
    try:
        for at, m in layers.items():
            m.__class__ = watched[plain[at]]
        model(mx.array([[1]]))  # never evaluated
    finally:
        for at, m in layers.items():
            m.__class__ = plain[at]
    for at in changed:
        mx.eval(layers[at].weight)
        layers[at].__class__ = like(plain[at], __setattr__=_ignore_weight)
    return found


def _ignore_weight(self: Any, name: str, value: Any) -> None:
    if name != "weight":
        nn.Module.__setattr__(self, name, value)


def chosen_keys(model: nn.Module, lora: LoraSettings) -> list[str] | None:
    """The keys of the layers to adapt, as `adapter_config.json` has them; None for all linear layers of a block.

    Raises:
        ConfigError: the model lacks the blocks or the layers that `lora` names; every wrong key is named, with what it has.
    """
    blocks = len(model.layers)
    if lora.layers > blocks:
        problem = f"{lora.layers} is more than the model's {blocks} blocks"
        raise ConfigError([Fault("lora.layers", problem, f"use -1 or 1 to {blocks}")])
    chosen = model.layers[-lora.layers :] if lora.layers > 0 else model.layers
    if lora.keys is not None:
        if faults := list(_wrong(model, chosen, lora.keys)):
            raise ConfigError(faults)
        return list(lora.keys)
    without = {key for block in chosen for key in (*routers_of(block), *(() if lora.experts else experts_of(block)))}
    without |= _handled_elsewhere(model)
    if not without:
        return None
    every = {k for block in chosen for k, m in block.named_modules() if _is(m, LINEAR) or hasattr(m, "to_lora")}
    return sorted(every - without)


def _wrong(model: nn.Module, chosen: list[nn.Module], keys: list[str]) -> Iterator[Fault]:
    known = {k for m in (*chosen, model) for k, layer in m.named_modules() if _is(layer, LINEAR)}
    short_names = sorted(k for k in known if ".layers." not in k)
    for key in (k for k in keys if k not in known):
        close = difflib.get_close_matches(key, short_names, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"use some of: {', '.join(short_names)}"
        yield Fault("lora.keys", f"{key!r} matches no linear layer of the model", hint)
    if not keys:
        yield Fault("lora.keys", "[] adapts nothing", "name layers, or use null for all")
