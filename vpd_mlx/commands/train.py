"""`vpd-mlx train`: train as a recipe says, into a run folder."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from vpd_mlx.commands.evaluate import NAMES
from vpd_mlx.commands.options import SetOption, json_alone, overridden
from vpd_mlx.commands.short import asked_recipe, by_key, named_flags
from vpd_mlx.common.streams import lasting
from vpd_mlx.common.text import duration, percent
from vpd_mlx.errors import wrong_option
from vpd_mlx.recipe import Recipe, load_recipe
from vpd_mlx.report.answers import print_answers
from vpd_mlx.report.live import make_view
from vpd_mlx.report.retained import print_retained
from vpd_mlx.report.tries import try_commands
from vpd_mlx.run.folder import load_run
from vpd_mlx.run.log import RECIPE_FILE, claimed_folder
from vpd_mlx.run.progress import Stop
from vpd_mlx.run.records import Summary
from vpd_mlx.run.resume import check_resume
from vpd_mlx.run.stopping import stoppable

__all__ = ["MOMENT", "train"]


def train(
    recipe: Annotated[
        str | None, typer.Argument(help="A built-in recipe's name or a .yaml file.", show_default="quickstart")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model folder or hub id.", show_default="the recipe's")] = None,
    adapter: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Adapter of `mlx_lm.lora` or of a run, to continue from.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="FILE", help="Rows to train on. With --model, no RECIPE is needed.")
    ] = None,
    verifier: Annotated[str | None, typer.Option(metavar="FILE", help="Python file with your `verify`.")] = None,
    algorithm: Annotated[str | None, typer.Option(help="vpd, sdpo, grpo …", show_default="the recipe's")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate: `optimizer.learning_rate`.")] = None,
    steps: Annotated[int | None, typer.Option(help="Rollout batches of the whole run.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run.")] = None,
    sets: SetOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder.", show_default="runs/<name>, or runs/<name>-2 … when that is taken")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Resume the run in this folder with its own recipe.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete everything in `--out`, or in runs/<name>, before training.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print warnings only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON, and nothing else.")] = False,
) -> None:
    """Train as a recipe says: roll out, grade, learn from the feedback, evaluate, write adapters.

    Ctrl-C stops the run at the next safe moment, with a checkpoint and adapters; a second Ctrl-C stops it at once.
    """
    short = {"model": model, "adapter": adapter, "data": data, "verifier": verifier, "algorithm": algorithm, "lr": lr}
    short |= {"steps": steps, "seed": seed, "name": name}
    stop = Stop()

    def asked() -> tuple[Recipe, Path]:
        if resume is not None:
            with named_flags(short):
                overrides = [*overridden(sets), *by_key(short).items()]
                return _resumed(resume, overrides, recipe, out, overwrite), resume
        cfg = asked_recipe(recipe, sets, short)
        base = Path("runs") / cfg.name
        return cfg, out or (base if overwrite else claims.enter_context(claimed_folder(base)))

    try:
        with contextlib.ExitStack() as claims, stoppable(stop, partial(_leave, stop)):
            _train(asked, stop, resume=resume is not None, overwrite=overwrite, quiet=quiet, as_json=as_json)
    except KeyboardInterrupt:
        raise typer.Exit(128 + (stop.signal or signal.SIGINT)) from None


def _train(
    asked: Callable[[], tuple[Recipe, Path]], stop: Stop, *, resume: bool, overwrite: bool, quiet: bool, as_json: bool
) -> None:
    from vpd_mlx.engine.ranks import Ranks  # late: it loads mlx, which `--help` does without

    ranks = Ranks.of_environment()
    # All ranks use the first rank's recipe and folder: the other machines need not have the run.
    cfg, folder = ranks.from_first(asked)
    # Late, so that a wrong recipe is reported at once: mlx-lm and the tokenizers take two seconds to load.
    from vpd_mlx.run.loop import train as run

    stop.begun = ranks.size > 1  # ranks stop together
    quiet = quiet or not ranks.first
    as_json = as_json and ranks.first
    with lasting(f"the run goes on in {folder}"):
        with json_alone(as_json), make_view(f"{cfg.name} ({cfg.algorithm})", quiet=quiet or as_json) as view:
            summary = run(cfg, folder, resume=resume, overwrite=overwrite, progress=view, stop=stop, ranks=ranks)
        if "interrupted" in summary:
            if not quiet and not as_json:
                typer.echo(f"resume with: vpd-mlx train --resume {folder}")
            raise typer.Exit(128 + int(summary["interrupted"]))
        if as_json:
            typer.echo(json.dumps(summary, indent=2))
        elif not quiet:
            _report(cfg, folder, summary)


def _resumed(
    folder: Path, overrides: list[tuple[str, Any]], recipe: str | None, out: Path | None, overwrite: bool
) -> Recipe:
    if recipe is not None or out is not None or overwrite:
        remedy = "leave RECIPE, --out and --overwrite out"
        raise wrong_option("--resume", "a resumed run has its own recipe and folder", remedy)
    if not (folder / RECIPE_FILE).is_file():
        problem = f"{folder} holds no run ({RECIPE_FILE} is missing)"
        raise wrong_option("--resume", problem, "give the folder of a run")
    after = load_recipe(folder / RECIPE_FILE, overrides)
    check_resume(folder, after, "--resume")
    return after


MOMENT = 2.0  # seconds


def _leave(stop: Stop, number: int) -> None:
    """Say that the command ends here, and see that it does."""
    left = "its last checkpoint stands, --resume goes on from there" if stop.begun else "nothing was written"
    line = f"\nvpd-mlx: stopped at once by {signal.Signals(number).name}; {left}\n"
    with contextlib.suppress(OSError):
        os.write(2, line.encode())  # in a signal handler, which may interrupt a write to sys.stderr
    # A hanging thread, such as a verifier's, may block an orderly exit: after a moment, exit without it.
    end = threading.Timer(MOMENT, os._exit, (128 + number,))
    end.daemon = True
    end.start()


def _report(cfg: Recipe, folder: Path, summary: Summary) -> None:
    console = Console(highlight=False)
    heads = (Column(name, justify="right") for name in ("before", "after"))
    table = Table("", *heads, title=f"held-out problems ({summary['problems']})", title_justify="left")
    for key, name in {"student": f"student, avg@{cfg.evaluation.samples}", **NAMES}.items():
        table.add_row(name, percent(summary["before"][key]), percent(summary["after"][key]))
    console.print(table)
    training = sum(v for k, v in summary["seconds"].items() if k not in ("wall", "evaluation", "selection"))
    steps, best = summary["steps"], summary["adapter_of_step"]
    chosen = f", chosen on {summary['selection']} other problems" if summary["selection"] else ""
    which = f"the adapter of step {best}{chosen}; " if chosen or best != steps else ""
    console.print(f"{which}{steps} steps, {duration(training)} training, {duration(summary['seconds']['wall'])} in all")
    found = load_run(folder)
    if needless := found.series("e_step/needless")[1]:
        trained = sum(not n for n in needless)
        told = f"in {sum(needless):.0f} it told right from wrong as it was (e_step.until_auc)"
        console.print(f"E-steps: the teacher was trained in {trained} of {steps} steps, {told}")
    print_answers(console, found.answers)
    print_retained(console, found.retained)
    console.print(f"adapters: {folder / 'adapters'}", soft_wrap=True)
    for what, command in try_commands(found):
        console.print(f"{what}: {command}", soft_wrap=True, markup=False)
