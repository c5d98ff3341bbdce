"""Rows from files of every kind, columns, the split that never moves, and leakage."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vpd_mlx.errors import ConfigError, DataError
from vpd_mlx.recipe import load_recipe
from vpd_mlx.tasks.data import read_rows, read_split
from vpd_mlx.tasks.exact import ExactSettings

ROWS: list[dict[str, Any]] = [{"prompt": f"question {i}", "answer": f"a{i}"} for i in range(40)]


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n\n" for r in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".csv":
        path.write_text("prompt,answer\n" + "".join(f'"{r["prompt"]}",{r["answer"]}\n' for r in rows))
    else:
        pyarrow = importlib.import_module("pyarrow")
        parquet = importlib.import_module("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"rows{suffix}")
    assert [row for _, row in read_rows(str(path))] == ROWS
    train, held = read_split(ExactSettings(kind="exact", data=str(path)))
    assert {p.prompt for p in (*train, *held)} == {r["prompt"] for r in ROWS}
    assert {p.prompt: p.answer for p in train}[train[0].prompt] == "a" + train[0].prompt.split()[1]


def test_json_may_hold_an_object_a_line(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl").rename(tmp_path / "rows.json")
    assert [row for _, row in read_rows(str(path))] == ROWS


def test_the_split_does_not_move_when_rows_are_added(tmp_path: Path) -> None:
    def held(rows: list[dict[str, Any]]) -> set[str]:
        return {
            p.prompt for p in read_split(ExactSettings(kind="exact", data=str(write(tmp_path / "r.jsonl", rows))))[1]
        }

    some, more = held(ROWS[:30]), held(ROWS)
    assert some == more & {r["prompt"] for r in ROWS[:30]}
    assert held(ROWS[::-1]) == more


def test_leakage_is_refused_through_white_space(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl")
    test = write(tmp_path / "test.csv", [{"prompt": " question  7 ", "answer": "x"}])
    with pytest.raises(DataError, match=r"test\.csv:2: the same prompt as the training row train\.jsonl:15"):
        read_split(ExactSettings(kind="exact", data=str(train), eval_data=str(test)))


def test_columns_are_mapped_and_messages_kept(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    rows = [
        {"chat": messages, "gold": 7, "solution": "s", "sys": "be brief"},
        {"chat": "plain", "gold": "x", "id": "mine"},
    ]
    cfg = ExactSettings(
        kind="exact", data=str(write(tmp_path / "rows.jsonl", rows)), prompt="chat", answer="gold", reference="solution",
        system="sys", eval_data=str(write(tmp_path / "e.jsonl", [{"chat": "other", "gold": "y"}])),
    )  # fmt: skip
    (first, second), _ = read_split(cfg)
    assert [m["role"] for m in first.messages] == ["system", "user", "assistant", "user"]
    assert (first.answer, first.reference, first.prompt) == ("7", "s", "c")
    assert (second.id, second.answer) == ("mine", "x")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("r.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "r.jsonl:2: broken JSON"),
        ("r.jsonl", b"[1]\n", "r.jsonl:1: a list, not an object"),
        ("r.jsonl", b"\n", "no rows"),
        ("r.jsonl", b"\xff\xfe", "not UTF-8"),
        ("r.json", b"[1, 2", "broken JSON"),
        ("r.json", b'[{"prompt": "a"}, 3]', "r.json:2: a int, not an object"),
        ("r.csv", b"prompt,answer\na,b,c\n", "r.csv:2: not as many values"),
        ("r.csv", b"prompt,answer\na\n", "r.csv:2: not as many values"),
        ("r.csv", b'prompt,answer\n"a,b\n', "broken CSV"),
        ("r.parquet", b"not parquet", "broken Parquet"),
        ("r.txt", b"a", "cannot tell what is in a .txt file"),
        (
            "r.jsonl",
            b'{"question": "a"}\n',
            "no column 'prompt' (columns: question); name the right one in task.prompt",
        ),
        ("r.jsonl", b'{"prompt": ""}\n', "must be text that is not empty"),
        ("r.jsonl", b'{"prompt": "a", "answer": ["b"]}\n', "column 'answer' is a list"),
        ("r.jsonl", b'{"prompt": "a", "answer": "b"}\n', "1 row, and training and evaluation need one each"),
    ],
)
def test_faults_name_the_place(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    if name.endswith("parquet"):
        importlib.import_module("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_split(ExactSettings(kind="exact", data=str(tmp_path / name)))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such data file"):
        read_rows(str(tmp_path / "none.jsonl"))


def test_parquet_without_its_library_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "r.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"vpd-mlx\[parquet\]"):
        read_rows(str(tmp_path / "r.parquet"))


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def in_hub_process(cache: Path, code: str) -> str:
    """What `code` prints in a process that is offline and has this cache: both are read once, at import."""
    env = {**os.environ, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    code = f"from vpd_mlx.tasks.data import *\nfrom vpd_mlx.errors import *\n{code}"
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout


def test_hub_files_come_from_the_cache_at_their_revision(tmp_path: Path) -> None:
    repo = tmp_path / "hub" / "datasets--someone--numbers"
    for commit, name in ((COMMIT, "old"), (COMMIT[::-1], "new")):
        folder = repo / "snapshots" / commit / "data"
        folder.mkdir(parents=True)
        (folder / "rows.jsonl").write_text(json.dumps({"prompt": name}) + "\n")
    (repo / "refs").mkdir()
    (repo / "refs" / "v2").write_text(COMMIT[::-1])
    code = "\n".join(
        [
            f"print(read_rows('hf://someone/numbers@{COMMIT}/data/rows.jsonl')[0])",
            "print(read_rows('hf://someone/numbers/data/rows.jsonl', 'v2')[0][1])",
            "for path in ('hf://someone/numbers@v3/data/rows.jsonl', 'hf://someone/else@v2/rows.jsonl'):",
            "    try: read_rows(path)",
            "    except DataError as error: print(error)",
        ]
    )
    old, new, *missing = in_hub_process(tmp_path, code).splitlines()
    assert old == str((f"hf://someone/numbers@{COMMIT}/data/rows.jsonl:1", {"prompt": "old"}))
    assert new == str({"prompt": "new"})
    assert len(missing) == 2
    assert all("it is not in the cache, and the hub cannot be reached" in line for line in missing)


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("data: hf://a/b/c.jsonl", "task.data: 'hf://a/b/c.jsonl' is not pinned"),
        ("data: hf://a/b", "does not name a file of a data set"),
        ("data: hf://a/b@main/", "does not name a file of a data set"),
        ("data: x.jsonl, data_revision: main", "task.data_revision: no hf:// file"),
        ("data: hf://a/b@main/c.jsonl, data_revision: main", "task.data_revision: no hf:// file"),
    ],
)
def test_hub_files_must_be_pinned(tmp_path: Path, task: str, words: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"name: x\nmodel: ./m\ntask: {{kind: exact, {task}}}\n")
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert words in str(caught.value)


def test_hub_paths_are_left_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "name: x\nmodel: ./m\ntask: {kind: exact, data: hf://a/b/c.jsonl, eval_data: e.csv, data_revision: v1}\n"
    )
    task = load_recipe(path).task
    assert isinstance(task, ExactSettings)
    assert task.data == "hf://a/b/c.jsonl"
    assert task.eval_data == str(tmp_path / "e.csv")
