"""reweight: A_t = A ((1 - a) + a clip(exp(sign(A) (log q - log pi)), 1 +- eps)), a falling (arXiv 2605.15113, B.3)."""

from __future__ import annotations

from functools import partial

from vpd_mlx import losses
from vpd_mlx.algos.hybrids import Hybrid
from vpd_mlx.algos.policy_gradient import TokenAdvantages
from vpd_mlx.algos.settings import HybridSettings

__all__ = ["Reweight"]


class Reweight(Hybrid):
    """The teacher says which tokens deserve the advantage."""

    def reshape(self, step: int) -> TokenAdvantages:
        """`hybrid.mix`, falling linearly to 0 over `hybrid.mix_decay_steps` where that is set."""
        hybrid = self.recipe.section(HybridSettings)
        mix = hybrid.mix
        if hybrid.mix_decay_steps is not None:
            mix *= max(0.0, 1.0 - (step - 1) / hybrid.mix_decay_steps)
        return partial(losses.reweighted_advantages, mix=mix, clip=hybrid.weight_clip)
