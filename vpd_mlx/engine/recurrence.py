"""The gated delta rule by chunks of tokens, not one by one: the recurrence of Qwen3.5, Qwen3-Next, OLMo's hybrid and Kimi Linear.

A head keeps a matrix S (Dv, Dk). A token with query q, key k, value v, gate g in (0, 1] and rate b changes and reads it:

    d = b (v - g S k),  S <- g S + d k^T,  o = S q

mlx-lm runs this token by token wherever a gradient is taken, and elsewhere but on Metal. In a chunk that starts from S, with
G_i = log g_1 + ... + log g_i and rows for tokens, all d at once solve a triangular system, from which the rest are products of
matrices (Yang et al. 2024, arXiv 2406.06484 and, with gates, arXiv 2412.06464, section 3.3):

    (I + L) D = b (V - e^G K S^T),  L_ij = b_i e^(G_i - G_j) k_i.k_j  for j < i
    O = e^G Q S^T + P D,            P_ij = e^(G_i - G_j) q_i.k_j      for j <= i
    S <- e^(G_C) S + D^T (e^(G_C - G_j) k_j)

This is exact. Only sums of log g, which are never positive, are exponentiated; each G_i - G_j is summed up by itself, as a
difference of two long sums would lose digits after a strong decay. (I + L)^-1 is put together from the inverses of its diagonal
blocks: powers of L would grow to 10^18 where a token is repeated. With a gate for each channel of the key (Kimi Linear, arXiv
2510.26692), k_i.k_j and q_i.k_j are sums of channels that decay on their own, of (C, C, Dk) products for each chunk.

`install` gives the layers of the model at hand a class of their own, in whose `__call__` the name of mlx-lm's function means
ours. Other models of the process keep mlx-lm's, every pass of this one is served, whatever thread runs it, and no code of
mlx-lm's is copied. A single token, as in decoding, is left to mlx-lm. On Metal mlx may have kernels for both directions
(`mx.fast.gated_delta_update`): they are taken where mlx chooses them for these heads. Either way is compared with mlx-lm's on
random inputs first, values and gradients.
"""

from __future__ import annotations

import io
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gated_delta
from mlx_lm.models.cache import make_prompt_cache

from vpd_mlx.engine.caches import KEYS, layout
from vpd_mlx.engine.device import close, device_kind, gpu_ways

__all__ = ["Rule", "agrees", "chunked", "install", "inverse", "rule_of"]

NAME = "gated_delta_update"
PLAIN: Callable[..., tuple[mx.array, mx.array]] = gated_delta.gated_delta_update
CHUNK, GPU_CHUNK = 16, 64  # tokens: few products on a CPU, few launches on a GPU
LEAST = 4  # tokens in a chunk, a diagonal block whose inverse is a polynomial of it


def _blocks(matrix: mx.array, width: int, row: int, step: int) -> mx.array:
    """The blocks (..., n, width, width) of (..., C, C) at (row, 0), (row + step, step) and so on."""
    size = matrix.shape[-1]
    bands = matrix.reshape(*matrix.shape[:-2], size // step, step, size)[..., row : row + width, :]
    parts = mx.split(bands, size // step, axis=-3)
    return mx.concatenate([p[..., n * step : n * step + width] for n, p in enumerate(parts)], axis=-3)


def inverse(lower: mx.array) -> mx.array:
    """(I + lower)^-1 of strictly lower triangular matrices (..., C, C), C a power of 2 and at least 4.

    The inverse of [[A, 0], [B, D]] is [[A', 0], [-D' B A', D']]: from blocks of 4 up, each twice as wide as those before.
    """
    size, width = lower.shape[-1], LEAST
    power = _blocks(lower, width, 0, width)
    one = mx.eye(width) - power
    found = one + one @ (power @ power)  # (I - X)(I + X^2), for X^4 = 0
    while width < size:
        pairs = found.reshape(*found.shape[:-3], -1, 2, width, width)
        first, second = (x.squeeze(-3) for x in mx.split(pairs, 2, axis=-3))
        corner = -(second @ _blocks(lower, width, width, 2 * width) @ first)
        upper = mx.concatenate([first, mx.zeros_like(first)], axis=-1)
        found = mx.concatenate([upper, mx.concatenate([corner, second], axis=-1)], axis=-2)
        width *= 2
    return found.squeeze(-3)


def _decays(log_g: mx.array) -> mx.array:
    """e^(G_i - G_j) for j <= i, else 0: (..., C, D) -> (..., C, C, D)."""
    at = mx.arange(log_g.shape[-2])
    before, seen = (x[..., None] for x in (at[:, None] > at, at[:, None] >= at))
    sums = mx.cumsum(mx.where(before, log_g[..., :, None, :], 0.0), axis=-3)  # of those behind j up to i
    return mx.exp(mx.where(seen, sums, -mx.inf))


def chunked(
    q: mx.array, k: mx.array, v: mx.array, log_g: mx.array, beta: mx.array, state: mx.array, size: int
) -> tuple[mx.array, mx.array]:
    """Outputs (B, T, Hv, Dv) and the last state (B, Hv, Dv, Dk), float32.

    `q` and `k` (B, T, Hk, Dk), `v` (B, T, Hv, Dv), `log_g` (B, T, Hv) or, a gate for each channel, (B, T, Hv, Dk), `beta` (B,
    T, Hv), `state` (B, Hv, Dv, Dk); `size` tokens per chunk, a power of 2. A token with `log_g` and `beta` 0 leaves the state
    as it is.
    """
    rows, length, heads, _ = q.shape
    v_shape = v.shape[:3]
    each = v.shape[2] // heads  # value heads that share a key head
    size = min(size, max(LEAST, 1 << (length - 1).bit_length()))
    count = -(-length // size)

    def cut(x: mx.array, shared: int) -> mx.array:
        """(B, T, H, D) -> (chunks, B, Hk, H / Hk, size, D), float32."""
        x = mx.pad(x.astype(mx.float32), [(0, 0), (0, count * size - length), (0, 0), (0, 0)])
        return x.reshape(rows, count, size, heads, shared, -1).transpose(1, 0, 3, 4, 2, 5)

    q, k, v = cut(q, 1), cut(k, 1), cut(v, each)
    log_g, beta = cut(log_g.reshape(*v_shape, -1), each), cut(beta[..., None], each)
    state = state.astype(mx.float32).reshape(rows, heads, each, *state.shape[2:]).swapaxes(-1, -2)  # S^T
    decay = _decays(log_g)
    since = mx.exp(mx.cumsum(log_g, axis=-2))  # e^G

    def scores_of(x: mx.array) -> mx.array:
        """x_i . k_j, each channel decayed since j: (..., C, C)."""
        if decay.shape[-1] == 1:  # one gate comes out of the product
            return (x @ k.swapaxes(-1, -2)) * decay.squeeze(-1)
        return (x[..., :, None, :] * k[..., None, :, :] * decay).sum(axis=-1)

    before = mx.arange(size)[:, None] > mx.arange(size)
    solve = inverse(mx.where(before, scores_of(k) * beta, 0.0))
    parts = (
        solve @ (v * beta),
        solve @ (k * (beta * since)),
        q * since,
        scores_of(q),
        (k * decay[..., -1, :, :]).swapaxes(-1, -2),
        since[..., -1:, :].swapaxes(-1, -2),
    )
    found = []
    for own, away, query, scores, key, left in zip(*(mx.split(x, count) for x in parts), strict=True):
        d = own[0] - away[0] @ state
        found.append(query[0] @ state + scores[0] @ d)
        state = left[0] * state + key[0] @ d
    out = mx.stack(found, axis=1).transpose(0, 1, 4, 2, 3, 5)  # (B, chunks, size, Hk, Hv / Hk, Dv)
    return out.reshape(rows, count * size, heads * each, -1)[:, :length], state.swapaxes(-1, -2).flatten(1, 2)


@dataclass(frozen=True)
class Rule:
    """In the place of `mlx_lm.models.gated_delta.gated_delta_update`: by mlx's own `kernels`, or in chunks of `size` tokens."""

    kernels: bool = False
    size: int = CHUNK

    def __call__(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        a: mx.array,
        b: mx.array,
        A_log: mx.array,
        dt_bias: mx.array,
        state: mx.array | None = None,
        mask: mx.array | None = None,
        *,
        use_kernel: bool = True,
        lower_bound: float | None = None,
        allow_neg_eigval: bool = False,
    ) -> tuple[mx.array, mx.array]:
        """Outputs (B, T, Hv, Dv) in the dtype of `q`, and the last state (B, Hv, Dv, Dk)."""
        how = {"lower_bound": lower_bound, "allow_neg_eigval": allow_neg_eigval}
        if q.shape[1] == 1:
            return PLAIN(q, k, v, a, b, A_log, dt_bias, state, mask, use_kernel=use_kernel, **how)
        beta = mx.sigmoid(b) * (2.0 if allow_neg_eigval else 1.0)
        scale = mx.exp(A_log.astype(mx.float32))
        if lower_bound is None:
            log_g = -scale * nn.softplus(a + dt_bias)
        else:
            log_g = lower_bound * mx.sigmoid(scale * (a.astype(mx.float32) + dt_bias))
        if mask is not None:
            log_g = mx.where(mask.reshape(*mask.shape, *[1] * (a.ndim - 2)), log_g, 0.0)
            beta = mx.where(mask[..., None], beta, 0.0)
        if state is None:
            state = mx.zeros((q.shape[0], *v.shape[2:], k.shape[-1]), mx.float32)
        if self.kernels:
            out, state = mx.fast.gated_delta_update(q, k, v, mx.exp(log_g), beta, state)
        else:
            out, state = chunked(q, k, v, log_g, beta, state, self.size)
        return out.astype(q.dtype), state


def install(model: nn.Module) -> str | None:
    """Have this model's layers compute the gated delta rule by the first of our ways that agrees with mlx-lm's.

    Returns why a recurrence of the model goes token by token, if one does: another one may.
    """
    layers = [m for m in model.modules() if rule_of(type(m)) is PLAIN]
    if not layers:
        recurrent = layout(make_prompt_cache(model)) != [KEYS] * len(model.layers)
        return "mlx-lm computes its recurrence in a loop" if recurrent and _grows(model) else None
    kinds = [type(m) for m in layers]
    seen: list[tuple[Any, ...]] = []

    def watch(*args: Any, **kwargs: Any) -> tuple[mx.array, mx.array]:
        seen.append((args, kwargs))
        return PLAIN(*args, **kwargs)

    _give(layers, watch)
    try:
        model(mx.array([[1]]))  # never evaluated
    finally:
        for layer, kind in zip(layers, kinds, strict=True):
            layer.__class__ = kind
    if not seen:
        return "its layers with a gated delta rule are not reached by a token"
    (q, _, v, a, *_), kwargs = seen[0]
    how = {name: value for name, value in kwargs.items() if name in ("lower_bound", "allow_neg_eigval")}
    channels = a.ndim > 3
    size = GPU_CHUNK if gpu_ways() and not channels else CHUNK
    ways = [Rule(kernels=True)] if device_kind() == "metal" and hasattr(mx.fast, NAME) and not channels else []
    heads = {"each": v.shape[2] // q.shape[2], "keys": q.shape[-1], "values": v.shape[-1], "channels": channels}
    for rule in [*ways, Rule(size=size)]:
        if agrees(rule, **heads, dtype=q.dtype, how=how):
            _give(layers, rule)
            return None
    return "its gated delta rule in chunks differs from mlx-lm's"


def _grows(model: nn.Module) -> bool:
    """Whether more tokens take more operations, as a loop over them does; what goes by chunks takes a tenth more here."""
    sizes = []
    for length in (16, 48):
        graph = io.StringIO()
        mx.export_to_dot(graph, model(mx.zeros((1, length), mx.int32)))  # never evaluated
        sizes.append(graph.getvalue().count("label"))
    return sizes[1] > 1.4 * sizes[0]


def agrees(
    rule: Rule, *, each: int, keys: int, values: int, channels: bool, dtype: mx.Dtype, how: dict[str, Any]
) -> bool:
    """Whether values and gradients of one key head with `each` value heads are mlx-lm's; for kernels, whether there are any."""
    length = 2 * rule.size + 3
    gates = (each, keys) if channels else (each,)
    shapes = [(1, keys), (1, keys), (each, values), gates, (each,)]
    random = [mx.random.normal((2, length, *shape), key=mx.random.key(i)) for i, shape in enumerate(shapes)]
    start = mx.random.normal((2, each, values, keys), key=mx.random.key(len(shapes)))
    q, k = (x.astype(dtype) for x in gated_delta.normalize_qk(*random[:2], inv_scale=keys**-0.5, eps=1e-6))
    inputs = [q, k, *(x.astype(dtype) for x in random[2:]), start]
    rates, bias = mx.log(mx.linspace(0.01, 16.0, each)), mx.ones(gates)  # from hardly any decay to a strong one
    rates = rates[:, None] if channels else rates
    mask = mx.arange(length) < mx.array([[length], [length - 5]])

    def results(function: Callable[..., tuple[mx.array, mx.array]]) -> list[mx.array]:
        def total(*x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
            out, state = function(*x[:5], rates, bias, x[5], mask, use_kernel=False, **how)
            out = mx.where(mask[..., None, None], out, 0.0).astype(mx.float32)
            return mx.sin(out).sum() + mx.sin(state).sum(), out, state

        (_, out, state), gradients = mx.value_and_grad(total, argnums=tuple(range(6)))(*inputs)
        return [out, state, *gradients]

    found = results(rule)
    if rule.kernels and not _has_kernels(found):
        return False
    return all(close(x, y, dtype=dtype) for x, y in zip(found, results(PLAIN), strict=True))


def _has_kernels(results: list[mx.array]) -> bool:
    """Whether mlx computes these by its kernels: for some heads it falls back to a token at a time."""
    graph = io.StringIO()
    mx.export_to_dot(graph, *results)
    return "GatedDeltaUpdate" in graph.getvalue() and "GatedDeltaUpdateVJP" in graph.getvalue()


def rule_of(kind: type) -> Any:
    """What a layer's class calls for the gated delta rule, if it does."""
    call = _call_of(kind)
    return call.__globals__.get(NAME) if call is not None and NAME in call.__code__.co_names else None


def _call_of(kind: type) -> types.FunctionType | None:
    found = next((vars(c)["__call__"] for c in kind.__mro__ if "__call__" in vars(c)), None)
    return found if isinstance(found, types.FunctionType) else None


def _give(layers: list[nn.Module], rule: Callable[..., tuple[mx.array, mx.array]]) -> None:
    """Make each layer's class one that calls `rule`."""
    own: dict[type, type] = {}
    for layer in layers:
        kind = type(layer)
        plain = _call_of(kind)
        if kind not in own and plain is not None:
            names = {**plain.__globals__, NAME: rule}
            call = types.FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__, plain.__closure__)
            call.__kwdefaults__ = plain.__kwdefaults__
            own[kind] = type(kind.__name__, (kind,), {"__module__": kind.__module__, "__call__": call})
        layer.__class__ = own[kind]
