"""Options that several commands share."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated, Any

import typer

from vpd_mlx.common.settings import parse_set

__all__ = ["SetOption", "json_alone", "overridden"]

SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override a key of the recipe, e.g. `-s rollout.prompts=4`."),
]


def overridden(sets: list[str] | None, **flags: Any) -> list[tuple[str, Any]]:
    """Overrides in the order of precedence: `--set` first, named flags after it."""
    return [*parse_set(sets or []), *((k, v) for k, v in flags.items() if v is not None)]


def json_alone(asked: bool) -> contextlib.AbstractContextManager[object]:
    """Keeps standard output for the JSON: what a verifier prints goes to standard error."""
    return contextlib.redirect_stdout(sys.stderr) if asked else contextlib.nullcontext()
