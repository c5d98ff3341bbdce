"""A command line that cannot be understood: one line with the word, what is wrong with it, and what was probably meant."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

import typer

from vpd_mlx.common.settings import Section
from vpd_mlx.errors import ConfigError, wrong_option
from vpd_mlx.recipe import Recipe, model_fields
from vpd_mlx.tasks import TASKS

__all__ = ["SHORT", "UsageError", "refusal"]

UsageError: type[Any] = typer.BadParameter.__bases__[0]
"""The parent of all errors of a command line; typer has brought its own copy of click since 0.20."""

SHORT = {
    "model": "model",
    "adapter": "adapter",
    "name": "name",
    "algorithm": "algorithm",
    "steps": "steps",
    "seed": "seed",
    "lr": "optimizer.learning_rate",
    "data": "task.data",
    "verifier": "task.verifier",
}
"""Flags of `vpd-mlx train` that are short for a key of the recipe."""

ELSEWHERE = {
    # mlx_lm.lora
    "iters": "--steps",
    "batch-size": "rollout.prompts",
    "num-layers": "lora.layers",
    "learning-rate": "--lr",
    "adapter-path": "--out",
    "resume-adapter-file": "--adapter",
    "max-seq-length": "rollout.max_prompt_tokens",
    "grad-checkpoint": "memory.gradient_checkpointing",
    "val-batches": "evaluation.problems",
    "steps-per-eval": "evaluation.every",
    "save-every": "checkpoint.every",
    "warmup": "optimizer.warmup_steps",
    "mask-prompt": "",
    "config": "RECIPE",
    # TRL, Unsloth
    "model-name": "--model",
    "model-name-or-path": "--model",
    "dataset": "--data",
    "dataset-name": "--data",
    "output-dir": "--out",
    "max-steps": "--steps",
    "num-train-epochs": "--steps",
    "epochs": "--steps",
    "per-device-train-batch-size": "rollout.prompts",
    "num-generations": "rollout.group_size",
    "num-samples": "rollout.group_size",
    "max-completion-length": "rollout.max_completion_tokens",
    "max-new-tokens": "rollout.max_completion_tokens",
    "max-tokens": "rollout.max_completion_tokens",
    "max-prompt-length": "rollout.max_prompt_tokens",
    "temp": "rollout.temperature",
    "lora-r": "lora.rank",
    "lora-alpha": "lora.scale",
    "use-gradient-checkpointing": "memory.gradient_checkpointing",
    "max-grad-norm": "optimizer.grad_clip",
    "report-to": "logging.to",
    "reward-funcs": "--verifier",
    "reward": "--verifier",
    "judge": "--verifier",
    "resume-from-checkpoint": "--resume",
}
"""What other trainers call it -> the flag or the recipe's key here; empty where nothing of the kind is needed."""


def refusal(error: Any, argv: Sequence[str]) -> ConfigError:
    """The usage error that typer raised on `argv`, in one line."""
    context = error.ctx
    command = "vpd-mlx" if context is None else " ".join(["vpd-mlx", *context.command_path.split()[1:]]).strip()
    path = re.sub(r"^vpd-mlx .*?-m \S+ ?", "vpd-mlx ", command)
    see = f"see {path} --help"
    name = getattr(error, "option_name", None)
    if type(error).__name__ == "NoSuchOption" and name is not None:
        return wrong_option(name, f"{path} has no such option", _meant(name, argv, context, see))
    if name is not None:
        what = "takes no value" if "does not take" in error.message else "lacks its value"
        return wrong_option(name, what, "see the command's --help" if context is None else see)
    if type(error).__name__ == "MissingParameter":
        return wrong_option(_label(error), "is missing", see)
    if isinstance(error, typer.BadParameter):
        label = _label(error)
        return wrong_option(label, f"got {_given(label, argv)!r}", f"needs {_needed(error)}")
    unknown = re.match(r"No such command '(.*?)'", error.format_message())
    if unknown is not None:
        names = list(context.command.commands) if context is not None else []
        close = difflib.get_close_matches(unknown[1], names, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(names)}"
        return wrong_option(unknown[1], "is no command", hint)
    extra = re.match(r"Got unexpected extra argument(?:s|\(s\))? \((.*)\)", error.format_message())
    if extra is not None:
        return wrong_option(extra[1], f"is more than {path} takes", f"quote what belongs together, or {see}")
    return wrong_option(path, error.format_message().rstrip("."), see)


def _label(error: Any) -> str:
    """What stands for a parameter on the command line."""
    param = error.param
    if param is None:
        return "argument"
    if not param.opts[0].startswith("-"):
        return str(param.metavar or param.name.upper())
    return str(max(param.opts, key=len))


def _given(label: str, argv: Sequence[str]) -> str:
    for at, word in enumerate(argv):
        if word == label and at + 1 < len(argv):
            return argv[at + 1]
        if word.startswith(f"{label}="):
            return word.partition("=")[2]
    return next((word for word in reversed(argv) if not word.startswith("-")), "")


def _needed(error: Any) -> str:
    """What typer, or pydantic behind it, asks for, without either's phrases."""
    text = error.message.removeprefix("Value error, ").removeprefix("Input should be ").rstrip(".")
    for pattern, words in (
        (r"a valid integer.*", "a whole number"),
        (r"a valid number.*", "a number"),
        (r".* is not a valid integer.*", "a whole number"),
        (r".* is not a valid float.*", "a number"),
        (r"greater than or equal to (\S+)", r"at least \1"),
        (r".* is not one of (.*)", r"one of \1"),
        (r".*not in the range x>=(\S+)", r"at least \1"),
    ):
        text, found = re.subn(f"^{pattern}$", words, text)
        if found:
            break
    return str(text)


def _meant(option: str, argv: Sequence[str], context: Any, see: str) -> str:
    """The remedy for an option that a command does not have."""
    flags = [flag for param in context.command.params for flag in param.opts if flag.startswith("--")]
    word, value = option.lstrip("-").replace("_", "-"), _value(option, argv)
    known = ELSEWHERE.get(word)
    if known == "":
        return "leave it out: nothing of the kind is needed here"
    if known == "RECIPE":
        return f"write the file alone: {value}".rstrip(": ")
    if known in flags:
        return f"write {shlex.join(filter(None, (known, value)))}"
    if known is None and (close := difflib.get_close_matches(f"--{word}", flags, n=1, cutoff=0.8)):
        return f"did you mean {close[0]}?"
    keys = list(_keys(word.replace("-", "_"))) if known is None else [SHORT.get(known.removeprefix("--"), known)]
    keys = [key for key in keys if not key.startswith("--")]
    if "--set" not in flags or not keys:
        return see
    return f"write {' or '.join(shlex.join(['--set', f'{key}={value}']) for key in keys)}"


def _value(option: str, argv: Sequence[str]) -> str:
    """What follows an option on the command line, if it looks like a value."""
    for at, word in enumerate(argv):
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
        if word == option:
            value = argv[at + 1] if at + 1 < len(argv) else ""
            return "" if value.startswith("--") else value
    return ""


def _keys(word: str) -> Iterator[str]:
    """At most three keys of a recipe that an option may mean: by their last part, whole or nearly, or by several parts."""
    every = [path for path, _ in model_fields(Recipe) if path != "task"]
    every += [f"task.{name}" for settings, _ in TASKS for name in _own(settings)]
    every = list(dict.fromkeys(every))
    same = [key for key in every if key.rpartition(".")[2] == word or key.replace(".", "_") == word]
    if not same:
        lasts = difflib.get_close_matches(word, {key.rpartition(".")[2] for key in every}, n=1, cutoff=0.75)
        same = [key for key in every if lasts and key.rpartition(".")[2] == lasts[0]]
    if not same and len(word) > 3:
        same = [key for key in every if key.rpartition(".")[2].startswith(word)]
    yield from same[:3]


def _own(settings: type[Section]) -> list[str]:
    return [name for name in settings.model_fields if name != "kind"]
