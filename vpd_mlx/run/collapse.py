"""What a run does about a collapse: it goes back to its best adapter and on at half the rate, or stops, or only says so."""

from __future__ import annotations

from typing import Any

from vpd_mlx.algos.base import reset_parts
from vpd_mlx.run.state import RunState
from vpd_mlx.run.watch import collapse

__all__ = ["MOST_REVERTS", "SLOWER", "react"]

MOST_REVERTS = 3  # of a run: what collapses again after these does so at an eighth of the rate, too
SLOWER = 0.5


def react(state: RunState, row: dict[str, Any]) -> dict[str, Any]:
    """Look at the newest step and do as `on_collapse` says; returns what the step's row says of it."""
    trainer = state.trainer
    how = trainer.recipe.on_collapse
    found = trainer.ranks.from_first(lambda: collapse([*state.rows, row]))
    if found is None:
        return {}
    seen = {"watch/collapse": found.text, "watch/cause": found.cause}
    if how == "warn":
        return seen  # the warnings say it
    why = f"step {state.done}: collapse: {found.text}"
    if how == "stop" or state.reverts == MOST_REVERTS:
        state.stopped = True
        after = "" if how == "stop" else f" once more after {MOST_REVERTS} reverts"
        trainer.progress.note(f"{why}; the run stops{after} and hands over its best adapter (on_collapse: {how})")
        return {**seen, "watch/stopped": 1}
    to = _revert(state)
    slower = f"the learning rate is {SLOWER**state.reverts:g} of the recipe's"
    trainer.progress.note(f"{why}; back to the adapter of step {to}, {slower} from here on (on_collapse: revert)")
    return {**seen, "watch/reverted_to": to, "watch/rate_factor": SLOWER**state.reverts}


def _revert(state: RunState) -> int:
    """Go back to the best adapter so far, the initial one if there is none; returns its step."""
    trainer = state.trainer
    to, adapter = state.best or (0, state.initial)
    trainer.policy.set_adapter(adapter)
    reset_parts(trainer.algorithm.parts, trainer.policy, SLOWER)
    trainer.nonfinite_in_a_row = 0
    state.reverts += 1
    return to
