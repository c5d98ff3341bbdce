"""What the published algorithm and its reference code do in the corners: limits, thoughts, filters, seeds."""

from __future__ import annotations

import numpy as np
import pytest
from fakes import Chat

from vpd_mlx.algos.grpo import _minibatches, advantages_of
from vpd_mlx.algos.samples import Sample
from vpd_mlx.algos.settings import GrpoSettings
from vpd_mlx.common.thoughts import spoken, without_thoughts
from vpd_mlx.engine.ranks import Ranks
from vpd_mlx.feedback.prompts import CUT_MARK, NoRoom, Prompter, Templates
from vpd_mlx.recipe import Recipe
from vpd_mlx.tasks import build_task
from vpd_mlx.types import Problem, Rollout, TokenRow, Verdict

PROBLEM = Problem("p", ({"role": "user", "content": "2+2?"},), "4")


def prompter(student: int, teacher: int, context: int = 4096) -> Prompter:
    templates = Templates(
        verifier="{prompt}\n{context}", both="{prompt}\n{solution}\n{context}", attempt="I: {attempt}"
    )
    return Prompter(Chat(), templates, False, student, context, teacher)


def shown(how: Prompter, template: str, text: str, **more: str) -> tuple[str, bool]:
    ids, cut = how.teacher(PROBLEM, template, text, **more)
    return bytes(ids).decode(), cut


# --- the teacher's prompt has a limit of its own


def test_the_teachers_prompt_may_be_longer_than_the_students():
    words = "w" * 600
    text, cut = shown(prompter(200, 1000), "verifier", words)
    assert not cut
    assert words in text
    assert shown(prompter(200, 300), "verifier", words)[1]


def test_the_recipe_says_how_long():
    def recipe(**feedback: int) -> Recipe:
        return Recipe.model_validate({"name": "x", "model": "m", "task": {"kind": "addition"}, "feedback": feedback})

    assert recipe().max_teacher_tokens == recipe().rollout.max_prompt_tokens == 2048
    assert recipe(max_prompt_tokens=3000).max_teacher_tokens == 3000
    faults = list(recipe(max_prompt_tokens=512).contradictions())
    assert [(f.path, "feedback.max_prompt_tokens 512" in f.problem) for f in faults] == [("feedback.max_tokens", True)]
    faults = list(recipe(max_prompt_tokens=9000).contradictions())
    assert [(f.path, "10024 tokens (feedback.max_prompt_tokens" in f.problem) for f in faults] == [
        ("memory.micro_batch_tokens", True)
    ]


# --- no text beside a context pushes it out


@pytest.mark.parametrize("long", ["solution", "attempt"])
def test_a_long_solution_or_attempt_is_cut_and_the_context_stays(long: str):
    how = prompter(200, 400)
    text, cut = shown(how, "both", "the words", **{"solution": "short", long: "s" * 5000})
    assert cut
    assert "the words" in text
    assert CUT_MARK in text
    assert text.count("s") > 200
    assert len(text.encode()) <= 400


def test_texts_are_cut_to_a_common_length_and_a_short_one_stays_whole():
    text, cut = shown(prompter(200, 500), "both", "c" * 3000, solution="s" * 2000, attempt="aaaa")
    assert cut
    assert "aaaa" in text
    assert abs(text.count("c") - text.count("s")) < 10


def test_each_text_is_cut_to_the_contexts_limit():
    text, cut = shown(prompter(200, 4000, context=100), "both", "c" * 50, solution="z" * 500)
    assert cut
    assert (text.count("c"), text.count("z")) == (50, 100)


def test_no_room_at_all_is_said():
    with pytest.raises(NoRoom, match=r"raise feedback\.max_prompt_tokens"):
        shown(prompter(200, 10), "both", "c" * 50, solution="s" * 50)


# --- thoughts

ANALYSIS = "<|channel|>analysis<|message|>4? 5?"  # what gpt-oss says before


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("<think>4? 5?</think>\nIt is 4.", "It is 4."),
        ("4? 5?</think>\nIt is 4.", "It is 4."),  # the template opened the thought
        ("Well. <think>4? 5?</think> It is 4.", "Well.  It is 4."),
        ("It is 4. <think>or 5", "It is 4."),
        ("a</think>b<think>c</think>d", "bd"),
        ("It is 4.", "It is 4."),
        ("<|channel>thought\n4? 5?<channel|>It is 4.", "It is 4."),  # Gemma 4
        ("[THINK]4? 5?[/THINK]It is 4.", "It is 4."),  # Magistral
        ("4? 5?</longcat_think>It is 4.", "It is 4."),
        (f"{ANALYSIS}<|end|><|start|>assistant<|channel|>final<|message|>It is 4.", "It is 4."),  # gpt-oss
        (f"{ANALYSIS}<|end|><|start|>assistant<|channel|>final<|message|>It is 4.<|end|>", "It is 4."),
        (ANALYSIS, ""),
        (f"{ANALYSIS}<|end|><|start|>assistant<|channel|>final", ""),
    ],
)
def test_a_demonstration_has_no_thought(text: str, want: str):
    assert without_thoughts(text) == want
    if "<think>" not in text.removeprefix("<think>"):  # text between two thoughts is shown, and not judged
        assert spoken(text).strip() == want


def test_exact_and_regex_judge_the_answer_not_the_thought(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "2+2?", "answer": "4"}\n')
    held = tmp_path / "held.jsonl"
    held.write_text('{"prompt": "1+3?", "answer": "4"}\n')
    for kind in ({"kind": "exact"}, {"kind": "regex", "match": "anywhere"}):
        given = {**kind, "data": str(rows), "eval_data": str(held)}
        task = build_task(Recipe.model_validate({"name": "x", "model": "m", "task": given}))
        problem = task.train[0]
        for right in ("4", "<think>5?</think>4", "5?</think>\n4\n", "4<think>5"):
            assert task.verify(problem, right).score == 1, (kind, right)
        for wrong in ("<think>4</think>5", "4</think>5", "<think>4"):
            assert task.verify(problem, wrong).score == 0, (kind, wrong)


# --- the group filter and advantages go by the same quantity


def test_a_group_is_left_out_where_its_advantages_are_zero():
    def sample(group: int, score: float) -> Sample:
        rollout = Rollout((1,), (0.0,), "", "stop").graded(Verdict(score), 0.5)
        return Sample(group, TokenRow((1,), (1,)), None, rollout)

    # all failures, with different scores; all alike; a success and a failure
    samples = [sample(0, 0.1), sample(0, 0.3), sample(1, 0.2), sample(1, 0.2), sample(2, 0.0), sample(2, 1.0)]
    cfg = GrpoSettings(drop_uniform_groups=True)
    kept = {i for part in _minibatches(samples, cfg) for i in part}
    assert kept == set(np.flatnonzero(advantages_of(samples, cfg))) == {0, 1, 4, 5}


# --- seeds


def test_no_rank_draws_what_another_ranks_stream_draws():
    seeds = []
    for index in range(4):
        ranks = Ranks()
        ranks.index = index
        seeds += [ranks.seed(1234) + stream for stream in range(4)]
    assert len(set(seeds)) == 16
    assert seeds[0] == 1234
