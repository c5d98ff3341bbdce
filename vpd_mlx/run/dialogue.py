"""A run's base model and its trained model, asked the same: one network in memory, its adapter off or on."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import TemplateError

from vpd_mlx.engine.models import first_line, lora_of
from vpd_mlx.engine.policy import Policy
from vpd_mlx.engine.sampling import Reply, Sampling, stream
from vpd_mlx.errors import ModelError, wrong_option
from vpd_mlx.feedback.prompts import Prompter
from vpd_mlx.recipe import Recipe, load_recipe
from vpd_mlx.run.log import RECIPE_FILE
from vpd_mlx.run.setup import build_prompter, load_policy
from vpd_mlx.types import Message, Problem

__all__ = ["NAMES", "Dialogue", "Pair"]

NAMES = ("base", "trained")


@dataclass(frozen=True)
class Pair:
    """A run's recipe, and its model with the adapter that it hands over."""

    recipe: Recipe
    policy: Policy
    prompter: Prompter

    @classmethod
    def load(cls, folder: Path) -> Pair:
        """Load a run's model and adapter.

        Raises:
            ModelError: there is no adapter yet, the model is gone, or the two do not fit.
        """
        adapters = folder / "adapters"
        if not (adapters / "adapters.safetensors").is_file():
            remedy = "let the run end, or stop it with Ctrl-C, which leaves one"
            raise ModelError(f"{folder}: has no adapter yet (adapters/adapters.safetensors is missing); {remedy}")
        recipe = load_recipe(folder / RECIPE_FILE).model_copy(update={"lora": lora_of(adapters)})
        policy = load_policy(recipe)
        policy.load_adapter(adapters)
        return cls(recipe, policy, build_prompter(recipe, policy.tokenizer))

    @property
    def remembers(self) -> bool:
        """Whether a prompt can follow on others: without a chat template each one stands alone."""
        return self.policy.tokenizer.chat_template is not None

    def stream(self, name: str, messages: Sequence[Message], how: Sampling, seed: int) -> Generator[Reply, None, None]:
        """The answer of the model of this name to a conversation, worded and encoded as in training, while it is decoded."""
        prompt = self.prompter.student(Problem("", tuple(messages)))
        with contextlib.nullcontext() if name == "trained" else self.policy.adapter_off():
            yield from stream(self.policy, prompt, how, seed)


@dataclass
class Dialogue:
    """Two conversations about the same prompts: each model has its own answers in its history."""

    pair: Pair
    how: Sampling
    seed: int
    system: str | None = None
    _history: dict[str, list[Message]] = field(default_factory=lambda: {name: [] for name in NAMES})
    _turn: int = 0

    def check_system(self) -> None:
        """See that the chat template takes the system message.

        Raises:
            ConfigError: it refuses it.
        """
        try:
            self.pair.prompter.encode([*self._lead, {"role": "user", "content": "x"}])
        except TemplateError as error:
            problem = f"the model's chat template refuses a system message ({first_line(error)})"
            raise wrong_option("--system", problem, "leave it out, or --system '' if it is the task's own") from None

    @property
    def _lead(self) -> list[Message]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def ask(self, prompt: str) -> Iterator[dict[str, Reply]]:
        """Both models' replies so far, token by token, base model first. A turn that is not read to its end is forgotten."""
        asked: Message = {"role": "user", "content": prompt}
        replies: dict[str, Reply] = {}
        for name in NAMES:
            messages = [*self._lead, *self._history[name], asked]
            with contextlib.closing(self.pair.stream(name, messages, self.how, self.seed + self._turn)) as growing:
                for reply in growing:
                    replies[name] = reply
                    yield dict(replies)
        self._turn += 1
        if self.pair.remembers:
            for name, reply in replies.items():
                self._history[name] += [asked, {"role": "assistant", "content": reply.text}]

    def reset(self) -> None:
        """Forget both conversations."""
        self._history = {name: [] for name in NAMES}
