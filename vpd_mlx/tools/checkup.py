"""What a run would make of a model, said from its config.json and, where it is there, its tokenizer: no weights are read.

Memory is that of the model itself, by its shapes (`engine.blueprint`). What its architecture allows is tried on a miniature of
it, in a process of its own.
"""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from jinja2.exceptions import TemplateError
from mlx_lm.utils import load_tokenizer

from vpd_mlx.common.hub import reaching_hub
from vpd_mlx.common.text import one_line, size
from vpd_mlx.common.thoughts import CHANNEL
from vpd_mlx.engine.blueprint import Blueprint
from vpd_mlx.engine.keys import experts_of, routers_of
from vpd_mlx.engine.miniature import miniature
from vpd_mlx.engine.models import TOKENIZER_FILES, first_line
from vpd_mlx.engine.settings import LoraSettings, MemorySettings
from vpd_mlx.errors import ModelError
from vpd_mlx.feedback.prompts import Prompter, Templates
from vpd_mlx.run.plan import model_config
from vpd_mlx.tools.doctor import Fact
from vpd_mlx.tools.trial import Trial, trial
from vpd_mlx.types import Message, Problem, TokenRow

__all__ = ["apart", "checkup"]

ANSWER = "It is four"
ROW = 64  # tokens of the row whose gradient is measured
Tried = Callable[[Mapping[str, Any]], Trial]


def apart(config: Mapping[str, Any]) -> Trial:
    """`trial` in a process of its own, which an architecture may crash.

    Raises:
        ModelError: it does.
        Exception: as `trial` does.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(trial, dict(config)).result()
        except BrokenProcessPool:
            raise ModelError("model: mlx crashes in this architecture; take another") from None


def checkup(model: str, revision: str | None = None, tried: Tried = apart) -> Iterator[Fact]:
    """Facts about a model folder, a config.json or a hub id; the last one of a model that cannot be trained says why.

    Raises:
        ModelError: there is no such config.
    """
    config = model_config(model, revision)
    kind = str(config.get("model_type"))
    try:
        blueprint = Blueprint.of(config, LoraSettings(), MemorySettings())
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever mlx-lm's file raises, it is said
        yield Fact("architecture", kind, f"mlx-lm cannot build it ({_line(error)}); it takes another model")
        return
    yield from _parts(config, kind, blueprint)
    yield from _memory(blueprint)
    try:
        found = tried(miniature(config))
    except Exception as error:  # noqa: BLE001 - the same
        yield Fact("training", "refused", _line(error).removeprefix("model: "))
        return
    yield from _ways(found)
    yield from _speaking(config, model, revision)


def _line(error: BaseException) -> str:
    text = first_line(error) if isinstance(error, Exception) else "its file exits"
    return one_line(text if isinstance(error, ModelError) else f"{type(error).__name__}: {text}")


def _parts(config: Mapping[str, Any], kind: str, blueprint: Blueprint) -> Iterator[Fact]:
    others = [part for part in ("vision", "audio") if config.get(f"{part}_config")]
    tower = f", its text part alone: {' and '.join(others)} are left out" if others else ""
    blocks = blueprint.model.layers
    yield Fact("architecture", f"{kind}, {len(blocks)} blocks{tower}")
    mixed = next((block for block in blocks if experts_of(block)), None)
    if mixed is not None:
        count = next(iter(experts_of(mixed).values())).weight.shape[0]
        router = ", ".join(sorted(routers_of(mixed))) or "a layer of its own"
        text = f"{count}, {blueprint.experts_per_token} a token; the router ({router}) stays frozen"
        yield Fact("experts", f"{text}, and so do the experts, unless lora.experts says otherwise")


def _memory(blueprint: Blueprint) -> Iterator[Fact]:
    adapter = size(blueprint.adapter_bytes)
    yield Fact("weights", f"{size(blueprint.weights)}, an adapter of rank {LoraSettings().rank} {adapter}")
    layers = blueprint.layers()
    token = sum(each for each, most in layers if math.isinf(most))
    windows = sum(each * most for each, most in layers if 1 < most < math.inf)
    states = sum(each for each, most in layers if most == 1)
    text = f"{token / 1024:.0f} KB a token" if token else "none that grows with a row"
    text += f", at most {size(windows)} a row in windows" if windows else ""
    text += f", {size(states)} a row in states" if states else ""
    yield Fact("memory in decoding", text)
    rows = [TokenRow(tuple(range(1, ROW // 2 + 1)), tuple(range(1, ROW // 2 + 1)))]
    most, _ = blueprint.gradient(rows)
    yield Fact(
        "memory in an update", f"{size(most / blueprint.positions(rows))} a token, before gradient_checkpointing"
    )


def _ways(found: Trial) -> Iterator[Fact]:
    def way(name: str, ok: bool, yes: str, no: str) -> Fact:
        return Fact(name, yes if ok else no)

    caches = ", ".join(found.caches)
    yield way("prompts", found.shares, "read once for all their completions", f"read for each completion ({caches})")
    yield way("head", found.splits, "fused with the loss: no whole logits", "in the model: losses hold whole logits")
    yield way("attention", found.bounded, "no whole scores of long rows", "whole scores of long rows")
    yield way("decoding", found.batches, "in batches", "one completion at a time: several times slower")
    off = found.gradient_error
    wrong = "" if off <= 1e-3 else "it is wrong: take another architecture"
    yield Fact("gradient", f"off by {off:.0e} from a plain pass for each row", wrong)
    off = found.score_error
    wrong = "" if off <= 1e-2 else "in long completions mlx-lm samples by other scores than it computes: take another"
    yield Fact("samples", f"scored as they were drawn, to {off:.0e}", wrong)


def _speaking(config: Mapping[str, Any], model: str, revision: str | None) -> Iterator[Fact]:
    """Stop tokens, thinking, and how prompts are rendered."""
    ids = config.get("eos_token_id")
    folder = Path(model)
    try:
        if not folder.exists():
            with reaching_hub():
                folder = Path(snapshot_download(model, revision=revision, allow_patterns=TOKENIZER_FILES))
        tokenizer = load_tokenizer(folder, eos_token_ids=ids) if (folder / "tokenizer_config.json").is_file() else None
    except Exception as error:  # noqa: BLE001 - whatever is wrong with its files
        yield Fact("tokenizer", "cannot be loaded", _line(error))
        return
    if tokenizer is None:
        yield Fact("stop tokens", f"{ids if ids is not None else 'none'} in config.json; there is no tokenizer to ask")
        return
    names = [f"{tokenizer.decode([i])} ({i})" for i in sorted(tokenizer.eos_token_ids)]
    yield Fact(
        "stop tokens", ", ".join(names) or "none", "" if names else "completions would never stop: add eos_token_id"
    )
    if tokenizer.chat_template is None and not tokenizer.has_chat_template:
        yield Fact("chat template", "none: prompts are plain text")
        return
    yield from _rendering(Prompter(tokenizer, Templates(), False, 4096, 1024, 4096))


def _rendering(plain: Prompter) -> Iterator[Fact]:
    tokenizer = plain.tokenizer
    thoughtful = Prompter(tokenizer, Templates(), True, 4096, 1024, 4096)
    ask: list[Message] = [{"role": "user", "content": "2+2?"}]
    try:
        off, on = plain.encode(ask), thoughtful.encode(ask)
        student = plain.student(problem := Problem("x", tuple(ask), "4"))
        teacher, _ = plain.teacher(problem, "verifier", "It is 4.")
    except (TemplateError, ValueError) as error:
        yield Fact("chat template", "refuses a user's message", _line(error))
        return
    yield from _ending(tokenizer, ask)
    switch = "switched by the recipe's `thinking`" if on != off else "no switch in the chat template"
    marks = tokenizer.think_start or ("channels" if CHANNEL in tokenizer.get_vocab() else "no tokens of their own")
    yield Fact("thinking", f"{switch}; thoughts are in {marks}")
    tail = _tail(*(plain.encode([{"role": "user", "content": text}]) for text in ("one", "a b")))
    same = bool(tail) and student[-len(tail) :] == teacher[-len(tail) :]
    text = f"both end in {tokenizer.decode(list(tail))!r}" if same else "their ends differ"
    yield Fact(
        "student and teacher", text, "" if same else "they would not score the same completion: mend the template"
    )


def _ending(tokenizer: Any, ask: list[Message]) -> Iterator[Fact]:
    """What the template puts behind an answer: a completion that ends in no stop token runs on to its limit."""
    if CHANNEL in tokenizer.get_vocab():
        return  # gpt-oss ends an earlier answer otherwise than one that it gives
    said: list[Message] = [*ask, {"role": "assistant", "content": ANSWER}]
    ids = tokenizer.apply_chat_template(said, tokenize=True, enable_thinking=False)
    after = next((n for n in range(len(ids)) if ANSWER in tokenizer.decode(ids[: n + 1])), None)
    if after is None or after + 1 == len(ids):
        return
    end = int(ids[after + 1])
    stops = end in tokenizer.eos_token_ids
    remedy = (
        "" if stops else "it is no stop token: completions run on; add it to eos_token_id in generation_config.json"
    )
    yield Fact("end of an answer", f"{tokenizer.decode([end])} ({end})", remedy)


def _tail(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    n = 0
    while n < min(len(one), len(other)) and one[-1 - n] == other[-1 - n]:
        n += 1
    return one[len(one) - n :]
