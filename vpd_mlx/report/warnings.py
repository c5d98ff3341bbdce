"""What a reader should worry about: each finding with its numbers and what to do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vpd_mlx.common.text import figures_in_line, interval, number, percent
from vpd_mlx.run.folder import Run

__all__ = ["findings"]

UPDATES = ("m_step", "policy_gradient")
UNIFORM = 0.9  # percentage of groups that are all right or all wrong
ENTROPY_LEFT = 0.2  # of the first steps' entropy, and below:
ENTROPY_LOW = 0.1  # nats
LENGTH_LEFT = 0.5
LENGTH_GROWN = 2.0
TRUNCATED = 0.2
GAP = 0.02
SOLVED = 0.9  # from here on low entropy and uniform groups are success, not collapse


def findings(run: Run) -> list[str]:
    """Warnings in the order of their weight, each one or two sentences. A run that has logged nothing has none."""
    out: list[str] = []
    _numbers(run, out)
    _outcome(run, out)
    _groups(run, out)
    _teacher(run, out)
    _collapse(run, out)
    _context(run, out)
    return out


def _ends(values: Sequence[float]) -> tuple[float, float] | None:
    """Means of the first and the last fifth."""
    if not values:
        return None
    n = max(1, len(values) // 5)
    return float(np.mean(values[:n])), float(np.mean(values[-n:]))


def _last(values: Sequence[float]) -> float | None:
    ends = _ends(values)
    return None if ends is None else ends[1]


def _of(name: str) -> tuple[str, ...]:
    return tuple(f"{u}/{name}" for u in UPDATES)


def _numbers(run: Run, out: list[str]) -> None:
    bad = int(sum(number(v) or 0 for row in run.metrics for k, v in row.items() if k.endswith("/nonfinite")))
    if bad:
        out.append(
            f"{bad} update(s) were left out because loss or gradient was not finite. Lower optimizer.learning_rate."
        )
    failed = int(
        sum(run.series("verifier_failures")[1]) + sum(number(e.get("verifier_failures")) or 0 for e in run.evals)
    )
    if failed:
        out.append(
            f"The verifier failed on {failed} completions, which count for nothing. See its error in the run's output."
        )


def _outcome(run: Run, out: list[str]) -> None:
    change = run.change()
    if change is not None and change.verdict == "worse":
        out.append(
            f"The student got worse: greedy {percent(run.before.get('student_greedy'))} before, "
            f"{percent(run.after.get('student_greedy'))} after. Lower optimizer.learning_rate, or take an earlier checkpoint."
        )
    steps, values, _ = run.evaluations("student")
    if run.after and len(values) > 2:
        best = int(np.argmax(values))
        bounds = interval(run.after, "student")
        if bounds is not None and values[best] > bounds[1]:
            out.append(
                f"The best evaluation was after step {steps[best]} ({percent(values[best])}), the last is at "
                f"{figures_in_line(run.after, 'student')}. Stop earlier, or lower optimizer.learning_rate."
            )


def _groups(run: Run, out: list[str]) -> None:
    for key, word, remedy in (
        ("groups_all_wrong", "wrong", "Give easier problems or richer feedback, or raise rollout.group_size."),
        ("groups_all_right", "right", "Nothing is left to learn here: give harder problems, or stop."),
    ):
        level = _last(run.series(key)[1])
        if level is not None and level >= UNIFORM:
            out.append(f"All completions are {word} in {percent(level)} of the last groups. {remedy}")
    skipped = run.series("e_step/skipped")[1]
    if skipped and np.mean(skipped) > 0.5:
        out.append(
            f"{int(sum(skipped))} of {len(skipped)} E-steps were left out, their batch being all right or all wrong. "
            "Raise rollout.prompts, or choose problems that the student answers sometimes."
        )


def _teacher(run: Run, out: list[str]) -> None:
    gap, student = number(run.after.get("gap")), number(run.after.get("student"))
    if gap is not None and student is not None and gap < GAP and student < SOLVED:
        out.append(
            f"The teacher's gap is gone: under feedback it is only {100 * gap:+.1f} points better than the student, so "
            "there is nothing to distil. Richer feedback, or a later start from a better E-step, may bring it back."
        )
    for keys, what in ((("e_step/margin",), "E-step"), (_of("margin"), "update")):
        margin = _last(run.series(*keys)[1])
        if margin is not None and margin < 0:
            out.append(
                f"The margin is negative ({margin:.2f} over the last {what}s): the teacher holds wrong completions for likelier "
                "than right ones, and teaches them. Check the feedback's wording, or run the E-step more often (e_step.every)."
            )
            break


def _collapse(run: Run, out: list[str]) -> None:
    success = _last(run.series("success", "reward")[1])
    entropy = _ends(run.series(*_of("student_entropy"))[1])
    solved = success is not None and success >= SOLVED
    if entropy is not None and not solved and entropy[1] < ENTROPY_LOW and entropy[1] < ENTROPY_LEFT * entropy[0]:
        out.append(
            f"The student's entropy fell from {entropy[0]:.3f} to {entropy[1]:.3f} nats a token without solving the task: its "
            "completions become alike. Lower optimizer.learning_rate or raise rollout.temperature."
        )
    length = _ends(run.series("length")[1])
    if length is not None and length[0] > 0:
        ratio = length[1] / length[0]
        if ratio < LENGTH_LEFT or ratio > LENGTH_GROWN:
            out.append(
                f"Completions went from {length[0]:.0f} to {length[1]:.0f} tokens. Read some below: "
                + ("they may have become empty." if ratio < 1 else "they may ramble or repeat.")
            )
    cut = _last(run.series("truncated")[1])
    if cut is not None and cut > TRUNCATED:
        out.append(
            f"{percent(cut)} of the last completions were cut off at rollout.max_completion_tokens. Raise it, or the model "
            "learns from unfinished answers."
        )


def _context(run: Run, out: list[str]) -> None:
    if run.algorithm == "grpo" or not run.rollouts:
        return
    last = [e for e in run.rollouts if e.step > run.done - max(1, run.done // 5)]
    without = sum(e.kind == "none" for e in last)
    if last and without > len(last) / 2:
        out.append(
            f"{percent(without / len(last))} of the last completions got no feedback and teach nothing. Add a source to "
            "feedback.sources."
        )
    cut, given = sum(run.series("contexts_cut")[1]), sum(e.kind != "none" for e in run.rollouts)
    if given and cut > given / 5:
        out.append(
            f"{percent(cut / given)} of the feedback was cut to feedback.max_tokens. Raise it where memory allows."
        )
