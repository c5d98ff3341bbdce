"""The documentation says what the program does."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import docs_commands
import pytest
from typer.testing import CliRunner

from vpd_mlx.commands.app import app
from vpd_mlx.recipe import Recipe, model_fields

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").glob("*/*.md")]
)


@pytest.mark.parametrize(
    "name", ["make_reference.py", "make_estimates.py", pytest.param("make_errors.py", marks=pytest.mark.long)]
)
def test_what_is_generated_is_up_to_date(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", [name, "--check"])
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "docs" / name), run_name="__main__")  # exits with the page's name if it is not


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_within_the_repository_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


# errors.md names what does not exist, on purpose.
@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "errors.md"], ids=lambda p: str(p.relative_to(ROOT)))
def test_every_command_and_key_that_is_named_exists(page: Path):
    text = page.read_text()
    commands = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    commands |= {g.name for g in app.registered_groups}
    for name in re.findall(r"vpd-mlx ([a-z]+)\b", "\n".join(re.findall(r"```.*?```|`[^`]+`", text, re.DOTALL))):
        assert name in commands, f"{page.name}: vpd-mlx {name}"
    sections = {path.split(".")[0] for path, _ in model_fields(Recipe) if "." in path}
    known = {path for path, _ in model_fields(Recipe)}
    for key in re.findall(r"`([a-z_]+\.[a-z_]+)(?::[^`]*)?`", text):
        if key.split(".")[0] in sections and key.split(".")[0] != "task" and not key.endswith((".py", ".yaml")):
            assert key in known, f"{page.name}: {key}"


def test_every_command_explains_itself():
    runner = CliRunner()
    for command in app.registered_commands:
        name = command.name or command.callback.__name__  # type: ignore[union-attr]
        result = runner.invoke(app, [name, "--help"])
        assert result.exit_code == 0
        assert len(result.output) > 200, name


def test_commands_are_found_and_joined():
    page = """
```
vpd-mlx recipes   # what there is
some output
vpd-mlx train a.yaml \\
    --steps 2
cat > a.txt <<'END'
vpd-mlx is text here
END
```

```
$ make train
vpd-mlx is output here
$ python -m mlx_lm generate --prompt 47+38=
85
```

```python
python = 3
```
"""
    assert docs_commands.commands(page) == [
        "vpd-mlx recipes",
        "vpd-mlx train a.yaml --steps 2",
        "cat > a.txt <<'END'\nvpd-mlx is text here\nEND",
        "make train",
        "python -m mlx_lm generate --prompt 47+38=",
    ]


def test_no_exception_outlives_its_command():
    printed = {c for page in docs_commands.PAGES for c in docs_commands.commands(page.read_text())}
    assert set(docs_commands.EXCEPTIONS) <= printed
    assert len(printed) > 2 * len(docs_commands.EXCEPTIONS)


def test_a_command_that_fails_is_told_and_the_shell_is_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(docs_commands, "small_run", lambda folder: None)
    page = "```\ncd docs\ncat several-macs.md\nvpd-mlx train --set a\ncat never\n```\n"
    with pytest.raises(
        SystemExit, match=r"(?s)# Several Macs.*\$ vpd-mlx train --set a\n.*not of the form key=value"
    ) as e:
        docs_commands.run_page(page)
    assert "cat never" not in str(e.value)


@pytest.mark.long
def test_a_newcomers_own_task_takes_no_more_than_ten_commands():
    text = (ROOT / "docs" / "first-task.md").read_text(encoding="utf-8")
    assert len(docs_commands.commands(text)) <= 10
    ran, left = docs_commands.run_page(text)
    assert (ran, left) == (9, 1)  # all but the clone
