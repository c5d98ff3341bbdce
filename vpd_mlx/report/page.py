"""The page of a run and the page that compares several: one HTML file each, which loads nothing from anywhere.

This module gathers the data; all markup is in the templates beside it. What a model or a data set wrote is hostile text: Jinja2
escapes it, the rollouts' JSON holds no `<`, `>` or `&`, and the script adds it to the page as text nodes only. A content security
policy forbids the rest.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from vpd_mlx.common.files import write_atomic
from vpd_mlx.common.text import (
    duration,
    figures,
    interval,
    number,
    percent,
    points,
    points_range,
    steps,
    without_surrogates,
)
from vpd_mlx.errors import wrong_option
from vpd_mlx.report.browse import MOST_BYTES, histories, rollouts
from vpd_mlx.report.plots import comparison_plots, legend_colors, run_plots
from vpd_mlx.report.tries import try_commands
from vpd_mlx.run.answers import choose as choose_answers
from vpd_mlx.run.answers import rule
from vpd_mlx.run.folder import Run, by_dotted_key
from vpd_mlx.run.forgetting import cost
from vpd_mlx.run.pairing import pair_up
from vpd_mlx.run.warnings import GAP_LEFT, findings

__all__ = ["comparison_page", "run_page", "save"]


def save(path: Path, page: str) -> str:
    """Write a page; returns its path and size as text.

    Raises:
        ConfigError: the path is no place for a file.
        RunError: the disk is full or read-only.
    """
    reason = "it is a folder" if path.is_dir() else "" if path.parent.is_dir() else "its folder does not exist"
    if reason:
        raise wrong_option("--out", f"{path} cannot be written ({reason})", "give a file in a folder that exists")
    write_atomic(path, page)
    return f"{path} ({path.stat().st_size / 1000:,.0f} kB)"


def _render(template: str, **values: Any) -> str:
    environment = Environment(
        loader=PackageLoader("vpd_mlx.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    environment.filters |= {form.__name__: form for form in (duration, percent, points, steps)}
    environment.filters["grouped"] = "{:,.0f}".format
    environment.filters["plain"] = lambda v: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)
    environment.globals |= {"script": _script, "figures": figures, "number": number, "points_range": points_range}
    # Half a surrogate pair is legal in JSON's escapes but cannot be written to a UTF-8 file.
    return without_surrogates(environment.get_template(template).render(values))


def _script(name: str) -> Markup:
    return Markup((files("vpd_mlx.report") / f"{name}.js").read_text(encoding="utf-8"))


def run_page(run: Run, most: int, folder: Path | None = None) -> str:
    """The page of a run, with at most `most` of its rollouts; `folder` is where it will lie, for its links."""
    rows, answers = rollouts(run, most), choose_answers(run.answers)
    kept = histories(run) if answers else []
    return _render(
        "run.html",
        run=run,
        subtitle=_subtitle(run),
        headline=_headline(run),
        warnings=findings(run),
        change=run.change(),
        cost=cost(run.retained),
        answers=answers,
        answers_rule=rule(run.answers, answers),
        plots=run_plots(run),
        rollouts=rows,
        has_shifts=any(r["shift"] for r in rows),
        most_megabytes=MOST_BYTES >> 20,
        histories=kept,
        answered=len(run.answers),
        gap_story=_gap_story(run),
        commands=try_commands(run),
        adapters=_link(run.adapters, folder),
        recipe=[(key, [value]) for key, value in by_dotted_key(run.config).items()],
        versions=[(key, [value]) for key, value in _mapping(run.summary.get("versions")).items()],
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _subtitle(run: Run) -> str:
    model = "/".join(str(run.config.get("model") or "").rstrip("/").split("/")[-2:])
    wall = number(_mapping(run.summary.get("seconds")).get("wall"))
    spent = sum(run.seconds.values()) if wall is None else wall
    parts = [
        run.algorithm,
        f"model {model}" if model else "",
        _progress(run),
        "" if number(run.config.get("seed")) is None else f"seed {run.config['seed']}",
        duration(spent) if spent else "",
        "" if run.peak_memory_mb is None else f"peak memory {run.peak_memory_mb:,.0f} MiB",
    ]
    return " · ".join(p for p in parts if p)


def _progress(run: Run) -> str:
    if run.finished:
        return steps(run.done)
    if run.planned is None:
        return f"{steps(run.done)} so far"
    return f"{run.done} of {run.planned} steps so far: not finished"


def _headline(run: Run) -> str:
    """The run's result in a sentence: one figure, before and after; the greedy one where it was logged."""
    before, after = run.before, run.after
    problems = number((after or before).get("problems"))
    of = "" if problems is None else f" of {problems:.0f} held-out problems"
    key, name = "student_greedy", "the student's likeliest answer is right on"
    if number((after or before).get(key)) is None:
        key, name = "student", "the student, sampled, solves"
    if not after:
        if not before:
            return "Nothing has been evaluated yet."
        return f"Before training {name} {percent(before.get(key))}{of}. No later evaluation yet."
    text = f"After {steps(run.evaluated)} {name} {percent(after.get(key))}{of}"
    if not before:
        return f"{text}. It was not evaluated before training."
    text += (
        f", before training on {percent(before.get(key))}"
        if key != "student"
        else f"; before, {percent(before.get(key))}"
    )
    change = run.change() if key == "student_greedy" else None
    if change is None:
        return f"{text}."
    verdict = {"better": "a gain", "worse": "a loss", "within noise": "within noise"}[change.verdict]
    bounds = f"95 % interval {points_range(change.low, change.high)}, paired by problem"
    return f"{text}: {points(change.difference)} points ({bounds}), {verdict}."


def _gap_story(run: Run) -> str:
    """What feedback was worth before and after training: whether there was a gap from the start, and what became of it."""
    before, after = number(run.before.get("gap")), number(run.after.get("gap"))
    if before is None:
        return ""
    read = _teacher_and_student(run.before)
    if before <= 0:
        return f"No gap from the start: before training the teacher solves no more than the student ({read})."
    if _may_be_none(run.before):
        bounds = f"95 % interval {points_range(*(interval(run.before, 'gap') or (before, before)))}"
        return f"No certain gap from the start: {points(before)} points ({bounds}; {read}). More held-out problems would tell."
    worth = f"Before training, feedback is worth {points(before)} points ({read})"
    if after is None:
        return f"{worth}."
    worth += f", after it {points(after)} ({_teacher_and_student(run.after)}): "
    if after >= GAP_LEFT and not _may_be_none(run.after):
        return f"{worth}there is more to learn from it."
    rose = (number(run.after.get("student_there")) or 0.0) - (number(run.before.get("student_there")) or 0.0)
    if rose >= before / 2:
        return f"{worth}the gap is closed, the student has caught up."
    return f"{worth}the gap is lost, the teacher has come down to the student."


def _teacher_and_student(evaluation: Mapping[str, Any]) -> str:
    return f"teacher {percent(evaluation.get('teacher'))}, student {percent(evaluation.get('student_there'))}"


def _may_be_none(evaluation: Mapping[str, Any]) -> bool:
    """Whether the gap's interval holds 0."""
    bounds = interval(evaluation, "gap")
    return bounds is not None and bounds[0] <= 0


def _link(target: Path, folder: Path | None) -> str | None:
    """The address of a file or folder in a page of `folder`; None for a page that lies nowhere, or without a target."""
    if folder is None or not target.exists():
        return None
    return quote(Path(os.path.relpath(target.resolve(), folder.resolve())).as_posix())


def comparison_page(runs: Mapping[str, Run], folder: Path | None = None) -> str:
    """The page that compares runs; differences are from the first one. `folder` is where it will lie, for its links."""
    (first, base), *_ = runs.items()
    results = [
        {
            "name": name,
            "run": run,
            "color": color,
            "progress": _progress(run),
            "commands": try_commands(run),
            "adapters": _link(run.adapters, folder),
            "report": _link(run.path / "report.html", folder),
            "paired": None if name == first else pair_up(base, run).difference,
        }
        for (name, run), color in zip(runs.items(), legend_colors(len(runs)), strict=True)
    ]
    return _render(
        "comparison.html",
        first=first,
        headline=_verdicts(first, results[1:]),
        warnings=[f"{name}: {w}" for name, run in runs.items() for w in findings(run)] + _not_comparable(runs),
        results=results,
        plots=comparison_plots(runs),
        differences=_differences(runs),
    )


def _verdicts(first: str, others: Sequence[Mapping[str, Any]]) -> str:
    """Which runs are better or worse than the first, in a sentence."""
    parts = [
        f"{other['name']} cannot be paired with it"
        if (p := other["paired"]) is None
        else f"{other['name']} is {p.verdict} ({points(p.difference)} points, {points_range(p.low, p.high)})"
        for other in others
    ]
    return f"Greedy accuracy against {first}: {'; '.join(parts)}."


def _not_comparable(runs: Mapping[str, Run]) -> list[str]:
    """Reasons why the figures may not be comparable."""
    (first, base), *others = runs.items()
    out = []
    for name, run in others:
        pairing = pair_up(base, run)
        if pairing.base and pairing.other and pairing.base.keys() != pairing.other.keys():
            out.append(
                f"{name} was evaluated on different problems than {first} ({pairing.shared} in common): compare only the "
                "paired difference."
            )
        if pairing.by_name and pairing.shared:
            out.append(
                f"{name} or {first} has no hashes of its problems (an older run): they are paired by row names, which says "
                "nothing where the files differ."
            )
        if base.done != run.done:
            out.append(f"{name} has done {steps(run.done)}, {first} {base.done}.")
    return out


def _differences(runs: Mapping[str, Run]) -> list[tuple[str, list[Any]]]:
    """The recipe's keys that differ, with each run's value."""
    recipes = [by_dotted_key(run.config) for run in runs.values()]
    rows = [(key, [r.get(key, "-") for r in recipes]) for key in dict.fromkeys(k for r in recipes for k in r)]
    return [(key, values) for key, values in rows if len({json.dumps(v) for v in values}) > 1]
