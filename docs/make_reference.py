"""Write docs/recipe.md from the config model, so that the reference says what the program does.

python docs/make_reference.py            # writes it
python docs/make_reference.py --check    # fails where it is not up to date
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from vpd_mlx import recipe
from vpd_mlx.tasks import TASKS

HERE = Path(__file__).parent


def default_of(info: FieldInfo) -> str:
    """The default as YAML would write it."""
    if info.default is PydanticUndefined:
        return "required"
    value: Any = info.default
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def section(model: type[BaseModel], prefix: str, title: str) -> list[str]:
    """One table."""
    head = ["| key | default | what it does |", "|---|---|---|"]
    lines = [f"## {title}", "", (model.__doc__ or "").strip(), "", *head]
    nested = []
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            if prefix:
                nested += section(info.annotation, f"{prefix}{name}.", f"{prefix}{name}")
            continue
        text = (info.description or "").replace("|", "\\|")
        if prefix.startswith("task") and name == "kind":
            text = "Names the task."
            default = str(info.annotation.__args__[0])  # type: ignore[union-attr]
        else:
            default = default_of(info)
        lines.append(f"| `{prefix}{name}` | {default} | {text} |")
    return [*lines, "", *nested]


def kind_of(model: type[BaseModel]) -> str:
    """The task's name."""
    return str(model.model_fields["kind"].annotation.__args__[0])  # type: ignore[union-attr]


def reference() -> str:
    """The whole page."""
    lines = [
        "# Recipe reference",
        "",
        "A recipe is one YAML file. Unknown keys, wrong types and values that contradict each other are all reported at",
        "once. Paths are relative to the recipe. Precedence: recipe < `--set key=value` < named flag. This page is",
        "generated from the config model by `docs/make_reference.py`; a test keeps it in step.",
        "",
    ]
    lines += section(recipe.Recipe, "", "Top level")
    for model, _ in sorted(TASKS, key=lambda task: kind_of(task[0])):
        lines += section(model, "task.", f"task: {kind_of(model)}")
    for name, info in recipe.Recipe.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            lines += section(info.annotation, f"{name}.", name)
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Write or check."""
    path, text = HERE / "recipe.md", reference()
    if "--check" in sys.argv:
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            raise SystemExit("docs/recipe.md is not up to date: run python docs/make_reference.py")
        return
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
