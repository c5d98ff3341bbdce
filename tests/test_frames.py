"""Frames of the result pipe are read as hostile. `make fuzz` reads a million of them."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from attacks import FRAMES
from fuzz.frames import LIMIT, fuzz, read

from vpd_mlx.sandbox.child import decode, encode
from vpd_mlx.sandbox.frames import Report, read_call, read_report, read_value
from vpd_mlx.sandbox.results import Failure


def test_ten_thousand_fuzzed_frames() -> None:
    values, longest = fuzz(10_000, seed=0)
    assert 1_000 < values < 9_000
    assert longest < LIMIT


@pytest.mark.parametrize("name", FRAMES)
def test_known_frames(name: str) -> None:
    assert read(FRAMES[name][1:]) == (name in ("half a surrogate", "huge hexadecimal"))


@pytest.mark.parametrize("depth", [100, 101])
def test_what_is_written_is_read_to_the_same_depth(depth: int) -> None:
    value: Any = 1
    for _ in range(depth):
        value = {"k": value}
    if depth > 100:
        with pytest.raises(TypeError, match="nested too deeply"):
            encode(value)
        return
    got = read_value(json.dumps(encode(value)).encode())
    assert got.equals(value)
    assert decode(got.encoded) == value


def test_calls_and_reports() -> None:
    assert read_call(b'["f", [1, {"t": [2]}], {"k": null}]') == ("f", [1, {"t": [2]}], {"k": None})
    assert read_report(b'{"ok": true}') == Report()
    why = Failure("ValueError", "no", 3)
    text = '{"ok": false, "why": "ValueError\\u00003\\u0000no", "called": true, "at": ["<test>", 1]}'
    assert read_report(text.encode()) == Report(why, ("<test>", 1), True)
    for body in (
        '["f", [1]]',
        "[1, [], {}]",
        '["f", {}, []]',
        '["f", [{"q": 1}], {}]',
        '{"ok": 1}',
        '{"ok": true, "x": 1}',
    ):
        for reader in (read_call, read_report):
            with pytest.raises(ValueError, match=r"not a|nested"):
                reader(body.encode())


def test_members_that_must_be_searched_take_no_time() -> None:
    members = ",".join(f'{{"z":[{n}]}}' for n in range(3000))
    got = read_value(f'{{"s":[{members}]}}'.encode())
    start = time.process_time()
    assert not got.equals(set(range(3000)))
    assert time.process_time() - start < 2 * LIMIT
