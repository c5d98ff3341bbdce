"""Report, show and compare: true to the run folder, whatever stage it is in and whatever the model wrote."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import QUICKSTART, SMALL
from typer.testing import CliRunner

from vpd_mlx.commands.app import app
from vpd_mlx.common.files import read_rows
from vpd_mlx.common.stats import paired
from vpd_mlx.errors import ConfigError, DataError, VpdError
from vpd_mlx.recipe import load_recipe
from vpd_mlx.report.browse import choose, histories
from vpd_mlx.report.page import comparison_page, run_page
from vpd_mlx.report.plots import run_plots
from vpd_mlx.report.tries import try_commands
from vpd_mlx.run.folder import LoggedRollout, load_run, short_names
from vpd_mlx.run.loop import train
from vpd_mlx.run.warnings import findings

ALWAYS = {"accuracy", "gap", "reward", "groups", "length", "entropy", "updates", "seconds", "memory"}
HOSTILE = '</script><img src=x onerror="hacked()">&amp;\u2028\x1b[31m\u202eabc'


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A VPD run with an E-step at every step, and a GRPO run of one step."""
    folder = tmp_path_factory.mktemp("runs")
    for name, changes in {"vpd": {"e_step.every": 1, "rollout.prompts": 8}, "grpo": {"steps": 1}}.items():
        train(load_recipe(QUICKSTART, list({**SMALL, "algorithm": name, **changes}.items())), folder / name)
    return {name: folder / name for name in ("vpd", "grpo")}


@pytest.fixture
def run(runs: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the VPD run, for a test to change."""
    shutil.copytree(runs["vpd"], tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def whole_page(runs: dict[str, Path]) -> str:
    """The page of the VPD run with its plots."""
    return run_page(load_run(runs["vpd"]), 400)


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots take most of the second that a page takes."""
    monkeypatch.setattr("vpd_mlx.report.page.run_plots", lambda run: {})


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


class Parsed(HTMLParser):
    """Elements and texts of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.rollouts: list[dict[str, Any]] = []
        self._in_data = self._in_script = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_data = ("id", "rollouts") in attrs
        self._in_script = tag == "script"

    def handle_endtag(self, tag: str) -> None:
        self._in_data = self._in_script = False

    def handle_data(self, data: str) -> None:
        if self._in_data:
            self.rollouts = json.loads(data)
        elif not self._in_script:
            self.text += data

    def ids(self, tag: str) -> set[str]:
        return {str(a["id"]) for t, a in self.tags if t == tag and "id" in a}


def report(path: Path, most: int = 400) -> Parsed:
    return Parsed(run_page(load_run(path), most))


def test_the_page_has_it_all_and_reads_nothing_from_anywhere(whole_page):
    text = whole_page
    page = Parsed(text)
    plots = page.ids("figure")
    assert {f"plot-{p}" for p in ALWAYS | {"divergence", "contexts"}} <= plots
    assert len(re.findall(r"<svg ", text)) == len(plots)
    assert not [a for t, a in page.tags if t in ("img", "link", "iframe", "object") or "src" in a]
    # Names of things within the page, and of XML's vocabularies, are no addresses that a browser reads.
    assert set(re.findall(r"https?://[^\"' ]*", text)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "prefers-color-scheme: dark" in text
    assert "#0102" not in text, "a stand-in for a colour is left"
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    for used in re.findall(r'(?:url\(#|href="#)([^)"]+)', text):
        assert used in ids
    for name in ("mlx-lm", "python", "optimizer.learning_rate", "feedback.sources"):
        assert name in page.text
    for figure in re.findall(r"<figure.*?</figure>", text, re.DOTALL):
        assert re.search(r"<p>[^<]{30,}[.]</p>", figure), "a plot without its sentence"


def test_figures_are_those_of_the_run(runs, no_plots):
    evals = read_rows(runs["vpd"] / "evals.jsonl")
    page = report(runs["vpd"])
    for value in (evals[0]["student"], evals[-1]["student"], evals[-1]["teacher"]):
        assert f"{100 * value:.1f} %" in page.text
    low, high = evals[-1]["student_interval"]
    assert f"{100 * low:.1f} to {100 * high:.1f}" in page.text
    logged = read_rows(runs["vpd"] / "rollouts.jsonl")
    assert [(r["step"], r["prompt"], r["completion"], r["right"], r["teacher"]) for r in page.rollouts] == [
        (r["step"], r["prompt"], r["completion"], r["success"], r["teacher_prompt"] or "") for r in logged
    ]
    with_teacher = [r for r in page.rollouts if r["shift"]]
    assert with_teacher
    assert all(len(r["shift"]) == len(r["pieces"]) for r in with_teacher)


def test_grpo_with_one_step(runs):
    plots = report(runs["grpo"]).ids("figure")
    assert {f"plot-{p}" for p in ALWAYS} == plots


def test_a_folder_of_the_first_format_has_all_its_plots():
    old = load_run(Path(__file__).parent / "data" / "old-run")
    assert not any(k.startswith("student/") for k in read_rows(old.path / "metrics.jsonl")[0])
    assert {"entropy", "divergence", "seconds"} <= set(run_plots(old))
    assert "student's update" in run_page(old, 5)


def hostile(run: Path, text: str) -> None:
    """Put a text into every place of a run folder that a model, a data set, a recipe or a machine decides."""
    rows = read_rows(run / "rollouts.jsonl")
    texts = dict.fromkeys(("problem", "prompt", "completion", "verdict", "teacher_prompt", "finish"), text)
    context = {"kind": text, "text": text, "cut": True}
    write(
        run / "rollouts.jsonl",
        [{**rows[0], **texts, "context": context, "pieces": [text], "shift": [-9.0], "step": 9}],
    )
    steps = read_rows(run / "metrics.jsonl")
    write(run / "metrics.jsonl", [{**r, "contexts": {text: 9}} for r in steps])
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "versions": {text: text}}))
    keys = ("name", "algorithm", "model", "seed", text)
    (run / "config.yaml").write_text("".join(f"{json.dumps(k)}: {json.dumps(text)}\n" for k in keys) + "steps: 2\n")


@pytest.mark.parametrize("text", [HOSTILE, "<script>hacked()</script>", "{{ 7 * 191 }}{% raw %}"])
def test_what_a_model_wrote_stays_text(run, whole_page, text):
    plain = whole_page
    hostile(run, text)
    page = run_page(load_run(run), 400)
    parsed = Parsed(page)
    assert page.count("</script>") == page.count("<script") == plain.count("<script") == 6
    assert "<img" not in page
    assert "1337" not in re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL)
    assert parsed.rollouts[0]["completion"] == text
    assert {t for t, _ in parsed.tags} <= {t for t, _ in Parsed(plain).tags}
    assert not [a for _, a in parsed.tags if "onerror" in a]
    compared = comparison_page({text: load_run(run), "b": load_run(run)})
    assert "<img" not in compared
    assert compared.count("</script>") == compared.count("<script") == 2
    assert text.replace("\x1b", "") in Parsed(compared).text.replace("\x1b", "")


def test_the_terminal_shows_no_control_characters(run):
    hostile(run, HOSTILE)
    shown = CliRunner().invoke(app, ["show", str(run)])
    assert "\x1b" not in shown.output
    assert "\u202e" not in shown.output
    assert "\\x1b[31m" in shown.output


def test_half_a_surrogate_can_be_written(run, no_plots):
    hostile(run, "a\ud800")
    page = run_page(load_run(run), 400)
    page.encode()
    assert Parsed(page).rollouts[0]["completion"] == "a?"
    comparison_page({"a": load_run(run), "b": load_run(run)}).encode()


@pytest.mark.parametrize(
    "missing", [["summary.json", "rollouts.jsonl"], ["evals.jsonl"], ["metrics.jsonl"], "all"], ids=str
)
def test_files_may_be_missing(run, missing):
    names = ["summary.json", "evals.jsonl", "metrics.jsonl", "rollouts.jsonl"] if missing == "all" else missing
    for name in names:
        (run / name).unlink()
    report(run)
    assert CliRunner().invoke(app, ["show", str(run)]).exit_code == 0
    if missing == "all":
        comparison_page({"a": load_run(run), "b": load_run(run)})


def test_keys_may_be_missing_and_numbers_broken(run):
    faulty: dict[str, list[dict[str, Any]]] = {}
    for name in ("metrics.jsonl", "evals.jsonl", "rollouts.jsonl"):
        first, *rows = read_rows(run / name)
        faulty[name] = [
            {"step": first["step"]},
            dict.fromkeys(first, None),
            {k: "nan" if isinstance(v, float) else v for k, v in first.items()},
            {k: v if k == "step" else "text" for k, v in first.items()},
        ]
        write(run / name, [*faulty[name], *rows])
    assert len(report(run).rollouts) > 4
    for i in range(4):
        for name, rows in faulty.items():
            write(run / name, [rows[i]])
        findings(load_run(run))
        assert len(run_page(load_run(run), 5)) > 10_000


def test_a_run_that_goes_on(run, no_plots):
    (run / "summary.json").unlink()
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("steps: 2", "steps: 50"))
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        with (run / name).open("a") as f:
            f.write('{"step": 3, "reward": 0.')
    page = report(run)
    assert "2 of 50 steps so far" in page.text
    assert not any(r["step"] == 3 for r in page.rollouts)


def test_long_runs_stay_small(run):
    rows = read_rows(run / "metrics.jsonl")
    write(run / "metrics.jsonl", [{**rows[i % 2], "step": i + 1} for i in range(4000)])
    for name, plot in run_plots(load_run(run)).items():
        assert len(plot.svg) < 150_000, name
        assert len(json.dumps(plot.data)) < 30_000, name


def test_what_is_left_out_is_said(runs, no_plots):
    page = report(runs["vpd"], most=10)
    total = len(read_rows(runs["vpd"] / "rollouts.jsonl"))
    assert len(page.rollouts) <= 10
    assert f"{len(page.rollouts)} of {total} rollouts are here" in page.text
    assert "{" not in page.text.split("What the student wrote")[1].split("Recipe")[0]
    assert f"{total - len(page.rollouts)} are left out" in page.text


def test_long_completions_do_not_swell_the_page(runs, no_plots, monkeypatch):
    whole = len(json.dumps(report(runs["vpd"]).rollouts))
    monkeypatch.setattr("vpd_mlx.report.browse.MOST_BYTES", whole // 3)
    kept = report(runs["vpd"]).rollouts
    assert whole // 6 < len(json.dumps(kept)) <= whole // 3


@pytest.mark.parametrize("most", [1, 3, 4, 10, 100, 399])
def test_whole_groups_from_the_first_step_to_the_last(most):
    entries = [
        LoggedRollout(0, step, f"p{p}", False, "none") for step in range(1, 11) for p in range(10) for _ in range(4)
    ]
    chosen = choose(entries, most)
    assert 0 < len(chosen) <= most
    if most >= 8:
        assert {1, 10} <= {e.step for e in chosen}
        assert len(chosen) % 4 == 0
        assert len(chosen) > most - 8


def changed(run: Path, **values: Any) -> list[str]:
    """Findings once every row of the metrics has these."""
    rows = read_rows(run / "metrics.jsonl")
    write(
        run / "metrics.jsonl",
        [{**rows[0], **{k.replace("__", "/"): v for k, v in values.items()}, "step": s} for s in range(1, 21)],
    )
    return findings(load_run(run))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"groups_all_wrong": 1.0}, "All completions are wrong in 100.0 %"),
        ({"groups_all_right": 0.96}, "All completions are right in 96.0 %"),
        ({"e_step__margin": -0.4}, "margin has been negative three times (last -0.40)"),
        ({"truncated": 0.5}, "50% of completions are cut off"),
        ({"student__nonfinite": 2}, "40 update(s) were left out"),
        ({"verifier_failures": 3}, "The verifier failed on 60"),
        ({"e_step__skipped": 1}, "20 of 20 E-steps were skipped"),
        ({"contexts_cut": 1000}, "of the feedback was cut"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_warnings(run, values, words):
    assert not any(words in f for f in findings(load_run(run)))
    found = changed(run, **values)
    assert any(words in f for f in found), found


def test_collapse_is_told_from_success(run):
    rows = read_rows(run / "metrics.jsonl")
    falling = [
        {
            **rows[0],
            "step": i + 1,
            "student/entropy": 0.6 if i < 10 else 0.01,
            "length": 40 if i < 10 else 4,
            "reward": 0.1,
        }
        for i in range(20)
    ]
    write(run / "metrics.jsonl", falling)
    found = " ".join(findings(load_run(run)))
    assert "Collapse: entropy has gone from 0.600 to 0.010 nats" in found
    assert "Length collapse: 40.0 -> 4.0 tokens" in found
    write(run / "metrics.jsonl", [{**r, "reward": 0.95} for r in falling])
    assert "ntropy" not in " ".join(findings(load_run(run)))


def test_a_gap_that_is_gone_and_a_student_that_got_worse(run):
    rows = read_rows(run / "evals.jsonl")
    problems = [f"p{i}" for i in range(40)]
    first = {**rows[0], "greedy_by_problem": dict.fromkeys(problems, 1.0), "student_greedy": 1.0, "gap": 0.5}
    last = {
        **rows[-1],
        "greedy_by_problem": dict.fromkeys(problems, 0.0),
        "student_greedy": 0.0,
        "gap": 0.001,
        "student": 0.3,
    }
    write(run / "evals.jsonl", [first, last])
    found = " ".join(findings(load_run(run)))
    assert "The student got worse: greedy 100.0 % before, 0.0 % after" in found
    assert "gap is gone" in found
    assert "no gap from the start" not in found


def told(run: Path, before: tuple[float, float] | None, after: tuple[float, float] | None) -> tuple[str, str]:
    """The page's sentence on the gap, and the findings, of (teacher, student) before and after training."""
    rows = read_rows(run / "evals.jsonl")[:2]
    scores = [
        {**row, "teacher": t, "student": s, "student_there": s, "gap": t - s, "teacher_problems": 8, "step": 2 * i}
        | {"gap_interval": [t - s - 0.1, t - s + 0.1]}
        for i, (row, both) in enumerate(zip(rows, (before, after), strict=True))
        if both is not None
        for t, s in [both]
    ]
    write(run / "evals.jsonl", scores)
    page = run_page(load_run(run), 0)
    story = re.search(r'<p id="gap-story">(.*?)</p>', page)
    return story[1] if story else "", " ".join(findings(load_run(run)))


@pytest.mark.parametrize(
    ("before", "after", "story", "warned"),
    [
        ((0.1, 0.2), (0.1, 0.2), "No gap from the start: before training", True),
        ((0.9, 0.1), (0.9, 0.5), "+80.0 points (teacher 90.0 %, student 10.0 %), after it +40.0", False),
        (
            (0.15, 0.1),
            (0.9, 0.9),
            "No certain gap from the start: +5.0 points (95 % interval −5.0 to +15.0; teacher",
            False,
        ),
        ((0.9, 0.1), (0.95, 0.9), "after it +5.0 (teacher 95.0 %, student 90.0 %): the gap is closed", False),
        ((0.9, 0.1), (0.9, 0.9), "after it +0.0 (teacher 90.0 %, student 90.0 %): the gap is closed", False),
        ((0.9, 0.1), (0.1, 0.1), "after it +0.0 (teacher 10.0 %, student 10.0 %): the gap is lost", False),
        ((0.9, 0.1), None, "Before training, feedback is worth +80.0 points (teacher 90.0 %, student 10.0 %).", False),
    ],
)
def test_no_gap_from_the_start_is_told_from_one_that_was_lost(run, no_plots, before, after, story, warned):
    said, found = told(run, before, after)
    assert story in said
    assert ("no gap from the start" in found) == warned


def test_the_headline_compares_one_figure_with_itself(run, no_plots):
    rows = read_rows(run / "evals.jsonl")
    headline = re.search(r'<p class="lead">(.*?)</p>', run_page(load_run(run), 0))[1]
    first, last = (f"{100 * row['student_greedy']:.1f} %" for row in (rows[0], rows[-1]))
    assert f"right on {last} of 8 held-out problems, before training on {first}: " in headline.replace("&#39;", "'")
    write(run / "evals.jsonl", [{k: v for k, v in row.items() if "greedy" not in k} for row in rows])
    headline = re.search(r'<p class="lead">(.*?)</p>', run_page(load_run(run), 0))[1]
    first, last = (f"{100 * row['student']:.1f} %" for row in (rows[0], rows[-1]))
    assert f"sampled, solves {last} of 8 held-out problems; before, {first}." in headline


def test_a_page_leads_to_the_adapter_and_says_how_to_try_it(run, tmp_path, no_plots):
    page = Parsed(run_page(load_run(run), 0, tmp_path / "elsewhere"))
    links = {str(a["href"]) for t, a in page.tags if t == "a"}
    assert "../run/adapters/" in links
    assert f"vpd-mlx try {run} " in page.text
    assert f"--adapter-path {run / 'adapters'} --max-tokens 6 --prompt " in page.text
    places = {link[1:] for link in links if link.startswith("#")}
    assert {"figures", "answers", "curves", "browse"} <= places <= {str(a["id"]) for _, a in page.tags if "id" in a}
    rows = read_rows(run / "answers.jsonl")
    for prompt, last in (("[bold]it's[/bold]\n", f"try {run} '[bold]it"), ("a\x1b[2J\u202eb", f"vpd-mlx try {run}")):
        write(run / "answers.jsonl", [{**r, "prompt": prompt} for r in rows])
        commands = [command for _, command in try_commands(load_run(run))]
        assert last in commands[0]
        assert "\x1b" not in "".join(commands)
        assert all(shlex.split(command)[-1] in (prompt, str(run)) for command in commands)
    (run / "report.html").write_text("")
    compared = Parsed(comparison_page({"a": load_run(run), "b": load_run(run)}, tmp_path))
    assert {"run/report.html", "run/adapters/"} <= {str(a["href"]) for t, a in compared.tags if t == "a"}
    shutil.rmtree(run / "adapters")
    assert "vpd-mlx try" not in Parsed(run_page(load_run(run), 0, tmp_path)).text


def test_points_under_the_pointer_are_those_of_the_run(runs, whole_page):
    found = load_run(runs["vpd"])
    plots = {str(a["id"])[5:]: json.loads(str(a["data-chart"])) for t, a in Parsed(whole_page).tags if t == "figure"}
    (accuracy,) = plots["accuracy"]["axes"]
    steps, values, bounds = found.evaluations("student_greedy")
    greedy = next(t for t in accuracy["tracks"] if t["name"] == "student, greedy")
    assert (greedy["x"], greedy["y"]) == (steps, pytest.approx([100 * v for v in values], rel=1e-4))
    assert greedy["low"] == pytest.approx([100 * low for low, _ in bounds], rel=1e-4)
    norms, rates = plots["updates"]["axes"]
    assert [axis["name"] for axis in (norms, rates)] == ["gradient norm", "learning rate"]
    assert [t["y"] for t in norms["tracks"]] == [
        pytest.approx(found.series(f"{part}/grad_norm")[1], rel=1e-4) for part in ("student", "e_step")
    ]
    assert next(t["y"] for t in rates["tracks"]) == pytest.approx(found.series("student/rate")[1], rel=1e-4)
    for plot in plots.values():
        for axis in plot["axes"]:
            left, top, right, bottom = axis["box"]
            assert 0 < left < right <= 72 * 4.4
            assert 0 < top < bottom <= 72 * 3.0


def test_flat_curves_look_flat(run):
    rows = read_rows(run / "metrics.jsonl")
    flat = {"reward": 0.0, "success": 0.0, "length": 7.0, "length_max": 7, "truncated": 0.0, "student/entropy": 0.0}
    write(run / "metrics.jsonl", [{**rows[0], **flat, "student/teacher_entropy": 0.0, "step": s} for s in range(1, 9)])
    write(run / "evals.jsonl", [{**r, "gap": 0.0, "gap_interval": [0, 0]} for r in read_rows(run / "evals.jsonl")])
    plots = run_plots(load_run(run))
    for name, least in {"gap": 10, "reward": 0.1, "length": 1, "entropy": 0.05}.items():
        for axis in plots[name].data["axes"]:
            assert axis["y"][1] - axis["y"][0] >= least - 1e-9, name


def test_a_problem_can_be_followed_through_all_evaluations(run, monkeypatch):
    rows = read_rows(run / "answers.jsonl")
    found = histories(load_run(run))
    assert [h["problem"] for h in found] == list(dict.fromkeys(r["problem"] for r in rows))
    for h in found:
        own = [r for r in rows if r["problem"] == h["problem"]]
        assert [(a["step"], a["right"], a["text"]) for a in h["answers"]] == [
            (r["step"], r["success"], r["completion"]) for r in own
        ]
        assert h["expected"] == own[0]["expected"]
        assert {t["text"] for t in h["taught"]} == {r["teacher_prompt"] for r in own if r["teacher_prompt"]}
    write(run / "answers.jsonl", [dict.fromkeys(rows[0]), {"step": 2}, {"step": "nan", "problem": "x"}, *rows])
    assert [h["problem"] for h in histories(load_run(run))] == ["?", *(h["problem"] for h in found)]
    monkeypatch.setattr("vpd_mlx.report.browse.MOST_HISTORY", 2000)
    few = histories(load_run(run))
    assert 0 < len(few) < len(found)
    assert len(json.dumps(few)) <= 2100


def test_problems_that_come_back_can_be_followed():
    entries = [
        LoggedRollout(0, step, name, False, "none")
        for step in range(1, 41)
        for name in (*(f"s{step}-{p}" for p in range(8)), *(("again",) if step % 4 == 0 else ()))
        for _ in range(4)
    ]
    chosen = choose(entries, 240)
    assert {e.step for e in chosen if e.problem == "again"} == set(range(4, 41, 4))
    assert {1, 40} <= {e.step for e in chosen}
    assert 200 < len(chosen) <= 240


def test_short_names_tell_runs_apart():
    assert short_names([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert short_names([Path("/x/one/seed0"), Path("/x/two/seed0")]) == ["one/seed0", "two/seed0"]


# --- commands


def test_report_command(run, tmp_path, no_plots):
    done = CliRunner().invoke(app, ["report", str(run)])
    assert done.exit_code == 0
    assert (run / "report.html").exists()
    assert "report.html" in done.output
    CliRunner().invoke(app, ["report", str(run), "--out", str(tmp_path / "page.html"), "--rollouts", "0"])
    assert Parsed((tmp_path / "page.html").read_text()).rollouts == []


def test_show_command(runs):
    def shown(*options: str) -> str:
        done = CliRunner().invoke(app, ["show", str(runs["vpd"]), *options], env={"COLUMNS": "80", "NO_COLOR": "1"})
        assert done.exit_code == 0, done.output
        assert "\x1b" not in done.output
        assert max(map(len, done.output.splitlines())) <= 80
        return done.output

    logged = read_rows(runs["vpd"] / "rollouts.jsonl")
    everything = shown("--limit", "1000")
    assert everything.count("feedback:") == len(logged)
    assert len(re.findall(r"^expected +\d+ *$", everything, re.MULTILINE)) == len(logged)
    assert shown().count("step 2") == 5  # newest first
    assert "WRONG" not in shown("--right", "--limit", "1000")
    wrong = shown("--wrong", "--step", "1", "--limit", "1000")
    assert wrong.count("WRONG") == sum(r["step"] == 1 and not r["success"] for r in logged)
    kind = next(r["context"]["kind"] for r in logged if r["context"])
    some = shown("--kind", kind, "--limit", "1000")
    assert some.count(f"feedback: {kind}") == sum(bool(r["context"]) and r["context"]["kind"] == kind for r in logged)
    assert "teacher−student" in some


def test_compare_command(runs, tmp_path):
    both = [str(runs["vpd"]), str(runs["grpo"])]
    done = CliRunner().invoke(app, ["compare", *both, "--out", str(tmp_path / "c.html")], env={"COLUMNS": "80"})
    assert done.exit_code == 0, done.output
    assert max(map(len, done.output.splitlines()[:-1])) <= 80
    page = Parsed((tmp_path / "c.html").read_text())
    assert {"plot-student", "plot-greedy", "plot-teacher", "plot-reward", "plot-entropy", "plot-length"} == page.ids(
        "figure"
    )
    assert "algorithm" in page.text
    p = paired(load_run(runs["vpd"]).greedy(), load_run(runs["grpo"]).greedy())
    assert f"better on {p.better}, worse on {p.worse} of {p.problems}" in page.text


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["report", "nowhere"], "nowhere does not exist, so holds no run"),
        (["show", "."], "holds no run (config.yaml is missing)"),
        (["compare", "RUN"], "got 1 run"),
        (["compare", "RUN", "RUN"], "names a run twice"),
        (["show", "RUN", "--right", "--wrong"], "leave one out"),
        (["show", "RUN", "--step", "99"], "got 99"),
        (["show", "RUN", "--kind", "gossip"], "got 'gossip'"),
        (["report", "RUN", "--out", "no/such/folder/page.html"], "cannot be written"),
        (["report", "RUN", "--out", "."], "cannot be written"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_errors_are_one_line(runs, tmp_path, monkeypatch, command, words):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, [str(runs["vpd"]) if c == "RUN" else c for c in command])
    assert isinstance(done.exception, ConfigError)
    assert done.exception.exit_code == 2
    assert words in str(done.exception)
    assert "\n" not in str(done.exception)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("metrics.jsonl", '{"step": 1}\n{"step":\n', "metrics.jsonl:2: broken JSON"),
        ("evals.jsonl", "[1]\n", "evals.jsonl:1: got list"),
        ("rollouts.jsonl", b"\xff\xfe\n", "rollouts.jsonl:1: broken JSON"),
        ("summary.json", "{", "summary.json: broken JSON"),
        ("config.yaml", "a: [\n", "not valid YAML"),
    ],
)
def test_broken_files_are_named(run, name, text, words):
    (run / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError) as caught:
        load_run(run)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, VpdError)


def test_reading_a_run_loads_no_mlx(runs):
    script = (
        "import sys; from pathlib import Path; from vpd_mlx.report.page import run_page; "
        "from vpd_mlx.run.folder import load_run; "
        "run_page(load_run(Path(sys.argv[1])), 5); sys.exit(any(m.split('.')[0] in ('mlx', 'mlx_lm') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", script, str(runs["vpd"])], check=False).returncode == 0
