"""The completion must be JSON that fits a schema, and equal the row's answer if the row has one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from vpd_mlx.errors import DataError, config_error
from vpd_mlx.tasks.answers import in_fence, spoken
from vpd_mlx.tasks.data import DatasetSettings, read_split
from vpd_mlx.types import Problem, Verdict

__all__ = ["JsonSchema", "JsonSchemaSettings"]


class JsonSchemaSettings(DatasetSettings):
    """The completion must be JSON that fits a schema, and equal the row's answer if the row has one."""

    paths: ClassVar[tuple[str, ...]] = ("schema_file",)
    kind: Literal["json-schema"]
    # Not called `schema`, which is a method of every section.
    schema_file: str | None = Field(
        None, description="File with the schema of all rows, relative to the recipe; null takes each row's own."
    )
    schema_column: str = Field("schema", description="Column of a row's own schema: an object, or JSON text.")


MOST_FAULTS = 3  # reported at once


class JsonSchema:
    """The whole completion, or its last fenced block, read as strict JSON."""

    def __init__(self, cfg: JsonSchemaSettings) -> None:
        self._cfg = cfg
        self._one = None
        if cfg.schema_file is not None:
            try:
                self._one = _validator(Path(cfg.schema_file).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                what = f"{cfg.schema_file}: {error}"
                raise config_error("task.schema_file", what, "give a file with a JSON Schema") from None
        self.train, self.held_out = read_split(cfg)
        for problem in (*self.train, *self.held_out):
            self._schema(problem)

    def _schema(self, problem: Problem) -> Any:
        if self._one is not None:
            return self._one
        column, row = self._cfg.schema_column, f"row {problem.id}"
        if problem.data.get(column) is None:
            raise DataError(f"{row}: no column {column!r}; name it in task.schema_column, or set task.schema_file")
        try:
            return _validator(problem.data[column])
        except ValueError as error:
            raise DataError(f"{row}: {error}; fix the row's schema") from None

    def verify(self, problem: Problem, completion: str) -> Verdict:
        """1 for JSON that fits, else 0 and up to three places where it does not fit."""
        text = in_fence(completion)
        try:
            value = _strict(spoken(completion) if text is None else text)
        except (ValueError, RecursionError) as error:
            return Verdict(0.0, f"This is not JSON: {error}.")
        try:
            faults = sorted(self._schema(problem).iter_errors(value), key=lambda e: (len(e.absolute_path), e.json_path))
        except Exception as error:  # noqa: BLE001 - the library raises all sorts of errors on unresolvable references
            return Verdict(0.0, error=f"the schema cannot be used ({type(error).__name__}: {error})")
        if faults:
            return Verdict(0.0, "\n".join(f"{e.json_path}: {_cut(e.message)}" for e in faults[:MOST_FAULTS]))
        if problem.answer is not None and not _validator({"const": _answer(problem)}).is_valid(value):
            return Verdict(0.0, "It fits the schema, but is not the right answer.")
        return Verdict(1.0)

    def reference_completion(self, problem: Problem) -> str | None:
        """The reference, else the answer."""
        return problem.reference if problem.reference is not None else problem.answer


def _validator(raw: Any) -> Any:
    try:
        import jsonschema
        import referencing
    except ImportError:
        what, remedy = "json-schema needs the jsonschema library", "pip install 'vpd-mlx[json-schema]'"
        raise config_error("task.kind", what, remedy) from None
    schema = json.loads(raw) if isinstance(raw, str) else raw
    if not isinstance(schema, dict | bool):
        raise ValueError(f"a {type(schema).__name__} is not a JSON Schema")
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"not a JSON Schema ({error.message})") from None
    # An empty registry: references to other schemas are never fetched.
    return kind(schema, registry=referencing.Registry())


def _strict(text: str) -> Any:
    def refuse(word: str) -> Any:
        raise ValueError(f"{word} is not a JSON value")

    return json.loads(text, parse_constant=refuse)


def _answer(problem: Problem) -> Any:
    try:
        return json.loads(problem.answer or "")
    except ValueError:
        return problem.answer  # a bare word is its own value


def _cut(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + "..."
