"""reshape: A_t = reward * A + distill * sg[log q - log pi] (arXiv 2605.15113, B.3)."""

from __future__ import annotations

from functools import partial

from vpd_mlx import losses
from vpd_mlx.algos.hybrids import Hybrid
from vpd_mlx.algos.policy_gradient import TokenAdvantages
from vpd_mlx.algos.settings import HybridSettings

__all__ = ["Reshape"]


class Reshape(Hybrid):
    """The teacher's opinion is added to each token's advantage."""

    def reshape(self, step: int) -> TokenAdvantages:
        """The recipe's weights, the same at every step."""
        hybrid = self.recipe.section(HybridSettings)
        return partial(losses.reshaped_advantages, reward=hybrid.reward, distill=hybrid.distill)
