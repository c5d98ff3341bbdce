"""`vpd-mlx new`: a folder with a task of your own that runs as it is."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from vpd_mlx.commands.draft import KINDS, Size, config_of, draft, size_of
from vpd_mlx.commands.starters import starter
from vpd_mlx.errors import ModelError, wrong_option
from vpd_mlx.recipe import NAME, schema_file

__all__ = ["new"]

SCHEMA = "recipe.schema.json"  # named in the recipe's first line, for editors


def new(
    name: Annotated[str, typer.Argument(help="Name of the folder, and of the recipe in it.")],
    model: Annotated[
        str | None,
        typer.Option(help="A model folder or a hub id.", show_default="the tiny model that comes with the package"),
    ] = None,
    task: Annotated[str, typer.Option(metavar="KIND", help=f"Kind of task: {', '.join(KINDS)}.")] = "python",
) -> None:
    """Write a folder with a commented recipe for a model, some rows and a verifier: a task of your own that runs as it is.

    Limits, rate and templates are those for the model, by its config.json; of a model on the hub only this file is fetched.
    """
    folder = Path(name).expanduser()
    if not re.fullmatch(NAME, folder.name):
        raise wrong_option("NAME", f"{folder.name!r} cannot name a run", "use letters, digits, dots and dashes")
    if folder.is_file() or (folder.exists() and any(folder.iterdir())):
        raise wrong_option(
            "NAME", f"{folder} {'is a file' if folder.is_file() else 'holds something already'}", "give another name"
        )
    if task not in KINDS:
        raise wrong_option("--task", f"got {task!r}", f"use one of {', '.join(KINDS)}")
    if model is None and task not in ("python", "exact"):
        raise wrong_option("--model", f"is missing, and the tiny model knows sums alone, no {task}", "name a model")
    size, place = (Size(), None) if model is None else _model(model, folder)
    texts = starter(task, tiny=model is None)
    keys: dict[str, Any] = {
        key: file for key, file in (("data", "rows.jsonl"), ("verifier", "verifier.py")) if file in texts
    }
    keys |= {"held_out": 0.3} if texts else {"name": "spell_backward"}
    file = folder / f"{folder.name}.yaml"
    texts |= {file.name: draft(folder.name, place, task, size, task=keys, file=str(file))}
    texts |= {SCHEMA: schema_file().read_text(encoding="utf-8")}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for other, text in texts.items():
            (folder / other).write_text(text, encoding="utf-8")
    except OSError as error:
        raise wrong_option("NAME", f"{folder} cannot be written ({error.strerror})", "choose another place") from None
    typer.echo(f"written: {folder}/{', '.join([file.name, *(other for other in texts if other != file.name)])}")
    typer.echo(f"try it: vpd-mlx train {file}")


def _model(model: str, folder: Path) -> tuple[Size, str]:
    """(the model's size, how a recipe in the folder names it): relative where both lie below this folder.

    Raises:
        ModelError: it is a folder without a model.
    """
    local = Path(model).expanduser()
    if not local.exists():
        if model.startswith((".", "/", "~")) or model.count("/") != 1:
            raise wrong_option("--model", f"there is no folder {model}", "give a model folder, or a hub id: owner/name")
        try:
            return size_of(config_of(model)), model
        except ModelError as error:
            typer.echo(f"note: {error}; until then the limits are those for a model of 4,096 positions", err=True)
            return Size(), model
    here, there = Path.cwd().resolve(), local.resolve()
    below = there.is_relative_to(here) and folder.resolve().is_relative_to(here)
    place = os.path.relpath(there, folder.resolve()) if below else str(there)
    return size_of(config_of(str(local))), place if place.startswith((".", "/")) else f"./{place}"
