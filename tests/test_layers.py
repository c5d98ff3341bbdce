"""The house: arrows go down only, rooms are few, and nothing in them is too large to be read in one go."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import vpd_mlx
from vpd_mlx.algos import ALGORITHMS

ROOT = Path(vpd_mlx.__file__).parent
LAYERS = [
    ["__init__", "types", "errors", "common"],
    ["losses", "sandbox"],
    ["engine", "tasks"],
    ["feedback"],
    ["algos"],
    ["recipe"],
    ["run"],
    ["report", "tools"],
    ["api"],
    ["commands", "__main__"],
]
LAYER_OF = {name: layer for layer, names in enumerate(LAYERS) for name in names}
MODULES = sorted(p for p in ROOT.rglob("*.py") if "_recipes" not in p.parts)


def unit(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def at_run_time(tree: ast.AST) -> list[ast.AST]:
    """All nodes but those below `if TYPE_CHECKING:`, which never run."""
    found: list[ast.AST] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            found += [n for other in node.orelse for n in (other, *at_run_time(other))]
            continue
        found += [node, *at_run_time(node)]
    return found


def imported(path: Path) -> set[str]:
    found = set()
    for node in at_run_time(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{a.name}" for a in node.names] if node.module == "vpd_mlx" else [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        found |= {n.split(".")[1] for n in names if n.startswith("vpd_mlx.") and n.split(".")[1] != "__version__"}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path):
    own = LAYER_OF[unit(path)]
    for name in imported(path):
        assert LAYER_OF[name] <= own, f"{path.name} (layer {own}) imports {name} (layer {LAYER_OF[name]})"


def test_the_walk_sees_imports():
    assert {"run", "recipe", "errors"} <= imported(ROOT / "commands" / "train.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_all_lists_what_exists(path: Path):
    name = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")
    if name.endswith("__main__"):
        return
    module = importlib.import_module(name)
    assert len(set(module.__all__)) == len(module.__all__)
    for item in module.__all__:
        assert hasattr(module, item), f"{name}.__all__ names {item}, which is not there"


def loaded_by(statement: str) -> set[str]:
    """Top-level names of the modules that a fresh interpreter has loaded after a statement."""
    code = f"import sys; {statement}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(out.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "statement",
    [
        "from vpd_mlx.recipe import builtin_recipes, load_recipe; load_recipe(builtin_recipes()['quickstart'])",
        "import vpd_mlx.commands.app",
        "import vpd_mlx.report.page",
    ],
)
def test_recipes_help_and_reports_stand_without_mlx(statement: str):
    assert not {"mlx", "mlx_lm", "transformers"} & loaded_by(statement)


def test_only_algos_names_an_algorithm():
    """Everything else follows from the list; the recipe alone has a default, and a style of wording is called after a paper."""
    named = {
        (str(path.relative_to(ROOT)), node.value)
        for path in MODULES
        if unit(path) != "algos"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in ALGORITHMS
    }
    assert named == {("recipe.py", "vpd"), ("feedback/wordings.py", "sdpo")}


def test_few_rooms():
    # `_recipes` is there in a wheel only.
    names = {p.name for p in ROOT.iterdir()} - {"__pycache__", "_recipes"}
    assert len(names) <= 18, sorted(names)


def lines(node: ast.AST) -> int:
    return node.end_lineno - node.lineno + 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_too_large_to_read(path: Path):
    text = path.read_text()
    assert text.count("\n") <= 450, f"{path.name}: {text.count(chr(10))} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            assert lines(node) <= 250, f"{path.name}: class {node.name} has {lines(node)} lines"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert lines(node) <= 60, f"{path.name}: {node.name} has {lines(node)} lines"
