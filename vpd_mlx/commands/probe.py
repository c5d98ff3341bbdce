"""`vpd-mlx probe`: whether feedback will help this model on this task, before any training."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from vpd_mlx.commands.options import SetOption, json_alone, overridden
from vpd_mlx.common.text import duration, number, percent, points, points_range, visible
from vpd_mlx.recipe import load_recipe, resolve_recipe_path
from vpd_mlx.report.live import make_view

if TYPE_CHECKING:
    from vpd_mlx.run.advice import Student, Teacher
    from vpd_mlx.run.probe import Probe

__all__ = ["probe"]

LEGEND = (
    "AUC: how surely the teacher tells the student's right completions of a problem from its wrong ones, by the sum of log q - "
    "log pi; 0.5 is a coin. "
    "first, stop, rest: log q - log pi of the first token, the stop token and the others of right answers, in nats; below 0 the "
    "teacher's prompt takes probability from them. JS: divergence of the first token's distributions. right: share of the whole "
    "divergence that falls on right completions. length: relative to the student's. copied: words taken from the context."
)


def probe(
    recipe: Annotated[str, typer.Argument(help="A built-in recipe's name or a .yaml file.")] = "quickstart",
    sets: SetOption = None,
    problems: Annotated[int, typer.Option(min=1, help="Training problems to measure on.")] = 24,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="The student's sampled completions of each problem.",
            show_default="rollout.group_size, at most 8",
        ),
    ] = None,
    teacher_samples: Annotated[
        int, typer.Option(min=1, help="Each teacher's sampled completions of each problem.")
    ] = 2,
    templates: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Compare this set of templates; repeat it for several.", show_default="all sets"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Will feedback help this model on this task? Measures the student, and the teacher under each source and wording.

    Nothing is trained. Sources are those of the recipe, and sibling, verifier and reference wherever the data allow them. At the
    end stands a recommendation, as keys to paste. The intervals are 95 % bootstrap intervals over problems, paired for the gap.
    """
    cfg = load_recipe(resolve_recipe_path(recipe), overridden(sets))
    # Late: MLX and the tokenizers take two seconds to load.
    from vpd_mlx.run.probe import probe as measure

    with json_alone(as_json), make_view(f"probe {cfg.name}", quiet=as_json) as view:
        found = measure(
            cfg,
            problems=problems,
            samples=samples,
            teacher_samples=teacher_samples,
            templates=templates or (),
            progress=view,
        )
    if as_json:
        typer.echo(json.dumps(_json(recipe, cfg.model, cfg.task.kind, cfg.seed, found), indent=2))
        return
    _print(recipe, sets or [], found)


def _json(target: str, model: str, task: str, seed: int, found: Probe) -> dict[str, Any]:
    out = {"target": target, "model": model, "task": task, "split": "train", "seed": seed, **asdict(found)}
    for row, teacher in zip(out["teachers"], found.teachers, strict=True):
        if teacher.gap is not None:
            row["gap"]["verdict"] = teacher.gap.verdict
    out["advice"]["sets"] = found.advice.sets
    return out


def _print(target: str, sets: Sequence[str], found: Probe) -> None:
    console, student = Console(highlight=False), found.student
    console.print(_about(student), soft_wrap=True)
    if found.teachers:
        console.print(
            "\nTeachers:", _scores(found.teachers), "\nTheir style:", _styles(found.teachers), LEGEND, sep="\n"
        )
    for name, why in found.silent.items():
        console.print(visible(f"{name}: {why}"), soft_wrap=True, markup=False)
    advice = found.advice
    console.print(f"\n{advice.verdict[0].upper()}{advice.verdict[1:]}.", soft_wrap=True, markup=False)
    for reason in advice.reasons:
        console.print(f"- {reason}", soft_wrap=True, markup=False)
    if advice.keys:
        options = [arg for item in (*sets, *advice.sets) for arg in ("--set", item)]
        command = shlex.join(["vpd-mlx", "train" if advice.helps else "probe", target, *options])
        console.print(f"Try: {command}", soft_wrap=True, markup=False)
    console.print(f"{duration(found.seconds)} after loading", soft_wrap=True)


def _about(student: Student) -> str:
    """The student in three lines."""
    between = student.sampled_interval
    shown = "" if between is None else f" ({100 * between[0]:.1f} to {100 * between[1]:.1f})"
    return (
        f"{student.problems} training problems. Student: {percent(student.sampled)}{shown} sampled at temperature "
        f"{student.temperature:g} (avg@{student.samples}), {percent(student.greedy)} greedy.\n"
        f"Groups of {student.samples}: {percent(student.groups_mixed)} have right and wrong completions, "
        f"{percent(student.groups_all_wrong)} none right, {percent(student.groups_all_right)} all right.\n"
        f"Completions: {_plain(student.length, '.1f')} tokens, {percent(student.truncated)} cut off at the limit, "
        f"{percent(student.refusals)} begin as a refusal."
    )


def _plain(value: float | None, form: str) -> str:
    found = number(value)
    return "-" if found is None else format(found, form).replace("-", "−")


def _table(*heads: str) -> Table:
    """Narrow: it must fit 80 columns."""
    left, right = (Column(h, no_wrap=True) for h in ("source", "wording")), (Column(h, justify="right") for h in heads)
    return Table(*left, *right, box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")


def _scores(teachers: Sequence[Teacher]) -> Table:
    table = _table("problems", "sampled", "greedy", "gap", "interval", "AUC")
    for t in teachers:
        gap = ("-", "-") if t.gap is None else (points(t.gap.difference), points_range(t.gap.low, t.gap.high))
        table.add_row(
            t.source,
            t.templates,
            str(t.problems),
            percent(t.sampled),
            percent(t.greedy),
            *gap,
            _plain(t.style.auc, ".2f"),
        )
    return table


def _styles(teachers: Sequence[Teacher]) -> Table:
    table = _table("first", "stop", "rest", "JS", "right", "length", "cut off", "refused", "copied")
    for t in teachers:
        s = t.style
        shifts = (_plain(s.first_token, "+.2f"), _plain(s.stop_token, "+.2f"), _plain(s.rest, "+.2f"))
        shares = (_share(t.truncated), _share(t.refusals), _share(t.overlap))
        length = f"×{_plain(t.length_ratio, '.2f')}"
        table.add_row(t.source, t.templates, *shifts, _plain(s.first_js, ".3f"), _share(s.right_share), length, *shares)
    return table


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"
