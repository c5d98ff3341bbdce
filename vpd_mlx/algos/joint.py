"""joint: distill * L_SDPO + reward * L_GRPO in one gradient (arXiv 2605.15113, B.3)."""

from __future__ import annotations

from vpd_mlx.algos.hybrids import Hybrid
from vpd_mlx.algos.m_step import Distillation
from vpd_mlx.algos.settings import HybridSettings, MStepSettings

__all__ = ["Joint"]


class Joint(Hybrid):
    """Both losses; a rollout without a context has the policy gradient alone."""

    def distillation(self) -> tuple[float, float, Distillation]:
        """The recipe's weights."""
        hybrid = self.recipe.section(HybridSettings)
        return hybrid.distill, hybrid.reward, Distillation(self.recipe.section(MStepSettings), self.teacher)
