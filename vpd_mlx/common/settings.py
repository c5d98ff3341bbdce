"""What every section of a recipe is, and how YAML text becomes one, with all its faults reported at once.

A section is a strict pydantic model. It names those of its keys that are paths (`paths`) and finds the values in it that
contradict the rest of the recipe (`faults`). Every field's description is its documentation: `docs/recipe.md` is generated
from it.
"""

from __future__ import annotations

import copy
import difflib
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetJsonSchemaHandler, ValidationError
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from vpd_mlx.errors import ConfigError, Fault, config_error

__all__ = [
    "HUB",
    "OneOf",
    "Plain",
    "Positive",
    "Section",
    "absolute",
    "kind_of",
    "parse_set",
    "parse_yaml",
    "spelt_out",
    "to_yaml",
    "validate",
]

MOST_NODES = 10_000  # of a recipe or a grid: the longest that ships has some hundred
HUB = "hf://"  # prefix of data on the Hugging Face hub

Positive = Annotated[int, Field(ge=1)]


def _finite(value: Any) -> Any:
    """The value, if every number in it is finite."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for part in inner:
        _finite(part)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("finite numbers")
    return value


Plain = Annotated[dict[str, Any], AfterValidator(_finite)]
"""Keys and values that another library names."""


@dataclass(frozen=True)
class OneOf:
    """In `Annotated[str, OneOf(names)]`: the name of something on a list, such as an algorithm or a feedback source.

    The list is read when a value is checked: what is added to it later may be named, too.
    """

    names: Collection[str]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._checked)

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {"type": "string", "enum": list(self.names)}

    def _checked(self, value: Any) -> str:
        if not isinstance(value, str) or value not in self.names:
            *others, last = map(repr, self.names)
            raise PydanticCustomError("one_of", "{expected}", {"expected": f"{', '.join(others)} or {last}"})
        return value


class Section(BaseModel):
    """A part of a recipe."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    paths: ClassVar[tuple[str, ...]] = ()
    """Keys that hold a path, relative to the recipe's folder; those of the base classes count as well."""
    shorthand: ClassVar[str | None] = None
    """The key that a name or a list in place of the section sets: `templates: sdpo` is `templates: {style: sdpo}`."""

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler.resolve_ref_schema(handler(core))
        return schema if cls.shorthand is None else {"anyOf": [schema, schema["properties"][cls.shorthand]]}

    def faults(self, recipe: Any) -> Iterator[Fault]:
        """Values that are valid alone and contradict each other or the rest of the recipe."""
        yield from ()

    def notes(self, recipe: Any) -> Iterator[str]:
        """Values that may be meant, and deserve a word when the run begins."""
        yield from ()

    def path_keys(self, prefix: str = "") -> set[str]:
        """Dotted keys that hold a path, those of the sections within it, too."""
        found = {prefix + key for kind in type(self).__mro__ for key in getattr(kind, "paths", ())}
        for key in type(self).model_fields:
            if isinstance(value := getattr(self, key), Section):
                found |= value.path_keys(f"{prefix}{key}.")
        return found

    def located(self, folder: Path) -> Self:
        """The section with its paths absolute, and those of the sections within it."""
        paths = self.path_keys()
        changes: dict[str, Any] = {}
        for key in type(self).model_fields:
            value = getattr(self, key)
            if isinstance(value, Section):
                changes[key] = value.located(folder)
            elif key in paths and isinstance(value, str) and not value.startswith(HUB):
                changes[key] = absolute(value, folder)
        return self.model_copy(update=changes)


Model = TypeVar("Model", bound=Section)


def kind_of(section: type[Section]) -> str:
    """The value of `kind` that chooses this section where a key may hold one of several."""
    return str(get_args(section.model_fields["kind"].annotation)[0])


def absolute(path: str, folder: Path) -> str:
    """The path as seen from `folder`."""
    try:
        return str((folder / Path(path).expanduser()).resolve())
    except (ValueError, RuntimeError) as error:  # a null byte, or the home of an unknown user
        raise ConfigError(
            [Fault(repr(path), f"is not a path ({error})", "give the path of a file or folder")]
        ) from None


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


WORDS = {"name", "description", "model", "model_revision", "data_revision"}
"""Keys whose value is a text, however it is spelt: a run may be called `no` or `123`, a commit `1234e56`."""
TEXT = "tag:yaml.org,2002:str"


def _mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise config_error(f"line {key.start_mark.line + 1}", "a key is no plain word", "write it as one")
        if key.value in seen:
            line = key.start_mark.line + 1
            raise config_error(f"line {line}", f"the key {key.value!r} is given twice", "keep one of them")
        seen.add(key.value)
        if key.value in WORDS:
            _as_text(value)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


def _as_text(node: yaml.Node) -> None:
    """Let a plain scalar be the text that it is, unless it is null."""
    if isinstance(node, yaml.ScalarNode) and not node.tag.endswith((":null", ":str")):
        node.tag = TEXT


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """How many nodes there are below one, counted without following an alias twice."""
    if id(node) not in known:
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        nodes = [n for item in inner for n in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_size(n, known) for n in nodes)
    return known[id(node)]


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes the texts which `_Loader` would take for numbers: 1e5."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def to_yaml(values: Any) -> str:
    """Plain values as YAML text, which `parse_yaml` reads back as they are."""
    return str(yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110))


def parse_yaml(text: str, where: str, *, as_text: bool = False) -> Any:
    """YAML text as plain values; with `as_text` a plain scalar is text, whatever it looks like.

    Raises:
        ConfigError: it is not YAML, gives a key twice, or is nested or repeated beyond all use.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None and _size(node, {}) > MOST_NODES:
            many = f"more than {MOST_NODES:,} values, aliases counted wherever they are used"
            raise config_error("text", many, "write it without so many aliases")
        if node is not None and as_text:
            _as_text(node)
        return None if node is None else loader.construct_document(node)
    except ConfigError as error:
        raise ConfigError(error.faults, where) from None
    except RecursionError:
        raise config_error("text", "nested too deeply, or in itself", "write it flat", where) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date, for one
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}" if mark is not None else "text"
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        remedy = "indent by spaces, not tabs" if r"'\t'" in what else "fix that line"
        raise config_error(line, f"not valid YAML ({what})", remedy, where) from None


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
        else:
            as_text = key.strip().rpartition(".")[2] in WORDS
            pairs.append((key.strip(), parse_yaml(text, f"--set {key}", as_text=as_text)))
    if faults:
        raise ConfigError(faults, "--set")
    return pairs


def merged(raw: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The values with changes; sections of the same name are merged key by key."""
    out = dict(raw)
    for key, value in changes.items():
        both = isinstance(out.get(key), Mapping) and isinstance(value, Mapping)
        out[key] = merged(out[key], value) if both else value
    return out


# --- checking


def spelt_out(model: type[Section], raw: dict[str, Any]) -> dict[str, Any]:
    """The values with each section's `shorthand` written as the section that it stands for."""
    out = dict(raw)
    for name, field in model.model_fields.items():
        kind = _kinds(field.annotation).get(None)
        if kind is not None and kind.shorthand is not None and isinstance(raw.get(name), str | list):
            out[name] = {kind.shorthand: raw[name]}
    return out


def validate(model: type[Model], raw: dict[str, Any]) -> tuple[Model | None, list[Fault]]:
    """The model, if the values allow one, and the faults.

    Faulty keys are dropped and the rest is read again, so that values which contradict each other are reported together with
    those of a wrong type.
    """
    try:
        return model.model_validate(raw), []
    except ValidationError as error:
        places = [_place(model, e["loc"]) for e in error.errors()]
        faults = [_fault(place, e) for place, e in zip(places, error.errors(), strict=True)]
        rest = copy.deepcopy(raw)
        for place in places:
            _drop(rest, place.keys)
    try:
        return model.model_validate(rest), faults
    except ValidationError:
        return None, faults


@dataclass(frozen=True)
class _Place:
    """Where in the recipe an error is: the keys that lead there, and the section that holds the last of them."""

    keys: tuple[str | int, ...]
    section: type[Section]


def _place(model: type[Section], location: Sequence[str | int]) -> _Place:
    """The place of pydantic's error location, in which a section's kind stands as well: task.addition.digits."""
    keys, section, parts = list[str | int](), model, list(location)
    while parts:
        keys.append(part := parts.pop(0))
        field = section.model_fields.get(str(part))
        inner = _kinds(field.annotation) if field is not None and parts else {}
        if None in inner:
            section = inner[None]
        elif inner:
            section = inner[str(parts.pop(0))]
    return _Place(tuple(keys), section)


def _kinds(annotation: Any) -> dict[str | None, type[Section]]:
    """The sections that a key may hold, by kind; under None the only one."""
    if isinstance(annotation, type):
        return {None: annotation} if issubclass(annotation, Section) else {}
    return {kind_of(m): m for m in get_args(annotation) if isinstance(m, type) and issubclass(m, Section)}


def _drop(raw: dict[str, Any], keys: tuple[str | int, ...]) -> None:
    node: Any = raw
    for key in keys[:-1]:
        node = node.get(key) if isinstance(node, dict) else None
    if isinstance(node, dict) and keys:
        node.pop(keys[-1], None)


def _fault(place: _Place, error: Any) -> Fault:
    """pydantic's error as a place, a problem and a remedy."""
    path, last = ".".join(map(str, place.keys)) or "recipe", str(place.keys[-1]) if place.keys else ""
    kind, value = error["type"], error["input"]
    shown = "nothing (null)" if value is None else repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
    match kind:
        case "extra_forbidden":
            names = list(place.section.model_fields)
            close = difflib.get_close_matches(last, names, n=1)
            remedy = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(names)}"
            return Fault(path, f"unknown key (value {shown})", remedy)
        case "missing":
            return Fault(path, "is required and missing", f"add `{last}: …`")
        case "union_tag_not_found" | "union_tag_invalid":
            kinds = ", ".join(map(str, _kinds(place.section.model_fields[last].annotation)))
            got = value.get("kind") if isinstance(value, dict) else value
            return Fault(f"{path}.kind", f"{got!r} is not a kind of {last}", f"use one of {kinds}")
        case "model_type":
            inner = next(iter(_kinds(place.section.model_fields[last].annotation).values()))
            return Fault(path, f"got {shown}", f"needs keys of its own, e.g. {path}.{next(iter(inner.model_fields))}")
        case "too_short":
            return Fault(path, f"got {shown}", f"needs at least {error['ctx']['min_length']} of them")
        case "string_pattern_mismatch" if path == "name":
            return Fault(path, f"got {shown}", "needs letters, digits, dots and dashes, a letter or digit first")
        case "literal_error" | "one_of" if close := difflib.get_close_matches(str(value), _choices(error), n=1):
            others = ", ".join(name for name in _choices(error) if name != close[0])
            return Fault(
                path,
                f"got {shown}",
                f"did you mean {close[0]!r}? There is also {others}" if others else f"use {close[0]!r}",
            )
    return Fault(path, f"got {shown}", f"needs {needed(error)}")


def _choices(error: Any) -> list[str]:
    return re.findall(r"'([^']*)'", error["ctx"]["expected"])


NEEDED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list, e.g. [a, b]",
    "dict_type": "keys and values, e.g. {a: 1}",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "string_too_short": "a text that is not empty",
    "literal_error": "one of {expected}",
    "one_of": "one of {expected}",
}
"""What a value must be, by pydantic's name of the error."""


def needed(error: Any) -> str:
    """What a value that pydantic refuses should be, in a few words."""
    kind, context = error["type"], error.get("ctx", {})
    if kind == "string_pattern_mismatch" and "://" in context["pattern"]:
        return "an address that begins with http:// or https://"
    if kind == "list_type" and isinstance(error["input"], str):
        return f"a list, e.g. [{error['input']}]"
    if kind == "string_type" and isinstance(error["input"], int | float):
        return f"text; write it in quotes, '{error['input']}'"
    if kind in NEEDED:
        shown = {k: f"{v:g}" if isinstance(v, float) else v for k, v in context.items()}
        return NEEDED[kind].format(**shown)
    message: str = error["msg"]
    return message.removeprefix("Input should be ").removeprefix("Value error, ")
