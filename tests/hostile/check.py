"""Every hostile program alone, under all layers of the sandbox and with layers taken away. Fails if a promise is broken.

PYTHONPATH=tests python tests/hostile/check.py            # takes minutes; writes the table in docs/sandbox.md
PYTHONPATH=tests python tests/hostile/check.py --dry      # leaves the page alone
"""

from __future__ import annotations

import argparse
import glob
import sys
import tempfile
import time
from pathlib import Path

from arena import LIMITS, Arena, arena, attack, forge, kept, one, patient
from attacks import ALONE, FORGED, FRAMED, QUICK

from vpd_mlx.sandbox import Sandbox
from vpd_mlx.sandbox.layers import PROMISES

PAGE = Path(__file__).parents[2] / "docs" / "sandbox.md"
BEGIN, END = "<!-- table by make hostile-test -->\n", "<!-- end of table -->\n"
WITHOUT: list[tuple[str, ...]] = [
    (),
    ("userid",),
    ("namespaces", "userid"),
    ("landlock",),
    ("seccomp",),
    ("userid", "landlock", "seccomp"),
    ("namespaces", "userid", "landlock"),
    ("namespaces", "userid", "seccomp"),
]
LONGEST = 120  # seconds: the start of a process on a busy machine, the time limit, and the end
HARMLESS = ("network", "kernel")  # to try where they are not prevented, for the short attacks


def programs(promise: str) -> dict[str, str]:
    """All programs that would break a promise."""
    short = {name: one(name, source) for name, source in QUICK.get(promise, {}).items()}
    return {**ALONE.get(promise, {}), **short}


def row(without: tuple[str, ...], place: Arena) -> tuple[str, list[str]]:
    """One row of the table, and what went wrong."""
    box = Sandbox(LIMITS, without=without, packages=[str(place.files[2].parent)])
    calm, cells, wrong = patient(box), {}, []
    for promise in HARMLESS:
        if promise not in kept(box):
            tried = {name: one(name, source) for name, source in QUICK[promise].items()}
            through = sum(a.harmed for a in attack(calm, tried, place.words))
            cells[promise] = f"no: {through} of {len(tried)}"
    before, folders = place.state(), set(glob.glob(f"{tempfile.gettempdir()}/vpd-sandbox-*"))
    started = time.monotonic()
    for promise in ("limits", *kept(box)):
        attacks = attack(box if promise == "limits" else calm, programs(promise), place.words)
        wrong += [f"{a.name}: {a.result}" for a in attacks if a.harmed]
        wrong += [f"{a.name} took {a.seconds:.0f} s" for a in attacks if a.seconds > LONGEST]
        cells[promise] = f"yes: 0 of {len(attacks)}"
    scores = forge(box, place.words, {**FORGED, **FRAMED})
    wrong += [f"{name} scores: {passed}" for name, passed in scores.items() if any(passed)]
    cells["scores"] = f"0 of {len(scores)}"
    time.sleep(max(0, started + 4.5 - time.monotonic()))  # when a daemon would have struck
    after = place.state()
    wrong += [
        f"changed: {what}: {before[what]} {after.get(what)}" for what in before if before[what] != after.get(what)
    ]
    wrong += [f"left behind: {path}" for path in set(glob.glob(f"{tempfile.gettempdir()}/vpd-sandbox-*")) - folders]
    names = ", ".join(box.abilities.layers)
    columns = [cells.get(promise, "no") for promise in (*PROMISES, "limits", "scores")]
    return f"| {names} | {' | '.join(columns)} |", [f"{names}: {what}" for what in wrong]


def main() -> int:
    """Fill the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    lines = [f"| layers | {' | '.join(PROMISES)} | limits | scores |", "|---" * (len(PROMISES) + 3) + "|"]
    faults: list[str] = []
    with tempfile.TemporaryDirectory(prefix="vpd-hostile-") as own, arena() as place:
        Path(own).chmod(0o711)  # programs with a user id of their own pass through it
        tempfile.tempdir = own  # where no other run leaves its folders
        for without in WITHOUT:
            line, wrong = row(without, place)
            print("\n".join([line, *wrong]), flush=True)
            lines.append(line)
            faults += wrong
    if not faults and not args.dry:
        text = PAGE.read_text()
        head, tail = text.split(BEGIN)[0], text.split(END)[1]
        PAGE.write_text(head + BEGIN + "\n".join(dict.fromkeys(lines)) + "\n" + END + tail)
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
