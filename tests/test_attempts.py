"""The source `attempts`: which siblings it shows, how it calls them, and that a run learns from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from fakes import Chat

from vpd_mlx.common.files import read_rows
from vpd_mlx.feedback import FeedbackSettings, add_context, build_sources
from vpd_mlx.feedback.attempts import attempts
from vpd_mlx.feedback.base import Answer
from vpd_mlx.feedback.prompts import Prompter, Templates
from vpd_mlx.feedback.sibling import sibling
from vpd_mlx.feedback.wordings import STYLES
from vpd_mlx.recipe import Recipe
from vpd_mlx.run.loop import train
from vpd_mlx.types import Group, Problem, Rollout, Verdict

PROBLEM = Problem("p", ({"role": "user", "content": "Name a prime."},))


def group(*said: str) -> Group:
    """Rollouts by what they say; a mark of `+` or `-` before it is the verdict."""
    rollouts = [
        Rollout((1,), (0.0,), text[1:], "stop", Verdict(float(text[0] == "+")), text[0] == "+") for text in said
    ]
    return Group(PROBLEM, (1,), tuple(rollouts))


def said(of: Group) -> list[Answer]:
    return attempts([of], [[True] * len(of.rollouts)])[0]


def test_two_right_siblings_and_a_wrong_one_each_called_what_it_is():
    found = said(group("-4", "+2", "-6", "+3", "+5"))
    four, two, six, three, five = found
    of_a_success = "\n\nA wrong answer:\n4\n(End of the wrong answer.)"
    assert four == "2\n\nAnother correct answer:\n3\n\nA wrong answer:\n6\n(End of the wrong answer.)"
    assert six == "2\n\nAnother correct answer:\n3" + of_a_success
    assert two == "3\n\nAnother correct answer:\n5" + of_a_success
    assert three == "2\n\nAnother correct answer:\n5" + of_a_success
    assert five == "2\n\nAnother correct answer:\n3" + of_a_success


def test_it_shows_what_there_is_and_says_nothing_without_a_right_one():
    assert said(group("+2", "-4")) == [None, "2"]
    assert said(group("-4", "+2", "-6"))[0] == "2\n\nA wrong answer:\n6\n(End of the wrong answer.)"
    assert said(group("+2", "+3", "+5"))[1] == "2\n\nAnother correct answer:\n5"
    assert said(group("-4", "-6")) == [None, None]
    both = group("+2", "-4")
    assert attempts([both], [[False, True]]) == sibling([both], [[False, True]]) == [[None, "2"]]


def test_thinking_and_repetitions_are_left_out():
    found = said(group("-1", "+<think>a</think>2", "+<think>b</think>2", "+3", "-<think>endless", "-9"))
    assert found[0] == "2\n\nAnother correct answer:\n3\n\nA wrong answer:\n9\n(End of the wrong answer.)"


@pytest.mark.parametrize("style", STYLES)
def test_every_wording_calls_the_first_answer_right(style: str):
    prompter = Prompter(Chat(), Templates(style=style), False, 2048, 1024, 2048)
    cfg = FeedbackSettings(sources=["attempts"])
    (done,) = add_context(build_sources(cfg, prompter), [group("-4", "+2", "-6", "+3")], prompter, cfg)
    first = done.rollouts[0]
    assert first.context is not None
    assert first.context.kind == "attempts"
    prompt = bytes(first.teacher_prompt or ()).decode()
    before, _, after = bytes(prompter.teacher(PROBLEM, "sibling", "@")[0]).decode().partition("@")
    assert prompt == f"{before}{first.context.text}{after}"
    assert "correct" in before.lower()


def test_a_cut_leaves_the_wrong_answer_its_label():
    prompter = Prompter(Chat(), Templates(sibling="{prompt} {context}"), False, 200, 100, 200)
    text = str(said(group("-4", "+" + "2" * 300, "-" + "6" * 300))[0])
    ids, cut = prompter.teacher(PROBLEM, "sibling", text)
    assert cut
    assert bytes(ids).decode().removesuffix("<assistant>").endswith("6\n(End of the wrong answer.)")


def test_a_run_learns_from_it(small: Callable[..., Recipe], tmp_path: Path):
    shared = {"seed": 1, "steps": 2, "rollout__prompts": 6, "task__eval_only": None, "feedback__max_tokens": 60}
    shared |= {"feedback__max_prompt_tokens": 120}
    for name in ("attempts", "sibling"):
        train(small(feedback__sources=[name], **shared), tmp_path / name)
    rows = read_rows(tmp_path / "attempts" / "rollouts.jsonl")
    told = [row for row in rows if row["context"]]
    assert {row["context"]["kind"] for row in told} == {"attempts"}
    assert any("A wrong answer:\n" in row["teacher_prompt"] for row in told)
    adapters = [(tmp_path / n / "adapters" / "adapters.safetensors").read_bytes() for n in ("attempts", "sibling")]
    assert adapters[0] != adapters[1]
