"""The page of a run and the page that compares several: one HTML file each, which loads nothing from anywhere.

This module gathers the data; all markup is in the templates beside it. What a model or a data set wrote is hostile text: Jinja2
escapes it, the rollouts' JSON holds no `<`, `>` or `&`, and the script adds it to the page as text nodes only. A content security
policy forbids the rest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from vpd_mlx.common.files import write_atomic
from vpd_mlx.common.text import duration, figures, number, percent, points, points_range, steps, without_surrogates
from vpd_mlx.errors import wrong_option
from vpd_mlx.report.plots import comparison_plots, legend_colors, run_plots
from vpd_mlx.run.answers import choose as choose_answers
from vpd_mlx.run.answers import rule
from vpd_mlx.run.folder import NO_CONTEXT, LoggedRollout, Run, by_dotted_key
from vpd_mlx.run.forgetting import cost
from vpd_mlx.run.pairing import pair_up
from vpd_mlx.run.warnings import findings

__all__ = ["choose", "comparison_page", "run_page", "save"]

MOST_BYTES = 8 << 20  # of rollouts in a page: a browser stays quick, and the file can be sent by mail


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
    environment.globals |= {"figures": figures, "number": number, "points_range": points_range}
    # Half a surrogate pair is legal in JSON's escapes but cannot be written to a UTF-8 file.
    return without_surrogates(environment.get_template(template).render(values))


def run_page(run: Run, most: int) -> str:
    """The page of a run, with at most `most` of its rollouts."""
    rows, answers = _rollouts(run, most), choose_answers(run.answers)
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
        script=Markup((files("vpd_mlx.report") / "browser.js").read_text(encoding="utf-8")),
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
    """The run's result in a sentence or two."""
    before, after = run.before, run.after
    problems = number((after or before).get("problems"))
    of = "" if problems is None else f" of {problems:.0f} held-out problems"
    if not after:
        if not before:
            return "Nothing has been evaluated yet."
        return f"Before training the student solves {percent(before.get('student'))}{of}. No later evaluation yet."
    count = int(number(after.get("step")) or 0)
    text = f"After {steps(count)} the student solves {percent(after.get('student'))}{of}"
    text += f"; before training, {percent(before.get('student'))}." if before else "."
    change = run.change()
    if change is not None:
        verdict = {"better": "a gain", "worse": "a loss", "within noise": "within noise"}[change.verdict]
        text += (
            f" Its greedy accuracy changed by {points(change.difference)} points (95 % interval "
            f"{points_range(change.low, change.high)}, paired by problem): {verdict}."
        )
    return text


def choose(entries: Sequence[LoggedRollout], most: int) -> list[LoggedRollout]:
    """At most `most` rollouts, whole groups, spread evenly over the run, the first and the last step's among them."""
    if len(entries) <= most:
        return list(entries)
    groups = [list(g) for _, g in groupby(entries, key=lambda e: (e.step, e.problem))]
    fit = max(1, int(most / (len(entries) / len(groups))))
    for count in range(min(fit, len(groups)), 1, -1):
        at = sorted({round(float(i)) for i in np.linspace(0, len(groups) - 1, count)})
        chosen = [e for i in at for e in groups[i]]
        if len(chosen) <= most:
            return chosen
    return groups[-1][:most]


def _rollouts(run: Run, most: int) -> list[dict[str, Any]]:
    """At most `most` rollouts, fewer if they take more than MOST_BYTES."""
    while True:
        rows = [_for_browser(row) for row in run.read(choose(run.rollouts, most))]
        size = sum(len(json.dumps(r)) for r in rows)
        if len(rows) <= 1 or size <= MOST_BYTES:
            return rows
        most = min(len(rows) - 1, len(rows) * MOST_BYTES // size)


def _for_browser(row: Mapping[str, Any]) -> dict[str, Any]:
    """What browser.js shows of a rollout, whatever a broken row holds."""
    context, pieces, shift = _mapping(row.get("context")), row.get("pieces"), row.get("shift")
    sample, score = number(row.get("sample")), number(row.get("score"))
    return {
        "step": int(number(row.get("step")) or 0),
        "problem": str(row.get("problem", "?")),
        "sample": None if sample is None else int(sample),
        "right": bool(row.get("success")),
        "score": None if score is None else round(score, 4),
        "kind": str(context.get("kind")) if context else NO_CONTEXT,
        "cut": bool(context.get("cut")),
        **{key: str(row.get(key) or "") for key in ("prompt", "completion", "verdict", "finish")},
        "teacher": str(row.get("teacher_prompt") or ""),
        "tokens": int(number(row.get("tokens")) or 0),
        "pieces": [str(p) for p in pieces] if isinstance(pieces, list) else None,
        "shift": [number(x) for x in shift] if isinstance(shift, list) else None,
    }


def comparison_page(runs: Mapping[str, Run]) -> str:
    """The page that compares runs; differences are from the first one."""
    (first, base), *_ = runs.items()
    results = [
        {
            "name": name,
            "run": run,
            "color": color,
            "progress": _progress(run),
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
