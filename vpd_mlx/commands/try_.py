"""`vpd-mlx try RUN [PROMPT]`: the base model and the trained model answer side by side; without a prompt, a chat with both."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from vpd_mlx.commands.options import json_alone
from vpd_mlx.common.text import visible, without_surrogates
from vpd_mlx.errors import ConfigError, Fault, wrong_option
from vpd_mlx.report.answers import LABEL, WIDE, side_by_side
from vpd_mlx.run.folder import find_run, system_messages

if TYPE_CHECKING:
    from vpd_mlx.engine.sampling import Reply
    from vpd_mlx.run.dialogue import Dialogue

__all__ = ["try_"]

COMMANDS = "/reset forgets the conversation, /exit or Ctrl-D leaves"


def try_(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or its name under runs/.")],
    prompt: Annotated[
        str | None, typer.Argument(help="What to ask.", show_default="a chat; from a pipe, its whole input")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 is the likeliest answer.")] = 0.0,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of an answer at most.", show_default="the recipe's")
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="System message.", show_default="the task's, if it has one")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.", show_default="the recipe's")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print both answers to one prompt as JSON.")] = False,
) -> None:
    """Ask the base model and the trained model the same: one answer beside the other, worded as in training.

    Without a prompt it is a chat; each model then remembers its own answers. /reset forgets the conversation, /exit or Ctrl-D
    leaves, Ctrl-C ends an answer.
    """
    folder = find_run(run)
    talks = prompt is None and sys.stdin.isatty()
    if prompt is None and not talks:
        prompt = _piped()
    _check(prompt, temperature, seed, as_json, talks)
    console = Console(highlight=False)
    with json_alone(as_json):
        dialogue = _open(folder, temperature, max_tokens, system, seed)
        if talks:
            _chat(console, dialogue, f"{dialogue.pair.recipe.model} and the adapter of {folder}")
            return
        text = without_surrogates((prompt or "").strip("\n"))
        *_, replies = dialogue.ask(text) if as_json else [_show(console, dialogue, text)]
    if as_json:
        typer.echo(json.dumps(_facts(folder, dialogue, text, replies), indent=2))


def _piped() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise wrong_option("PROMPT", f"standard input is no UTF-8 ({error.reason})", "pipe UTF-8 text") from None


def _check(prompt: str | None, temperature: float, seed: int | None, as_json: bool, talks: bool) -> None:
    faults = []
    if talks and as_json:
        faults.append(Fault("--json", "is for one prompt", "give a PROMPT"))
    if not talks and not (prompt or "").strip():
        faults.append(Fault("PROMPT", "is empty", "give a text, or no PROMPT at a terminal for a chat"))
    if seed is not None and temperature == 0:
        faults.append(Fault("--seed", f"{seed} means nothing at temperature 0", "give --temperature as well"))
    if faults:
        raise ConfigError(faults, "command line")


def _open(folder: Path, temperature: float, max_tokens: int | None, system: str | None, seed: int | None) -> Dialogue:
    """The run's two models, with the task's system message unless another is given."""
    # Late: MLX and the tokenizers take two seconds to load.
    from vpd_mlx.engine.sampling import Sampling
    from vpd_mlx.run.dialogue import Dialogue, Pair

    pair = Pair.load(folder)
    if system is None:
        system, note = _own_system(folder)
        if note:
            typer.echo(note, err=True)
    how = Sampling(temperature, 1.0, max_tokens or pair.recipe.rollout.max_completion_tokens)
    dialogue = Dialogue(pair, how, pair.recipe.seed if seed is None else seed, system)
    dialogue.check_system()
    return dialogue


def _own_system(folder: Path) -> tuple[str | None, str]:
    """(the system message of the task's problems, what to say if that is not known)."""
    found = system_messages(folder)
    if len(found) == 1:
        return found[0], ""
    if not found:
        return None, f"{folder} has no answers.jsonl, so no system message of its task is known; --system gives one"
    return None, f"the task's problems have {len(found)} different system messages: none is used; --system gives one"


def _chat(console: Console, dialogue: Dialogue, what: str) -> None:
    """Turn after turn, until the person leaves."""
    import readline  # noqa: F401 - gives `input` line editing and a history

    alone = "" if dialogue.pair.remembers else "; without a chat template each prompt stands alone"
    console.print(Text(visible(f"{what}: {COMMANDS}{alone}"), style="dim"))
    while True:
        try:
            line = without_surrogates(input("> ")).strip()
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print()
            continue
        if line == "/exit":
            return
        if line == "/reset":
            dialogue.reset()
            console.print(Text("forgotten", style="dim"))
        elif line:
            try:
                _show(console, dialogue, line)
            except KeyboardInterrupt:
                console.print(Text("stopped; this turn is forgotten", style="dim"))


def _show(console: Console, dialogue: Dialogue, prompt: str) -> dict[str, Reply]:
    """Ask, show the answers as they grow if this is a terminal, and print them whole."""
    replies: dict[str, Reply] = {}
    live = Live(console=console, refresh_per_second=8, transient=True) if console.is_terminal else None
    with live or contextlib.nullcontext():
        for replies in dialogue.ask(prompt):
            if live is not None:
                live.update(_drawn(console, replies, max(1, console.height // 2 - 2)))
    console.print(_drawn(console, replies), soft_wrap=False)
    return replies


def _drawn(console: Console, replies: dict[str, Reply], lines: int | None = None) -> Any:
    """Both answers; of each only the last lines, where there is no room for more."""
    columns = []
    for name in ("base", "trained"):
        reply = replies.get(name)
        text = Text("" if reply is None else visible(reply.text).strip("\n"))
        if lines is not None:
            width = console.width // (2 if console.width >= WIDE else 1) - LABEL - 2
            text = Text("\n").join(text.wrap(console, max(8, width))[-lines:])
        if reply is not None and reply.finish == "length":
            text.append(f"\ncut off at --max-tokens {reply.tokens}", style="dim")
        columns.append((Text(name, style="bold"), text))
    return side_by_side(console.width, columns)


def _facts(folder: Path, dialogue: Dialogue, prompt: str, replies: dict[str, Reply]) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "run": str(folder),
        "model": dialogue.pair.recipe.model,
        "system": dialogue.system,
        "prompt": prompt,
        "temperature": dialogue.how.temperature,
        "max_tokens": dialogue.how.max_tokens,
        "seed": None if dialogue.how.temperature == 0 else dialogue.seed,
        **{name: {"answer": r.text, "tokens": r.tokens, "finish": r.finish} for name, r in replies.items()},
    }
