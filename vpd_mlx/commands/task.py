"""`vpd-mlx verify`, `data` and `new`: bring a task of one's own, and see that it is sound before training on it."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from vpd_mlx.config import builtin_recipes, load_recipe, parse_set, resolve_recipe_path
from vpd_mlx.errors import ConfigError, DataError, Fault

__all__ = ["data", "new", "verify"]

RecipeArgument = Annotated[str, typer.Argument(help="A built-in recipe's name or a .yaml file.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override a key of the recipe.")
]


def verify(
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="A built-in recipe's name or a .yaml file.")],
    problem: Annotated[str | None, typer.Option(help="Id of a problem.", show_default="the first one")] = None,
    completion: Annotated[
        str | None,
        typer.Option(help="File with the completion, - for standard input.", show_default="the reference answer"),
    ] = None,
    sets: SetOption = None,
) -> None:
    """Grade one completion and print verdict and context as JSON. Exit code 1 when the verifier itself fails."""
    from vpd_mlx.tasks import build_task, examine

    cfg = load_recipe(resolve_recipe_path(recipe), parse_set(sets or []))
    with contextlib.redirect_stdout(sys.stderr):  # what the user's own verifier prints is no part of the JSON
        task = build_task(cfg)
    everyone = {p.id: p for p in (*task.train, *task.held_out)}
    chosen = task.train[0] if problem is None else everyone.get(problem)
    if chosen is None:
        some = ", ".join(list(everyone)[:3])
        raise DataError(f"--problem: there is no problem {problem!r}; the first ones are {some}")
    if completion is None:
        text = task.reference_completion(chosen)
        if text is None:
            raise DataError(f"row {chosen.id}: has no reference answer to grade; give --completion FILE")
    elif completion == "-":
        text = sys.stdin.read()
    else:
        try:
            text = Path(completion).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"--completion: {completion} cannot be read ({error}); give a UTF-8 text file") from None
    held = chosen in task.held_out
    with contextlib.redirect_stdout(sys.stderr):
        verdict = examine(task, chosen, text) if held else task.verify(chosen, text)
    success = verdict.error is None and verdict.score >= cfg.rollout.success_threshold
    out: dict[str, Any] = {
        "problem": chosen.id,
        "split": "held-out" if held else "train",
        "completion": text,
        "score": None if verdict.error else verdict.score,
        "success": success,
        "text": verdict.text,
        "error": verdict.error,
        # what the teacher would be shown of this completion alone: siblings and critiques need a group and a model
        "context": _context(cfg.feedback.sources, chosen.reference, verdict.text, success),
    }
    typer.echo(json.dumps(out, indent=2, ensure_ascii=False))
    if verdict.error:
        raise typer.Exit(1)


def _context(sources: list[Any], reference: str | None, text: str, success: bool) -> dict[str, str] | None:
    for name in sources:
        if name == "verifier" and not success and text.strip():
            return {"kind": "verifier", "text": text}
        if name == "reference" and reference:
            return {"kind": "reference", "text": reference}
    return None


data = typer.Typer(help="Look at a recipe's data before training on it.", no_args_is_help=True)


@data.command("check")
def check(recipe: RecipeArgument, sets: SetOption = None) -> None:
    """Read every row, run every reference through the verifier, and count: lengths against the limits, duplicates, leaks.

    Exit code 2 with the place and the remedy when a row is unusable.
    """
    import numpy as np

    from vpd_mlx.loading import build_prompter, load_policy
    from vpd_mlx.tasks import build_task, prove

    cfg = load_recipe(resolve_recipe_path(recipe), parse_set(sets or []))
    task = build_task(cfg)  # refuses broken rows and prompts that stand on both sides of the split
    rows = (*task.train, *task.held_out)
    prove(task, rows=len(rows))
    prompter = build_prompter(cfg, load_policy(cfg))
    lengths = np.array([len(prompter.student(p)) for p in rows])
    answers = [len(prompter.tokenizer.encode(a)) for p in rows if (a := task.reference_completion(p)) is not None]
    prompts = [json.dumps([m["content"] for m in p.messages]) for p in rows]
    typer.echo(f"rows: {len(task.train)} to train on, {len(task.held_out)} held out, none on both sides")
    typer.echo(f"reference answers: {len(answers)} of {len(rows)} rows have one, each scores 1")
    solutions = sum(bool(p.reference) for p in rows)
    typer.echo(f"reference solutions, for the feedback source of that name: {solutions} of {len(rows)} rows have one")
    _quantiles("prompt tokens", lengths, cfg.rollout.max_prompt_tokens)
    if answers:
        _quantiles("reference tokens", np.array(answers), cfg.rollout.max_completion_tokens)
    typer.echo(f"duplicates: {len(prompts) - len(set(prompts))} rows repeat another row's prompt")
    first: dict[str, Any] = {}
    for prompt, p in zip(prompts, rows, strict=True):
        other = first.setdefault(prompt, p)
        if other.answer != p.answer:
            raise DataError(
                f"row {p.id}: answer {p.answer!r}, and row {other.id} has the same prompt with {other.answer!r}; mend one of them"
            )
    over = [p.id for p, n in zip(rows, lengths, strict=True) if n > cfg.rollout.max_prompt_tokens]
    if over:
        raise DataError(
            f"row {over[0]}: its prompt is longer than rollout.max_prompt_tokens {cfg.rollout.max_prompt_tokens}, as are "
            f"{len(over) - 1} more; raise the limit or take them out"
        )


def _quantiles(name: str, values: Any, limit: int) -> None:
    import numpy as np

    low, half, high, most = (int(np.quantile(values, q)) for q in (0.05, 0.5, 0.95, 1.0))
    typer.echo(f"{name}: 5 % {low}, median {half}, 95 % {high}, longest {most}; limit {limit}")


RECIPE = """# Made by `vpd-mlx new {name}`. It runs as it is, on the tiny model that comes with the package:
#
#     vpd-mlx train {name}/{name}.yaml
#
# Then put in your own rows, your own verifier and your own model.
name: {name}
description: Write what it teaches, in one line.
algorithm: vpd              # or sdpo, grpo, joint, reshape, reweight: the same loop
model: {model}  # a folder or a hub id, e.g. mlx-community/Qwen3-0.6B-4bit
steps: 20

task:
  kind: python
  data: rows.jsonl          # one problem a line: prompt, answer, and whatever else your verifier needs
  verifier: verifier.py     # verify(problem, completion) -> score in 0..1, or (score, what is wrong in words)
  held_out: 0.3             # chosen by a hash of each row, so that it never moves

feedback:
  sources: [sibling, verifier]   # who is asked for words, in order of preference
  max_tokens: 32

rollout:
  prompts: 4                # problems a step
  group_size: 4             # completions of each
  max_prompt_tokens: 64     # raise these three for a real model: 2048, 1024, 256
  max_completion_tokens: 6

optimizer:
  learning_rate: 5e-4       # 1e-4 for models of 0.5B and more

templates:                  # take these out for a real model: they are what the tiny one was taught to read
  sibling: "{{prompt}}\\nA correct answer: {{context}}"
  verifier: "{{prompt}}\\nFeedback: {{context}}"
  review: "{{prompt}}\\nFeedback: {{context}}"     # of command, server, human and replay
"""
VERIFIER = '''"""Says how good a completion is and, in words, what is wrong with it. The words are what the model learns from."""


def verify(problem, completion):
    """problem.answer is the row's answer, problem.data the whole row."""
    got = completion.strip()
    if got == problem.answer:
        return 1.0
    if len(got) < len(problem.answer):
        return 0.0, "hundreds missing"
    return 0.0, "tens too low"
'''
SUMS = ((47, 38), (56, 27), (88, 14), (19, 73), (65, 28), (34, 59), (77, 16), (48, 48), (29, 83), (91, 45))


def new(name: Annotated[str, typer.Argument(help="Name of the folder, and of the recipe in it.")]) -> None:
    """Write a folder with a commented recipe, ten rows and a verifier: a task of your own that runs as it is."""
    folder = Path(name)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", folder.name):
        raise ConfigError(
            [Fault("NAME", f"{folder.name!r} cannot name a run", "use letters, digits, dots and dashes")],
            "command line",
        )
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError([Fault("NAME", f"{folder} holds something already", "give another name")], "command line")
    model = builtin_recipes()["quickstart"].parent / "model"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{folder.name}.yaml").write_text(RECIPE.format(name=folder.name, model=model), encoding="utf-8")
        (folder / "verifier.py").write_text(VERIFIER, encoding="utf-8")
        rows = "".join(json.dumps({"prompt": f"{a}+{b}=", "answer": str(a + b)}) + "\n" for a, b in SUMS)
        (folder / "rows.jsonl").write_text(rows, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            [Fault("NAME", f"{folder} cannot be written ({error.strerror})", "choose another place")], "command line"
        ) from None
    typer.echo(f"written: {folder}/{folder.name}.yaml, verifier.py, rows.jsonl")
    typer.echo(f"try it: vpd-mlx train {folder}/{folder.name}.yaml")
