"""Rows from files: read, mapped to problems, split into training and held-out by a hash of the row.

Files are local, or belong to a data set on the Hugging Face hub; those go through the hub's usual cache, and `HF_HUB_OFFLINE` is
respected.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from vpd_mlx.common.hub import hub_fault, reaching_hub
from vpd_mlx.common.settings import HUB, Section
from vpd_mlx.errors import DataError, Fault
from vpd_mlx.types import Message, Problem

__all__ = ["DatasetSettings", "content", "fraction", "read_all", "read_rows", "read_split"]


class DatasetSettings(Section):
    """Keys of every task whose rows come from a file."""

    paths: ClassVar[tuple[str, ...]] = ("data", "eval_data")

    data: str = Field(
        description="Training rows: a .jsonl, .json, .csv or .parquet file, relative to the recipe, or a file of a data set "
        "on the Hugging Face hub: `hf://owner/name@revision/path`."
    )
    data_revision: str | None = Field(
        None,
        description="Branch, tag or commit for `hf://` files that do not name one themselves; one of the two is required.",
    )
    eval_data: str | None = Field(
        None, description="Held-out rows. Without it a share of `data` is held out, chosen by a hash of each row."
    )
    held_out: float = Field(
        0.1, gt=0, lt=1, description="Share of `data` held out for evaluation if there is no `eval_data`."
    )
    prompt: str = Field("prompt", description="Column of the prompt: text, or a list of chat messages.")
    answer: str = Field("answer", description="Column of the answer.")
    reference: str = Field("reference", description="Column of a worked solution, used if a row has it.")
    system: str = Field("system", description="Column of the system message, used if a row has it.")

    def faults(self, recipe: Any) -> Iterator[Fault]:
        """Data sets on the hub change; a reproducible run names a revision."""
        on_hub = {k: v for k in ("data", "eval_data") if (v := getattr(self, k)) and v.startswith(HUB)}
        for key, value in on_hub.items():
            if not re.fullmatch(HUB + r"[^/@]+/[^/@]+(@[^/@]+)?/.*[^/]", value):
                remedy = "write hf://owner/name@revision/path of a file in it"
                yield Fault(f"task.{key}", f"{value!r} does not name a file of a data set", remedy)
            elif "@" not in value and self.data_revision is None:
                remedy = "set task.data_revision to a commit, or add @revision after the name"
                yield Fault(f"task.{key}", f"{value!r} is not pinned", remedy)
        if self.data_revision is not None and not any("@" not in value for value in on_hub.values()):
            yield Fault("task.data_revision", "no hf:// file takes its revision from here", "remove it")


def read_rows(source: str, revision: str | None = None) -> list[tuple[str, dict[str, Any]]]:
    """(place, row) of every row; the place is `file:line`, or `file:n` for the n-th row where rows have no lines.

    `.json` holds a list of objects, or one object a line, as `.jsonl` does; `.csv` has a header, and all its values are text.

    Raises:
        DataError: no such file, an unknown suffix, broken content (with its place), or no rows at all.
    """
    path = _from_hub(source, revision) if source.startswith(HUB) else Path(source)
    if path.suffix not in READERS:
        suffix = path.suffix or "nameless"
        raise DataError(f"{source}: cannot tell what is in a {suffix} file; use {', '.join(READERS)}")
    if not path.is_file():
        raise DataError(
            f"{source}: no such data file; give its path, relative to the recipe, or make it as its README says"
        )
    try:
        rows = READERS[path.suffix](source, path.read_bytes())
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error}); make it readable") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: not UTF-8 text ({error}); convert it") from None
    if not rows:
        raise DataError(f"{source}: no rows; write one object a row")
    for place, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{place}: a {type(row).__name__}, not an object; each row must be one JSON object")
    return rows


def read_split(
    cfg: DatasetSettings, given: Mapping[str, str] | None = None, *, reuse: bool = False
) -> tuple[tuple[Problem, ...], tuple[Problem, ...]]:
    """(training, held-out) problems. The split is by a hash of the row's content, so it never moves when rows are added.

    `given` has the lines of .jsonl files that are not on the disk, by path. With `reuse` all rows serve on both sides of a split
    that would leave a side empty.

    Raises:
        DataError: a file or a row is unusable, one side of the split is empty, or a prompt is on both sides.
    """

    def read(path: str) -> list[Problem]:
        lines = (given or {}).get(path)
        found = read_rows(path, cfg.data_revision) if lines is None else _lines(path, lines.encode())
        return [_problem(cfg, place, row) for place, row in found]

    rows = read(cfg.data)
    if cfg.eval_data is not None:
        train, held = rows, read(cfg.eval_data)
    else:
        train = [p for p in rows if fraction(content(p)) >= cfg.held_out]
        held = [p for p in rows if fraction(content(p)) < cfg.held_out]
        if not held or not train:
            if reuse:
                return tuple(rows), tuple(rows)
            distinct = sorted({fraction(content(p)) for p in rows})
            if len(distinct) == 1:
                few = (
                    "1 row, and training and evaluation need one each"
                    if len(rows) == 1
                    else f"{len(rows)} rows with one prompt"
                )
                raise DataError(f"{cfg.data}: {few}; add rows with other prompts, or give task.eval_data")
            side = "training" if held else "evaluation"
            fits = (distinct[0] + distinct[1]) / 2 if held == [] else (distinct[-1] + distinct[-2]) / 2
            what = f"the split by hash leaves no row of {len(rows)} for {side} (task.held_out is {cfg.held_out:g})"
            raise DataError(f"{cfg.data}: {what}; add rows, set task.held_out={fits:.2g}, or give task.eval_data")
    seen = {content(p): p.id for p in train}
    for p in held:
        if content(p) in seen:
            raise DataError(f"{p.id}: the same prompt as the training row {seen[content(p)]}; take one of them out")
    return tuple(train), tuple(held)


def read_all(cfg: DatasetSettings) -> tuple[Problem, ...]:
    """Every problem of `cfg.data`, unsplit.

    Raises:
        DataError: the file or a row is unusable.
    """
    return tuple(_problem(cfg, place, row) for place, row in read_rows(cfg.data, cfg.data_revision))


def fraction(text: str) -> float:
    """A number in 0..1 from a text's hash: the same on every machine and for ever."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:13], 16) / 16**13


def _lines(source: str, data: bytes) -> list[tuple[str, Any]]:
    lines = _numbered(source, data.decode("utf-8-sig").split("\n"))
    return [(place, _parse(place, line, "each line must be one JSON object")) for place, line in lines if line.strip()]


def _json(source: str, data: bytes) -> list[tuple[str, Any]]:
    text = data.decode("utf-8-sig").strip()
    if not text.startswith("["):
        return _lines(source, data)
    return _numbered(source, _parse(source, text, "it must be a list of objects, or one object a line"))


def _csv(source: str, data: bytes) -> list[tuple[str, Any]]:
    reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
    rows = []
    try:
        for row in reader:
            place = f"{source}:{reader.line_num}"
            if None in row or None in row.values():
                raise DataError(f"{place}: not as many values as the header has names; fix that line")
            rows.append((place, row))
    except csv.Error as error:
        raise DataError(f"{source}:{reader.line_num}: broken CSV ({error}); fix that line") from None
    return rows


def _parquet(source: str, data: bytes) -> list[tuple[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{source}: reading Parquet needs pyarrow; pip install 'vpd-mlx[parquet]'") from None
    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(data))
    except (pyarrow.ArrowException, OSError) as error:
        first = str(error).splitlines()[0]
        raise DataError(f"{source}: broken Parquet ({first}); download or write it again") from None
    return _numbered(source, table.to_pylist())


READERS = {".jsonl": _lines, ".json": _json, ".csv": _csv, ".parquet": _parquet}


def _numbered(source: str, rows: Iterable[Any]) -> list[tuple[str, Any]]:
    return [(f"{source}:{number}", row) for number, row in enumerate(rows, 1)]


def _parse(place: str, text: str, needed: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: broken JSON ({error}); {needed}") from None


def _from_hub(source: str, revision: str | None) -> Path:
    """The cached file, downloaded first if necessary."""
    import huggingface_hub  # here, since the import is slow, and local files do not need it

    owner, name, path = source.removeprefix(HUB).split("/", 2)
    name, _, own = name.partition("@")
    try:
        with reaching_hub():
            found = huggingface_hub.hf_hub_download(
                f"{owner}/{name}", path, repo_type="dataset", revision=own or revision
            )
    except (huggingface_hub.errors.HfHubHTTPError, ValueError, OSError) as error:
        raise DataError(f"{source}: {hub_fault(error)}") from None
    return Path(found)


def content(problem: Problem) -> str:
    """What a problem asks, as text to be hashed: its messages, whatever their spacing."""
    return json.dumps([[m["role"], " ".join(m["content"].split())] for m in problem.messages])


def _problem(cfg: DatasetSettings, place: str, row: dict[str, Any]) -> Problem:
    if cfg.prompt not in row:
        has = ", ".join(sorted(map(str, row))) or "none"
        raise DataError(f"{place}: no column {cfg.prompt!r} (columns: {has}); name the right one in task.prompt")
    messages, system = _messages(row[cfg.prompt], place, cfg.prompt), row.get(cfg.system)
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages = ({"role": "system", "content": system.strip()}, *messages)
    answer, reference = row.get(cfg.answer), row.get(cfg.reference)
    for name, value in ((cfg.answer, answer), (cfg.reference, reference)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, str | int | float)):
            raise DataError(f"{place}: column {name!r} is a {type(value).__name__}; it must be text or a number")
        if isinstance(value, float) and not math.isfinite(value):
            raise DataError(f"{place}: column {name!r} is {value}; it must be text or a finite number, or left out")
    file, _, number = place.rpartition(":")
    return Problem(
        id=str(row.get("id", f"{file.rpartition('/')[2]}:{number}")),
        messages=messages,
        answer=None if answer is None else str(answer),
        reference=None if reference is None else str(reference),
        data=row,
    )


def _messages(value: Any, place: str, column: str) -> tuple[Message, ...]:
    if isinstance(value, str) and value.strip():
        return ({"role": "user", "content": value},)
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        texts = [m.get(key) if isinstance(m, dict) else None for m in value for key in ("role", "content")]
        if all(isinstance(text, str) for text in texts) and value[-1]["role"] == "user":
            return tuple({"role": m["role"], "content": m["content"]} for m in value)
    needed = "text that is not empty, or a list of messages with role and content, the last one the user's"
    raise DataError(f"{place}: column {column!r} must be {needed}")
