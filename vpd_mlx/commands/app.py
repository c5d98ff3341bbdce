"""The command line: parse, call one function, print an error in one line."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from vpd_mlx import __version__
from vpd_mlx.commands.data import data
from vpd_mlx.commands.doctor import doctor
from vpd_mlx.commands.evaluate import evaluate
from vpd_mlx.commands.export import export
from vpd_mlx.commands.lab import lab
from vpd_mlx.commands.new import new
from vpd_mlx.commands.plan import plan
from vpd_mlx.commands.probe import probe
from vpd_mlx.commands.report import compare, report
from vpd_mlx.commands.show import show
from vpd_mlx.commands.train import train
from vpd_mlx.commands.try_ import try_
from vpd_mlx.commands.usage import UsageError, refusal
from vpd_mlx.commands.verify import verify
from vpd_mlx.errors import VpdError
from vpd_mlx.recipe import builtin_recipes, load_recipe

__all__ = ["app", "main"]

app = typer.Typer(
    name="vpd-mlx",
    help="Teach a small language model from language feedback, on one machine. `vpd-mlx train` alone runs a demonstration.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"vpd-mlx {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


for command in (train, evaluate, doctor, export, lab, new, verify, plan, probe, report, show, compare, try_):
    app.command({"evaluate": "eval", "try_": "try"}.get(command.__name__))(command)
app.add_typer(data, name="data")


@app.command()
def recipes() -> None:
    """List the built-in recipes."""
    table = Table("recipe", "algorithm", "what it does", box=None, pad_edge=False)
    for name, path in builtin_recipes().items():
        recipe = load_recipe(path)
        table.add_row(name, recipe.algorithm, recipe.description)
    Console(highlight=False).print(table)


def main() -> None:
    """Entry point: an error that the user can fix is one line on standard error."""
    try:
        try:
            code = app(standalone_mode=False)
        except UsageError as error:
            if type(error).__name__ == "NoArgsIsHelpError":
                error.show()
                raise SystemExit(2) from None
            raise refusal(error, sys.argv[1:]) from None
        except typer.Abort:
            raise SystemExit(1) from None
        raise SystemExit(code or 0)
    except VpdError as error:
        sys.stderr.write(f"vpd-mlx: {error}\n")
        raise SystemExit(error.exit_code) from None
