"""Fuzzed frames of the result pipe: whatever a program writes there, the trainer's side raises ValueError or takes it, and soon.

PYTHONPATH=tests python tests/fuzz/frames.py --frames 1000000 --seed 0
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from typing import Any

from attacks import FRAMES

from vpd_mlx.sandbox import Value
from vpd_mlx.sandbox.child import decode, encode
from vpd_mlx.sandbox.frames import read_call, read_report, read_value
from vpd_mlx.sandbox.results import Failure, show_arguments

LIMIT = 1.0  # seconds of CPU for one frame of up to 250 kB: read three times, compared 34 times, shown and written
OURS: list[Any] = [
    None, True, 0, 2**70, 1.5, math.inf, "é", b"\x00", 1 + 2j, [1, [2]], (1, (2,)), {1, (2, 3)}, frozenset({frozenset({1})}),
    {1: [2], "k": {(1,): None}}, list(range(100)), {i: str(i) for i in range(50)},
    set(range(3000)),
]  # fmt: skip
PIECES = [
    *'{}[]",:0123456789-.eE+ \\', '{"t":[', '{"d":[[', '{"i":"0x', '{"c":[', '{"f":"', '{"s":[', '{"z":[', '{"b":"', "]}", "]]}",
    '"}', "null", "true", "NaN", "Infinity", "1e999", "-0.0", '"\\ud800"', "\x00", "\xff", "0x", "nan", "inf", '"ok"', '"why"',
    '"called"', '"at"', '{"o":["x",true]}', "[" * 200, "]" * 200, "9" * 400, "f" * 300, '{"t":[' * 120, "]}" * 120,
]  # fmt: skip


def plain(rng: random.Random, depth: int = 0) -> Any:
    """A plain value."""
    kind = rng.randrange(7 if depth > 3 else 13)
    if kind < 7:
        numbers = [
            rng.getrandbits(rng.choice((3, 60, 400))),
            rng.uniform(-9, 9),
            float(rng.choice(("inf", "nan", "-0.0"))),
        ]
        return rng.choice(
            [*numbers, None, rng.random() < 0.5, rng.randbytes(3), rng.choice("aé\ud800\x00"), complex(1, -2)]
        )
    parts = [plain(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 12:
        return {repr(p): p for p in parts}
    return {7: list, 8: tuple, 9: list}.get(
        kind, lambda x: {repr(p) for p in x} if kind == 10 else frozenset(map(repr, x))
    )(parts)


def frame(rng: random.Random) -> bytes:
    """A frame's body: a good one, a bad one that is known, or one made of pieces; most of them damaged."""
    if rng.random() < 0.001:
        item = json.dumps(encode(plain(rng)))
        many = ",".join([item] * (250_000 // (len(item) + 1)))
        return (
            rng.choice(('{"t":[%s]}', '{"s":[%s]}', '{"d":[[1,[%s]]]}', '["f",[%s],{}]', "[%s", "%s"))
            .replace("%s", many)
            .encode()
        )
    kind = rng.randrange(5)
    if kind == 0:
        return rng.choice(list(FRAMES.values()))[1:]
    if kind == 1:
        return "".join(rng.choices(PIECES, k=rng.randrange(1, 14))).encode("utf-8", "surrogatepass")
    value: Any = encode(plain(rng))
    if kind == 2:
        value = rng.choice(
            [["f", [value, value], {"k": value}], {"ok": True}, {"ok": False, "why": "E\0007\0m", "called": True}]
        )
        if isinstance(value, dict) and not value["ok"]:
            value["at"] = rng.choice([["<test>", 3], [3, "<test>"], [], None, ["<test>", 1e9]])
    body = bytearray(json.dumps(value).encode())
    for _ in range(rng.choice((0, 0, 1, 2, 5))):
        at = rng.randrange(len(body) + 1)
        piece = rng.choice(
            (rng.randbytes(1), rng.choice(PIECES).encode("utf-8", "surrogatepass"), body[at : at + 9] * 3)
        )
        body[at : at + rng.randrange(3)] = piece
    return bytes(body)


def read(body: bytes) -> bool:
    """All that the trainer's side does with a frame. Returns whether it was a value."""
    got: Value | None = None
    for reader in (read_value, read_call, read_report):
        try:
            parsed = reader(body)
        except ValueError:
            continue
        if isinstance(parsed, Value):
            got = parsed
        elif isinstance(parsed, tuple):
            show_arguments(*parsed[1:])
    failure = Failure.parse(body)
    assert failure.kind.isidentifier()
    assert len(str(failure)) < 4200
    if got is None:
        return False
    for ours in OURS:
        got.equals(ours)
        got.equals(ours, tuples_as_lists=True)
    assert isinstance(str(got), str)
    json.dumps(got.encoded)
    if got.opaque is None:
        decode(got.encoded)
    return True


def fuzz(frames: int, seed: int) -> tuple[int, float]:
    """Read so many frames; returns how many were values, and the longest time for one in seconds of CPU."""
    rng = random.Random(seed)
    values, longest = 0, 0.0
    for number in range(frames):
        body = frame(rng)
        start = time.process_time()
        try:
            values += read(body)
        except Exception as error:
            raise AssertionError(f"seed {seed}, frame {number}: {body[:200]!r}") from error
        longest = max(longest, time.process_time() - start)
    return values, longest


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    begun = time.process_time()
    values, longest = fuzz(args.frames, args.seed)
    spent = time.process_time() - begun
    print(
        f"{args.frames:,} frames, {values:,} of them values, no exception; longest {longest * 1000:.1f} ms, all {spent:.0f} s"
    )
    sys.exit(longest > LIMIT)
