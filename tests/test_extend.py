"""A task, a feedback source and an algorithm: each is one file, an entry in its list and the import of it; all else follows."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vpd_mlx

ROOT = Path(vpd_mlx.__file__).parent.parent

TASK = '''"""Say a letter twice."""
from typing import Any, Literal

from pydantic import Field

from vpd_mlx.common.settings import Section
from vpd_mlx.types import Problem, Verdict


class TwiceSettings(Section):
    """Letters to be said twice."""

    kind: Literal["twice"]
    letters: str = Field("abcdefgh", description="The letters that are asked for.")


class Twice:
    """Prompt `a`, completion `aa`."""

    def __init__(self, cfg: Any) -> None:
        rows = [Problem(x, ({"role": "user", "content": x},), x * 2) for x in cfg.letters]
        self.train, self.held_out = tuple(rows[2:]), tuple(rows[:2])

    def verify(self, problem: Problem, completion: str) -> Verdict:
        return Verdict(float(completion.strip() == problem.answer), "twice, please")

    def reference_completion(self, problem: Problem) -> str | None:
        return problem.answer
'''

SOURCE = '''"""C = encouragement."""
from pydantic import Field

from vpd_mlx.common.settings import Section
from vpd_mlx.feedback.base import SourceEntry, answer_each


class CheerKeys(Section):
    """What `cheer` adds to the section `feedback`."""

    cheer_words: str = Field("try again", description="What `cheer` says.")


CHEER = SourceEntry(
    lambda parts: lambda groups, wanted: answer_each(groups, wanted, lambda group, rollout: parts.cfg.cheer_words),
    CheerKeys,
)
'''

ALGORITHM = '''"""Pulls the student towards the teacher, every few steps."""
from pydantic import Field

from vpd_mlx.common.settings import Positive, Section


class LazySettings(Section):
    """The lazy algorithm."""

    rest: Positive = Field(2, description="Learn every n-th step.")


def load(recipe, policy):
    from vpd_mlx.algos.sdpo import Sdpo

    class Lazy(Sdpo):
        def __call__(self, policy, groups, step):
            learns = step.number % recipe.section(LazySettings).rest == 0
            return {"lazy/learned": float(learns), **(super().__call__(policy, groups, step) if learns else {})}

    return Lazy(recipe, policy)
'''

# (new file, its text, the file of the list, the entry that the new one is put in front of, the new entry, its import)
ADDED = [
    (
        *("tasks/twice.py", TASK, "tasks/__init__.py", "    (AdditionSettings, Addition),"),
        *("    (TwiceSettings, Twice),", "from vpd_mlx.tasks.twice import Twice, TwiceSettings"),
    ),
    (
        *("feedback/cheer.py", SOURCE, "feedback/__init__.py", "    sibling=SIBLING,"),
        *("    cheer=CHEER,", "from vpd_mlx.feedback.cheer import CHEER"),
    ),
    (
        *("algos/lazy.py", ALGORITHM, "algos/__init__.py", "    vpd=Entry("),
        *(
            '    lazy=Entry("vpd_mlx.algos.lazy:load", {"lazy": LazySettings, **_M}),',
            "from vpd_mlx.algos.lazy import LazySettings",
        ),
    ),
]

RECIPE = """
name: mine
model: {model}
algorithm: lazy
steps: 2
task: {{kind: twice}}
lazy: {{rest: 2}}
feedback: {{sources: [cheer, verifier], cheer_words: come on, max_tokens: 32}}
rollout: {{prompts: 2, group_size: 2, max_prompt_tokens: 256, max_completion_tokens: 4}}
evaluation: {{problems: 2, samples: 1}}
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's package and docs with the three additions, and a recipe that uses them."""
    root = tmp_path_factory.mktemp("extended")
    for part in ("vpd_mlx", "docs", "recipes/quickstart"):
        shutil.copytree(ROOT / part, root / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file, text, listing, before, entry, imported in ADDED:
        (root / "vpd_mlx" / file).write_text(text)
        at = root / "vpd_mlx" / listing
        whole = at.read_text()
        assert whole.count(before) == 1
        first = whole.index("from vpd_mlx.")
        at.write_text(f"{whole[:first]}{imported}\n{whole[first:]}".replace(before, f"{entry}\n{before}"))
    (root / "mine.yaml").write_text(RECIPE.format(model=root / "recipes" / "quickstart" / "model"))
    return root


def run(root: Path, *args: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    done = subprocess.run([sys.executable, *args], cwd=root, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


COMMANDS = """
import contextlib, io, json, sys
from vpd_mlx.commands.app import main
said = []
for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            main()
        except SystemExit as end:
            assert not end.code, (arguments, end.code)
    said.append(out.getvalue())
print(json.dumps(said))
"""


def test_they_are_planned_train_and_are_reported(copy: Path):
    asked = [
        ["plan", "mine.yaml"],
        ["train", "mine.yaml", "--out", "run", "--quiet"],
        ["show", "run", "--kind", "cheer"],
        ["report", "run"],
    ]
    planned, _, shown, _ = json.loads(
        run(copy, "-c", COMMANDS, json.dumps(asked))
    )  # in one process: each starts slowly
    assert "update" in planned
    rows = [json.loads(line) for line in (copy / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["lazy/learned"] for row in rows] == [0.0, 1.0]
    assert all(row["contexts"]["cheer"] for row in rows)
    assert "come on" in shown
    page = (copy / "run" / "report.html").read_text()
    assert "come on" in page
    assert "lazy" in page


def test_they_are_documented(copy: Path):
    code = "import sys; sys.path.insert(0, 'docs'); import make_reference; print(make_reference.reference())"
    page = run(copy, "-c", code)
    for words in (
        "## task: twice",
        "`task.letters`",
        "`feedback.cheer_words`",
        "## lazy",
        "`lazy.rest` | 2 | Learn every n-th step.",
    ):
        assert words in page


def test_a_recipe_with_them_is_read_without_mlx(copy: Path):
    code = (
        "import sys; from pathlib import Path; from vpd_mlx.recipe import load_recipe; load_recipe(Path('mine.yaml'))"
    )
    assert run(copy, "-c", f"{code}; print('mlx' in sys.modules)").strip() == "False"
