"""Runs are compared on the problems that they share, and problems are known by what they ask."""

import json
from dataclasses import replace

import pytest

from vpd_mlx.errors import ConfigError
from vpd_mlx.run.folder import load_run
from vpd_mlx.run.pairing import fingerprints, pair_up, refuse_strangers
from vpd_mlx.types import Problem


def problem(name: str, prompt: str, answer: str = "1", **data: object) -> Problem:
    return Problem(name, ({"role": "user", "content": prompt},), answer, data=data)


PROBLEMS = [problem(f"rows.jsonl:{i}", f"{i} + {i}", str(2 * i)) for i in range(1, 5)]


def folder(path, problems, scores, hashes=True):
    """A run folder with one evaluation."""
    path.mkdir()
    (path / "config.yaml").write_text("name: x\nalgorithm: vpd\nsteps: 1\n")
    names = [p.id for p in problems]
    row = {"step": 1, "problems": len(names), "greedy_by_problem": dict(zip(names, scores, strict=True))}
    if hashes:
        row["hash_by_problem"] = dict(zip(names, fingerprints(problems), strict=True))
    (path / "evals.jsonl").write_text(json.dumps(row) + "\n")
    return load_run(path)


def test_a_hash_knows_what_is_asked_and_nothing_else():
    one = PROBLEMS[0]
    system = ({"role": "system", "content": "Be brief."}, *one.messages)
    same = [replace(one, id="elsewhere.jsonl:9"), replace(one, messages=system), replace(one, reference="because")]
    assert {fingerprints([p])[0] for p in [one, *same]} == set(fingerprints([one]))
    others = [
        replace(one, answer="3"),
        replace(one, data={"tests": 1}),
        replace(one, messages=({"role": "user", "content": "1+1"},)),
        replace(one, messages=(*one.messages, {"role": "assistant", "content": "2"}, *one.messages)),
    ]
    assert len({fingerprints([p])[0] for p in [one, *others]}) == 5


def test_a_problem_asked_twice_counts_twice():
    first, second = fingerprints([PROBLEMS[0], replace(PROBLEMS[0], id="again")])
    assert second == f"{first}-2"


def test_values_that_are_no_json_and_half_surrogates_have_a_hash():
    assert fingerprints([problem("a", "\ud800", x=object())]) == fingerprints([problem("b", "\ud800", x=object())])


def test_another_file_in_another_order_gives_the_same_pairs(tmp_path):
    moved = [replace(p, id=f"copy.jsonl:{i}") for i, p in enumerate(reversed(PROBLEMS), 1)]
    found = pair_up(
        folder(tmp_path / "a", PROBLEMS, [1.0, 0.0, 0.0, 1.0]), folder(tmp_path / "b", moved, [1.0, 1.0, 0.0, 0.0])
    )
    assert (found.shared, found.by_name) == (4, False)
    assert (found.difference.better, found.difference.worse) == (1, 1)  # by name it would be 2 and 2


def test_the_same_row_names_of_other_problems_are_refused(tmp_path):
    others = [replace(p, answer="0") for p in PROBLEMS]
    runs = {
        "a": folder(tmp_path / "a", PROBLEMS, [1.0] * 4),
        "b": folder(tmp_path / "b", [*others[:3], PROBLEMS[3]], [0.0] * 4),
        "c": folder(tmp_path / "c", others, [0.0] * 4),
    }
    assert pair_up(runs["a"], runs["b"]).shared == 1
    refuse_strangers({k: runs[k] for k in "ab"})
    with pytest.raises(ConfigError, match=r"none of c's 4 held-out problems is among the 4 of a"):
        refuse_strangers(runs)


def test_a_run_without_hashes_is_paired_by_name_and_one_without_an_evaluation_with_nothing(tmp_path):
    old = folder(tmp_path / "old", PROBLEMS, [1.0] * 4, hashes=False)
    new = folder(tmp_path / "new", PROBLEMS[:2], [0.0] * 2)
    assert (pair_up(old, new).by_name, pair_up(old, new).shared) == (True, 2)
    none = folder(tmp_path / "none", [], [])
    refuse_strangers({"new": new, "none": none})
    assert pair_up(new, none).difference is None
