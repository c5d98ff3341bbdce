"""The page of a run and the page of several: one HTML file each, which reads nothing from anywhere.

What a model or a data set wrote is hostile text: it enters HTML through `html.escape`, and the rollouts' JSON without `<`, `>`
and `&`; the script puts it on the page as text nodes only. A content security policy forbids the rest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from vpd_mlx.common.files import write_atomic
from vpd_mlx.common.stats import Paired, paired
from vpd_mlx.common.text import figures, number, percentage, points, steps
from vpd_mlx.errors import ConfigError, Fault
from vpd_mlx.report.plots import Plot, comparison_plots, legend_colors, run_plots
from vpd_mlx.report.warnings import findings
from vpd_mlx.run.folder import NO_CONTEXT, Entry, Run, flat

__all__ = ["choose", "comparison_page", "json_for_html", "run_page", "save"]

MOST_BYTES = 8 << 20  # of rollouts in a page: a browser stays quick, and the file can be sent by mail
RATES = (
    ("student", "Student, sampled", "average over sampled answers"),
    ("student_greedy", "Student, greedy", "likeliest token each time"),
    ("teacher", "Teacher", "same network, feedback in its prompt"),
)


def save(path: Path, page: str) -> None:
    """Write a page.

    Raises:
        ConfigError: it is no place for a file.
        RunError: the disk is full or read-only.
    """
    reason = ""
    if path.is_dir():
        reason = "it is a folder"
    elif not path.parent.is_dir():
        reason = "there is no such folder"
    if reason:
        fault = Fault("--out", f"{path} cannot be written ({reason})", "give a file in a folder that exists")
        raise ConfigError([fault], "command line")
    write_atomic(path, page)


def _asset(name: str) -> str:
    return (files("vpd_mlx.report") / name).read_text(encoding="utf-8")


def _page(title: str, body: str, scripts: str = "") -> str:
    return Template(_asset("page.html")).substitute(title=escape(title), body=body, scripts=scripts)


def json_for_html(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, ensure_ascii=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    # Half a surrogate pair is legal in JSON's escapes and no text in a UTF-8 file.
    return text.encode("utf-8", "replace").decode("utf-8")


def _clean(text: str) -> str:
    return escape(text.encode("utf-8", "replace").decode("utf-8"))


# --- one run


def run_page(run: Run, most: int) -> str:
    """The page of a run, with at most `most` of its rollouts."""
    parts = [
        f"<h1>{_clean(run.name)}</h1>",
        f'<p class="soft">{_clean(_subtitle(run))}</p>',
        f'<p class="lead">{_clean(headline(run))}</p>',
        _warnings(findings(run)),
        _before_after(run),
        _figures(run_plots(run), "Curves", "No step has been logged yet: pictures appear with the first one."),
    ]
    rows = [_embedded(row) for row in run.read(choose(run.rollouts, most))]
    while len(rows) > 1 and (size := sum(len(json.dumps(r)) for r in rows)) > MOST_BYTES:
        rows = [
            _embedded(row) for row in run.read(choose(run.rollouts, min(len(rows) - 1, len(rows) * MOST_BYTES // size)))
        ]
    parts.append(_browser(run, rows))
    parts += [_recipe(run), _versions(run)]
    scripts = ""
    if rows:
        scripts = (
            f'<script type="application/json" id="rollouts">{json_for_html(rows)}</script>\n'
            f"<script>{_asset('browser.js')}</script>"
        )
    return _page(f"{run.name} · vpd-mlx report", "\n".join(parts), scripts)


def _subtitle(run: Run) -> str:
    model = "/".join(str(run.config.get("model") or "").rstrip("/").split("/")[-2:])
    parts = [f"{run.algorithm}", f"model {model}" if model else "", _progress(run)]
    if number(run.config.get("seed")) is not None:
        parts.append(f"seed {run.config['seed']}")
    wall = number((run.summary.get("seconds") or {}).get("wall"))
    spent = wall if wall is not None else sum(run.seconds.values())
    parts.append(_duration(spent) if spent else "")
    if run.peak_memory_mb is not None:
        parts.append(f"peak memory {run.peak_memory_mb:,.0f} MiB")
    return " · ".join(p for p in parts if p)


def _progress(run: Run) -> str:
    if run.finished:
        return steps(run.done)
    return (
        f"{steps(run.done)} so far"
        if run.planned is None
        else f"{run.done} of {run.planned} steps so far: not finished"
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def headline(run: Run) -> str:
    """The run's result in a sentence or two."""
    before, after = run.before, run.after
    problems = number((after or before).get("problems"))
    among = "" if problems is None else f" of {problems:.0f} held-out problems"
    if not after:
        if not before:
            return "Nothing has been evaluated yet."
        return f"Before training the student answers {percentage(before.get('student'))}{among} right. No later evaluation yet."
    count = int(number(after.get("step")) or 0)
    text = f"After {steps(count)} the student answers {percentage(after.get('student'))}{among} right"
    text += f", before training {percentage(before.get('student'))}." if before else "."
    change = run.change()
    if change is not None:
        how = {"better": "a gain", "worse": "a loss", "within noise": "within noise"}[change.verdict]
        text += f" Its greedy accuracy changed by {points(change.difference)} points "
        text += f"(95 % interval {_bounds(change)}, paired by problem): {how}."
    return text


def _bounds(p: Paired) -> str:
    return f"{points(p.low)} to {points(p.high)}"


def _warnings(found: Sequence[str]) -> str:
    if not found:
        return '<p class="soft">Nothing to warn of.</p>'
    items = "".join(f"<li>{_clean(f)}</li>" for f in found)
    return f'<section class="card warnings"><h3>Worth a look</h3><ul>{items}</ul></section>'


def _cell(row: Mapping[str, Any], key: str) -> str:
    value, bounds = figures(row, key)
    return f'<td class="n">{value}' + (f'<br><span class="soft">{bounds}</span>' if bounds else "") + "</td>"


def _before_after(run: Run) -> str:
    if not run.evals:
        return ""
    change = run.change()
    lines = []
    for key, name, note in RATES:
        a, b = number(run.before.get(key)), number(run.after.get(key))
        if a is None and b is None:
            continue
        moved = "-" if a is None or b is None else points(b - a)
        if key == "student_greedy" and change is not None:
            moved += f'<br><span class="soft">{_bounds(change)}</span>'
        lines.append(
            f'<tr><th>{name}<br><span class="soft note">{note}</span></th>{_cell(run.before, key)}'
            f'{_cell(run.after, key)}<td class="n">{moved}</td></tr>'
        )
    for key, name in (("length", "Length, tokens"), ("truncated", "Cut off at the limit")):
        form = percentage if key == "truncated" else lambda v: "-" if number(v) is None else f"{v:.1f}"
        values = [figures(row, key, form)[0] for row in (run.before, run.after)]
        if values != ["-", "-"]:
            cells = "".join(f'<td class="n">{v}</td>' for v in values)
            lines.append(f"<tr><th>{name}</th>{cells}<td></td></tr>")
    step = run.after.get("step")
    after = f"after step {escape(str(step))}" if run.after else "after"
    return (
        "<h2>Before and after</h2>"
        '<p class="soft">Held-out problems answered right. Small figures are 95 % intervals; the change of the greedy figure is '
        "paired problem by problem, so its interval is the one to judge by.</p>"
        '<div class="card scroll"><table id="before-after"><thead><tr><th></th><th class="n">before</th>'
        f'<th class="n">{after}</th><th class="n">change, points</th></tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def _figures(plots: Sequence[Plot], title: str, nothing: str, legend: str = "") -> str:
    if not plots:
        return f'<h2>{title}</h2><p class="soft">{nothing}</p>'
    cards = "".join(
        f'<figure class="card" id="plot-{p.name}"><h3>{escape(p.title)}</h3><p>{escape(p.sentence)}</p>{legend}{p.svg}</figure>'
        for p in plots
    )
    note = "Where a curve jumps about, the thin line is each step and the thick one the running mean."
    return f'<h2>{title}</h2><p class="soft">{note}</p><div class="grid">{cards}</div>'


# --- rollouts


def choose(entries: Sequence[Entry], most: int) -> list[Entry]:
    """At most `most` rollouts, whole groups, spread evenly over the run, the first and the last step's among them."""
    if len(entries) <= most:
        return list(entries)
    groups = [list(g) for _, g in groupby(entries, key=lambda e: (e.step, e.problem))]
    fit = max(1, int(most / (len(entries) / len(groups))))
    while fit > 1:
        at = sorted({round(float(i)) for i in np.linspace(0, len(groups) - 1, min(fit, len(groups)))})
        chosen = [e for i in at for e in groups[i]]
        if len(chosen) <= most:
            return chosen
        fit -= 1
    return groups[-1][:most]


def _embedded(row: Mapping[str, Any]) -> dict[str, Any]:
    context = row.get("context")
    context = context if isinstance(context, Mapping) else None
    shift = row.get("shift")
    pieces = row.get("pieces")
    return {
        "step": int(number(row.get("step")) or 0),
        "problem": str(row.get("problem", "?")),
        "sample": None if (n := number(row.get("sample"))) is None else int(n),
        "right": bool(row.get("success")),
        "score": None if (score := number(row.get("score"))) is None else round(score, 4),
        "kind": str(context.get("kind")) if context else NO_CONTEXT,
        "cut": bool(context and context.get("cut")),
        "prompt": _text(row.get("prompt")),
        "completion": _text(row.get("completion")),
        "verdict": _text(row.get("verdict")),
        "teacher": _text(row.get("teacher_prompt")),
        "tokens": int(number(row.get("tokens")) or 0),
        "finish": _text(row.get("finish")),
        "pieces": [str(p) for p in pieces] if isinstance(pieces, list) else None,
        "shift": [number(x) for x in shift] if isinstance(shift, list) else None,
    }


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _browser(run: Run, rows: Sequence[Mapping[str, Any]]) -> str:
    total = len(run.rollouts)
    if not rows:
        return (
            '<h2>Rollouts</h2><p class="soft">No rollout has been logged yet.</p>'
            if not total
            else (f'<h2>Rollouts</h2><p class="soft">{total:,} rollouts left out: --rollouts is 0.</p>')
        )
    left = total - len(rows)
    here = (
        f"All {total:,} rollouts of the run are here."
        if not left
        else f"{len(rows):,} of {total:,} rollouts are here, whole groups spread evenly over the run; {left:,} are left out "
        f"(<code>--rollouts</code> sets how many, up to {MOST_BYTES >> 20} MB of them; <code>vpd-mlx show</code> has them all)."
    )
    key = ""
    if any(r["shift"] for r in rows):
        key = (
            '<p class="key soft">Colours say how the teacher, who has read the feedback, sees each token: '
            '<span style="background:rgba(var(--more),0.5)">likelier</span> or '
            '<span style="background:rgba(var(--less),0.5)">less likely</span> than the student does. '
            "Training moves the student that way. Numbers are nats, teacher less student.</p>"
        )
    return (
        f'<h2 id="browse">Rollouts</h2><p class="soft">What the student wrote in training, newest first. {here}</p>{key}'
        '<div class="controls">'
        '<label>outcome<select id="outcome"><option value="">right and wrong</option><option>right</option>'
        "<option>wrong</option></select></label>"
        '<label>step<select id="step"><option value="">all steps</option></select></label>'
        '<label>feedback<select id="kind"><option value="">all kinds</option></select></label>'
        '<label>search<input id="word" type="search" size="16"></label>'
        '<label class="check"><input id="numbers" type="checkbox"> show numbers</label></div>'
        '<p id="count" class="soft" aria-live="polite"></p><div id="list"></div>'
        '<button id="more" type="button" hidden>show more</button>'
        '<noscript><p class="card warnings">The rollouts need JavaScript; everything above does without.</p></noscript>'
    )


# --- facts


def _value(value: Any) -> str:
    return _clean(json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value)


def _keys(rows: Sequence[tuple[str, Sequence[Any]]], heads: Sequence[str] = ()) -> str:
    head = "".join(f"<th>{_clean(h)}</th>" for h in heads)
    body = "".join(f"<tr><td>{_clean(k)}</td>{''.join(f'<td>{_value(v)}</td>' for v in vs)}</tr>" for k, vs in rows)
    return f'<div class="card scroll"><table class="keys">{f"<tr><th></th>{head}</tr>" if head else ""}{body}</table></div>'


def _recipe(run: Run) -> str:
    rows = [(k, [v]) for k, v in flat(run.config).items()]
    return f'<h2>Recipe</h2><details id="recipe"><summary>all {len(rows)} keys</summary>{_keys(rows)}</details>'


def _versions(run: Run) -> str:
    versions = run.summary.get("versions")
    if not isinstance(versions, Mapping) or not versions:
        return '<h2>Versions</h2><p class="soft">Written when the run ends.</p>'
    return f'<h2>Versions</h2><div id="versions">{_keys([(str(k), [v]) for k, v in versions.items()])}</div>'


# --- several runs


def comparison_page(runs: Mapping[str, Run]) -> str:
    """The page that lays runs side by side; differences are from the first one."""
    base_name, base = next(iter(runs.items()))
    plots = comparison_plots(runs)
    parts = [
        "<h1>Runs side by side</h1>",
        f'<p class="lead">{_clean(verdict(runs))}</p>',
        _warnings([f"{name}: {w}" for name, run in runs.items() for w in findings(run)] + unlike(runs)),
        "<h2>Results</h2>",
        '<p class="soft">Newest evaluation of each run, held-out problems answered right, with 95 % intervals. The difference is '
        f"greedy, paired problem by problem with <b>{_clean(base_name)}</b>. Intervals are over problems alone: "
        "the same recipe with another seed may differ by more.</p>",
        _results(runs, base),
        _figures(plots, "Curves", "None of these runs has logged a step yet.", _legend(runs)),
        "<h2>What differs in the recipes</h2>",
        _differences(runs),
    ]
    return _page("comparison · vpd-mlx", "\n".join(parts))


def verdict(runs: Mapping[str, Run]) -> str:
    """Which runs are better or worse than the first, in a sentence."""
    (base_name, base), *others = runs.items()
    said = []
    for name, run in others:
        p = paired(base.greedy(), run.greedy())
        if p is None:
            said.append(f"{name} has no held-out problem in common with it")
        else:
            said.append(f"{name} is {p.verdict} ({points(p.difference)} points, {_bounds(p)})")
    return f"Greedy accuracy against {base_name}: {'; '.join(said)}."


def unlike(runs: Mapping[str, Run]) -> list[str]:
    """Reasons why the figures may not be comparable."""
    (base_name, base), *others = runs.items()
    out = []
    for name, run in others:
        mine, yours = base.greedy(), run.greedy()
        if mine and yours and set(mine) != set(yours):
            common = len(set(mine) & set(yours))
            out.append(
                f"{name} was evaluated on other problems than {base_name} ({common} in common): only the paired difference "
                "compares them."
            )
        if base.done != run.done:
            out.append(f"{name} has done {steps(run.done)}, {base_name} {base.done}.")
    return out


def _legend(runs: Mapping[str, Run]) -> str:
    names = zip(runs, legend_colors(len(runs)), strict=True)
    dots = " ".join(
        f'<span><span class="dot" style="background:var(--{c})"></span>{_clean(n)}</span>' for n, c in names
    )
    return f'<div class="legend">{dots}</div>'


def _results(runs: Mapping[str, Run], base: Run) -> str:
    lines = []
    for (name, run), color in zip(runs.items(), legend_colors(len(runs)), strict=True):
        row = run.evaluation
        p = None if run is base else paired(base.greedy(), run.greedy())
        if run is base:
            difference = '<td class="n">-</td>'
        elif p is None:
            difference = '<td class="n">no problem in common</td>'
        else:
            difference = (
                f'<td class="n">{points(p.difference)} <b>{p.verdict}</b><br><span class="soft">{_bounds(p)}; '
                f"better on {p.better}, worse on {p.worse} of {p.problems}</span></td>"
            )
        memory = "-" if run.peak_memory_mb is None else f"{run.peak_memory_mb:,.0f}"
        lines.append(
            f'<tr><th><span class="dot" style="background:var(--{color})"></span>{_clean(name)}<br>'
            f'<span class="soft small">{_clean(run.algorithm)}, {_clean(_progress(run))}</span></th>'
            f'<td class="n">{percentage(run.before.get("student"))}</td>'
            f"{''.join(_cell(row, key) for key, _, _ in RATES)}{difference}"
            f'<td class="n">{_duration(sum(run.seconds.values()))}</td><td class="n">{memory}</td></tr>'
        )
    heads = ("student, before", "student", "student, greedy", "teacher", "difference, points", "time", "peak, MiB")
    head = "".join(f'<th class="n">{h}</th>' for h in heads)
    return (
        f'<div class="card scroll"><table id="results"><thead><tr><th>run</th>{head}</tr></thead><tbody>{"".join(lines)}'
        "</tbody></table></div>"
    )


def _differences(runs: Mapping[str, Run]) -> str:
    recipes = [flat(run.config) for run in runs.values()]
    keys = list(dict.fromkeys(k for r in recipes for k in r))
    rows = [
        (k, [r.get(k, "-") for r in recipes]) for k in keys if len({json.dumps(r.get(k, "-")) for r in recipes}) > 1
    ]
    if not rows:
        return '<p class="soft">Nothing: the recipes are the same.</p>'
    note = '<p class="soft">A dash: that recipe does not have the key.</p>'
    return f'{note}<div id="differences">{_keys(rows, list(runs))}</div>'
