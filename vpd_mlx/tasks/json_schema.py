"""The completion must be JSON that fits a schema, and equal the row's answer if the row has one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from vpd_mlx.common.thoughts import spoken
from vpd_mlx.errors import DataError, SourceError, config_error
from vpd_mlx.tasks.answers import in_fence
from vpd_mlx.tasks.checker import Checker
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
    timeout: float = Field(
        5.0, gt=0, description="Seconds of processor time for one completion; one that takes more does not fit."
    )


# A schema comes as JSON text. An empty registry: references to other schemas are never fetched.
VALIDATOR = """
import functools, json, math
import jsonschema, referencing

@functools.lru_cache(1024)
def validator(text):
    schema = json.loads(text)
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    kind.check_schema(schema)
    return kind(schema, registry=referencing.Registry())

@limited
def fault(schema):
    try:
        validator(schema)
    except jsonschema.SchemaError as error:
        return json.dumps(error.message)
    return json.dumps("")

def refuse(word):
    raise ValueError(word + " is not a JSON value")

def finite(word):
    return float(word) if math.isfinite(float(word)) else refuse(word)

def cut(text):
    return text if len(text) <= 200 else text[:200] + "..."

@limited
def check(schema, text, answer):
    try:
        value = json.loads(text, parse_constant=refuse, parse_float=finite)
    except (ValueError, RecursionError) as error:
        return json.dumps("This is not JSON: " + cut(str(error)) + ".")
    faults = sorted(validator(schema).iter_errors(value), key=lambda e: (len(e.absolute_path), e.json_path))
    if faults:
        return json.dumps("\\n".join(cut(e.json_path) + ": " + cut(e.message) for e in faults[:3]))
    right = answer is None or validator(json.dumps({"const": json.loads(answer)})).is_valid(value)
    return json.dumps("" if right else "It fits the schema, but is not the right answer.")
"""


class JsonSchema:
    """The whole completion, or its last fenced block, read as strict JSON."""

    def __init__(self, cfg: JsonSchemaSettings) -> None:
        self._cfg = cfg
        self._checker = Checker(VALIDATOR, "jsonschema", "json-schema", cfg.kind, cfg.timeout)
        self._one = None
        if cfg.schema_file is not None:
            try:
                self._one = _schema(Path(cfg.schema_file).read_text(encoding="utf-8"))
                self._refuse_faulty(self._one)
            except (OSError, ValueError) as error:
                what = f"{cfg.schema_file}: {error}"
                raise config_error("task.schema_file", what, "give a file with a JSON Schema") from None
        self.train, self.held_out = read_split(cfg)
        for problem in (*self.train, *self.held_out) if self._one is None else ():
            if problem.data.get(cfg.schema_column) is None:
                remedy = "name it in task.schema_column, or set task.schema_file"
                raise DataError(f"row {problem.id}: no column {cfg.schema_column!r}; {remedy}")
            try:
                self._refuse_faulty(self._schema(problem))
            except ValueError as error:
                raise DataError(f"row {problem.id}: {error}; fix the row's schema") from None

    def _schema(self, problem: Problem) -> str:
        return _schema(problem.data[self._cfg.schema_column]) if self._one is None else self._one

    def _refuse_faulty(self, schema: str) -> None:
        try:
            fault = self._checker.call("fault", schema)
        except SourceError as error:
            fault = str(error)
        if fault:
            raise ValueError(f"not a JSON Schema ({fault})")

    def verify(self, problem: Problem, completion: str) -> Verdict:
        """1 for JSON that fits, else 0 and up to three places where it does not fit."""
        schema, answer = self._schema(problem), None if problem.answer is None else _answer(problem.answer)

        def read(fault: str) -> Verdict:
            return Verdict(0.0, fault) if fault else Verdict(1.0)

        # Where no completion is known to be right, one that is easy to check tells whether the schema is at fault.
        known = self.reference_completion(problem) or "null"
        calls = [("check", schema, _json_of(text), answer) for text in (completion, known)]
        return self._checker.grade(problem, calls[0], calls[1], "the schema cannot be used", read)

    def reference_completion(self, problem: Problem) -> str | None:
        """The reference, else the answer."""
        return problem.reference if problem.reference is not None else problem.answer


def _schema(raw: Any) -> str:
    """A schema, or its text, as JSON text. Raises ValueError if it is none."""
    try:
        schema = json.loads(raw) if isinstance(raw, str) else raw
        if not isinstance(schema, dict | bool):
            raise ValueError(f"a {type(schema).__name__} is not a JSON Schema")
        return json.dumps(schema)
    except (RecursionError, TypeError) as error:
        raise ValueError(f"not a JSON Schema ({error})") from None


def _json_of(completion: str) -> str:
    fenced = in_fence(completion)
    return spoken(completion) if fenced is None else fenced


def _answer(text: str) -> str:
    """The answer as JSON text; a bare word is its own value."""
    try:
        return json.dumps(json.loads(text))
    except (ValueError, RecursionError):
        return json.dumps(text)
