"""Rows from files: read, mapped to problems, split into training and held-out by a hash of the row."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol

from vpd_mlx.errors import DataError
from vpd_mlx.types import Message, Problem

__all__ = ["Columns", "read_jsonl", "read_split"]


class Columns(Protocol):
    """The part of a task's config that says where rows lie and which column is which."""

    data: str
    eval_data: str | None
    held_out: float
    prompt: str
    answer: str
    reference: str
    system: str


def read_jsonl(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(place, row) of every line that is not blank; the place is `file:line`.

    Raises:
        DataError: no such file, not text, a line that is not a JSON object (with its number), or no rows at all.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: no such data file; give the path of a .jsonl file, relative to the recipe") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); give a UTF-8 .jsonl file") from None
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}: broken JSON ({error}); each line must be one JSON object") from None
        if not isinstance(row, dict):
            raise DataError(f"{place}: a {type(row).__name__}, not an object; each line must be one JSON object")
        rows.append((place, row))
    if not rows:
        raise DataError(f"{path}: no rows; write one JSON object a line")
    return rows


def read_split(cfg: Columns) -> tuple[tuple[Problem, ...], tuple[Problem, ...]]:
    """(training, held-out) problems. The split is by a hash of the row's content, so it never moves when rows are added.

    Raises:
        DataError: a file or a row is unusable, one side of the split is empty, or a prompt stands on both sides.
    """
    rows = [_problem(cfg, place, row) for place, row in read_jsonl(Path(cfg.data))]
    if cfg.eval_data is None:
        train = [p for p in rows if _fraction(p) >= cfg.held_out]
        held = [p for p in rows if _fraction(p) < cfg.held_out]
        if not held or not train:
            side = "evaluation" if not held else "training"
            raise DataError(
                f"{cfg.data}: the split by hash leaves no row of {len(rows)} for {side} (task.held_out is {cfg.held_out:g}); "
                "add rows, change task.held_out, or give task.eval_data"
            )
    else:
        train = rows
        held = [_problem(cfg, place, row) for place, row in read_jsonl(Path(cfg.eval_data))]
    seen = {_content(p): p.id for p in train}
    for p in held:
        if _content(p) in seen:
            raise DataError(f"{p.id}: the same prompt as the training row {seen[_content(p)]}; take one of them out")
    return tuple(train), tuple(held)


def _content(problem: Problem) -> str:
    return json.dumps([[m["role"], " ".join(m["content"].split())] for m in problem.messages])


def _fraction(problem: Problem) -> float:
    return int(hashlib.sha256(_content(problem).encode()).hexdigest()[:13], 16) / 16**13


def _problem(cfg: Columns, place: str, row: dict[str, Any]) -> Problem:
    if cfg.prompt not in row:
        has = ", ".join(sorted(map(str, row))) or "none"
        raise DataError(f"{place}: no column {cfg.prompt!r} (columns: {has}); name the right one in task.prompt")
    messages = _messages(row[cfg.prompt], place, cfg.prompt)
    system = row.get(cfg.system)
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages = ({"role": "system", "content": system.strip()}, *messages)
    answer, reference = row.get(cfg.answer), row.get(cfg.reference)
    for name, value in ((cfg.answer, answer), (cfg.reference, reference)):
        if value is not None and not isinstance(value, str | int | float):
            raise DataError(f"{place}: column {name!r} is a {type(value).__name__}; it must be text or a number")
    name = Path(place.rsplit(":", 1)[0]).name + ":" + place.rsplit(":", 1)[1]
    return Problem(
        id=str(row.get("id", name)),
        messages=messages,
        answer=None if answer is None else str(answer),
        reference=None if reference is None else str(reference),
        data=row,
    )


def _messages(value: Any, place: str, column: str) -> tuple[Message, ...]:
    if isinstance(value, str) and value.strip():
        return ({"role": "user", "content": value},)
    if isinstance(value, list) and value:
        fine = all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
        )
        if fine and value[-1]["role"] == "user":
            return tuple({"role": m["role"], "content": m["content"]} for m in value)
    raise DataError(
        f"{place}: column {column!r} must be text that is not empty, or a list of messages with role and content, "
        "the last one the user's"
    )
