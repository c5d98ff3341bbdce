"""joint: distill * L_SDPO + reward * L_GRPO in one gradient (arXiv 2605.15113, B.3)."""

from __future__ import annotations

from vpd_mlx.algos.hybrid import Hybrid
from vpd_mlx.updates import Distillation

__all__ = ["Joint"]


class Joint(Hybrid):
    """Both losses; a rollout without a context has the policy gradient alone."""

    def distillation(self) -> tuple[float, float, Distillation]:
        """The recipe's weights."""
        hybrid = self.recipe.hybrid
        return hybrid.distill, hybrid.reward, Distillation(self.recipe.m_step, self.teacher)
