"""What a measurement before training says: whether feedback helps this model on this task, and which keys to set.

Pure functions of figures: `recommend` of what `probe` measured, `gap_line` of the evaluation before the first step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vpd_mlx.common.stats import Paired
from vpd_mlx.common.text import number, percent, points, points_range
from vpd_mlx.feedback import SOURCES
from vpd_mlx.run.warnings import LEAST_PROBLEMS, SOLVED

__all__ = ["Advice", "Bounds", "Contexts", "Student", "Style", "Teacher", "gap_line", "recommend", "worth"]

USEFUL_GAP = 0.05  # a smaller one is not worth the training
PROMISING_GAP = 0.1  # without certainty: worth more problems
NEAR_ZERO = 0.25  # of the greedy score: sampling loses most of what the model knows
KNOWS = 0.1  # greedy score from which on that means something
MIXED = 0.1  # share of groups from which on a verdict alone teaches something
OFTEN = 0.2  # share of completions cut off, of contexts cut
MOVES = 0.5  # nats at the first and the stop token of right answers

Bounds = tuple[float, float] | None


@dataclass(frozen=True)
class Student:
    """The student on the recipe's training problems. Scores, shares and their bounds lie in 0..1.

    `samples` completions of each problem, sampled as in training, one greedy. A group is mixed if it has right and wrong
    completions. `refusals` is the share that begins as a refusal does, `length` in tokens.
    """

    problems: int
    samples: int
    temperature: float
    sampled: float | None
    sampled_interval: Bounds
    success: float | None
    greedy: float | None
    greedy_interval: Bounds
    groups_mixed: float
    groups_all_right: float
    groups_all_wrong: float
    length: float | None
    truncated: float | None
    refusals: float | None
    verifier_failures: int


@dataclass(frozen=True)
class Contexts:
    """What a source had to say on the student's completions, in numbers of them: it gave contexts to some, cut or whole, and
    failed on some. Of the wrong ones some are `missing` a context."""

    completions: int
    given: int
    cut: int
    failed: int
    wrong: int
    missing: int


@dataclass(frozen=True)
class Style:
    """How far a teacher's prompt moves the form of the answers; nats, None without data.

    `first_token`, `stop_token` and `rest` (a mean over the tokens between) are log q - log pi on right completions, below 0
    where the teacher takes probability from them. `first_kl`, KL(student|teacher), and `first_js` compare the distributions of
    the first token. `divergence_right` and `divergence_wrong` are Jensen-Shannon per token on the student's own completions,
    `right_share` (0..1) the part of the whole that falls on right ones. `auc` (0..1) is the probability that a right one of them
    gains more from the teacher's prompt, by the sum of log q - log pi, than a wrong one of the same problem: at 0.5 the
    teacher cannot tell.
    """

    first_token: float | None = None
    stop_token: float | None = None
    rest: float | None = None
    first_kl: float | None = None
    first_js: float | None = None
    divergence_right: float | None = None
    divergence_wrong: float | None = None
    right_share: float | None = None
    auc: float | None = None

    @property
    def harm(self) -> float:
        """Nats that the teacher's prompt takes from how right answers begin and end; 0 where nothing is known."""
        return sum(max(0.0, -value) for value in (self.first_token, self.stop_token) if value is not None)


@dataclass(frozen=True)
class Teacher:
    """The teacher under one source of feedback in one wording, on the `problems` that got a context.

    `student_there` is the student's score on these, `gap` and `greedy_gap` teacher less student, paired by problem, sampled and
    greedy. `length_ratio` is to the student's length there, `overlap` the share of its four-word runs copied from the context.
    """

    source: str
    templates: str
    problems: int
    sampled: float | None
    sampled_interval: Bounds
    greedy: float | None
    student_there: float | None
    gap: Paired | None
    greedy_gap: Paired | None
    length_ratio: float | None
    truncated: float | None
    refusals: float | None
    overlap: float | None
    contexts: Contexts
    style: Style


def worth(teacher: Teacher, problems: int) -> float:
    """The gap that is left to learn: times the share of problems that have it, times exp(-harm) for what its style costs."""
    gap = 0.0 if teacher.gap is None else teacher.gap.difference
    return gap * teacher.problems / max(1, problems) * math.exp(-teacher.style.harm)


@dataclass(frozen=True)
class Advice:
    """`helps` is None where the measurement cannot tell. `keys` are those of the recipe to set, `reasons` sentences."""

    helps: bool | None
    verdict: str
    source: str | None = None
    templates: str | None = None
    temperature: float | None = None
    keys: Mapping[str, Any] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()

    @property
    def sets(self) -> list[str]:
        """`keys` as arguments of `--set`."""
        return [f"{key}={_flow(value)}" for key, value in self.keys.items()]


def _flow(value: Any) -> str:
    """A value as `--set` reads it."""
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return value if isinstance(value, str) else json.dumps(value)


def recommend(
    student: Student,
    teachers: Sequence[Teacher],
    *,
    templates: Mapping[str, Any],
    reads: str | None = None,
    without: str | None = None,
) -> Advice:
    """The plain recommendation.

    Args:
        student: measured.
        teachers: measured, in any order.
        templates: wording's name -> the value of the key `templates` that chooses it; None for the recipe's own.
        reads: the algorithm to take where the recipe's reads no feedback; None where it does.
        without: an algorithm that learns from the verdict alone.
    """
    if (student.sampled or 0.0) >= SOLVED:
        verdict = f"the student is right already ({percent(student.sampled)}): nothing is left to learn"
        return Advice(False, verdict, reasons=("Give harder problems.",))
    cooler, cooler_reasons = _cooler(student, teachers)
    measured = [t for t in teachers if t.gap is not None]
    if max((t.problems for t in measured), default=0) < LEAST_PROBLEMS:
        return _too_few(student, measured, cooler, cooler_reasons)
    measured = [t for t in measured if t.problems >= LEAST_PROBLEMS]
    helpful = [t for t in measured if t.gap is not None and t.gap.low > 0 and t.gap.difference >= USEFUL_GAP]
    if not helpful:
        return _no_help(student, measured, cooler, cooler_reasons, without)
    best = max(helpful, key=lambda t: worth(t, student.problems))
    sources = [best.source, *_fallbacks(best, helpful, student.problems)]
    keys: dict[str, Any] = {} if reads is None else {"algorithm": reads}
    keys["feedback.sources"] = sources
    if templates.get(best.templates) is not None:
        keys["templates"] = templates[best.templates]
    if cooler is not None:
        keys["rollout.temperature"] = cooler
    reasons = [*cooler_reasons, *_on_teacher(best, sources), *_on_student(student)]
    if reads is not None:
        reasons.insert(0, f"The recipe's algorithm reads no feedback; {reads} does.")
    verdict = f"feedback helps, best {_named(best)}: {_figures(best)}"
    return Advice(True, verdict, best.source, best.templates, cooler, keys, tuple(reasons))


def _named(teacher: Teacher) -> str:
    return f"from {teacher.source}, wording {teacher.templates}"


def _figures(teacher: Teacher) -> str:
    gap = teacher.gap
    between = "" if gap is None else f" (gap {points(gap.difference)} points, {points_range(gap.low, gap.high)})"
    scores = f"{percent(teacher.sampled)} against the student's {percent(teacher.student_there)}"
    return f"{scores} on {teacher.problems} problems{between}"


def _cooler(student: Student, teachers: Sequence[Teacher]) -> tuple[float | None, list[str]]:
    """A lower temperature, if sampling loses most of what student or teacher know, and why."""
    sides = [("student", student.sampled, student.greedy)]
    sides += [
        (f"teacher {_named(t)}", t.sampled, t.greedy) for t in sorted(teachers, key=lambda t: -(t.greedy or 0))[:1]
    ]
    lost = [
        f"At temperature {student.temperature:g} the {name} is right in {percent(sampled)}, greedily in {percent(greedy)}: "
        "sample cooler."
        for name, sampled, greedy in sides
        if sampled is not None and greedy is not None and greedy >= KNOWS and sampled < NEAR_ZERO * greedy
    ]
    return (max(0.1, round(student.temperature / 2, 2)) if lost else None), lost


def _again(cooler: float | None) -> str:
    return "probe again" if cooler is None else f"probe again with --set rollout.temperature={cooler:g}"


def _too_few(student: Student, measured: Sequence[Teacher], cooler: float | None, why: list[str]) -> Advice:
    most = max((t.problems for t in measured), default=0)
    keys = {} if cooler is None else {"rollout.temperature": cooler}
    if student.problems < LEAST_PROBLEMS:
        verdict, remedy = (
            f"{student.problems} problems are too few to tell",
            f"Ask for {LEAST_PROBLEMS} or more (--problems).",
        )
    else:
        verdict = f"feedback reaches only {most} of {student.problems} problems: too few to tell whether it helps"
        remedy = (
            "Add worked solutions to the rows (source reference), let the verifier say what is wrong (source verifier), or "
            "give easier problems, so that groups have a right completion (source sibling)."
        )
    return Advice(None, verdict, temperature=cooler, keys=keys, reasons=(*why, remedy, *_on_student(student)))


def _no_help(
    student: Student, measured: Sequence[Teacher], cooler: float | None, why: list[str], without: str | None
) -> Advice:
    """No gap is certain: perhaps one at another temperature, perhaps one that more problems would show, perhaps none."""
    keys: dict[str, Any] = {} if cooler is None else {"rollout.temperature": cooler}
    best = max(measured, key=lambda t: t.gap.difference if t.gap is not None else -1.0)
    greedily = [t for t in measured if t.greedy_gap is not None and t.greedy_gap.low > 0]
    rest = (*why, *_on_student(student))
    if cooler is not None and greedily:
        top = max(greedily, key=lambda t: t.greedy_gap.difference if t.greedy_gap is not None else 0.0)
        verdict = (
            f"feedback does not help at temperature {student.temperature:g}, but it may at a lower one: greedily the teacher "
            f"{_named(top)} is right in {percent(top.greedy)}"
        )
        return Advice(None, verdict, top.source, top.templates, cooler, keys, (*rest, f"Then {_again(cooler)}."))
    if best.gap is not None and best.gap.difference >= PROMISING_GAP and best.gap.high > 0:
        verdict = f"feedback may help, best {_named(best)}: {_figures(best)}"
        remedy = f"The interval holds 0: {_again(cooler)} and more problems (--problems {2 * student.problems})."
        return Advice(None, verdict, best.source, best.templates, cooler, keys, (remedy, *rest))
    verdict = f"feedback does not help this model on this task; best {_named(best)}: {_figures(best)}"
    tried = ", ".join(dict.fromkeys(t.source for t in measured))
    reasons = [*why, f"Tried: {tried}. Try another source, a larger model, or problems that this model can follow."]
    if without is not None and student.groups_mixed >= MIXED:
        keys["algorithm"] = without
        reasons.append(
            f"{percent(student.groups_mixed)} of the groups have right and wrong completions: {without} can learn from these."
        )
    return Advice(False, verdict, temperature=cooler, keys=keys, reasons=(*reasons, *_on_student(student)))


def _fallbacks(best: Teacher, helpful: Sequence[Teacher], problems: int) -> list[str]:
    """Sources for the problems that the best one has nothing on, in the same wording; of those that show siblings one alone."""
    if best.problems >= problems:
        return []
    others = [t for t in helpful if t.templates == best.templates and t.source != best.source]
    found = [best.source]
    for name in (t.source for t in sorted(others, key=lambda t: -worth(t, problems))):
        if not (SOURCES[name].siblings and any(SOURCES[other].siblings for other in found)):
            found.append(name)
    return found[1:]


def _on_teacher(best: Teacher, sources: Sequence[str]) -> list[str]:
    out, style, contexts = [], best.style, best.contexts
    if style.harm > MOVES:
        moved = {"first token": style.first_token, "stop token": style.stop_token}
        named = " and ".join(f"{name} {value:+.1f}" for name, value in moved.items() if value is not None and value < 0)
        out.append(
            f"This wording moves the style of right answers ({named} nats): watch the length and the first tokens in training."
        )
    if contexts.given and contexts.cut > OFTEN * contexts.given:
        out.append(f"{percent(contexts.cut / contexts.given)} of the contexts are cut: raise feedback.max_tokens.")
    if contexts.failed:
        out.append(
            f"{best.source} failed on {contexts.failed} of {contexts.completions} completions: see why before training."
        )
    if contexts.missing and len(sources) == 1:
        out.append(
            f"{best.source} has nothing on {contexts.missing} of {contexts.wrong} wrong completions, which then teach nothing."
        )
    return out


def _on_student(student: Student) -> list[str]:
    out = []
    if (student.truncated or 0.0) > OFTEN:
        out.append(
            f"{percent(student.truncated)} of the completions are cut off: raise rollout.max_completion_tokens, or ask for "
            "shorter answers."
        )
    if (student.refusals or 0.0) > OFTEN:
        out.append(f"{percent(student.refusals)} of the completions begin as a refusal.")
    return out


# --- the evaluation before the first step


def gap_line(row: Mapping[str, Any]) -> str | None:
    """What the evaluation before the first step says of the feedback, in a line; None if it says nothing."""
    gap = number(row.get("gap"))
    if gap is None:
        return None
    what = "helps" if gap > 0 else "does not help"
    scores = f"teacher {percent(row.get('teacher'))}, student {percent(row.get('student_there'))}"
    return (
        f"feedback {what}: {scores} on {row.get('teacher_problems')} problems with feedback (gap {points(gap)} points)"
    )
