"""Before any training: what student and teachers do on the recipe's own training problems, and what follows from it.

The student is sampled as in training, and greedily. Each source of feedback that the recipe names, or that the data allow at no
cost (`SourceEntry.free`), is asked once about these completions; its answers make a teacher in every wording. Nothing is trained.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from vpd_mlx.algos import ALGORITHMS
from vpd_mlx.common.functions import NOTHING, Handed
from vpd_mlx.common.seeds import phase_seed
from vpd_mlx.common.stats import bootstrap_interval, mean, overlap, paired
from vpd_mlx.engine.sampling import Sampling
from vpd_mlx.errors import ConfigError, SourceError, wrong_option
from vpd_mlx.feedback import SOURCES, add_context, build_sources
from vpd_mlx.feedback.base import Answer, Failed, Source
from vpd_mlx.feedback.outside import Outside
from vpd_mlx.feedback.prompts import PLACEHOLDERS, Prompter, Templates
from vpd_mlx.feedback.wordings import STYLES
from vpd_mlx.recipe import Recipe
from vpd_mlx.run.advice import Advice, Contexts, Student, Teacher, recommend
from vpd_mlx.run.collect import Batch, collect, rows_at_once, student_prompts
from vpd_mlx.run.evaluate import names
from vpd_mlx.run.progress import Progress
from vpd_mlx.run.setup import Parts
from vpd_mlx.run.shift import Scored, Scorer, style_of
from vpd_mlx.run.step import problems_of_step
from vpd_mlx.tasks import notices
from vpd_mlx.types import Group, Problem, Rollout

__all__ = ["MOST_SAMPLES", "PROBLEMS", "TEACHER_SAMPLES", "Probe", "Wording", "probe", "refuses", "wordings"]

PROBLEMS = 24
MOST_SAMPLES = 8  # of a recipe's group size, where nothing is asked for
TEACHER_SAMPLES = 2
SCORED_RIGHT = 2  # right completions scored for each problem
SCORED_OWN = 4  # the student's own completions scored for each problem

Values = dict[str, float]

_REFUSAL = re.compile(
    r"\W*(i['’]?m sorry|i am sorry|sorry,|i apologi[sz]e|i can['’]?t\b|i cannot\b|i['’]?m (unable|not able)|"
    r"i am (unable|not able)|i won['’]?t\b|i will not\b|as an ai\b|as a (large )?language model)",
    re.IGNORECASE,
)


def refuses(text: str) -> bool:
    """Whether an answer begins as a refusal does."""
    return _REFUSAL.match(text) is not None


@dataclass(frozen=True)
class Probe:
    """What `probe` found: the student, the teacher under each source and wording, why some are missing (`silent`), the advice.
    `seconds` is the time it took after loading."""

    student: Student
    teachers: tuple[Teacher, ...]
    silent: Mapping[str, str]
    advice: Advice
    seconds: float


@dataclass(frozen=True)
class Wording:
    """A set of templates to compare. `value` chooses it as the recipe's key `templates`; None for what the recipe has already."""

    templates: Templates
    value: Any = None


def wordings(own: Templates, only: Sequence[str] = ()) -> dict[str, Wording]:
    """The sets of templates by name, of these or of all: the recipe's own first, called `recipe` if it words a teacher itself.

    Raises:
        ConfigError: `only` names one that there is not.
    """
    teachers = [key for key, names in PLACEHOLDERS.items() if "context" in names]
    kept = own.model_dump(exclude={"style", *teachers}, exclude_none=True)  # what is not the teacher's stays as it is
    found = {}
    if any(getattr(own, key) is not None for key in teachers):
        found["recipe"] = Wording(own)
    for name in sorted(STYLES, key=lambda name: name != own.style):
        same = not found and name == own.style
        value = None if same else {"style": name, **kept} if kept else name
        found[name] = Wording(Templates(style=name, **kept), value)
    if unknown := [name for name in only if name not in found]:
        raise wrong_option("--templates", f"{unknown[0]!r} is no set of templates", f"use {', '.join(found)}")
    return {name: wording for name, wording in found.items() if not only or name in only}


def probe(
    recipe: Recipe,
    *,
    problems: int = PROBLEMS,
    samples: int | None = None,
    teacher_samples: int = TEACHER_SAMPLES,
    templates: Sequence[str] = (),
    progress: Progress | None = None,
    handed: Handed = NOTHING,
) -> Probe:
    """Measure student and teachers on the first `problems` training problems. `samples` None is the group size, 8 at most.

    `templates` names the sets to compare; none named are all.

    Raises:
        ConfigError: `templates` names one that there is not.
        SourceError: the verifier failed on more than half of the student's completions.
        VpdError: data, model or recipe are unusable.
    """
    chosen_wordings = wordings(recipe.templates, templates)
    parts = Parts.build(recipe, progress, handed=handed)
    for note in (*parts.policy.notes, *notices(parts.task), *recipe.notices()):
        parts.progress.note(note)
    started = time.perf_counter()
    chosen = problems_of_step(parts.task.train, 1, min(problems, len(parts.task.train)), recipe.seed)
    k = samples or min(recipe.rollout.group_size, MOST_SAMPLES)
    with contextlib.closing(parts.sources):
        bench = _Bench(parts, chosen, k, teacher_samples, chosen_wordings)
        teachers, silent = bench.teachers()
    own = {name for name, entry in ALGORITHMS.items() if not entry.contexts}
    advice = recommend(
        bench.student,
        teachers,
        templates={name: wording.value for name, wording in chosen_wordings.items()},
        reads=None if recipe.entry.contexts else str(Recipe.model_fields["algorithm"].default),
        without=None if recipe.algorithm in own else min(own),
    )
    return Probe(bench.student, tuple(teachers), silent, advice, round(time.perf_counter() - started, 1))


class _Bench:
    """The student's completions, and teachers made of the feedback on them."""

    def __init__(
        self,
        parts: Parts,
        problems: Sequence[Problem],
        samples: int,
        teacher_samples: int,
        wordings: Mapping[str, Wording],
    ) -> None:
        self.parts = parts
        self.keys = names(problems)
        self.samples, self.teacher_samples = samples, teacher_samples
        self.scorer = Scorer(parts.policy)
        self.prompters, self.silent = _prompters(parts.prompter, wordings)
        self.sources = _sources(parts)
        self._done = 0
        self._total = len(problems) * (samples + 1 + len(self.sources) * len(self.prompters) * (teacher_samples + 1))
        prompts = student_prompts(parts.prompter, problems)
        sampled, greedy = (
            self._sample(problems, prompts, n, name) for n, name in ((samples, "student"), (1, "greedy"))
        )
        failures = [*sampled.failures, *greedy.failures]
        if len(failures) > len(problems) * (samples + 1) // 2:
            raise SourceError(f"the verifier failed on {len(failures)} completions, first {failures[0]}")
        self.groups = sampled.groups
        self.sampled, self.greedy = self._scores(sampled), self._scores(greedy)
        self.student = self._student(sampled, len(failures))

    def _sample(self, problems: Sequence[Problem], prompts: Sequence[tuple[int, ...]], count: int, name: str) -> Batch:
        """Completions as in training, graded as in training; `name` greedy takes the likeliest instead."""
        recipe, before = self.parts.recipe, self._done
        rollout, memory = recipe.rollout, recipe.memory
        temperature, top_p = (0.0, 1.0) if name == "greedy" else (rollout.temperature, rollout.top_p)

        def on_progress(done: int, _total: int) -> None:
            self.parts.stop.check()
            self.parts.progress.phase("probe", before + done, self._total)

        batch = collect(
            self.parts.policy,
            self.parts.task.verify,
            problems,
            prompts,
            count,
            Sampling(temperature, top_p, rollout.max_completion_tokens, rows_at_once(recipe), memory.rollout_streams),
            threshold=rollout.success_threshold,
            seed=phase_seed(recipe.seed, 0, f"probe {name}"),  # all teachers draw alike
            on_progress=on_progress,
        )
        self._done = before + len(problems) * count
        mx.clear_cache()
        return batch

    def _scores(self, batch: Batch, keys: Sequence[str] | None = None) -> Values:
        """Mean score by problem, of those with a verdict."""
        named = zip(self.keys if keys is None else keys, batch.groups, strict=True)
        return {name: float(np.mean(_graded(g.rollouts))) for name, g in named if g.rollouts}

    def _student(self, sampled: Batch, failures: int) -> Student:
        rollouts = sampled.rollouts
        sizes = [(sum(r.success for r in g.rollouts), len(g.rollouts)) for g in sampled.groups if g.rollouts]
        n = max(1, len(sizes))
        values, greedy = list(self.sampled.values()), list(self.greedy.values())
        return Student(
            problems=len(self.keys),
            samples=self.samples,
            temperature=self.parts.recipe.rollout.temperature,
            sampled=mean(values),
            sampled_interval=bootstrap_interval(values),
            success=mean([float(r.success) for r in rollouts]),
            greedy=mean(greedy),
            greedy_interval=bootstrap_interval(greedy),
            groups_mixed=sum(0 < right < size for right, size in sizes) / n,
            groups_all_right=sum(right == size for right, size in sizes) / n,
            groups_all_wrong=sum(right == 0 for right, _ in sizes) / n,
            length=mean([float(len(r.tokens)) for r in rollouts]),
            truncated=mean([float(r.finish == "length") for r in rollouts]),
            refusals=mean([float(refuses(r.text)) for r in rollouts]),
            verifier_failures=failures,
        )

    # --- teachers

    def teachers(self) -> tuple[list[Teacher], dict[str, str]]:
        """A teacher for each source that has something to say, in each wording; and why the other sources have none."""
        found: list[Teacher] = []
        silent = dict(self.silent)
        share = len(self.keys) * (self.teacher_samples + 1)
        for name, source in self.sources.items():
            answers = source(self.groups, [[True] * len(g.rollouts) for g in self.groups])
            if not any(isinstance(a, str) and a.strip() for row in answers for a in row):
                silent[name] = _why_silent(answers)
                self._total -= share * len(self.prompters)
                continue
            for wording, prompter in self.prompters.items():
                teacher = self._teacher(name, wording, answers, prompter)
                if teacher is None:
                    silent[f"{name}, {wording}"] = "no room for its texts; raise feedback.max_prompt_tokens"
                    self._total -= share
                else:
                    found.append(teacher)
        return found, silent

    def _teacher(
        self, name: str, wording: str, answers: Sequence[Sequence[Answer]], prompter: Prompter
    ) -> Teacher | None:
        groups = add_context({name: lambda *_: answers}, self.groups, prompter, self.parts.recipe.feedback)
        at = [i for i, g in enumerate(groups) if _first(g) is not None]
        if not at:
            return None
        firsts = [(i, r) for i in at if (r := _first(groups[i])) is not None]
        problems, keys = [groups[i].problem for i in at], [self.keys[i] for i in at]
        prompts = [r.teacher_prompt or () for _, r in firsts]
        sampled = self._sample(problems, prompts, self.teacher_samples, "teacher")
        greedy = self._sample(problems, prompts, 1, "greedy")
        self._total -= (len(self.keys) - len(at)) * (self.teacher_samples + 1)
        values, likeliest = self._scores(sampled, keys), self._scores(greedy, keys)
        gap = paired({k: v for k, v in self.sampled.items() if k in values}, values)
        there = [self.groups[i] for i in at]
        lengths = mean([float(len(r.tokens)) for g in there for r in g.rollouts])
        copied = [
            overlap(r.text, first.context.text)
            for (_, first), g in zip(firsts, sampled.groups, strict=True)
            for r in g.rollouts
            if first.context is not None
        ]
        every, rollouts = [r for g in groups for r in g.rollouts], sampled.rollouts
        rows = [row for i, first in firsts for row in self._scored(groups[i], first)]
        return Teacher(
            source=name,
            templates=wording,
            problems=len(at),
            sampled=mean(list(values.values())),
            sampled_interval=bootstrap_interval(list(values.values())),
            greedy=mean(list(likeliest.values())),
            student_there=mean([self.sampled[k] for k in keys if k in self.sampled]),
            gap=gap,
            greedy_gap=paired({k: v for k, v in self.greedy.items() if k in likeliest}, likeliest),
            length_ratio=(mean([float(len(r.tokens)) for r in rollouts]) or 0.0) / lengths if lengths else None,
            truncated=mean([float(r.finish == "length") for r in rollouts]),
            refusals=mean([float(refuses(r.text)) for r in rollouts]),
            overlap=mean(copied),
            contexts=Contexts(
                completions=len(every),
                given=sum(r.context is not None for r in every),
                cut=sum(r.context is not None and r.context.cut for r in every),
                failed=sum(bool(r.source_errors) for r in every),
                wrong=sum(not r.success for r in every),
                missing=sum(not r.success and r.context is None for r in every),
            ),
            style=style_of(rows, self.scorer(rows)),
        )

    def _scored(self, group: Group, first: Rollout) -> list[Scored]:
        """Completions of a problem to score: some of the student's own, and right ones, the task's where it has none."""
        out, shown = [], first.teacher_prompt or ()
        own = [r for r in group.rollouts if r.teacher_prompt is not None][:SCORED_OWN]
        for r in own:
            prompt = r.teacher_prompt or ()
            out.append(Scored(group.prompt, prompt, r.tokens, r.finish == "stop", r.success, sampled=True))
        right = sum(row.right for row in out)
        for r in group.rollouts:
            if r.success and r.teacher_prompt is None and right < SCORED_RIGHT:
                right += 1
                out.append(Scored(group.prompt, shown, r.tokens, r.finish == "stop", True, sampled=False))
        text = None if right else self.parts.task.reference_completion(group.problem)
        if text:
            tokenizer = self.parts.policy.tokenizer
            ids = (*tokenizer.encode(text, add_special_tokens=False), int(tokenizer.eos_token_id))
            out.append(Scored(group.prompt, shown, tuple(map(int, ids)), True, True, sampled=False))
        return out


def _prompters(prompter: Prompter, wordings: Mapping[str, Wording]) -> tuple[dict[str, Prompter], dict[str, str]]:
    """A prompter for each wording that this model's chat template shows, and why it does not show the others."""
    found, hidden = {}, {}
    for name, wording in wordings.items():
        found[name] = replace(prompter, templates=wording.templates)
        try:
            found[name].check_style()
        except ConfigError as error:
            del found[name]
            hidden[f"wording {name}"] = error.faults[0].problem
    return found, hidden


def _graded(rollouts: Sequence[Rollout]) -> list[float]:
    return [r.verdict.score if r.verdict is not None else 0.0 for r in rollouts]


def _first(group: Group) -> Rollout | None:
    """The first completion with a context."""
    return next((r for r in group.rollouts if r.teacher_prompt is not None), None)


def _why_silent(answers: Sequence[Sequence[Answer]]) -> str:
    """Why a source has no text on any completion."""
    failed = next((a.why for row in answers for a in row if isinstance(a, Failed)), None)
    return "it has nothing to say on these completions" if failed is None else f"it failed: {failed}"


def _sources(parts: Parts) -> dict[str, Source]:
    """The recipe's sources, with one request a problem at most and none to a person, and those that cost nothing."""
    own: dict[str, Source] = {
        name: source.for_evaluation if isinstance(source, Outside) else source for name, source in parts.sources.items()
    }
    more = [name for name, entry in SOURCES.items() if entry.free and name not in own]
    cfg = parts.recipe.feedback.model_copy(update={"sources": more})
    return {**own, **build_sources(cfg, parts.prompter)}
