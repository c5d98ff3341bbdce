"""One gradient step each: BCO on the teacher's prompt, divergence or policy gradient on the student's."""

from vpd_mlx.updates.bco import EStepResult, bco_update
from vpd_mlx.updates.divergence import Distillation, divergence_update
from vpd_mlx.updates.learner import Learner, Sample, accumulate, gather, minibatches
from vpd_mlx.updates.policy_gradient import advantages_of, policy_gradient_update

__all__ = [
    "Distillation",
    "EStepResult",
    "Learner",
    "Sample",
    "accumulate",
    "advantages_of",
    "bco_update",
    "divergence_update",
    "gather",
    "minibatches",
    "policy_gradient_update",
]
