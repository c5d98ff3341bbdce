"""Bad data and bad verifiers, by the hundred: a named fault with its place, or rows that can be used. Never a traceback."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vpd_mlx.errors import VpdError
from vpd_mlx.recipe import load_recipe
from vpd_mlx.tasks import build_task
from vpd_mlx.tasks.own_process import as_verdict

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
cells = st.recursive(scalars, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=6), x, max_size=3))
rows = st.dictionaries(st.sampled_from(["prompt", "answer", "reference", "system", "id", "x"]), cells, max_size=5)
lines = st.one_of(rows.map(json.dumps), cells.map(lambda x: json.dumps(x)), st.text(max_size=40))
quiet = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def load(folder, text: bytes, kind: str):
    (folder / "rows.jsonl").write_bytes(text)
    (folder / "judge.py").write_text("def verify(problem, completion): return 1.0\n")
    recipe = folder / "recipe.yaml"
    verifier = ", verifier: judge.py" if kind == "python" else ""
    recipe.write_text(f"name: x\nmodel: ./m\ntask: {{kind: {kind}, data: rows.jsonl, held_out: 0.5{verifier}}}\n")
    return build_task(load_recipe(recipe))


def named_or_usable(folder, text: bytes, kind: str) -> None:
    try:
        task = load(folder, text, kind)
    except VpdError as error:
        found = error
    else:
        assert task.train
        assert task.held_out
        for p in (*task.train, *task.held_out):
            assert p.id
            assert p.prompt.strip() or len(p.messages) > 1 or p.prompt == ""
        return
    assert found.exit_code == 2
    message = str(found)
    assert "rows.jsonl" in message
    assert len(message.splitlines()) == 1
    assert any(word in message for word in ("; ", " must ", " needs ")), message  # what helps


@quiet
@given(st.lists(lines, max_size=6), st.sampled_from(["exact", "python", "math", "mcq", "regex"]))
def test_any_lines(tmp_path, parts, kind):
    named_or_usable(tmp_path, "\n".join(parts).encode("utf-8", "surrogatepass"), kind)


@quiet
@given(st.binary(max_size=80))
def test_any_bytes(tmp_path, data):
    named_or_usable(tmp_path, data, "exact")


@settings(max_examples=200, deadline=None)
@given(cells | st.tuples(cells, cells) | st.tuples(st.floats(), st.text(max_size=5)))
def test_any_verdict_is_a_score_or_the_verifiers_own_failure(result):
    verdict = as_verdict(result)
    if verdict.error is None:
        assert 0.0 <= verdict.score <= 1.0
    else:
        assert repr(result)[:10] in verdict.error or "returned" in verdict.error


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf, -0.1, 1.1, "1", None])
def test_a_score_that_is_none_never_counts_as_zero(score):
    assert as_verdict(score).error is not None
    assert as_verdict((score, "words")).error is not None
