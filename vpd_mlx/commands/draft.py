"""A first recipe for a model and a kind of task: limits, rate and wording that fit, so that it runs before anybody edits it.

`vpd-mlx new` writes it down; `vpd-mlx train --model … --data …` without a recipe trains by it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from vpd_mlx.common.settings import parse_yaml
from vpd_mlx.recipe import builtin_recipes

__all__ = ["KINDS", "Size", "draft", "plain_name", "size_of"]

KINDS = {
    "python": 256,
    "exact": 64,
    "math": 512,
    "mcq": 256,
    "regex": 64,
    "json-schema": 256,
    "code": 512,
    "reasoning_gym": 512,
}
"""Kinds of task that can be begun with -> most tokens of a completion."""
SMALL = 300_000_000  # parameters: models below it took 5e-4 in recipes/smollm2, those above take the default 1e-4
TEMPLATES = """
templates:                  # the wordings that the tiny model was trained to read; a real model needs none of this
  sibling: "{prompt}\\nA correct answer: {context}"
  verifier: "{prompt}\\nFeedback: {context}"
  review: "{prompt}\\nFeedback: {context}"     # of command, server, human and replay
"""
MEMORY = """
memory:
  gradient_checkpointing: true
  micro_batch_tokens: {tokens}

evaluation:
  samples: 2
"""


@dataclass(frozen=True)
class Size:
    """What a recipe must know of a model: its positions and its parameters, None where its config does not tell."""

    positions: int | None = None
    parameters: int | None = None


def size_of(config: Mapping[str, Any]) -> Size:
    """The size by a model's config.json: the parameters of its embedding and of dense blocks, about 12 D² each."""
    config = {**config, **(config.get("text_config") or {})}

    def whole(*names: str) -> int | None:
        found = next((config[n] for n in names if isinstance(config.get(n), int)), None)
        return None if isinstance(found, bool) else found

    width, blocks = whole("hidden_size", "n_embd", "dim"), whole("num_hidden_layers", "n_layer", "n_layers")
    positions = whole("max_position_embeddings", "n_positions", "max_seq_len")
    if width is None or blocks is None:
        return Size(positions)
    return Size(positions, blocks * 12 * width * width + (whole("vocab_size") or 0) * width)


def draft(name: str, model: str | None, kind: str, size: Size, *, task: Mapping[str, Any], file: str = "") -> str:
    """A recipe's text. Without a model it is the one that comes with the package. `task` has the keys of the task but its kind.

    `file` is where the recipe will stand, for the command in its first lines.
    """
    tiny = model is None
    prompt = min(64 if tiny else 2048, (size.positions or 4096) // 2)
    completion = min(6 if tiny else KINDS[kind], (size.positions or 4096) // 4)
    context = 32 if tiny else min(512, prompt // 2)
    own = kind == "python"
    lines = [f"kind: {kind}", *(f"{key}: {in_yaml(value)}" for key, value in task.items())]
    comments = {
        "data": "# one problem a line: prompt, answer" + (", and whatever else your verifier needs" if own else ""),
        "verifier": "# verify(problem, completion) -> score in 0..1, or (score, what is wrong in words)",
        "held_out": "# chosen by a hash of each row, so that the split never changes",
    }
    lines = [f"  {line:<25} {comments.get(line.partition(':')[0], '')}".rstrip() for line in lines]
    small = size.parameters is not None and size.parameters < SMALL
    template = (files("vpd_mlx.commands") / "new.yaml").read_text(encoding="utf-8")
    text = template.format(
        name=in_yaml(name),
        file=file,
        where=", on the tiny model that comes with the package" if tiny else "",
        parts=(", your own verifier" if own else "") + (" and your own model" if tiny else ""),
        model=in_yaml(_tiny_model() if model is None else model),
        task="\n".join(lines),
        sources="sibling, verifier" if own else "sibling, reference, verifier",
        context=context,
        group=4 if tiny else 8,
        prompt=prompt,
        completion=completion,
        limits="  # for a real model: 2048 and 256"
        if tiny
        else "  # a completion that is longer is cut off, and wrong",
        temperature="" if tiny else "  temperature: 0.8\n",
        rate="5e-4" if tiny or small else "1e-4",
        rates="" if not tiny else "       # 1e-4 for models of 0.5B and more",
        rest=TEMPLATES if tiny else MEMORY.format(tokens=max(4096, prompt + completion)),
    )
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def in_yaml(text: Any) -> str:
    """A value as YAML reads it back: a text in quotes where it would be a number, a truth value or more than a plain scalar."""
    if not isinstance(text, str):
        return json.dumps(text)
    plain = re.fullmatch(r"[\w./~+-][\w./~+ -]*", text) and text == text.strip() and parse_yaml(text, "") == text
    return text if plain else json.dumps(text)


def plain_name(text: str) -> str:
    """A run's name from a file's or a model's: letters, digits, dots and dashes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("._-") or "run"


def config_of(model: str) -> dict[str, Any]:
    """A model's config.json; of one on the hub, this file alone is fetched.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    from vpd_mlx.run.plan import model_config  # late: it loads mlx

    return model_config(model, None)


def _tiny_model() -> str:
    return str(builtin_recipes()["quickstart"].parent / "model")
