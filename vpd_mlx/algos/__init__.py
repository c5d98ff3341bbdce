"""Algorithms by name, one file each. The loop knows none of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vpd_mlx.algos.base import Algorithm, State, Step
from vpd_mlx.algos.grpo import Grpo
from vpd_mlx.algos.joint import Joint
from vpd_mlx.algos.reshape import Reshape
from vpd_mlx.algos.reweight import Reweight
from vpd_mlx.algos.sdpo import Sdpo
from vpd_mlx.algos.vpd import Vpd
from vpd_mlx.config import Recipe
from vpd_mlx.policy import Policy

__all__ = ["ALGORITHMS", "Algorithm", "State", "Step"]

ALGORITHMS: Mapping[str, Callable[[Recipe, Policy], Algorithm]] = {
    "vpd": Vpd,
    "sdpo": Sdpo,
    "opsd": Sdpo,  # the config sees to it that the contexts are reference solutions
    "grpo": Grpo,
    "joint": Joint,
    "reshape": Reshape,
    "reweight": Reweight,
}
