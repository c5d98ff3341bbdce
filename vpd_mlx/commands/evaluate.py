"""`vpd-mlx eval`: what training changed, problem by problem."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from vpd_mlx.commands.options import SetOption, json_alone, overridden
from vpd_mlx.common.settings import HUB
from vpd_mlx.common.text import figures, points, points_range
from vpd_mlx.errors import ConfigError, Fault, wrong_option
from vpd_mlx.recipe import Recipe, builtin_recipes, load_recipe, resolve_recipe_path
from vpd_mlx.report.live import make_view
from vpd_mlx.run.log import RECIPE_FILE

__all__ = ["NAMES", "evaluate"]

Split = Literal["held-out", "train"]


def evaluate(
    target: Annotated[
        str, typer.Argument(metavar="RUN|RECIPE|MODEL", help="A run folder, a recipe, a model folder or a hub id.")
    ],
    recipe: Annotated[
        str | None,
        typer.Option(help="Recipe whose task and limits to use.", show_default="the run's; quickstart for a model"),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Adapter folder in mlx-lm's format.", show_default="the run's; none for a model")
    ] = None,
    split: Annotated[Split, typer.Option(help="Problems of this side of the task.")] = "held-out",
    data: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Rows to evaluate on instead. None of them may be a training row."),
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="k: sampled completions per problem.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Sampling temperature.")] = None,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="The likeliest completion alone; nothing is sampled.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Problems at most.", show_default="the recipe's evaluation.problems")
    ] = None,
    base: Annotated[
        bool, typer.Option(help="Evaluate the base model, too, and pair the two problem by problem.")
    ] = True,
    sets: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """How good is it? Student and teacher on problems never trained on, and what training changed.

    avg@k is the mean score of k sampled completions, pass@j the chance that one of j is right (unbiased), maj@k the score of
    the commonest answer, teacher that of the same network once it has read the feedback on the student's completion. Intervals
    are 95 % bootstrap intervals over problems; differences to the base model are paired: the same problems, the same seed.
    """
    sampling = {"evaluation.samples": samples, "evaluation.temperature": temperature, "evaluation.problems": limit}
    _check_flags(greedy, samples, temperature)
    cfg, folder = _target(target, recipe, adapter, overridden(sets, **sampling))
    if data is not None:
        cfg = _with_data(cfg, data, split)
    # Late: MLX and the tokenizers take two seconds to load.
    from vpd_mlx.run.change import evaluate_change

    with json_alone(as_json), make_view(target, quiet=as_json) as view:
        found = evaluate_change(cfg, folder, Path(target), split, base=base, greedy=greedy, progress=view)
    out = {"target": target, "data": data, **found}
    if as_json:
        typer.echo(json.dumps(out, indent=2))
        return
    Console(highlight=False).print(_table(out), _caption(out))


def _check_flags(greedy: bool, samples: int | None, temperature: float | None) -> None:
    faults = [
        Fault(flag, f"{value} means nothing with --greedy", "leave one of the two out")
        for flag, value in (("--samples", samples), ("--temperature", temperature))
        if greedy and value is not None
    ]
    if temperature == 0 and not greedy:
        faults.append(Fault("--temperature", "0 is the likeliest completion every time", "use --greedy"))
    if faults:
        raise ConfigError(faults, "command line")


def _target(
    target: str, recipe: str | None, adapter: Path | None, overrides: list[tuple[str, Any]]
) -> tuple[Recipe, Path | None]:
    """The recipe to evaluate by, and the adapter's folder, if any."""
    folder = Path(target).expanduser()
    if not folder.exists() and target not in builtin_recipes() and (Path("runs") / target / RECIPE_FILE).is_file():
        folder = Path("runs") / target
    if (folder / RECIPE_FILE).is_file():
        own = load_recipe(folder / RECIPE_FILE, overrides)
        if recipe is not None:
            other = load_recipe(resolve_recipe_path(recipe), overrides)
            # another task, by the model as it was trained
            same = {k: getattr(own, k) for k in ("model", "model_revision", "thinking", "lora", "seed")}
            own = other.model_copy(update=same)
        return own, folder / "adapters" if adapter is None else adapter
    if target in builtin_recipes() or (folder.is_file() and folder.suffix in (".yaml", ".yml")):
        if recipe is not None:
            remedy = "leave --recipe out, or name a run or a model first"
            raise wrong_option("--recipe", f"{target} is a recipe already", remedy)
        return load_recipe(resolve_recipe_path(target), overrides), adapter
    if not folder.is_dir():
        _refuse_no_run(target, folder)
    model = str(folder.resolve()) if folder.is_dir() else target
    return load_recipe(resolve_recipe_path(recipe or "quickstart"), [*overrides, ("model", model)]), adapter


def _refuse_no_run(target: str, folder: Path) -> None:
    """A name that only a folder here can have is not looked up on the hub: of a hub id, nothing here has the owner's name."""
    local = target.startswith((".", "/", "~")) or folder.parts[0] == "runs" or Path(folder.parts[0]).is_dir()
    if not local and target.count("/") == 1:
        return
    runs = {p.parent.name for p in Path("runs").glob(f"*/{RECIPE_FILE}")}
    close = difflib.get_close_matches(folder.name, [*runs, *builtin_recipes()], n=1)
    known = (
        f"runs/ holds {', '.join(sorted(runs))}"
        if runs
        else "give a run's folder, a recipe, a model's folder or a hub id"
    )
    near = f"did you mean {f'runs/{close[0]}' if close[0] in runs else close[0]}?" if close else known
    raise wrong_option("RUN|RECIPE|MODEL", f"there is no {target} here, neither run, recipe nor model", near)


def _with_data(cfg: Recipe, data: str, split: Split) -> Recipe:
    if split == "train":
        raise wrong_option("--data", "is for rows that were not trained on", "leave --split train out")
    if not hasattr(cfg.task, "eval_data"):
        remedy = "leave it out, or name a recipe with --recipe whose rows come from a file"
        raise wrong_option("--data", f"task {cfg.task.kind} makes its own problems", remedy)
    place = data if data.startswith(HUB) else str(Path(data).expanduser().resolve())
    return cfg.model_copy(update={"task": cfg.task.model_copy(update={"eval_data": place})})


NAMES = {"student_greedy": "student, greedy", "teacher": "teacher under feedback"}


def _table(out: dict[str, Any]) -> Table:
    """A line a figure: base, trained, difference."""
    names = [key.removesuffix("_interval") for key in out if key.endswith("_interval") and key != "gap_interval"]
    base = out.get("base")
    heads = ("base", "trained", "difference") if base else ("base" if out["adapter"] is None else "trained",)
    table = Table("", *(Column(head, justify="right", no_wrap=True) for head in heads))
    for name in names:
        if name == "pass@1" and all(side["pass@1"] == side["student"] for side in (base, out) if side):
            continue  # scores are 0 or 1: it is avg@k
        title = f"student, avg@{out['samples']}" if name == "student" else NAMES.get(name, f"student, {name}")
        cells = [Text("\n".join(figures(side, name))) for side in ((base, out) if base else (out,))]
        if base:
            cells.append(Text(_difference(out["difference"].get(name))))
        table.add_row(title, *cells)
    return table


def _difference(paired: dict[str, Any] | None) -> str:
    if paired is None:
        return "-"
    return f"{points(paired['difference'])} {paired['verdict']}\n{points_range(paired['low'], paired['high'])}"


def _caption(out: dict[str, Any]) -> str:
    """What the table does not say."""
    where = f"rows of {out['data']}" if out["data"] else f"{out['split']} problems of task {out['task']}"
    taught = " and ".join(str(s["teacher_problems"]) for s in (out.get("base"), out) if s is not None)
    intervals = "Second lines are 95 % intervals over problems."
    return f"{out['problems']} {where}. {intervals} The teacher had feedback on {taught} of them."
