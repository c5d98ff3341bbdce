"""What an algorithm asks of memory, found without running it: whose gradients it takes, and what it holds between updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from vpd_mlx import losses
from vpd_mlx.algos.e_step import crossed
from vpd_mlx.algos.grpo import GrpoLoss
from vpd_mlx.algos.hybrids import Reshape
from vpd_mlx.algos.m_step import Distillation
from vpd_mlx.algos.rlcsd import Rlcsd
from vpd_mlx.algos.samples import gather, minibatches
from vpd_mlx.algos.settings import EStepSettings, GrpoSettings, MStepSettings, TeacherSettings
from vpd_mlx.algos.srpo import Srpo
from vpd_mlx.algos.teacher import Teacher
from vpd_mlx.common.softmax import Softmax
from vpd_mlx.engine.heads import Head, TokenLoss, target_logps
from vpd_mlx.engine.learner import Learner
from vpd_mlx.engine.policy import Policy
from vpd_mlx.losses import LossAndMetrics
from vpd_mlx.types import Group, TokenRow

if TYPE_CHECKING:
    from vpd_mlx.recipe import Recipe

__all__ = ["Demand", "Update", "demand"]


@dataclass(frozen=True)
class Update:
    """Rows, their token loss and the names of its constants, and whether their log-probabilities may be read midway
    (`learner.accumulate_weighed`)."""

    rows: list[TokenRow]
    loss: TokenLoss
    needs: Sequence[str] = ()
    read_midway: bool = False


@dataclass(frozen=True)
class Demand:
    """`updates` are its largest ones, of each kind.

    `states` counts the hidden states kept for each token of a batch; `held` is the bytes that it carries from update to update
    besides the student's adapter.
    """

    updates: list[Update]
    states: int
    held: int


def demand(recipe: Recipe, policy: Policy, groups: Sequence[Group], adapter: int) -> Demand:
    """Of the recipe's algorithm on a batch of these groups, with an adapter of so many bytes."""
    samples, sections = gather(groups), recipe.entry.sections
    algorithm = recipe.entry.load()(recipe, policy)
    sizes = {name: getattr(getattr(recipe, name), "minibatch_prompts", None) for name in sections}
    own = next((n for name, n in sizes.items() if name != "e_step" and n is not None), None)
    loss, needs = _student_loss(recipe, algorithm)
    updates = [Update([samples[i].student for i in minibatches(samples, own)[0]], loss, needs)]
    if "e_step" in sections:
        taught = crossed(samples) if recipe.section(EStepSettings).contexts == "crossed" else samples
        chosen = [taught[i] for i in minibatches(taught, sizes["e_step"])[0]]
        rows = [s.teacher for s in chosen if s.teacher is not None]
        updates.append(Update(rows, target_logps, read_midway=True))
    held = sum(int(a.nbytes) for part in algorithm.parts.values() for a in part.arrays().values())
    held += sum(2 * adapter for part in algorithm.parts.values() if isinstance(part, Learner))  # moments yet to be made
    states = 0
    if "teacher" in sections:
        kind = TeacherSettings.of(recipe).weights
        states = 0 if isinstance(algorithm, Rlcsd) else 2 if kind == "trust_region" else 1
        held += adapter if kind == "frozen" else 0  # the student's, as it was before the batch
    return Demand(updates, states, held)


def _teacher_logps(teacher: Teacher) -> TokenLoss:
    def loss(_student: Softmax, fixed: Mapping[str, mx.array], head: Head) -> LossAndMetrics:
        return mx.stop_gradient(losses.token_logps(teacher.logits(fixed, head), fixed["targets"])), {}

    return loss


def _student_loss(recipe: Recipe, algorithm: Any) -> tuple[TokenLoss, list[str]]:
    """The token loss of the student's update, put together from its sections, and the names of its constants."""
    teacher: Teacher | None = getattr(algorithm, "teacher", None)
    parts: list[TokenLoss] = []
    needs = []
    if isinstance(algorithm, Rlcsd):  # its hints are scored before the update
        needs += ["right", "contrast"]
    elif "m_step" in recipe.entry.sections and teacher is not None:
        cfg = recipe.section(MStepSettings)
        # The hybrids that shape advantages look at the sampled tokens alone.
        parts.append(_teacher_logps(teacher) if isinstance(algorithm, Reshape) else Distillation(cfg, teacher))
        needs += ["teacher", *(["initial"] if teacher.kind == "trust_region" else [])]
        needs += [] if cfg.importance_clip is None else ["old"]
    if "grpo" in recipe.entry.sections:
        grpo = recipe.section(GrpoSettings)
        if not isinstance(algorithm, Srpo):  # where a token has one of the losses: count the larger
            parts.insert(0, GrpoLoss(grpo))  # first, as `joint` has it
        needs += ["advantage", "old_logp", *(["reference"] if grpo.kl > 0 else [])]

    def loss(student: Softmax, fixed: Mapping[str, mx.array], head: Head) -> LossAndMetrics:
        done = [part(student, fixed, head) for part in parts or [target_logps]]
        return mx.stack([each for each, _ in done]).sum(axis=0), {
            k: v for _, metrics in done for k, v in metrics.items()
        }

    return loss, needs
