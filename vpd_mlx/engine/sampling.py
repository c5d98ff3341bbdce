"""Sampling: groups of completions from the student, one prefill per prompt, all rows decoded side by side.

The only module that touches mlx-lm's `BatchGenerator`.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import BatchGenerator, generation_stream, stream_generate
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import categorical_sampling, make_sampler

from vpd_mlx import losses
from vpd_mlx.engine.device import gpu_ways
from vpd_mlx.engine.live_rows import LiveRows
from vpd_mlx.engine.memory import free, out_of_memory
from vpd_mlx.engine.nucleus import nucleus
from vpd_mlx.engine.policy import Policy
from vpd_mlx.types import FinishReason, Rollout

__all__ = ["Finished", "Reply", "Sampling", "can_merge", "default_streams", "generate", "stream"]

PREFILL = 2048  # prompt tokens read at once
PATIENCE = 5.0  # seconds for the decoding threads to end with the process
CPU_STREAMS = 2  # one mlx stream keeps one core busy; a constant, so that a run is the same on any number of cores


@dataclass(frozen=True)
class Sampling:
    """How to sample. `temperature` 0 is greedy; `rows` bounds the sequences decoded side by side; `streams` is the number of
    threads among which prompts are divided, each with draws of its own; None takes the number that suits the device."""

    temperature: float
    top_p: float
    max_tokens: int
    rows: int | None = None
    streams: int | None = 1


class _Float32:
    """A model whose logits are float32: mlx-lm's generators take log-probabilities in the dtype of the logits.

    In half precision a log-probability of -8 would be off by up to 0.03, and draws would follow the rounded ones.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, *inputs: Any, **named: Any) -> mx.array:
        logits: mx.array = self._model(*inputs, **named)
        return logits.astype(mx.float32)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def default_streams(model: nn.Module) -> int:
    """How many threads decode when the recipe does not say: a GPU is one device, a CPU has cores to spare.

    For quantised products, that is, which keep one core busy. Dense ones are a BLAS's, whose threads two of ours would fight.
    """
    quantised = any(hasattr(part, "bits") for part in model.modules())
    return CPU_STREAMS if quantised and not gpu_ways() else 1


Finished = tuple[int, int, Rollout]
"""(prompt index, sample index, rollout)."""


@dataclass(frozen=True)
class Reply:
    """A completion that is being decoded: its text, its tokens so far, and how it ended, once it has."""

    text: str
    tokens: int
    finish: FinishReason | None


def stream(policy: Policy, prompt: tuple[int, ...], how: Sampling, seed: int) -> Iterator[Reply]:
    """One completion for a person who watches: the reply so far after each token; the last one has its `finish`.

    The same seed and prompt give the same tokens, at temperature 0 those of `generate`.
    """
    mx.random.seed(seed)
    text, ids = "", list[int]()
    for part in stream_generate(
        _Float32(policy.model), policy.tokenizer, list(prompt), max_tokens=how.max_tokens, sampler=_sampler(how)
    ):
        text += part.text
        ids.append(part.token)
        if part.finish_reason is None:
            yield Reply(text, len(ids), None)
    last = _rollout(policy, ids, [], "length")
    yield Reply(last.text, len(ids), last.finish)


def generate(
    policy: Policy, prompts: Sequence[tuple[int, ...]], samples: int, how: Sampling, seed: int
) -> Generator[Finished, None, None]:
    """Sample `samples` completions of each prompt; yields (prompt index, sample index, rollout) as each one finishes.

    The same seed, prompts and counts give the same tokens. Log-probabilities are those at `how.temperature`, over the whole
    vocabulary: without the nucleus. Greedy completions have those at temperature 1.

    When memory runs out, all rows are sampled again by the same seed, half as many side by side, and so it is from then on: what
    comes is what `how.rows` of that number gives. A place that was yielded before is yielded again, and replaces what it had.
    """
    while True:
        bounds = [n for n in (how.rows, policy.rollout_rows) if n is not None]
        now = replace(how, rows=min(bounds, default=None))
        try:
            yield from _once(policy, prompts, samples, now, seed)
            return
        except (RuntimeError, MemoryError) as error:
            width = min(len(prompts) * samples, now.rows or len(prompts) * samples)
            if not out_of_memory(error) or width < 2:
                raise
            policy.rollout_rows = width // 2
        free()
        policy.notes.append(
            f"memory ran out: memory.rollout_rows is {policy.rollout_rows} from here on, and these completions are "
            "sampled again; set it in the recipe to avoid this"
        )


def _once(
    policy: Policy, prompts: Sequence[tuple[int, ...]], samples: int, how: Sampling, seed: int
) -> Iterator[Finished]:
    parts = min(how.streams or default_streams(policy.model), len(prompts), how.rows or len(prompts))
    if parts > 1:
        yield from _side_by_side(policy, prompts, samples, how, seed, parts)
        return
    for finished in _steps(policy, prompts, samples, replace(how, streams=1), seed):
        yield from finished


class _Decoder(threading.Thread):
    """A thread that decodes for as long as the process runs.

    mlx keeps a thread of its own for each one that ever computed, and slows down with their number.
    """

    def __init__(self, part: int) -> None:
        super().__init__(name=f"rollout-{part}", daemon=True)
        self.tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.working = False
        self.start()

    def run(self) -> None:
        """Do one task after another; None ends it."""
        while (task := self.tasks.get()) is not None:
            self.working = True
            try:
                task()
            finally:
                self.working = False
        mx.clear_streams()  # mlx's own must not outlive the thread, or the process may abort at its end


_decoders: list[_Decoder] = []


@atexit.register
def _end_decoders() -> None:
    for decoder in _decoders:
        decoder.tasks.put(None)
    for decoder in _decoders:
        decoder.join(PATIENCE)


def _side_by_side(
    policy: Policy, prompts: Sequence[tuple[int, ...]], samples: int, how: Sampling, seed: int, parts: int
) -> Iterator[Finished]:
    """Each part of the prompts in a thread of its own, for devices whose one stream leaves cores idle.

    mlx keeps streams and random states by thread, so that a part's draws depend on its seed alone.
    """
    results: queue.SimpleQueue[list[Finished] | BaseException | None] = queue.SimpleQueue()
    stop, ended = threading.Event(), threading.Semaphore(0)
    rows = None if how.rows is None else how.rows // parts

    def work(part: int) -> None:
        start, end = len(prompts) * part // parts, len(prompts) * (part + 1) // parts
        try:
            steps = _steps(policy, prompts[start:end], samples, replace(how, rows=rows), seed + part)
            with contextlib.closing(steps):
                for finished in steps:
                    if stop.is_set():
                        return
                    if finished:
                        results.put([(start + p, n, r) for p, n, r in finished])
            results.put(None)
        except BaseException as error:  # noqa: BLE001 - raised again where the results are asked for
            results.put(error)
        finally:
            ended.release()

    mx.eval(policy.model.parameters())  # what was put in lazily belongs to this thread's stream
    _decoders.extend(_Decoder(part) for part in range(len(_decoders), parts))
    for part in range(parts):
        _decoders[part].tasks.put(functools.partial(work, part))
    try:
        left = parts
        while left:
            found = results.get()
            if isinstance(found, BaseException):
                raise found
            if found is None:
                left -= 1
            else:
                yield from found
    finally:
        stop.set()
        for _ in range(parts):
            ended.acquire()


def _steps(
    policy: Policy, prompts: Sequence[tuple[int, ...]], samples: int, how: Sampling, seed: int
) -> Generator[list[Finished], None, None]:
    """Decode token by token; yields after each the rows that it finished."""
    total = len(prompts) * samples
    if not total:
        return
    mx.random.seed(seed)
    width = min(total, how.rows or total, policy.widest or total)
    once = samples > 1 or policy.reads_alone
    together = once and width == total and all(len(p) > 1 for p in prompts)
    cache = _behind_prompts(policy, prompts, samples) if together else None
    if cache is not None:
        yield from _all_at_once(policy, prompts, cache, samples, how)
    else:
        yield from _continuous(policy, prompts, samples, how, width)


def _sampler(how: Sampling) -> Any:
    if how.temperature == 0.0 or how.top_p == 1.0 or gpu_ways():
        # On a GPU mlx sorts to find the largest, too.
        return make_sampler(temp=how.temperature, top_p=how.top_p if how.top_p < 1.0 else 0.0)
    return lambda logps: categorical_sampling(nucleus(logps, how.top_p), how.temperature)


def _at(temperature: float, logps: mx.array, tokens: mx.array) -> mx.array:
    """The tokens' log-probabilities (...,) at a temperature, float32, from (..., V) at temperature 1; 0 counts as 1."""
    if temperature in (0.0, 1.0):
        return mx.take_along_axis(logps, tokens[..., None], axis=-1)[..., 0].astype(mx.float32)
    return losses.token_logps(logps.astype(mx.float32) / temperature, tokens)


def _all_at_once(
    policy: Policy, prompts: Sequence[tuple[int, ...]], cache: list[Any], samples: int, how: Sampling
) -> Generator[list[Finished], None, None]:
    """All rows from first to last, behind prompts that were read once.

    What `BatchGenerator` does where no row waits for a place, with the same draws, without what its other uses need: each row's
    whole distribution, stop sequences, copies of finished rows' caches.
    """
    sampler, stops = _sampler(how), set(policy.tokenizer.eos_token_ids)
    rows = [(p, n) for p in range(len(prompts)) for n in range(samples)]
    held = LiveRows(cache, [len(prompts[p]) for p, _ in rows])
    done: dict[tuple[int, int], tuple[list[int], list[float]]] = {at: ([], []) for at in rows}
    # mlx lets few tasks wait, counted over all streams: beside another thread, async_eval waits for that one's.
    start: Callable[..., None] = mx.async_eval if how.streams == 1 else mx.eval

    def step(tokens: mx.array) -> tuple[mx.array, mx.array]:
        logits = held.live(policy.model(held.spread(tokens)[:, None], cache=cache)[:, -1, :]).astype(mx.float32)
        logps = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        sampled = sampler(logps)
        # Only the sampled token's is kept: a row of log-probabilities would pin the whole (rows, V) buffer.
        chosen = _at(how.temperature, logps, sampled)
        start(sampled, chosen)
        return sampled, chosen

    with mx.stream(generation_stream):
        tokens, chosen = step(mx.array([prompts[p][-1] for p, _ in rows]))
    for length in range(1, how.max_tokens + 1):
        here, scores = tokens, chosen
        if length < how.max_tokens:  # the device computes the next tokens while we look at these
            with mx.stream(generation_stream):
                tokens, chosen = step(here)
        mx.eval(here, scores)  # waits without blocking Python's other threads, unlike a conversion
        finished, keep = [], []
        drawn = zip(rows, np.array(here).tolist(), np.array(scores).tolist(), strict=True)
        for i, (at, token, score) in enumerate(drawn):
            done[at][0].append(token)
            done[at][1].append(score)
            if token in stops or length == how.max_tokens:
                ids, logps = done.pop(at)
                finished.append((*at, _rollout(policy, ids, logps, "length")))
            else:
                keep.append(i)
        yield finished
        if not keep:
            return
        if len(keep) < len(rows):
            rows = [rows[i] for i in keep]
            held.keep(keep)
            index = mx.array(keep)
            tokens, chosen = tokens[index], chosen[index]


class _Bounded(BatchGenerator):  # type: ignore[misc]
    """Never more rows than places. mlx-lm does not count the prompts that it is reading, which all become rows in the end."""

    def _next(self) -> Any:
        reading = len(self._prompt_batch)
        free = self.completion_batch_size - len(self._generation_batch)
        self.prefill_batch_size = max(reading, free) if reading else self.completion_batch_size
        return super()._next()


def _continuous(
    policy: Policy, prompts: Sequence[tuple[int, ...]], samples: int, how: Sampling, width: int
) -> Generator[list[Finished], None, None]:
    """At most `width` rows at a time: the next one takes the place of one that has finished."""
    generator = _Bounded(
        _Float32(policy.model),
        stop_tokens=[[int(t)] for t in sorted(policy.tokenizer.eos_token_ids)],
        sampler=_sampler(how),
        completion_batch_size=width,
        prefill_batch_size=width,
    )
    try:
        places = _insert(policy, generator, prompts, samples, how.max_tokens)
        tokens: dict[int, list[int]] = {uid: [] for uid in places}
        scores: dict[int, list[tuple[int, int]]] = {uid: [] for uid in places}
        columns: list[mx.array] = []
        while responses := generator.next_generated():
            # One gather a step for all rows: a kept row of log-probabilities would pin the whole (rows, V) buffer.
            rows = mx.stack([r.logprobs for r in responses])
            column = _at(how.temperature, rows, mx.array([r.token for r in responses]))
            del rows
            mx.async_eval(column)  # type: ignore[no-untyped-call]
            columns.append(column)
            finished = []
            for i, r in enumerate(responses):
                tokens[r.uid].append(r.token)
                scores[r.uid].append((len(columns) - 1, i))
                if r.finish_reason is not None:
                    finished.append((r.uid, r.finish_reason))
            del responses  # finished rows carry a copy of their cache
            values = {at: np.array(columns[at]) for uid, _ in finished for at, _ in scores[uid]}
            done = []
            for uid, reason in finished:
                logps = [float(values[at][i]) for at, i in scores.pop(uid)]
                done.append((*places[uid], _rollout(policy, tokens.pop(uid), logps, reason)))
            yield done
    finally:
        generator.close()


def _behind_prompts(policy: Policy, prompts: Sequence[tuple[int, ...]], samples: int) -> list[Any] | None:
    """One cache for all rows, each prompt read once and nothing kept of it but the rows' own copies."""
    if not can_merge(policy):
        return None
    by_layer = [list(layers) for layers in zip(*(_read(policy, p) for p in prompts), strict=True)]
    merged = []
    while by_layer:
        layers = by_layer.pop(0)
        merged.append(layers[0].merge([layer for layer in layers for _ in range(samples)]))
        del layers
        mx.eval(merged[-1].state)  # the prompts' own keys go layer by layer, as the rows' come
    return merged


def can_merge(policy: Policy) -> bool:
    """Whether rows of this architecture can start from what one of them read."""
    return all(hasattr(c, "merge") for c in make_prompt_cache(policy.model))


def _read(policy: Policy, prompt: tuple[int, ...]) -> list[Any]:
    """The cache behind all of the prompt but its last token."""
    cache: list[Any] = make_prompt_cache(policy.model)
    for start in range(0, len(prompt) - 1, PREFILL):
        policy.model(mx.array([prompt[start : min(start + PREFILL, len(prompt) - 1)]]), cache=cache)
        mx.eval([c.state for c in cache])
    return cache


class _ReadWhenNeeded:
    """A prompt's cache, read when the first of its rows gets a place: `BatchGenerator` then asks for the layers one by one."""

    def __init__(self, policy: Policy, prompt: tuple[int, ...]) -> None:
        self._layers = functools.cache(lambda: _read(policy, prompt))

    def __len__(self) -> int:
        return len(self._layers())

    def __getitem__(self, layer: int) -> Any:
        return self._layers()[layer]


def _insert(
    policy: Policy, generator: BatchGenerator, prompts: Sequence[tuple[int, ...]], samples: int, max_tokens: int
) -> dict[int, tuple[int, int]]:
    """Queue all rows; a prompt with several samples is read once, and its cache shared."""
    places: dict[int, tuple[int, int]] = {}
    share = (samples > 1 or policy.reads_alone) and can_merge(policy)
    for p, prompt in enumerate(prompts):
        shared = share and len(prompt) > 1
        caches: Any = [_ReadWhenNeeded(policy, prompt)] * samples if shared else None
        ids = prompt[-1:] if shared else prompt
        uids = generator.insert([list(ids) for _ in range(samples)], [max_tokens] * samples, caches)
        places.update({uid: (p, n) for n, uid in enumerate(uids)})
    return places


def _rollout(policy: Policy, ids: list[int], logps: list[float], reason: FinishReason) -> Rollout:
    stopped = ids[-1] in policy.tokenizer.eos_token_ids
    text = policy.tokenizer.decode(ids[:-1] if stopped else ids)
    return Rollout(tokens=tuple(ids), logps=tuple(logps), text=text, finish="stop" if stopped else reason)
