"""Arrows go down only: a module imports from its own layer or from below."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import vpd_mlx

ROOT = Path(vpd_mlx.__file__).parent
LAYERS = {
    0: ["__init__", "types", "config", "errors"],
    1: ["losses", "heads", "prompts", "batching", "metrics", "progress", "prefix", "ranks", "heartbeat", "watch"],
    2: ["tasks", "feedback", "runlog", "loggers", "sandbox", "_sandbox_child", "_sandbox_values"],
    3: ["policy", "rollout", "checkpoint"],
    4: ["teacher", "updates", "algos", "collect", "records"],
    5: ["train", "trainer", "loading", "evaluate", "report", "lab", "doctor", "selftest", "plan", "export"],
    6: ["cli", "view", "commands", "__main__"],
}
LAYER_OF = {name: layer for layer, names in LAYERS.items() for name in names}
MODULES = sorted(p for p in ROOT.rglob("*.py") if "_recipes" not in p.parts)


def unit(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
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
    assert {"train", "config", "errors"} <= imported(ROOT / "cli.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_all_lists_what_exists(path: Path):
    name = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")
    if name.endswith(("__main__", "_sandbox_child")):
        return
    module = importlib.import_module(name)
    assert len(set(module.__all__)) == len(module.__all__)
    for item in module.__all__:
        assert hasattr(module, item), f"{name}.__all__ names {item}, which is not there"


def test_nothing_downloads_or_reads_mlx_for_the_config():
    # `vpd-mlx --help` and a wrong recipe must be quick: config and errors stand without mlx.
    for name in ("types", "config", "errors", "metrics", "batching", "runlog", "loggers"):
        source = (ROOT / f"{name}.py").read_text()
        assert "import mlx" not in source
