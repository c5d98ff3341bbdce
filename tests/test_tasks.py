"""Verifiers: right answers score 1, wrong ones 0 with words that give nothing away, and a failing verifier is no score."""

from __future__ import annotations

import importlib
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from vpd_mlx.errors import ConfigError, DataError
from vpd_mlx.recipe import Recipe, load_recipe
from vpd_mlx.tasks import Task, build_task, examine, notices, prove
from vpd_mlx.tasks.answers import boxed, final_answer, in_fence, in_tag
from vpd_mlx.types import Problem, Verdict

SCIKNOWEVAL = Path(__file__).parent / "data" / "sciknoweval.json"


def recipe(folder: Path, task: dict[str, Any], rows: list[dict[str, Any]] | None = None) -> Recipe:
    if rows is not None:
        (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        # The same rows on both sides would be leakage.
        (folder / "eval.jsonl").write_text(json.dumps({**rows[0], "prompt": "held out"}) + "\n")
        task = {"data": "rows.jsonl", "eval_data": "eval.jsonl", **task}
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({"name": "x", "model": "./m", "task": task}))
    return load_recipe(path)


def build(folder: Path, task: dict[str, Any], rows: list[dict[str, Any]] | None = None) -> Task:
    return build_task(recipe(folder, task, rows))


# --- where answers stand


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{4}", "4"),
        (r"\boxed{1}, no, \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{3} and then \boxed{4", "3"),
        (r"\boxed{\boxed{5}}", "5"),
        ("#### 72\n", "72"),
        ("#### 1\n#### 2 \nmore", "2"),
        (r"#### 1 but \boxed{2}", "2"),
        (r"\boxed{}", None),
        ("####", None),
        ("42", None),
    ],
)
def test_final_answers(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


def test_nested_boxes_give_the_inner_one() -> None:
    assert boxed(r"\boxed{a\boxed{b}") == "b"
    assert boxed(r"} \boxed{{a}} {\boxed{b} \boxed{c") == "b"
    assert boxed("\\boxed{" * 50) is None


@pytest.mark.parametrize(
    "text", ["~" * 40_000 + "`", "\\boxed{" * 40_000, "`" * 40_000, "<answer>" * 20_000, " \t" * 40_000]
)
def test_reading_an_answer_takes_linear_time(text: str) -> None:
    start = time.process_time()
    assert [boxed(text), in_fence(text), in_tag(text, "answer"), final_answer(text)] == [None] * 4
    assert time.process_time() - start < 1.0  # 60 ms here; a loop within a loop would take minutes


def test_tags_and_fences_take_the_last() -> None:
    assert in_tag("<answer>A</answer> or <answer> B\n</answer>", "answer") == "B"
    assert in_tag("<think><answer>A</answer></think> so", "answer") is None
    assert in_tag("</answer><answer>", "answer") is None
    assert in_fence("```python\na\n```\ntext\n```\nb\nc\n```") == "b\nc\n"
    assert in_fence("```python\na\n```\n```python\nb") == "a\n"
    assert in_fence("````\n```\nx\n```\n````") == "```\nx\n```\n"
    assert in_fence("  ```py\n  a\n  ```") == "  a\n"
    assert in_fence("<think>```\na\n```</think>no") is None
    assert in_fence("a") is None


# --- mcq


def test_sciknoweval_rows_score_their_letter_and_no_other(tmp_path: Path) -> None:
    task = build(tmp_path, {"kind": "mcq", "data": str(SCIKNOWEVAL), "held_out": 0.3})
    problems = (*task.train, *task.held_out)
    assert len(problems) == 12
    prove(task)
    for problem in problems:
        assert [m["role"] for m in problem.messages] == ["system", "user"]
        reference = task.reference_completion(problem)
        assert reference is not None
        assert task.verify(problem, reference) == Verdict(1.0)
        assert task.verify(problem, f"<reasoning>\nlong\n</reasoning>\n<answer>{problem.answer}</answer>").score == 1.0
        for letter in set("ABCD") - {problem.answer}:
            assert task.verify(problem, f"<answer>\n{letter}\n</answer>") == Verdict(
                0.0, f"{letter} is not the right option."
            )


@pytest.mark.parametrize(
    ("completion", "score", "words"),
    [
        ("<answer>(b).</answer>", 1.0, ""),
        ("B", 0.0, "There is no <answer>"),
        ("<answer>B", 0.0, "There is no <answer>"),
        ("<answer>B: because</answer>", 0.0, "only the letter"),
        ("<answer>A or B</answer>", 0.0, "only the letter"),
        ("<answer></answer>", 0.0, "only the letter"),
        ("<answer>A</answer><answer>B</answer>", 1.0, ""),
    ],
)
def test_mcq_form(tmp_path: Path, completion: str, score: float, words: str) -> None:
    task = build(tmp_path, {"kind": "mcq"}, [{"prompt": "q", "answer": "B"}])
    verdict = task.verify(task.train[0], completion)
    assert verdict.score == score
    assert words in verdict.text


def test_mcq_refuses_rows_without_a_letter(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'Paris' is not a capital letter"):
        build(tmp_path, {"kind": "mcq"}, [{"prompt": "q", "answer": "Paris"}])


# --- math


@pytest.fixture(scope="module")
def maths(tmp_path_factory: pytest.TempPathFactory) -> Task:
    importlib.import_module("math_verify")
    rows = [
        {"prompt": "half", "answer": "1/2"},
        {"prompt": "gsm8k", "answer": "She sells 9 * 2 = 18.\n#### 18"},
        {"prompt": "square", "answer": "$x^2+2x+1$"},
        {"prompt": "big", "answer": "1,000"},
        {"prompt": "set", "answer": r"\{1,2\}", "reference": r"Clearly \boxed{\{2, 1\}}."},
        {"prompt": "ten", "answer": "10"},
        {"prompt": "huge", "answer": "9^{9^{9}}"},
    ]
    return build(tmp_path_factory.mktemp("math"), {"kind": "math", "timeout": 1.0}, rows)


@pytest.mark.parametrize(
    ("row", "completion", "score"),
    [
        (0, r"\boxed{0.5}", 1.0),
        (0, r"\boxed{\frac{1}{2}}", 1.0),
        (0, r"\boxed{\frac{2}{4}}", 1.0),
        (0, r"\boxed{0.51}", 0.0),
        (1, "#### 18", 1.0),
        (1, "#### $18", 1.0),
        (1, r"\boxed{18.0}", 1.0),
        (1, "#### 19", 0.0),
        (1, "18", 0.0),
        (2, r"\boxed{(x+1)^2}", 1.0),
        (2, r"\boxed{(x+1)^3}", 0.0),
        (3, r"\boxed{1000}", 1.0),
        (4, r"\boxed{\{1, 2\}}", 1.0),
        (4, r"\boxed{((((}", 0.0),
        (4, r"\boxed{__import__('os').getpid()}", 0.0),
    ],
)
def test_values_count_and_not_their_form(maths: Task, row: int, completion: str, score: float) -> None:
    verdict = maths.verify(maths.train[row], completion)
    assert (verdict.score, verdict.error) == (score, None)
    answer = final_answer(maths.train[row].answer or "") or maths.train[row].answer
    assert score == 1.0 or str(answer) not in verdict.text.replace(completion, "")


def test_math_proves_its_references(maths: Task) -> None:
    prove(maths)
    assert "not a final answer" not in maths.verify(maths.train[0], "so 1/2").text
    assert "There is no final answer" in maths.verify(maths.train[0], "so 1/2").text


def test_a_monstrous_answer_is_wrong_and_holds_nothing_up(maths: Task) -> None:
    ten, huge = maths.train[5:]
    # The first keeps Python busy, which a signal interrupts; the second one multiplication, which only the kernel ends.
    monsters = [f"\\boxed{{{'-' * 4000}1}}", r"\boxed{9^{9^{9}}}"]
    with ThreadPoolExecutor(4) as pool:
        verdicts = list(pool.map(lambda c: maths.verify(ten, c), [*monsters, r"\boxed{10.0}", r"\boxed{11}"]))
    assert verdicts[:2] == [Verdict(0.0, "The answer takes too long to check.")] * 2
    assert [v.score for v in verdicts[2:]] == [1.0, 0.0]
    verdict = maths.verify(huge, r"\boxed{8^{9^{9}}}")  # the row's own answer is as bad
    assert verdict.error is not None
    assert "took more than 1 s of processor time; the reference of row rows.jsonl:7 fails, too" in verdict.error


def test_the_library_outlives_the_threads_that_call_it(maths: Task) -> None:
    for wrong in ("11", "12"):
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(maths.verify, maths.train[5], f"\\boxed{{{wrong}}}").result().error is None
        time.sleep(0.1)


def test_a_library_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'vpd-mlx\[math\]'"):
        build(tmp_path, {"kind": "math"}, [{"prompt": "q", "answer": "1"}])


# --- regex


def test_regex_by_row_and_for_all(tmp_path: Path) -> None:
    importlib.import_module("regex")
    task = build(tmp_path, {"kind": "regex"}, [{"prompt": "a date", "answer": r"\d{4}-\d\d", "reference": "2024-05"}])
    prove(task)
    assert task.verify(task.train[0], " 2024-05\n").score == 1.0
    assert task.verify(task.train[0], "in 2024-05").score == 0.0
    anywhere = {"kind": "regex", "pattern": "^yes$", "match": "anywhere", "ignore_case": True}
    task = build(tmp_path, anywhere, [{"prompt": "q"}])
    assert task.verify(task.train[0], "well\nYES\n").score == 1.0
    verdict = task.verify(task.train[0], "no")
    assert verdict.score == 0.0
    assert "yes" not in verdict.text


def test_a_text_on_which_a_pattern_backtracks_for_ever_does_not_match(tmp_path: Path) -> None:
    importlib.import_module("regex")
    rows = [{"prompt": "q", "reference": "ab"}, {"prompt": "bad", "reference": "a" * 60}]
    task = build(tmp_path, {"kind": "regex", "pattern": r"(?:a|aa)+$b|ab", "timeout": 0.2}, rows)
    assert task.verify(task.train[0], "a" * 60) == Verdict(0.0, "The answer takes too long to check.")
    assert task.verify(task.train[0], "ab").score == 1.0
    verdict = task.verify(task.train[1], "a" * 50)
    assert verdict.error is not None
    assert "the reference of row rows.jsonl:2 fails, too" in verdict.error


def test_regex_faults(tmp_path: Path) -> None:
    importlib.import_module("regex")
    with pytest.raises(ConfigError, match=r"task\.pattern: '\(' is not a pattern"):
        build(tmp_path, {"kind": "regex", "pattern": "("}, [{"prompt": "q"}])
    with pytest.raises(DataError, match=r"'\[' is not a pattern"):
        build(tmp_path, {"kind": "regex"}, [{"prompt": "q", "answer": "["}])
    with pytest.raises(DataError, match="no column 'answer' with a pattern"):
        build(tmp_path, {"kind": "regex"}, [{"prompt": "q"}])


# --- json-schema

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("completion", "score", "words"),
    [
        ('{"name": "Ada", "age": 36}', 1.0, ""),
        ('Here:\n```json\n{"name": "Ada", "age": 36}\n```\n', 1.0, ""),
        ('{"name": "Ada"}', 0.0, "$: 'age' is a required property"),
        ('{"name": 1, "age": -1}', 0.0, "$.age: -1 is less than the minimum of 0\n$.name: 1 is not of type 'string'"),
        ("{name: Ada}", 0.0, "This is not JSON"),
        ('{"name": "Ada", "age": NaN}', 0.0, "NaN is not a JSON value"),
        ('{"name": "Ada", "age": 1e999}', 0.0, "1e999 is not a JSON value"),
        ('{"name": "\ud800", "age": "\\ud800"}', 0.0, "$.age: '\\ud800' is not of type 'integer'"),
        ("[" * 100_000, 0.0, "This is not JSON"),
        ("", 0.0, "This is not JSON"),
    ],
)
def test_json_must_fit_its_schema(tmp_path: Path, completion: str, score: float, words: str) -> None:
    importlib.import_module("jsonschema")
    task = build(tmp_path, {"kind": "json-schema"}, [{"prompt": "q", "schema": PERSON}])
    verdict = task.verify(task.train[0], completion)
    assert (verdict.score, verdict.error) == (score, None)
    assert words in verdict.text


def test_json_that_exhausts_its_schema_is_wrong(tmp_path: Path) -> None:
    importlib.import_module("jsonschema")
    many = {"type": "array", "uniqueItems": True}
    tree = {"$ref": "#/$defs/n", "$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}}}
    rows = [
        {"prompt": "pattern", "schema": {"pattern": "^(a|aa)+$"}},
        {"prompt": "unique", "schema": many, "reference": "[1, 2]"},
        {"prompt": "deep", "schema": tree},
        {"prompt": "endless", "schema": {"$ref": "#"}},
    ]
    task = build(tmp_path, {"kind": "json-schema", "timeout": 0.5}, rows)
    objects = json.dumps([{"a": i, "b": [i]} for i in range(3000)])
    for problem, text in zip(task.train, (json.dumps("a" * 60 + "b"), objects, "[" * 900 + "]" * 900), strict=False):
        assert task.verify(problem, text) == Verdict(0.0, "The answer takes too long to check."), problem.prompt
    assert task.verify(task.train[1], "[1, 1]").text == "$: [1, 1] has non-unique elements"
    verdict = task.verify(task.train[3], "1")
    assert verdict.error is not None
    assert verdict.error.startswith("the schema cannot be used: RecursionError")
    assert "the reference of row rows.jsonl:4 fails, too" in verdict.error


def test_json_schema_from_a_file_with_answers(tmp_path: Path) -> None:
    importlib.import_module("jsonschema")
    (tmp_path / "person.json").write_text(json.dumps(PERSON))
    rows = [{"prompt": "who", "answer": '{"age": 36.0, "name": "Ada"}'}]
    task = build(tmp_path, {"kind": "json-schema", "schema_file": "person.json"}, rows)
    prove(task)
    assert task.verify(task.train[0], '{"name": "Ada", "age": 36}').score == 1.0
    verdict = task.verify(task.train[0], '{"name": "Bob", "age": 36}')
    assert (verdict.score, "Ada" in verdict.text) == (0.0, False)


def test_json_schema_faults(tmp_path: Path) -> None:
    importlib.import_module("jsonschema")
    for schema, words in (
        ({"type": "thing"}, "not a JSON Schema"),
        (None, "no column 'schema'"),
        ("[1]", "a list is not"),
    ):
        with pytest.raises(DataError, match=words):
            build(tmp_path, {"kind": "json-schema"}, [{"prompt": "q", "schema": schema}])
    with pytest.raises(ConfigError, match=r"task\.schema_file"):
        build(tmp_path, {"kind": "json-schema", "schema_file": "none.json"}, [{"prompt": "q"}])


def test_json_schema_never_fetches(tmp_path: Path) -> None:
    importlib.import_module("jsonschema")
    rows = [{"prompt": "q", "schema": {"$ref": "http://127.0.0.1:9/schema.json"}}]
    task = build(tmp_path, {"kind": "json-schema"}, rows)
    verdict = task.verify(task.train[0], "{}")
    assert verdict.error is not None
    assert "Unresolvable" in verdict.error


# --- reasoning_gym


@pytest.fixture(scope="module")
def gym(tmp_path_factory: pytest.TempPathFactory) -> Task:
    importlib.import_module("reasoning_gym")
    task = {"kind": "reasoning_gym", "name": "countdown", "settings": {"max_numbers": 4}, "rows": 30, "held_out": 0.3}
    return build(tmp_path_factory.mktemp("gym"), task)


def test_gym_proves_its_references_and_splits_by_hash(gym: Task, tmp_path: Path) -> None:
    prove(gym)
    more = build(tmp_path, {"kind": "reasoning_gym", "name": "countdown", "settings": {"max_numbers": 4}, "rows": 60,
                            "held_out": 0.3})  # fmt: skip
    assert {p.prompt for p in gym.held_out} <= {p.prompt for p in more.held_out}
    assert not {p.prompt for p in more.held_out} & {p.prompt for p in more.train}


def test_gym_uses_the_librarys_scorer(gym: Task) -> None:
    problem = gym.train[0]
    assert gym.verify(problem, "1 + 1").text == "There is no <answer>...</answer>."
    wrong = gym.verify(problem, "<answer>1 + 1</answer>")
    assert 0 < wrong.score < 1  # this scorer gives a little for form
    turned = f"<answer>({problem.answer}) * 1 * 1</answer>"
    assert gym.verify(problem, turned).error is None


def test_gym_part_marks_can_be_left_aside(tmp_path: Path) -> None:
    importlib.import_module("reasoning_gym")
    task = {"kind": "reasoning_gym", "name": "countdown", "rows": 20, "held_out": 0.3, "partial_credit": False}
    strict = build(tmp_path, task)
    problem = strict.train[0]
    assert strict.verify(problem, "<answer>1 + 1</answer>").score == 0.0
    assert strict.verify(problem, f"<answer>{problem.answer}</answer>").score == 1.0


@pytest.mark.parametrize(
    "answer",
    [
        "__import__('os').system('x')",
        "exec('raise SystemExit')",
        "[e for e in [eval, 1]][0]",
        "(lambda: 1)()",
        "().mro()",
        "getattr (1, 'x')",
    ],
)
def test_gym_runs_no_code_from_an_answer(gym: Task, answer: str) -> None:
    verdict = gym.verify(gym.train[0], f"<answer>{answer}</answer>")
    assert verdict.score == 0.0
    assert verdict.error is not None or "code" in verdict.text


def test_gym_survives_its_scorer(gym: Task) -> None:
    gym._checker.close()  # type: ignore[attr-defined]
    prove(gym)


def test_gym_faults(tmp_path: Path) -> None:
    importlib.import_module("reasoning_gym")
    with pytest.raises(ConfigError, match=r"'chess' is not a task of reasoning-gym; use one of .*countdown"):
        build(tmp_path, {"kind": "reasoning_gym", "name": "chess"})
    with pytest.raises(ConfigError, match=r"task\.settings: .* refused by countdown"):
        build(tmp_path, {"kind": "reasoning_gym", "name": "countdown", "settings": {"numbers": 3}})
    with pytest.raises(DataError, match=r"leave none to evaluate on; raise task\.rows"):
        build(tmp_path, {"kind": "reasoning_gym", "name": "countdown", "rows": 1, "held_out": 0.01})


# --- what all have in common


class Fake:
    """A task of one problem."""

    train = (Problem("p", ({"role": "user", "content": "q"},), "a"),)
    held_out = ()

    def __init__(self, verdict: Verdict) -> None:
        self.verdict = verdict

    def verify(self, problem: Problem, completion: str) -> Verdict:
        return self.verdict

    def reference_completion(self, problem: Problem) -> str | None:
        return problem.answer


class Examined(Fake):
    def evaluate(self, problem: Problem, completion: str) -> Verdict:
        return Verdict(0.0, "private")


def test_examine_and_prove_use_evaluate_where_a_task_has_it() -> None:
    plain, own = Fake(Verdict(1.0)), Examined(Verdict(1.0))
    assert examine(plain, plain.train[0], "a").score == 1.0
    assert examine(own, own.train[0], "a") == Verdict(0.0, "private")
    prove(plain)
    with pytest.raises(DataError, match=r"scores 0, not 1 \(private\)"):
        prove(own)
    with pytest.raises(DataError, match="the verifier failed on the reference answer 'a': broken"):
        prove(Fake(Verdict(0.0, error="broken")))
    assert notices(plain) == ()
