"""`vpd-mlx new`: a folder with a task of your own that runs as it is."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from vpd_mlx.errors import wrong_option
from vpd_mlx.recipe import builtin_recipes, schema_file

__all__ = ["new"]

VERIFIER = '''"""Says how good a completion is and, in words, what is wrong with it. The words are what the model learns from."""


def verify(problem, completion):
    """problem.answer is the row's answer, problem.data the whole row."""
    got = completion.strip()
    if got == problem.answer:
        return 1.0
    if len(got) < len(problem.answer):
        return 0.0, "hundreds missing"
    return 0.0, "tens too low"
'''

SCHEMA = "recipe.schema.json"  # named in the recipe's first line, for editors
SUMS = ((47, 38), (56, 27), (88, 14), (19, 73), (65, 28), (34, 59), (77, 16), (48, 48), (29, 83), (91, 45))


def new(name: Annotated[str, typer.Argument(help="Name of the folder, and of the recipe in it.")]) -> None:
    """Write a folder with a commented recipe, ten rows and a verifier: a task of your own that runs as it is."""
    folder = Path(name)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", folder.name):
        raise wrong_option("NAME", f"{folder.name!r} cannot name a run", "use letters, digits, dots and dashes")
    if folder.exists() and any(folder.iterdir()):
        raise wrong_option("NAME", f"{folder} holds something already", "give another name")
    model = builtin_recipes()["quickstart"].parent / "model"
    recipe = (files("vpd_mlx.commands") / "new.yaml").read_text(encoding="utf-8")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{folder.name}.yaml").write_text(recipe.format(name=folder.name, model=model), encoding="utf-8")
        (folder / "verifier.py").write_text(VERIFIER, encoding="utf-8")
        rows = "".join(json.dumps({"prompt": f"{a}+{b}=", "answer": str(a + b)}) + "\n" for a, b in SUMS)
        (folder / "rows.jsonl").write_text(rows, encoding="utf-8")
        (folder / SCHEMA).write_text(schema_file().read_text(encoding="utf-8"), encoding="utf-8")
    except OSError as error:
        raise wrong_option("NAME", f"{folder} cannot be written ({error.strerror})", "choose another place") from None
    typer.echo(f"written: {folder}/{folder.name}.yaml, verifier.py, rows.jsonl, {SCHEMA}")
    typer.echo(f"try it: vpd-mlx train {folder}/{folder.name}.yaml")
