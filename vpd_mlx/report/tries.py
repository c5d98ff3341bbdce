"""What to type to try what a run has trained."""

from __future__ import annotations

import shlex

from vpd_mlx.common.text import mlx_lm_command, number, visible
from vpd_mlx.run.answers import choose
from vpd_mlx.run.folder import Run, by_dotted_key

__all__ = ["try_commands"]


def try_commands(run: Run) -> list[tuple[str, str]]:
    """(with what, command) for the adapter that the run hands over; empty before there is one.

    The prompt is that of a held-out problem, of one that was learned if there is any, else the first rollout's. A prompt with
    control characters is left out: pasted into a terminal, they would act on it.
    """
    if not run.adapters.is_dir():
        return []
    answers = choose(run.answers)
    found = answers[0].before if answers else next(run.read(run.rollouts[:1]), {})
    prompt = str(found.get("prompt") or "")
    if not prompt or visible(prompt) != prompt:
        return [("try it", shlex.join(["vpd-mlx", "try", str(run.path)]))]
    tokens = number(by_dotted_key(run.config).get("rollout.max_completion_tokens"))
    options = [*(["--max-tokens", f"{tokens:.0f}"] if tokens else []), "--prompt", prompt]
    model = str(run.config.get("model") or "")
    return [
        ("try it", shlex.join(["vpd-mlx", "try", str(run.path), prompt])),
        ("in mlx-lm", mlx_lm_command("generate", model, run.adapters, *options)),
    ]
