"""Algorithms by name, one file each. The loop knows none of them.

`ALGORITHMS` names, for each, the sections of the recipe that it reads and the class that does the work. The class is imported
when a run begins: a recipe is read without mlx.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vpd_mlx.algos.settings import EStepSettings, GrpoSettings, HybridSettings, MStepSettings, TeacherSettings
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
    """

    target: str
    sections: Mapping[str, type[Section]]
    contexts: bool = True
    source: str | None = None

    def load(self) -> Any:
        """The class itself."""
        module, _, name = self.target.partition(":")
        return getattr(importlib.import_module(module), name)


_M: Mapping[str, type[Section]] = {"m_step": MStepSettings, "teacher": TeacherSettings}
_HYBRID: Mapping[str, type[Section]] = {**_M, "grpo": GrpoSettings, "hybrid": HybridSettings}

ALGORITHMS: dict[str, Entry] = {
    "vpd": Entry("vpd_mlx.algos.vpd:Vpd", {"e_step": EStepSettings, **_M}),
    "sdpo": Entry("vpd_mlx.algos.sdpo:Sdpo", _M),
    "opsd": Entry("vpd_mlx.algos.sdpo:Sdpo", _M, source="reference"),
    "grpo": Entry("vpd_mlx.algos.grpo:Grpo", {"grpo": GrpoSettings}, contexts=False),
    "joint": Entry("vpd_mlx.algos.joint:Joint", _HYBRID),
    "reshape": Entry("vpd_mlx.algos.reshape:Reshape", _HYBRID),
    "reweight": Entry("vpd_mlx.algos.reweight:Reweight", _HYBRID),
}
