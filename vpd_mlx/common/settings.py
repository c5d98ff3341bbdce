"""What every section of a recipe is, and how YAML text becomes one with all its faults told at once.

A section is a strict pydantic model. It may add faults that only show beside the rest of the recipe (`faults`), and it says
which of its keys are paths (`paths`). Every field's description is its documentation: `docs/recipe.md` is generated from it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vpd_mlx.errors import ConfigError, Fault

__all__ = ["HUB", "Positive", "Section", "Unit", "absolute", "assign", "parse_set", "parse_yaml", "validate"]

HUB = "hf://"  # what data on the Hugging Face hub begins with

Positive = Annotated[int, Field(ge=1)]
Unit = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A part of a recipe."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    paths: ClassVar[tuple[str, ...]] = ()
    """Keys that hold a path, relative to the recipe's folder."""

    def faults(self, recipe: Any) -> Iterator[Fault]:
        """Values that are fine alone and make no sense beside the rest of the recipe."""
        yield from ()

    def located(self, folder: Path) -> Self:
        """The section with its paths absolute."""
        values = {key: value for key in self.paths if isinstance(value := getattr(self, key), str)}
        return self.model_copy(update={k: absolute(v, folder) for k, v in values.items() if not v.startswith(HUB)})


Model = TypeVar("Model", bound=Section)


def absolute(path: str, folder: Path) -> str:
    """The path as seen from `folder`."""
    return str((folder / Path(path).expanduser()).resolve())


# --- reading


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-5 as a number (YAML 1.1 takes it for text) and refuses a key given twice."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\d[\d_]*)(?:\.[\d_]*)?(?:[eE][-+]?\d+)$|^[-+]?\d[\d_]*\.[\d_]*$|^[-+]?\.\d+(?:[eE][-+]?\d+)?$"
    ),
    list("-+0123456789."),
)


def _mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if key.value in seen:
            line = key.start_mark.line + 1
            raise ConfigError([Fault(f"line {line}", f"the key {key.value!r} is given twice", "keep one of them")])
        seen.add(key.value)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse_yaml(text: str, where: str) -> Any:
    """YAML text as plain values.

    Raises:
        ConfigError: it is not YAML, or gives a key twice.
    """
    try:
        return yaml.load(text, _Loader)
    except ConfigError as error:
        raise ConfigError(error.faults, where) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date, for one
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}" if mark is not None else "text"
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError([Fault(line, f"not valid YAML ({what})", "mend that line")], where) from None


def parse_set(items: list[str]) -> list[tuple[str, Any]]:
    """`a.b=value` pairs with values read as YAML.

    Raises:
        ConfigError: an item without `=` or with an empty key.
    """
    pairs, faults = [], []
    for item in items:
        key, eq, text = item.partition("=")
        if not eq or not key.strip() or not all(key.split(".")):
            faults.append(Fault(item, "is not of the form key=value", "write e.g. --set rollout.group_size=4"))
            continue
        pairs.append((key.strip(), parse_yaml(text, f"--set {key}")))
    if faults:
        raise ConfigError(faults, "--set")
    return pairs


def assign(raw: dict[str, Any], key: str, value: Any) -> list[Fault]:
    """Set a dotted key in a tree of mappings; what stands in the way is a fault."""
    *parents, last = key.split(".")
    node = raw
    for i, part in enumerate(parents):
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            place = ".".join(parents[: i + 1])
            return [Fault(key, f"{place} is {child!r}, not a section", f"set {place} itself")]
        node = child
    node[last] = value
    return []


def validate(model: type[Model], raw: dict[str, Any]) -> tuple[Model | None, list[Fault]]:
    """The model if it can be had, and the faults. Faulty keys are dropped and the rest is read again, so that values
    which contradict each other are reported in the same go as wrong types."""
    try:
        return model.model_validate(raw), []
    except ValidationError as error:
        faults = [_fault(model, raw, e) for e in error.errors()]
        pruned = _without(raw, [_location(e) for e in error.errors()])
        try:
            return model.model_validate(pruned), faults
        except ValidationError:
            return None, faults


def _location(error: Any) -> list[str | int]:
    # A tagged union puts the tag into the location: task.addition.digits -> task.digits.
    loc = list(error["loc"])
    return loc[:1] + loc[2:] if loc[:1] == ["task"] and len(loc) > 1 else loc


def _fault(model: type[Section], raw: Any, error: Any) -> Fault:
    loc = _location(error)
    path = ".".join(str(p) for p in loc) or "recipe"
    kind, value = error["type"], error["input"]
    shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
    if kind == "extra_forbidden":
        names = _sibling_keys(model, raw, loc)
        close = difflib.get_close_matches(str(loc[-1]), names, n=1)
        remedy = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(names)}"
        return Fault(path, f"unknown key (value {shown})", remedy)
    if kind == "missing":
        return Fault(path, "is required and missing", f"add `{loc[-1]}: …`")
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        tags = ", ".join(_kinds(model, str(loc[0])))
        got = value.get("kind") if isinstance(value, dict) else value
        return Fault(f"{path}.kind", f"{got!r} is not a kind of task", f"use one of {tags}")
    if kind == "model_type":
        return Fault(
            path, f"got {shown}", f"needs keys of its own, e.g. {path}.{_sibling_keys(model, raw, [*loc, ''])[0]}"
        )
    if kind == "too_short":
        return Fault(path, f"got {shown}", f"needs at least {error['ctx']['min_length']} of them")
    if kind == "string_pattern_mismatch" and path == "name":
        return Fault(path, f"got {shown}", "needs letters, digits, dots and dashes, a letter or digit first")
    message = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return Fault(path, f"got {shown}", f"needs {message}")


def _kinds(model: type[Section], key: str) -> dict[str, type[Section]]:
    """Sections of a field that is one of several, by their `kind`."""
    union: Any = model.model_fields[key].annotation
    members = getattr(union, "__args__", (union,))
    return {str(m.model_fields["kind"].annotation.__args__[0]): m for m in members}


def _sibling_keys(model: type[Section], raw: Any, loc: list[str | int]) -> list[str]:
    found: Any = model
    for part in loc[:-1]:
        if part == "task":
            kinds = _kinds(found, part)
            found = kinds.get(raw["task"].get("kind"), next(iter(kinds.values())))
        else:
            found = found.model_fields[part].annotation
    return list(found.model_fields)


def _without(raw: dict[str, Any], locations: list[list[str | int]]) -> dict[str, Any]:
    def copy(node: Any) -> Any:
        return {k: copy(v) for k, v in node.items()} if isinstance(node, dict) else node

    out: dict[str, Any] = copy(raw)
    for loc in locations:
        node: Any = out
        keys = list(loc)
        for part in keys[:-1]:
            if not isinstance(node, dict) or part not in node:
                break
            node = node[part]
        else:
            if isinstance(node, dict) and keys:
                node.pop(keys[-1], None)
    return out
