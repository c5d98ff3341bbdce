"""The rows of a run folder's files: every field with its unit and its meaning. `docs/run-folder.md` is made from this.

`metrics.jsonl` has a row a step, `rollouts.jsonl` a row a completion, `evals.jsonl` a row an evaluation, `answers.jsonl` a row a
problem of an evaluation; `summary.json` is written once, when the run ends. What follows a run, from the terminal's view to the
logging services, reads these files.

A field is `Annotated[type, unit, meaning]`. In a name, KIND stands for a kind of feedback and K for a number of samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

import numpy as np

from vpd_mlx.common.stats import overlap
from vpd_mlx.types import Group, Problem, Rollout

if TYPE_CHECKING:
    from vpd_mlx.run.collect import Batch

__all__ = [
    "FORMAT",
    "AnswerRow",
    "EvaluationRow",
    "GeneralRow",
    "MetricsRow",
    "RolloutRow",
    "SelectionRow",
    "Summary",
    "answer_row",
    "rollout_metrics",
    "rollout_row",
    "upgraded",
]

FORMAT = 2
"""Of the folder. Format 1 named the student's figures after the algorithm; `upgraded` reads it."""

Fraction = float | None
Number = float | None
Seconds = dict[str, float]
Scores = dict[str, float | None]

_Learning = TypedDict(
    "_Learning",
    {
        "student/loss": Annotated[Number, "", "The loss of the student's updates, a mean over updates."],
        "student/sequences": Annotated[int, "completions", "How many of them the student learned from."],
        "student/divergence": Annotated[Number, "nats", "Divergence from the teacher, a mean over tokens."],
        "student/divergence_right": Annotated[Number, "nats", "The same over right completions."],
        "student/divergence_wrong": Annotated[Number, "nats", "The same over wrong completions."],
        "student/entropy": Annotated[Number, "nats", "The student's entropy, a mean over tokens."],
        "student/teacher_entropy": Annotated[Number, "nats", "The teacher's entropy, a mean over tokens."],
        "student/mass": Annotated[Fraction, "0..1", "The student's probability of its k likeliest tokens."],
        "student/log_ratio_right": Annotated[Number, "nats", "Log-probability, teacher less student, of a right one."],
        "student/log_ratio_wrong": Annotated[Number, "nats", "The same of a wrong completion."],
        "student/margin": Annotated[Number, "nats", "`log_ratio_right` less `log_ratio_wrong`."],
        "student/auc": Annotated[Fraction, "0..1", "How well the log-ratio tells right from wrong completions."],
        "student/advantage_std": Annotated[Number, "", "Standard deviation of the completions' advantages."],
        "student/ratio_min": Annotated[float, "", "Smallest probability ratio of a token, new to old policy."],
        "student/ratio_max": Annotated[float, "", "Largest probability ratio of a token."],
        "student/clipped": Annotated[Fraction, "0..1", "Tokens whose ratio was clipped."],
        "student/dual_clipped": Annotated[Fraction, "0..1", "Tokens clipped by the dual clip."],
        "student/kl": Annotated[Number, "nats", "Divergence from the untrained model, a mean over tokens."],
        "student/grad_norm": Annotated[Number, "", "Gradient norm before clipping, a mean over updates."],
        "student/rate": Annotated[float, "", "Learning rate of the last update."],
        "student/updates": Annotated[int, "updates", "Updates made."],
        "student/nonfinite": Annotated[int, "updates", "Updates left out: loss or gradient was not finite."],
        "teacher/refreshed": Annotated[
            int, "0 or 1", "1 if the teacher became the student after this step; only with `teacher.weights: gated`."
        ],
        "e_step/n_right": Annotated[int, "completions", "Right completions with a context."],
        "e_step/n_wrong": Annotated[int, "completions", "Wrong completions with a context."],
        "e_step/skipped": Annotated[int, "0 or 1", "1 if the E-step was left out: all were right, or all wrong."],
        "e_step/needless": Annotated[
            int, "0 or 1", "1 if the E-step was left out: `e_step.until_auc` was met. Not there without that key."
        ],
        "e_step/loss": Annotated[float, "nats", "The E-step's loss before its first update."],
        "e_step/delta": Annotated[float, "reward", "The reward shift between the classes."],
        "e_step/reward_right": Annotated[float, "reward", "Mean implicit reward of right completions."],
        "e_step/reward_right_std": Annotated[float, "reward", "Its standard deviation."],
        "e_step/reward_right/KIND": Annotated[Number, "reward", "The same under one kind of feedback."],
        "e_step/reward_wrong": Annotated[float, "reward", "Mean implicit reward of wrong completions."],
        "e_step/reward_wrong_std": Annotated[float, "reward", "Its standard deviation."],
        "e_step/reward_wrong/KIND": Annotated[Number, "reward", "The same under one kind of feedback."],
        "e_step/margin": Annotated[float, "reward", "`reward_right` less `reward_wrong`, before the updates."],
        "e_step/margin/KIND": Annotated[Number, "reward", "The same under one kind of feedback."],
        "e_step/margin_after": Annotated[float, "reward", "The margin after the updates."],
        "e_step/auc": Annotated[Fraction, "0..1", "How well the reward tells right from wrong completions."],
        "e_step/displaced": Annotated[
            Fraction, "0..1", "Successes that the teacher finds less likely than the student does."
        ],
        "e_step/n_hinted": Annotated[int, "", "Successes written behind a failure's context (`e_step.hints`)."],
        "e_step/saturated": Annotated[float, "0..1", "Completions whose reward is too far from delta to teach much."],
        "e_step/reward_length_correlation": Annotated[Number, "-1..1", "Correlation of reward and length."],
        "e_step/student_shift": Annotated[
            float, "nats", "What the E-step did to the student's log-probability of a token."
        ],
        "e_step/student_shift_abs": Annotated[float, "nats", "The same, a mean of absolute values."],
        "e_step/grad_norm": Annotated[Number, "", "Gradient norm before clipping, a mean over updates."],
        "e_step/rate": Annotated[float, "", "Learning rate of the last update."],
        "e_step/updates": Annotated[int, "updates", "Updates made."],
        "e_step/nonfinite": Annotated[int, "updates", "Updates left out: loss or gradient was not finite."],
    },
    total=False,
)

_Watching = TypedDict(
    "_Watching",
    {
        "experts/busiest": Annotated[
            float,
            "1",
            "Of a mixture of experts: the most loaded expert's tokens over the mean expert's, on those prompts.",
        ],
        "experts/idle": Annotated[Fraction, "0..1", "Of a mixture of experts: experts that got none of their tokens."],
        "style/first_token": Annotated[
            Fraction,
            "0..1",
            "Total variation of the student's first token from the untrained model's, a mean over some training prompts.",
        ],
        "human/comments": Annotated[
            int, "comments", "Comments given on the page since the step before; only with `feedback.human: page`."
        ],
        "human/comments_in_all": Annotated[
            int, "comments", "Comments given so far, those of an earlier part included."
        ],
        "watch/collapse": Annotated[str, "", "What has collapsed, if the watchdogs say so at this step."],
        "watch/cause": Annotated[str, "", "The same in a word: `reward`, `truncated`, `style`, `length` or `entropy`."],
        "watch/reverted_to": Annotated[int, "", "The step whose adapter the run went back to after this step."],
        "watch/rate_factor": Annotated[float, "", "What the learning rates are multiplied with since this revert."],
        "watch/stopped": Annotated[int, "1", "The run stopped here."],
    },
    total=False,
)


class MetricsRow(_Learning, _Watching, total=False):
    """A row of `metrics.jsonl`: one step."""

    step: Annotated[int, "", "Number of the step, from 1."]
    reward: Annotated[Fraction, "0..1", "Mean score of the step's completions."]
    success: Annotated[Fraction, "0..1", "Completions that are right: score at or above `rollout.success_threshold`."]
    length: Annotated[float, "tokens", "Mean length of a completion."]
    length_max: Annotated[int, "tokens", "Length of the longest."]
    length_median: Annotated[float, "tokens", "Median length."]
    first_tokens: Annotated[
        list[tuple[str, int]], "", "The commonest first tokens, each with its number of completions."
    ]
    truncated: Annotated[Fraction, "0..1", "Completions cut off at `rollout.max_completion_tokens`."]
    groups: Annotated[int, "groups", "Problems with at least one completion."]
    groups_mixed: Annotated[float, "0..1", "Groups with right and wrong completions."]
    groups_all_right: Annotated[float, "0..1", "Groups with right completions only."]
    groups_all_wrong: Annotated[float, "0..1", "Groups with wrong completions only."]
    contexts: Annotated[dict[str, int], "completions", "Completions that got feedback, by its kind."]
    contexts_none: Annotated[int, "completions", "Completions that got none."]
    contexts_cut: Annotated[int, "completions", "Completions whose feedback was cut to `feedback.max_tokens`."]
    contexts_failed: Annotated[int, "completions", "Completions on which a feedback source failed."]
    overlap: Annotated[Fraction, "0..1", "Four-word runs of the completions that stand in their feedback already."]
    verifier_failures: Annotated[int, "completions", "Completions left out because the verifier failed on them."]
    tokens_per_s: Annotated[float, "tokens/s", "Completion tokens by the seconds of the phase `rollout`."]
    peak_memory_mb: Annotated[float, "MiB", "Largest memory in use during the step."]
    seconds: Annotated[
        Seconds,
        "seconds",
        "By phase: `rollout`, `feedback`, `ranks`, `e_step`, `student`, `watch`, `log`; and `total`.",
    ]


class FeedbackText(TypedDict):
    """The feedback that a completion got."""

    kind: str
    text: str
    cut: bool


class RolloutRow(TypedDict, total=False):
    """A row of `rollouts.jsonl`: one graded completion."""

    step: Annotated[int, "", "Number of the step, from 1."]
    problem: Annotated[str, "", "The problem's id."]
    sample: Annotated[int, "", "Number of the completion in its group, from 0."]
    prompt: Annotated[str, "", "The problem's last user message."]
    completion: Annotated[str, "", "What the student wrote."]
    score: Annotated[Fraction, "0..1", "The verifier's score."]
    success: Annotated[bool, "", "Whether it is right: the score reaches `rollout.success_threshold`."]
    verdict: Annotated[str, "", "The verifier's words, empty if it has none."]
    expected: Annotated[str | None, "", "The right answer where the data have one, or the beginning of a long one."]
    context: Annotated[FeedbackText | None, "", "The feedback: its `kind`, its `text`, and whether it was `cut`."]
    tokens: Annotated[int, "tokens", "Length of the completion, its stop token included."]
    prompt_tokens: Annotated[int, "tokens", "Length of the student's prompt."]
    teacher_prompt_tokens: Annotated[int | None, "tokens", "Length of the teacher's prompt."]
    finish: Annotated[str, "", "`stop`, or `length` if the completion was cut off."]
    student_prompt: Annotated[str, "", "The student's prompt, decoded."]
    teacher_prompt: Annotated[str | None, "", "The teacher's prompt, decoded: the student's with the feedback in it."]
    pieces: Annotated[list[str], "", "The completion's tokens as text."]
    shift: Annotated[
        list[float], "nats", "Log-probability of each token, teacher less student; absent without a teacher."
    ]
    source_errors: Annotated[dict[str, str], "", "Why feedback sources failed on it, by source; absent if none did."]


Interval = tuple[float, float] | None

_Figures = TypedDict(
    "_Figures",
    {
        "pass@K": Annotated[Fraction, "0..1", "Problems that one of K sampled completions solves."],
        "pass@K_interval": Annotated[Interval, "0..1", "95 % interval over problems, as for all figures."],
        "maj@K": Annotated[Fraction, "0..1", "Mean score of the commonest answer among K completions."],
        "maj@K_interval": Annotated[Interval, "0..1", "Its interval."],
    },
    total=False,
)


class EvaluationRow(_Figures, total=False):
    """A row of `evals.jsonl`: one evaluation on the held-out problems."""

    step: Annotated[int, "", "Steps done before it; 0 is the untrained student."]
    problems: Annotated[int, "problems", "Held-out problems evaluated."]
    samples: Annotated[int, "completions", "Sampled completions of each problem."]
    student: Annotated[Fraction, "0..1", "Mean score of the student's sampled completions."]
    student_interval: Annotated[Interval, "0..1", "Its interval."]
    student_greedy: Annotated[Fraction, "0..1", "Mean score of the student's likeliest completion."]
    student_greedy_interval: Annotated[Interval, "0..1", "Its interval."]
    teacher: Annotated[
        Fraction, "0..1", "Mean score of the teacher that the M-step reads, given feedback on the student's completion."
    ]
    teacher_interval: Annotated[Interval, "0..1", "Its interval."]
    teacher_problems: Annotated[int, "problems", "Problems on which the teacher had feedback."]
    student_there: Annotated[Fraction, "0..1", "The student's score on these problems."]
    gap: Annotated[Number, "-1..1", "`teacher` less `student_there`: what there is to learn from the teacher."]
    gap_interval: Annotated[Interval, "-1..1", "Its interval."]
    contexts_failed: Annotated[int, "completions", "Completions on which a feedback source failed."]
    length: Annotated[Number, "tokens", "Mean length of a sampled completion."]
    truncated: Annotated[Fraction, "0..1", "Sampled completions cut off at `rollout.max_completion_tokens`."]
    verifier_failures: Annotated[int, "completions", "Completions left out because the verifier failed on them."]
    greedy_by_problem: Annotated[dict[str, float], "0..1", "Score of the likeliest completion by problem."]
    hash_by_problem: Annotated[dict[str, str], "", "Hash of what each problem asks: the same in every run that has it."]
    seconds: Annotated[float, "seconds", "Time that the evaluation took."]


class AnswerRow(TypedDict, total=False):
    """A row of `answers.jsonl`: what was answered on one held-out problem in one evaluation, for its first 200 problems."""

    step: Annotated[int, "", "Steps done before the evaluation; 0 is the untrained student."]
    problem: Annotated[str, "", "The problem's id, as in `greedy_by_problem` of `evals.jsonl`."]
    system: Annotated[str | None, "", "The problem's system message."]
    prompt: Annotated[str, "", "The problem's last user message."]
    completion: Annotated[str, "", "The student's likeliest completion."]
    score: Annotated[Fraction, "0..1", "The verifier's score of it."]
    success: Annotated[bool, "", "Whether it is right: the score reaches `rollout.success_threshold`."]
    verdict: Annotated[str, "", "The verifier's words, empty if it has none."]
    expected: Annotated[str | None, "", "The right answer where the data have one, or the beginning of a long one."]
    finish: Annotated[str, "", "`stop`, or `length` if the completion was cut off."]
    context: Annotated[str | None, "", "Kind of the feedback that the teacher got on a sampled completion."]
    teacher_prompt: Annotated[str | None, "", "The teacher's prompt, decoded: the student's with the feedback in it."]


class SelectionRow(TypedDict, total=False):
    """A row of `selection.jsonl`: one look at the held-out problems by which `keep_best` chooses. They are never reported on."""

    step: Annotated[int, "", "Steps done before it."]
    problems: Annotated[int, "problems", "Problems set aside to choose by."]
    student: Annotated[
        Fraction, "0..1", "Mean score of a likeliest and a sampled completion of each: the highest is best."
    ]
    student_greedy: Annotated[Fraction, "0..1", "Mean score of the likeliest completions alone."]
    length: Annotated[Number, "tokens", "Mean length of a sampled completion."]
    truncated: Annotated[Fraction, "0..1", "Sampled completions cut off at `rollout.max_completion_tokens`."]
    verifier_failures: Annotated[int, "completions", "Completions left out because the verifier failed on them."]
    seconds: Annotated[float, "seconds", "Time that it took."]


class GeneralRow(TypedDict, total=False):
    """A row of `general.jsonl`: one general check of `retain`, made before the first step and of the adapter handed over."""

    step: Annotated[int, "", "Steps done before it; 0 is the untrained student."]
    check: Annotated[str, "", "The check: `instructions`, `arithmetic`, `format` or `perplexity`."]
    value: Annotated[
        Number, "", "Share of the prompts answered right, 0..1; of `perplexity` the perplexity of the text."
    ]
    by_item: Annotated[
        dict[str, float],
        "",
        "0 or 1 by prompt; of `perplexity` the mean log-probability of a token by passage, in nats.",
    ]
    answers: Annotated[dict[str, str], "", "The likeliest answer by prompt; absent of `perplexity`."]
    seconds: Annotated[float, "seconds", "Time that it took."]


class Summary(TypedDict, total=False):
    """`summary.json`: the run, once it has ended."""

    format: Annotated[int, "", f"Format of the folder; absent in format 1, now {FORMAT}."]
    name: Annotated[str, "", "The recipe's name."]
    algorithm: Annotated[str, "", "The recipe's algorithm."]
    seed: Annotated[int, "", "The recipe's seed."]
    steps: Annotated[int, "steps", "Steps done."]
    reverts: Annotated[int, "", "How often the run went back to its best adapter after a collapse."]
    adapter_of_step: Annotated[int, "", "The step after which the adapter stood as it is handed over."]
    selection: Annotated[
        int, "problems", "Held-out problems by which that adapter was chosen, none of those evaluated."
    ]
    before: Annotated[Scores, "0..1", "`student`, `student_greedy` and `teacher` before the first step."]
    after: Annotated[Scores, "0..1", "The same of the adapter that is handed over."]
    problems: Annotated[int, "problems", "Held-out problems of that evaluation."]
    general: Annotated[dict[str, Scores], "", "`before` and `after` of each check of `retain`; empty without."]
    tokens: Annotated[int, "tokens", "Completion tokens sampled for training."]
    seconds: Annotated[
        Seconds, "seconds", "By phase, as in `metrics.jsonl`; `evaluation`; `selection`; `wall`, all in all."
    ]
    nonfinite_updates: Annotated[int, "updates", "Updates left out: loss or gradient was not finite."]
    ranks: Annotated[int, "processes", "Processes that trained together."]
    versions: Annotated[dict[str, str], "", "Of vpd-mlx, mlx, mlx-lm and Python; the platform and the device."]
    interrupted: Annotated[int, "", "Only returned, never written: the signal that stopped the run before its end."]


def upgraded(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of `metrics.jsonl`, or a summary, of any format under today's names."""
    new = {_renamed(key): value for key, value in row.items()}
    if isinstance(seconds := new.get("seconds"), Mapping):
        new["seconds"] = {_renamed(phase): value for phase, value in seconds.items()}
    return new


def _renamed(name: str) -> str:
    part, slash, figure = name.partition("/")
    if part not in ("m_step", "policy_gradient"):
        return name
    return f"student{slash}{'entropy' if figure == 'student_entropy' else figure}"


def rollout_metrics(batch: Batch, groups: Sequence[Group]) -> MetricsRow:
    """What a row of `metrics.jsonl` says of a step's rollouts: scores, lengths, groups by outcome, contexts by kind."""
    rollouts = [r for g in groups for r in g.rollouts]
    lengths = np.array([len(r.tokens) for r in rollouts] or [0])
    scores = [r.verdict.score for r in rollouts if r.verdict is not None]
    sizes = [(sum(r.success for r in g.rollouts), len(g.rollouts)) for g in groups if g.rollouts]  # (right, all)
    kinds = Counter(r.context.kind for r in rollouts if r.context is not None)
    copied = [overlap(r.text, r.context.text) for r in rollouts if r.context is not None]
    n = max(1, len(sizes))
    return {
        "reward": float(np.mean(scores)) if scores else None,
        "success": float(np.mean([r.success for r in rollouts])) if rollouts else None,
        "length": float(lengths.mean()),
        "length_max": int(lengths.max()),
        "length_median": float(np.median(lengths)),
        "truncated": float(np.mean([r.finish == "length" for r in rollouts])) if rollouts else None,
        "groups": len(sizes),
        "groups_mixed": sum(0 < right < size for right, size in sizes) / n,
        "groups_all_right": sum(right == size for right, size in sizes) / n,
        "groups_all_wrong": sum(right == 0 for right, _ in sizes) / n,
        "contexts": dict(kinds),
        "contexts_none": sum(r.context is None for r in rollouts),
        "contexts_cut": sum(r.context is not None and r.context.cut for r in rollouts),
        "contexts_failed": sum(bool(r.source_errors) for r in rollouts),
        "overlap": float(np.mean(copied)) if copied else None,
        "verifier_failures": len(batch.failures),
    }


def rollout_row(
    step: int, group: Group, index: int, expected: str | None, decode: Callable[[list[int]], str]
) -> RolloutRow:
    """One line of `rollouts.jsonl`, without the `shift` that the algorithm finds."""
    rollout = group.rollouts[index]
    verdict, context = rollout.verdict, rollout.context
    row: RolloutRow = {
        "step": step,
        "problem": group.problem.id,
        "sample": index,
        "prompt": group.problem.prompt,
        "completion": rollout.text,
        "score": verdict.score if verdict else None,
        "success": rollout.success,
        "verdict": verdict.text if verdict else "",
        "expected": expected,
        "context": None if context is None else {"kind": context.kind, "text": context.text, "cut": context.cut},
        "tokens": len(rollout.tokens),
        "prompt_tokens": len(group.prompt),
        "teacher_prompt_tokens": None if rollout.teacher_prompt is None else len(rollout.teacher_prompt),
        "finish": rollout.finish,
        "student_prompt": decode(list(group.prompt)),
        "teacher_prompt": None if rollout.teacher_prompt is None else decode(list(rollout.teacher_prompt)),
        "pieces": [decode([t]) for t in rollout.tokens],
    }
    if rollout.source_errors:
        row["source_errors"] = dict(rollout.source_errors)
    return row


def answer_row(
    name: str,
    problem: Problem,
    greedy: Rollout,
    taught: Rollout | None,
    expected: str | None,
    decode: Callable[[list[int]], str],
) -> AnswerRow:
    """One line of `answers.jsonl`, without its `step`; `taught` is the rollout that the teacher read feedback on."""
    verdict, first = greedy.verdict, problem.messages[0]
    prompt = None if taught is None else taught.teacher_prompt
    return {
        "problem": name,
        "system": first["content"] if first["role"] == "system" else None,
        "prompt": problem.prompt,
        "completion": greedy.text,
        "score": verdict.score if verdict else None,
        "success": greedy.success,
        "verdict": verdict.text if verdict else "",
        "expected": expected,
        "finish": greedy.finish,
        "context": None if taught is None or taught.context is None else taught.context.kind,
        "teacher_prompt": None if prompt is None else decode(list(prompt)),
    }
