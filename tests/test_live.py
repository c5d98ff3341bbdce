"""What the terminal shows of a run, at several sizes, with and without colour."""

from __future__ import annotations

import io
import json
import re

import pytest
from rich.console import Console

from vpd_mlx.common.text import duration, json_text
from vpd_mlx.report import live as view
from vpd_mlx.report.live import LiveView, make_view, spark
from vpd_mlx.run.remaining import seconds_left
from vpd_mlx.types import Context, Rollout, Verdict

METRICS = {
    "reward": 0.25,
    "student/divergence": 0.2,
    "length": 41.0,
    "tokens_per_s": 1234.0,
    "peak_memory_mb": 27.0,
}
FAILURE = Rollout(
    tokens=(1, 2),
    logps=(-1.0, -1.0),
    text="def add(a, b):\n    return a - b\n" * 20,
    finish="stop",
    verdict=Verdict(0.5, "no"),
    context=Context("verifier", "AssertionError: add(1, 2) gave -1 " * 30),
)


class Clock:
    """Time that passes when told to."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(view, "time", clock)
    return clock


def drawn(live: LiveView, width: int, height: int, **terminal: object) -> list[str]:
    out = io.StringIO()
    console = Console(file=out, width=width, height=height, **terminal)  # type: ignore[arg-type]
    live._console = console
    console.print(live._draw())
    return out.getvalue().splitlines()


def a_view() -> LiveView:
    live = LiveView(Console(file=io.StringIO(), force_terminal=True), "mine (vpd)")
    live.phase("rollout", 0, 8)
    live.evaluation(0, {"problems": 8, "samples": 4, "student": 0.1, "student_greedy": 0.0, "teacher": 0.6, "gap": 0.5})
    for step in range(1, 41):
        live.step(step, 60, {**METRICS, "reward": step / 60}, 130.0)
    live.sample("Write what adds.", FAILURE, "return a + b")
    return live


@pytest.mark.parametrize("terminal", [{"force_terminal": True}, {"no_color": True}, {"color_system": None}])
@pytest.mark.parametrize(("width", "height"), [(40, 16), (80, 24), (120, 40), (200, 12)])
def test_every_size_holds_what_matters(clock: Clock, width: int, height: int, terminal: dict[str, object]):
    lines = drawn(a_view(), width, height, **terminal)
    text = "\n".join(lines)
    assert len(lines) < height  # the evaluation's line and the cursor need room, too
    if not terminal.get("force_terminal"):
        assert "\x1b" not in text
        assert max(map(len, lines)) <= width
    for words in ("mine (vpd)", "step 40/60", "2 min 10 s left", "reward", "0.667", "teacher gap", "27 MB"):
        assert words in text
    shows = height - len(lines) > 0 and "completion" in text
    assert shows == (height >= 16)
    if shows:
        feedback = "return a + b", "verifier: AssertionError"
        for words in ("adds.", "def add(a, b):", "wrong, score 0.50", *feedback, "…"):
            assert words in text


def test_a_bad_verifier_and_a_right_answer(clock: Clock):
    live = a_view()
    live.sample("p", Rollout((1,), (0.0,), "fine", "stop", Verdict(1.0), success=True), None)
    assert "right, score 1.00" in "\n".join(drawn(live, 80, 30))
    live.sample("p", Rollout((1,), (0.0,), "?", "stop", Verdict(0.0, error="no connection")), None)
    assert "none: the verifier failed" in "\n".join(drawn(live, 80, 30))


def test_the_phase_says_how_long_it_still_takes(clock: Clock):
    live = a_view()
    live.phase("rollout", 0, 8)
    clock.now = 6.0
    live.phase("rollout", 2, 8)
    assert "rollout 2/8, 18 s left" in drawn(live, 80, 24)[0]
    clock.now = 24.0
    live.phase("update")  # not seen before, and no count: nothing is known
    assert drawn(live, 80, 24)[0].endswith("update")
    clock.now = 34.0
    live.phase("rollout", 0, 8)  # as long as last time, until it moves
    assert "rollout 0/8, 24 s left" in drawn(live, 80, 24)[0]
    clock.now = 58.0
    live.phase("update")
    clock.now = 61.0
    assert "update, 7 s left" in drawn(live, 80, 24)[0]


def test_the_time_left_is_there_before_the_first_step_and_runs_down(clock: Clock):
    live = LiveView(Console(file=io.StringIO(), force_terminal=True), "mine (vpd)")
    assert "left" not in "\n".join(drawn(live, 80, 24))
    live.left(300.0)
    clock.now = 60.0
    assert drawn(live, 80, 24)[1] == "about 4 min 00 s left"
    live.step(1, 60, METRICS, 130.0)
    clock.now = 70.0
    assert "2 min 00 s left" in drawn(live, 80, 24)[1]


def test_a_curve_says_between_which_values_it_runs(clock: Clock):
    (line,) = [line for line in drawn(a_view(), 80, 24, color_system=None) if line.startswith("reward")]
    assert line.rstrip().endswith("0.117 … 0.667")  # of the bars that are shown, not of the run


def test_what_is_over_at_once_gets_no_time(clock: Clock):
    live = a_view()
    live.phase("rollout", 0, 8)
    clock.now = 1.0
    live.phase("rollout", 4, 8)
    assert "left" not in drawn(live, 80, 24)[0]


HOSTILE = "a\x1b]52;c;ZXZpbA==\x07b\x1b[2Jc\x9b31md\u202ee\u2066f\u200fg\x00h\ud800i\rj"
SAFE = ("\\x1b]52;c;", "\\x1b[2J", "\\x9b31m", "\\u202e", "\\u2066", "\\u200f", "\\x00", "\\x0d")


def test_nothing_foreign_reaches_the_terminal_raw(clock: Clock, capsys: pytest.CaptureFixture[str]):
    hostile = Rollout((1,), (0.0,), HOSTILE, "stop", Verdict(0.0, HOSTILE), context=Context("verifier", HOSTILE))
    live = a_view()
    live.sample(HOSTILE, hostile, HOSTILE)
    live.note(f"the verifier failed: {HOSTILE}\nstep 9/9  reward 1.000")
    console = live._console
    assert isinstance(console.file, io.StringIO)
    text = "\n".join(drawn(live, 200, 40, color_system=None))
    notes = re.sub(r"\x1b\[[0-9;]*m", "", console.file.getvalue())  # our own colours
    for plain in (make_view("mine", quiet=False), make_view("mine", quiet=True)):
        plain.note(f"the verifier failed: {HOSTILE}\nstep 9/9  reward 1.000")
    said = capsys.readouterr()
    for shown in (text, notes, said.out, said.err):
        assert not [c for c in HOSTILE if c in shown and not c.isprintable()], shown
        for words in SAFE:
            assert words in shown
    assert (len(said.out.splitlines()), len(said.err.splitlines())) == (1, 1)  # no line that looks like ours


def test_json_for_the_terminal_is_json():
    text = json_text({"completion": HOSTILE, "text": "naïve — 你好"})
    assert not [c for c in text if not c.isprintable() and c != "\n" and c != "\ud800"]
    assert json.loads(text) == {"completion": HOSTILE, "text": "naïve — 你好"}
    assert "你好" in text


def test_the_scales():
    assert spark([1.0, 2.0, 3.0], 2) == ("▁█", "2 … 3")
    assert spark([2.0, 2.0], 8) == ("▁▁", "2")
    assert spark([0.01234, 1234.5], 8) == ("▁█", "0.0123 … 1234")
    assert spark([], 8) == ("", "")
    assert [duration(s) for s in (59.4, 61, 3700)] == ["59 s", "1 min 01 s", "1 h 01 min"]


def test_lines_where_nobody_watches(capsys: pytest.CaptureFixture[str]):
    plain = make_view("mine", quiet=False)
    with plain:
        plain.step(1, 60, METRICS, 5.0)
        plain.sample("p", FAILURE, None)
        plain.phase("rollout", 1, 2)
    assert capsys.readouterr().out.splitlines() == [
        "step 1/60  reward 0.250  length 41.0  divergence 0.200  tokens/s 1,234  5 s left"
    ]
    quiet = make_view("mine", quiet=True)
    with quiet:
        quiet.step(1, 60, METRICS, 5.0)
        quiet.note("a warning")
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "a warning\n")


@pytest.mark.parametrize(
    ("done", "every", "left"),
    [
        (0, None, 10 * 2 * 0.1 * 8 + 20),  # 8 completions a step, each twice the evaluation's 0.1 s; one evaluation
        (0, 4, 10 * 2 * 0.1 * 8 + 3 * 20),  # after 4, 8 and 10
        (5, 5, 5 * 3.0 + 20),
        (4, 4, 6 * 3.75 + 2 * 20),
        (10, 4, 0.0),
    ],
)
def test_the_time_left_counts_every_evaluation_to_come(small, done: int, every: int | None, left: float):
    recipe = small(steps=10, rollout__prompts=4, rollout__group_size=2, evaluation__every=every)
    evaluation = {"problems": 50, "samples": 2, "teacher_problems": 50, "seconds": 20.0}
    spent = {"rollout": 10.0, "student": 5.0, "evaluation": 77.0, "selection": 9.0}
    assert seconds_left(recipe, done, spent, evaluation) == pytest.approx(left)
    selection = {"seconds": 7.0}
    due = sum(step % recipe.evaluation.selection_every == 0 or step == 10 for step in range(done + 1, 11))
    assert seconds_left(recipe, done, spent, evaluation, selection) == pytest.approx(left + 7 * due)
