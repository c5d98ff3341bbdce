"""What a model and its passes hold in memory, read off their shapes: nothing is computed, and no weight is allocated.

A model is put together from its config alone; its weights are never evaluated. mlx hands out the graph of a function, primitive
by primitive with the shapes of all arrays (`mx.export_function`). Walked in the order in which mlx would queue them, an array
comes when it is made and goes after its last use, and the most that is there at a time is the peak.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

__all__ = ["Peak", "build", "nbytes", "peak"]

# Primitives whose output is a view of their first input. A reshape copies what a view before it has reordered.
REORDERED = ("Transpose", "Slice", "Broadcast", "AsStrided", "Split", "BroadcastAxes")
VIEWS = (
    *REORDERED,
    "Reshape",
    "Flatten",
    "Unflatten",
    "Squeeze",
    "ExpandDims",
    "StopGradient",
    "Depends",
    "Copy",
    "View",
)
# Those that cannot write their output over an input that nobody needs any more.
APART = (
    "Matmul",
    "AddMM",
    "QuantizedMatmul",
    "GatherMM",
    "GatherQMM",
    "Concatenate",
    "Gather",
    "Scatter",
    "Sort",
    "Reduce",
)


# mlx hands out memory when it queues a primitive and takes it back when that is through. On a CPU it queues up to ten tasks of
# ten calls ahead (transforms.cpp, backend/cpu/encoder.h): each primitive is a call that lets go of its buffers, and one that
# computes, unless it is a view.
LATE = 100
WIDTH = 20  # of the front on which mlx goes through a graph (transforms.cpp)


def nbytes(tree: Any) -> int:
    """Bytes of all arrays in a tree, evaluated or not."""
    return sum(int(v.nbytes) for _, v in tree_flatten(tree))


def build(config: Mapping[str, Any]) -> nn.Module:
    """The model of a config.json, its type and bits as mlx-lm would load them; none of its weights is evaluated.

    Raises:
        KeyError, ValueError, TypeError, AttributeError: mlx-lm does not know it, or the config lacks something.
    """
    kind, arguments = _get_classes(dict(config))
    model: nn.Module = kind(arguments.from_dict(dict(config)))
    text = config.get("text_config", {})
    dtype = next((c[k] for c in (config, text) for k in ("torch_dtype", "dtype") if c.get(k)), "float32")
    model.set_dtype(getattr(mx, str(dtype), mx.float32))
    bits = config.get("quantization") or _quantised_elsewhere(config)
    if bits:
        _quantise(model, bits)
    model.freeze()
    model.eval()
    return model


def _quantised_elsewhere(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """How mlx-lm keeps weights that another program has quantised, of the kinds that it does not unpack."""
    given = config.get("quantization_config") or {}
    if (kind := given.get("quant_method")) not in ("mxfp4", "mxfp8"):
        return None
    whole = dict.fromkeys(given.get("modules_to_not_convert", ()), False)
    return {"group_size": 32, "bits": 4 if kind == "mxfp4" else 8, "mode": kind, **whole}


def _quantise(model: nn.Module, bits: Mapping[str, Any]) -> None:
    width = bits["group_size"]

    def of_layer(path: str, module: nn.Module) -> Any:
        if not hasattr(module, "to_quantized"):
            return False
        own = next((v for k, v in bits.items() if fnmatch(path, k) or fnmatch(path, f"{k}.*")), None)
        if own is not None:
            return own
        return bool(module.weight.shape[-1] % width == 0)

    nn.quantize(model, group_size=width, bits=bits["bits"], mode=bits.get("mode", "affine"), class_predicate=of_layer)


Edge = tuple[str, tuple[int, ...], Any]
"""An array in the graph: name, shape, dtype."""


@dataclass(frozen=True)
class Peak:
    """Bytes of a function's own arrays, its inputs aside: most at a time, those there with its first result, and all results."""

    highest: int
    first: int
    results: int


Function = Callable[[dict[str, mx.array]], list[mx.array]]


def peak(function: Function, inputs: Mapping[str, mx.array], late: int = LATE) -> Peak:
    """What `function` takes at `inputs`, which are never evaluated, if memory comes back so many calls late."""
    events: list[dict[str, Any]] = []
    names = list(inputs)

    def of_arrays(*arrays: mx.array) -> list[mx.array]:
        return function(dict(zip(names, arrays, strict=True)))

    with _without_contiguous():
        mx.export_function(events.append, of_arrays, tuple(inputs.values()))
    steps = [e for e in events if e["type"] == "primitive"]
    results: list[Edge] = next(e["outputs"] for e in events if e["type"] == "outputs")
    return _walk(_as_queued(steps, results), results, late)


@contextlib.contextmanager
def _without_contiguous() -> Iterator[None]:
    """`mx.contiguous`, which mlx does not hand out, as another copy of its input. Recurrent layers call it for their states."""
    plain = mx.contiguous
    try:
        mx.contiguous = lambda x, *_, **__: x * mx.array(1, x.dtype)
        yield
    finally:
        mx.contiguous = plain


def _as_queued(steps: list[dict[str, Any]], results: list[Edge]) -> list[dict[str, Any]]:
    """The primitives in the order in which mlx's `eval_impl` queues them: backwards from the results, breadth first, on a front
    of at most `WIDTH`."""
    maker = {name: at for at, step in enumerate(steps) for name, *_ in step["outputs"]}
    inputs = [[maker[name] for name, *_ in step["inputs"] if name in maker] for step in steps]
    inputs.append([maker[name] for name, *_ in results if name in maker])  # what waits for all results
    last = len(steps)
    readers: Counter[int] = Counter()
    seen, ahead = {last}, [last]
    while ahead:
        for made in inputs[ahead.pop()]:
            readers[made] += 1
            if made not in seen:
                seen.add(made)
                ahead.append(made)
    tape, at = [last], 0
    aside: list[tuple[int, int]] = []
    while at < len(tape) or aside:
        if at < len(tape):
            step, first = tape[at], 0
            at += 1
        else:
            step, first = aside.pop()
        for i in range(first, len(inputs[step])):
            if len(tape) - at >= WIDTH:
                aside.append((step, i))
                break
            made = inputs[step][i]
            readers[made] -= 1
            if readers[made] == 0:
                tape.append(made)
    return [steps[i] for i in reversed(tape[1:])]


class _Buffers:
    """Which memory each array of a graph is in, how large it is, and how often it is still needed."""

    def __init__(self, steps: list[dict[str, Any]], results: list[Edge]) -> None:
        self.of: dict[str, str] = {}  # array -> the one whose memory it is in
        self.size: dict[str, int] = {}
        self.uses: Counter[str] = Counter()
        reordered: set[str] = set()
        for step in steps:
            first = step["inputs"][0][0] if step["inputs"] else ""
            kind = step["name"]
            is_view = kind in VIEWS and first and not (kind == "Reshape" and first in reordered)
            for edge in step["outputs"]:
                if not is_view:
                    self.of[edge[0]], self.size[edge[0]] = edge[0], _bytes(edge)
                    continue
                if first in self.of:  # else it is a view of an input
                    self.of[edge[0]] = self.of[first]
                if kind in REORDERED or first in reordered:
                    reordered.add(edge[0])
        self.needed = [Counter(self.of[n] for n, *_ in step["inputs"] if n in self.of) for step in steps]
        for counts in self.needed:
            self.uses.update(counts)
        self.uses.update(self.of[name] for name, *_ in results if name in self.of)
        self.readers = Counter(self.uses)


def _bytes(edge: Edge) -> int:
    return math.prod(edge[1]) * int(edge[2].size)


def _walk(steps: list[dict[str, Any]], results: list[Edge], most_late: int) -> Peak:
    buffers = _Buffers(steps, results)
    size, uses = buffers.size, buffers.uses
    live = highest = first = queued = 0
    late: deque[tuple[int, int]] = deque()  # calls of each of the last steps, and bytes that it was done with
    for step, needed in zip(steps, buffers.needed, strict=True):
        new = [name for name, *_ in step["outputs"] if buffers.of.get(name) == name]
        live += sum(size[name] for name in new)
        done = [name for name, times in needed.items() if uses[name] == times]
        fresh = {size[name] for name in new}
        # One that had other readers may be waited for by them, still.
        own = [size[d] for d in done if size[d] in fresh and buffers.readers[d] == needed[d]]
        over = 0 if step["name"] in APART else max(own, default=0)
        highest = max(highest, live - over)
        uses.subtract(needed)
        back = sum(size[name] for name in (*done, *(n for n in new if uses[n] == 0))) - over
        live -= over
        late.append((2 if new else 1, back))
        queued += late[-1][0]
        while queued > most_late:
            calls, back = late.popleft()
            queued -= calls
            live -= back
        if any(name == results[0][0] for name, *_ in step["outputs"]):
            first = live
    return Peak(highest, first, sum(_bytes(edge) for edge in results))
