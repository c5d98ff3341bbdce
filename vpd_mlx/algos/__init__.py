"""How rollouts become updates of the student: one file for each algorithm, and the steps that they are made of.

A step hands an algorithm its groups of rollouts. `samples` lays them out in rows; `e_step` trains the teacher's prompt, `m_step`
pulls the student onto the `teacher`. `sdpo` is the M-step alone, `vpd` puts an E-step before it, `grpo` follows the group's
advantages, `hybrids` and `rlcsd` wrap GRPO's token loss with the teacher, `srpo` gives each completion one of the two. `base`
says what the loop and the checkpoint ask of them all.

`ALGORITHMS` is the only list: for each algorithm, the sections of the recipe that it reads (`settings`) and the class that does
the work, which is imported when a run begins, so that a recipe is read without mlx.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vpd_mlx.algos.settings import EStepSettings, GrpoSettings, HybridSettings, MStepSettings, TeacherSettings
from vpd_mlx.common.functions import PREFIX, Listed, not_handed_over
from vpd_mlx.common.settings import Section

__all__ = ["ALGORITHMS", "Entry"]


@dataclass(frozen=True)
class Entry:
    """One algorithm.

    Attributes:
        target: `module:Class` of what is called with (recipe, policy) when a run begins.
        sections: name in the recipe -> its model, of all sections that the algorithm reads.
        contexts: whether it learns from feedback.
        source: a feedback source that it cannot do without.
        wrong_hints: how many wrong siblings' answers, worded as solutions, it wants beside a completion's context at most.
    """

    target: str
    sections: Mapping[str, type[Section]]
    contexts: bool = True
    source: str | None = None
    wrong_hints: int = 0

    def load(self) -> Any:
        """The class itself."""
        module, _, name = self.target.partition(":")
        return getattr(importlib.import_module(module), name)


class HandedOver(Entry):
    """The algorithm `function:NAME`, a function of a Python program (`vpd.train`)."""

    def __init__(self, name: str) -> None:
        super().__init__(name, {})

    def load(self) -> Any:
        """Only the program has it.

        Raises:
            ConfigError: always.
        """
        raise not_handed_over("algorithm", repr(self.target.removeprefix(PREFIX)))


_M: Mapping[str, type[Section]] = {"m_step": MStepSettings, "teacher": TeacherSettings}
_HYBRID: Mapping[str, type[Section]] = {**_M, "grpo": GrpoSettings, "hybrid": HybridSettings}

ALGORITHMS: dict[str, Entry] = Listed(
    HandedOver,
    vpd=Entry("vpd_mlx.algos.vpd:Vpd", {"e_step": EStepSettings, **_M}),
    sdpo=Entry("vpd_mlx.algos.sdpo:Sdpo", _M),
    opsd=Entry("vpd_mlx.algos.sdpo:Sdpo", _M, source="reference"),
    grpo=Entry("vpd_mlx.algos.grpo:Grpo", {"grpo": GrpoSettings}, contexts=False),
    joint=Entry("vpd_mlx.algos.hybrids:Joint", _HYBRID),
    reshape=Entry("vpd_mlx.algos.hybrids:Reshape", _HYBRID),
    reweight=Entry("vpd_mlx.algos.hybrids:Reweight", _HYBRID),
    srpo=Entry("vpd_mlx.algos.srpo:Srpo", _HYBRID),
    rlcsd=Entry("vpd_mlx.algos.rlcsd:Rlcsd", _HYBRID, source="sibling", wrong_hints=4),
)
