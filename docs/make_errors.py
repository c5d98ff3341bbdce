"""Write docs/errors.md: wrong inputs, and the line that each prints.

python docs/make_errors.py            # writes it
python docs/make_errors.py --check    # fails if it is not up to date
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import sys
import tempfile
from pathlib import Path

import huggingface_hub.constants

from vpd_mlx.commands.app import main as command
from vpd_mlx.recipe import builtin_recipes

HERE = Path(__file__).parent
MODEL = builtin_recipes()["quickstart"].parent / "model"
ROWS = "".join(f'{{"prompt": "{a}+11=", "answer": "{a + 11}"}}\n' for a in range(11, 31))
RECIPE = "name: mine\nmodel: MODEL\nsteps: 1\ntask: {kind: exact, data: rows.jsonl}\n"
OWN = RECIPE.replace("kind: exact", "kind: python, verifier: judge.py, timeout: 0.5")
TRAIN = "train mine.yaml"

Case = tuple[str, str, dict[str, str]]


def recipe(what: str, extra: str) -> Case:
    """A recipe with these lines more."""
    return f"`{what}`", TRAIN, {"mine.yaml": RECIPE + extra}


def rows(what: str, text: str, task: str = "data: rows.jsonl") -> Case:
    """A recipe with these rows."""
    return what, TRAIN, {"rows.jsonl": text, "mine.yaml": RECIPE.replace("data: rows.jsonl", task)}


def judge(what: str, source: str) -> Case:
    """A recipe with this verifier."""
    return what, TRAIN, {"mine.yaml": OWN, "judge.py": source}


def typed(line: str, **files: str) -> Case:
    """A command line."""
    return "", line, {name.replace("_", "."): text for name, text in files.items()}


SERVER = "feedback: {{sources: [server], server: {{url: '{}'}}}}\n"
CASES: dict[str, list[Case]] = {
    "The command line": [
        typed("trian"),
        typed("train --learning-rate 1e-3"),
        typed("train --num-generations 8"),
        typed("train --lora-alpha 16"),
        typed("train --step 5"),
        typed("train --config mine.yaml"),
        typed("train --mask-prompt"),
        typed("plan --iters 5"),
        typed("train --steps x"),
        typed("train --steps"),
        typed("train --steps 0"),
        typed("train --lr 0"),
        typed("train --algorithm vdp"),
        typed("train --name a/b"),
        typed("train mine.yaml rows.jsonl"),
        typed("train --set steps"),
        typed("train --set rollout.promts=3"),
        typed("train --set steps.deep=1"),
        typed("train --set rollout=3"),
        typed("train --data rows.jsonl"),
        typed("train quickstart --data rows.jsonl"),
        typed("train mine.yaml --verifier judge.py"),
        typed("eval"),
        typed("eval quickstart --samples 0"),
        typed("eval quickstart --greedy --samples 4"),
        typed("eval quickstart --temperature 0"),
        typed("export runs/first --to ggml"),
        typed("export runs/first --to hub"),
        typed("export runs/first --to peft --bits 4"),
        typed("verify -r mine.yaml --text 22 --completion answer.txt"),
        typed("verify -r mine.yaml --problem 7"),
        typed("verify -r mine.yaml --completion nowhere.txt"),
        typed("new 'a b'"),
        typed("new taken"),
        typed("new mine --task chess"),
        typed("new mine --task math"),
        typed("new mine --model ./nowhere"),
    ],
    "Places": [
        typed("train quickstrat"),
        typed("train taken"),
        typed("train nothing.yaml"),
        typed("train --model ./nowhere"),
        typed("train --model nobody/nothing"),
        typed("train --model one/two/three"),
        typed("train --adapter nowhere"),
        typed("train --out rows.jsonl"),
        typed("train --out rows.jsonl/run"),
        typed("train --out taken"),
        typed("train --out taken --overwrite"),
        typed("train --resume runs/nope"),
        typed("train --resume runs/first --out other"),
        typed("eval runs/nope"),
        typed("eval runs/frist"),
        typed("try runs/nope 1+1="),
        typed("report runs/nope"),
        typed("compare runs/first runs/nope"),
    ],
    "The recipe": [
        ("an empty file", TRAIN, {"mine.yaml": ""}),
        ("a list", TRAIN, {"mine.yaml": "- name: mine\n"}),
        ("an open bracket", TRAIN, {"mine.yaml": RECIPE + "feedback: {sources: [sibling}\n"}),
        ("a tab", TRAIN, {"mine.yaml": "name: mine\n\tmodel: x\n"}),
        ("a key twice", TRAIN, {"mine.yaml": RECIPE + "name: other\n"}),
        ("no task", TRAIN, {"mine.yaml": "name: mine\nmodel: MODEL\n"}),
        ("no model", TRAIN, {"mine.yaml": RECIPE.replace("model: MODEL\n", "")}),
        ("`task: {kind: chess}`", TRAIN, {"mine.yaml": "name: mine\nmodel: MODEL\ntask: {kind: chess}\n"}),
        recipe("version: 99", "version: 99\n"),
        recipe("step: 5", "step: 5\n"),
        (("`steps: 1.5`"), TRAIN, {"mine.yaml": RECIPE.replace("steps: 1", "steps: 1.5")}),
        recipe("thinking: maybe", "thinking: maybe\n"),
        recipe("on_collapse: stp", "on_collapse: stp\n"),
        recipe("description: [a]", "description: [a]\n"),
        recipe("optimizer: {learning_rate: .inf}", "optimizer: {learning_rate: .inf}\n"),
        recipe("optimizer: {beta1: 1}", "optimizer: {beta1: 1}\n"),
        recipe("lora: {keys: q_proj}", "lora: {keys: q_proj}\n"),
        recipe("preset: papr", "preset: papr\n"),
        recipe("rollout: {group_size: 1}", "rollout: {group_size: 1}\nfeedback: {sources: [sibling]}\n"),
        recipe("memory: {micro_batch_tokens: 100}", "memory: {micro_batch_tokens: 100}\n"),
        recipe("feedback: {sources: verifier}", "feedback: {sources: verifier}\n"),
        recipe("feedback: {sources: [siblin]}", "feedback: {sources: [siblin]}\n"),
        recipe("feedback: {sources: []}", "feedback: {sources: []}\n"),
        recipe("feedback: {sources: [server]}", "feedback: {sources: [server]}\n"),
        recipe("feedback: {max_tokens: 4000}", "feedback: {max_tokens: 4000}\n"),
        recipe("server: {url: localhost}", SERVER.format("localhost")),
        recipe("server: {url: http://127.0.0.1:9}", SERVER.format("http://127.0.0.1:9")),
        recipe("templates: sdop", "templates: sdop\n"),
        recipe("templates: {verifier: '{prompt}'}", "templates: {verifier: '{prompt}'}\n"),
        recipe("templates: {verifier: '{prompt} {contxt}'}", "templates: {verifier: '{prompt} {contxt} {context}'}\n"),
        recipe("warm_start: {data: rows.jsonl}", "warm_start: {data: rows.jsonl}\n"),
        recipe("evaluation: {patience: 2}", "evaluation: {patience: 2, keep_best: false}\n"),
    ],
    "Rows": [
        rows("no such file", "", "data: nowhere.jsonl"),
        rows("a `.txt` file", "", "data: rows.txt"),
        rows("an empty file", ""),
        rows("a broken line", ROWS + '{"prompt": "1+1=",\n'),
        rows("a list in a line", ROWS + "[1, 2]\n"),
        rows("another column", '{"question": "1+1=", "answer": "2"}\n'),
        rows("an empty prompt", ROWS + '{"prompt": " ", "answer": "2"}\n'),
        rows("no answer", ROWS + '{"prompt": "1+1="}\n'),
        rows("an answer that is a list", ROWS + '{"prompt": "1+1=", "answer": ["2"]}\n'),
        rows("20 equal prompts", '{"prompt": "1+1=", "answer": "2"}\n' * 20),
        rows("one row", '{"prompt": "1+1=", "answer": "2"}\n'),
        rows("`held_out: 0.001`", ROWS, "data: rows.jsonl, held_out: 0.001"),
        rows("the training rows as `eval_data`", ROWS, "data: rows.jsonl, eval_data: rows.jsonl"),
        rows("`hf://` without a revision", "", "data: hf://owner/name/rows.jsonl"),
        rows("`hf://` without a network", "", "data: hf://owner/name@main/rows.jsonl"),
    ],
    "The verifier": [
        ("no such file", TRAIN, {"mine.yaml": OWN}),
        judge("a syntax error", "def verify(problem, completion)\n    return 1.0\n"),
        judge("another name", "def verfy(problem, completion):\n    return 1.0\n"),
        judge("one argument", "def verify(completion):\n    return 1.0\n"),
        judge("an exception", "def verify(problem, completion):\n    return 1 / 0\n"),
        judge("a score of 2", "def verify(problem, completion):\n    return 2\n"),
        judge("no result", "def verify(problem, completion):\n    pass\n"),
        judge("0 for the right answer", "def verify(problem, completion):\n    return 0.0, 'no'\n"),
        judge("too slow", "import time\ndef verify(problem, completion):\n    time.sleep(9)\n"),
    ],
}


def printed(case: Case, folder: Path) -> tuple[str, int]:
    """(what a command prints on standard error, its exit code) in a folder with the case's files."""
    files = {
        "mine.yaml": RECIPE,
        "rows.jsonl": ROWS,
        "taken/notes.txt": "",
        "runs/first/config.yaml": RECIPE,
        **case[2],
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text.replace("MODEL", str(MODEL)), encoding="utf-8")
    before, argv, error = Path.cwd(), sys.argv, io.StringIO()
    os.chdir(folder)
    sys.argv = ["vpd-mlx", *shlex.split(case[1])]
    huggingface_hub.constants.HF_HUB_OFFLINE, offline = True, huggingface_hub.constants.HF_HUB_OFFLINE
    try:
        with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
            command()
    except SystemExit as ended:
        code = ended.code
    finally:
        os.chdir(before)
        sys.argv, huggingface_hub.constants.HF_HUB_OFFLINE = argv, offline
    return error.getvalue().strip(), int(code or 0)


def page() -> str:
    """The whole page."""
    count = sum(map(len, CASES.values()))
    lines = [
        "# Wrong inputs, and the line that each prints",
        "",
        f"{count} of them, each refused before a model is loaded. Exit codes: 2 for what you can correct, 3 for a run or a",
        "source that fails. Recipes, rows and verifiers are those of a small task of one's own. This page is generated by",
        "`docs/make_errors.py`, which runs every command; a test keeps it in step.",
    ]
    for title, cases in CASES.items():
        lines += ["", f"## {title}", "", "| input | exit | what it prints |", "|---|---|---|"]
        for case in cases:
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name).resolve()
                text, code = printed(case, folder)
            text = text.removeprefix("vpd-mlx: ").replace(f"{folder}/", "").replace(str(MODEL.parents[1]), "recipes")
            if code == 0 or len(text.splitlines()) != 1:
                raise SystemExit(f"{case[:2]}: exit {code}, not one line: {text}")
            what = case[0] or f"`vpd-mlx {case[1]}`"
            lines.append(f"| {what} | {code} | {_cell(text)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """A message within a table, its characters as they are."""
    return "`` " + text.replace("|", "\\|") + " ``"


def main() -> None:
    """Write or check."""
    path, text = HERE / "errors.md", page()
    if "--check" not in sys.argv:
        path.write_text(text, encoding="utf-8")
    elif not path.exists() or path.read_text(encoding="utf-8") != text:
        raise SystemExit(f"{path.name} is not up to date: run python docs/make_errors.py")


if __name__ == "__main__":
    main()
