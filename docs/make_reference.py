"""Write docs/recipe.md and recipes/recipe.schema.json from the config model, and docs/run-folder.md from the rows' declarations.

python docs/make_reference.py            # writes them
python docs/make_reference.py --check    # fails if one is not up to date
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from vpd_mlx import recipe
from vpd_mlx.algos.presets import PRESETS
from vpd_mlx.common.settings import Section, kind_of
from vpd_mlx.run import records
from vpd_mlx.run.folder import by_dotted_key
from vpd_mlx.tasks import TASKS

HERE = Path(__file__).parent


def default_of(info: FieldInfo) -> str:
    """The default as YAML would write it."""
    return "required" if info.default is PydanticUndefined else in_yaml(info.default)


def in_yaml(value: Any) -> str:
    """A value as YAML would write it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def section(model: type[Section], prefix: str, title: str) -> list[str]:
    """One table."""
    head = ["| key | default | what it does |", "|---|---|---|"]
    lines = [f"## {title}", "", (model.__doc__ or "").strip(), "", *head]
    nested = []
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            if prefix:
                nested += section(info.annotation, f"{prefix}{name}.", f"{prefix}{name}")
            continue
        text = (info.description or "").replace("|", "\\|")
        if prefix.startswith("task") and name == "kind":
            text = "Names the task."
            default = kind_of(model)
        else:
            default = default_of(info)
        lines.append(f"| `{prefix}{name}` | {default} | {text} |")
    return [*lines, "", *nested]


def presets() -> list[str]:
    """What each preset sets."""
    lines = [
        "## Presets",
        "",
        "`preset: NAME`, or `--set preset=NAME`, lays values under the keys that a recipe gives itself. They go by the",
        "algorithm: `--set algorithm=grpo --set preset=paper` is the paper's GRPO. Rates are ten times the paper's, which trains",
        "all weights where this trains LoRA; a minibatch of 32 problems is the whole batch, null.",
        "",
        *(f"- `{name}`: {preset.what}" for name, preset in PRESETS.items()),
        "",
    ]
    columns = {name: by_dotted_key(p.values) for name, p in PRESETS.items() if p.values and name != "paper"}
    lines += [f"| key | {' | '.join(f'`{name}`' for name in columns)} |", "|---|" + "---|" * len(columns)]
    for key in next(iter(columns.values())):
        lines.append(f"| `{key}` | {' | '.join(in_yaml(values[key]) for values in columns.values())} |")
    lines += ["", "| algorithm | in all three |", "|---|---|"]
    for name, values in next(p for p in PRESETS.values() if p.of).of.items():
        own = ", ".join(f"`{key}: {in_yaml(value)}`" for key, value in by_dotted_key(values).items())
        lines.append(f"| `{name}` | {own or 'no more'} |")
    return [*lines, ""]


def reference() -> str:
    """The whole page."""
    lines = [
        "# Recipe reference",
        "",
        "A recipe is one YAML file. Unknown keys, wrong types and values that contradict each other are all reported at",
        "once. Paths are relative to the recipe. Precedence: [preset](#presets) < recipe < `--set key=value` < named flag.",
        "This page is generated from the config model by `docs/make_reference.py`; a test keeps it in step.",
        "",
    ]
    lines += section(recipe.Recipe, "", "Top level")
    lines += presets()
    for model, _ in sorted(TASKS, key=lambda task: kind_of(task[0])):
        lines += section(model, "task.", f"task: {kind_of(model)}")
    for name, info in recipe.Recipe.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            lines += section(info.annotation, f"{name}.", name)
    return "\n".join(lines).rstrip() + "\n"


FOLDER = f"""# What a run folder holds

`report`, `show`, `compare`, `eval`, `lab` and the logging services know a run by its folder alone, and your own programs can
read it, too. The `.jsonl` files only grow, line by line; a last line without its newline is still being written. This page is
generated from `vpd_mlx/run/records.py` by `docs/make_reference.py`; a test keeps it in step.

| file | what it is |
|---|---|
| `config.yaml` | the recipe with all its defaults; `vpd-mlx train --resume` reads it |
| `metrics.jsonl` | a row for each step |
| `rollouts.jsonl` | a row for each completion |
| `evals.jsonl` | a row for each evaluation |
| `selection.jsonl` | a row for each look at the problems by which `evaluation.keep_best` chooses |
| `answers.jsonl` | a row for each held-out problem of an evaluation, up to 200 of them |
| `general.jsonl` | a row for each general check of `retain` |
| `summary.json` | written once, when the run has ended |
| `start/` | the adapter before the first step, where the run continued one (`adapter`) or was warmed up (`warm_start`) |
| `adapters/` | the trained adapter, as mlx-lm loads it |
| `checkpoints/` | what a resume needs |
| `nonfinite/` | the completions of steps whose update was left out as not finite |
| `logging/` | what the logging services printed, and how far each one is |

A `config.yaml` of an earlier `version` is read with the defaults of then: before version 4 an EMA teacher and an E-step before
every fifth M-step, before version 3 a warm-up counted by each optimizer's own updates, and in version 1 a live teacher and, where
it leaves `templates` `null`, the wording of then (`style: closing`).

A figure is `null` if a step had no data for it. JSON has no NaN or infinity: they are written as the text `nan` or `inf`.

In the names below, KIND stands for a kind of feedback and K for a number of samples. A step has those of the `student/` and
`e_step/` figures that its algorithm logs.

This is format {records.FORMAT}, as `summary.json` says. In format 1 the figures `student/…` were called `m_step/…` or
`policy_gradient/…`, and `student/entropy` ended in `student_entropy`. A run resumed across the change has rows of both formats;
all commands read both.
"""


def in_words(kind: Any) -> str:
    """A field's type as JSON knows it."""
    options = [a for a in get_args(kind) if a is not type(None)] if type(None) in get_args(kind) else [kind]
    names = {bool: "true or false", int: "integer", float: "number", str: "text", list: "list", tuple: "pair"}
    word = names.get(options[0], names.get(getattr(options[0], "__origin__", None), "object"))
    return f"{word} or null" if options[0] is not kind else word


def rows() -> str:
    """The page on the run folder."""
    lines = [FOLDER]
    files = {
        "metrics.jsonl": records.MetricsRow,
        "rollouts.jsonl": records.RolloutRow,
        "evals.jsonl": records.EvaluationRow,
        "selection.jsonl": records.SelectionRow,
        "answers.jsonl": records.AnswerRow,
        "general.jsonl": records.GeneralRow,
        "summary.json": records.Summary,
    }
    for title, table in files.items():
        what = (table.__doc__ or "").partition(": ")[2]
        lines += [f"## {title}", "", what[0].upper() + what[1:], ""]
        lines += ["| field | type | unit | what it is |", "|---|---|---|---|"]
        hints = get_type_hints(table, include_extras=True)
        for name in sorted(hints, key=lambda name: "/" in name or "@" in name):  # inherited ones last
            kind, unit, meaning = get_args(hints[name])
            lines.append(f"| `{name}` | {in_words(kind)} | {unit} | {meaning} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Write or check."""
    schema = json.dumps(recipe.json_schema(), indent=1) + "\n"
    pages = ((HERE / "recipe.md", reference()), (HERE / "run-folder.md", rows()), (recipe.schema_file(), schema))
    for path, text in pages:
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            raise SystemExit(f"{path.name} is not up to date: run python docs/make_reference.py")


if __name__ == "__main__":
    main()
