"""Which held-out problems two runs share: told by what is asked, not by where the row stood."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vpd_mlx.common.stats import Paired, paired
from vpd_mlx.errors import wrong_option
from vpd_mlx.run.folder import Run
from vpd_mlx.types import Problem

__all__ = ["Pairing", "fingerprints", "pair_up", "refuse_strangers"]


def fingerprints(problems: Sequence[Problem]) -> list[str]:
    """A hash of each problem: of its messages but the system's, its answer and what its verifier needs. 16 hex digits.

    The nth problem of the same content gets "-n" behind it, so that none hides another. A value of `data` that is no JSON counts
    by its type alone.
    """
    seen: Counter[str] = Counter()
    out = []
    for problem in problems:
        asked = [message for message in problem.messages if message["role"] != "system"]
        content = [asked, problem.answer, dict(problem.data)]
        text = json.dumps(content, sort_keys=True, default=lambda value: type(value).__qualname__)
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        seen[digest] += 1
        out.append(digest if seen[digest] == 1 else f"{digest}-{seen[digest]}")
    return out


@dataclass(frozen=True)
class Pairing:
    """Greedy scores of two runs by problem, each run's own; `by_name` where a run has no hashes and row names must do."""

    base: Mapping[str, float]
    other: Mapping[str, float]
    by_name: bool

    @property
    def shared(self) -> int:
        """Problems that both were evaluated on."""
        return len(self.base.keys() & self.other.keys())

    @property
    def difference(self) -> Paired | None:
        """`other` less `base` over the shared problems."""
        return paired(self.base, self.other)


def pair_up(base: Run, other: Run) -> Pairing:
    """The problems of two runs' last evaluations, by content where both runs have it."""
    both = [(run.greedy(), run.hash_by_problem()) for run in (base, other)]
    by_name = any(scores.keys() - hashes.keys() for scores, hashes in both)
    ours, theirs = (
        scores if by_name else {hashes[name]: score for name, score in scores.items()} for scores, hashes in both
    )
    return Pairing(ours, theirs, by_name)


def refuse_strangers(runs: Mapping[str, Run]) -> None:
    """Refuse to compare runs that were evaluated, and on no problem in common with the first.

    Raises:
        ConfigError: names the run.
    """
    (first, base), *others = runs.items()
    for name, run in others:
        found = pair_up(base, run)
        if found.base and found.other and not found.shared:
            raise wrong_option(
                "RUN...",
                f"none of {name}'s {len(found.other)} held-out problems is among the {len(found.base)} of {first}",
                "compare runs of the same eval_data, or evaluate one on the other's with `vpd-mlx eval RUN --data FILE`",
            )
