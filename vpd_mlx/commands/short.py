"""`vpd-mlx train`'s short forms of recipe keys, and the recipe that they make where none is named."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vpd_mlx.commands.draft import config_of, draft, plain_name, size_of
from vpd_mlx.commands.usage import SHORT
from vpd_mlx.common.settings import HUB, parse_set, parse_yaml
from vpd_mlx.errors import ConfigError, Fault, wrong_option
from vpd_mlx.recipe import Recipe, load_recipe, made_recipe, resolve_recipe_path

__all__ = ["asked_recipe", "by_key", "named_flags"]

FILES = ("model", "adapter", "data", "verifier")  # whose paths are relative to the folder where the command is given


def by_key(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Recipe key -> value of each short form that is given, paths absolute."""
    return {SHORT[flag]: _absolute(flag, value) for flag, value in flags.items() if value is not None}


def _absolute(flag: str, value: Any) -> Any:
    if flag not in FILES or value.startswith(HUB):
        return value
    path = Path(value).expanduser()
    if flag == "model" and not path.exists() and not value.startswith((".", "/", "~")):
        return value  # on the hub
    return str(path.resolve())


@contextlib.contextmanager
def named_flags(flags: Mapping[str, Any]) -> Iterator[None]:
    """Within the block a fault of a key that came by its short form names the flag."""
    names = {SHORT[flag]: f"--{flag}" for flag, value in flags.items() if value is not None}
    try:
        yield
    except ConfigError as error:
        if not any(f.path in names for f in error.faults):
            raise
        faults = [Fault(names.get(f.path, f.path), f.problem, f.remedy) for f in error.faults]
        alone = all(f.path in names for f in error.faults)
        raise ConfigError(faults, "command line" if alone else error.where) from None


def asked_recipe(recipe: str | None, sets: list[str] | None, flags: Mapping[str, Any]) -> Recipe:
    """The recipe by name or file with `--set` and then the short forms laid over it; without one, but with rows, a draft.

    Raises:
        ConfigError: every fault found; one that came by a short form names the flag.
    """
    keys = by_key(flags)
    overrides = [*parse_set(sets or []), *keys.items()]
    if "model" in keys:
        overrides.insert(0, ("model_revision", None))  # the recipe's is that of another model
    with named_flags(flags):
        if recipe is None and flags.get("data") is not None:
            return _drafted(flags, keys, overrides)
        path = resolve_recipe_path(recipe or "quickstart")
        if "task.data" in keys or "task.verifier" in keys:
            _refuse_other_task(path, overrides, flags)
        return load_recipe(path, overrides)


def _drafted(flags: Mapping[str, Any], keys: Mapping[str, Any], overrides: list[tuple[str, Any]]) -> Recipe:
    """The recipe that `vpd-mlx new` would write for this model, with these rows."""
    if "model" not in keys:
        raise wrong_option("--model", "is missing, and --data without a RECIPE needs it", "name a model, or a RECIPE")
    kind = "exact" if flags.get("verifier") is None else "python"
    name = flags.get("name") or plain_name(Path(keys["task.data"]).stem)
    task = {key.removeprefix("task."): value for key, value in keys.items() if key.startswith("task.")}
    text = draft(name, keys["model"], kind, size_of(config_of(keys["model"])), task=task)
    where = "the recipe of --model and --data"
    return made_recipe(parse_yaml(text, where), where, Path.cwd(), overrides)


def _refuse_other_task(path: Path, overrides: list[tuple[str, Any]], flags: Mapping[str, Any]) -> None:
    """A recipe whose task reads no rows, or brings a verifier of its own, has no use for the flag."""
    own = load_recipe(path, [(key, value) for key, value in overrides if not key.startswith("task.")]).task
    faults = [
        Fault(f"--{flag}", f"the task of {path.stem}, {own.kind}, {has}", "leave RECIPE out, or name another")
        for flag, has in (("data", "makes its own problems"), ("verifier", "has a verifier of its own"))
        if flags.get(flag) is not None and flag not in type(own).model_fields
    ]
    if faults:
        raise ConfigError(faults, "command line")
