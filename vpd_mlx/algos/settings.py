"""The recipe's sections that algorithms read. Imports no mlx, so that a recipe is checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from vpd_mlx.common.settings import Positive, Section
from vpd_mlx.errors import Fault

__all__ = [
    "EStepSettings",
    "GrpoSettings",
    "HybridSettings",
    "MStepSettings",
    "TeacherKind",
    "TeacherSettings",
    "minibatch_faults",
]

TeacherKind = Literal["live", "frozen", "ema", "trust_region", "adapter", "gated"]

Unit = Annotated[float, Field(ge=0.0, le=1.0)]


def minibatch_faults(section: str, size: int | None, recipe: Any) -> Iterator[Fault]:
    """A minibatch that is larger than the batch it is taken from."""
    if size is not None and size > recipe.rollout.prompts:
        yield Fault(
            f"{section}.minibatch_prompts",
            f"{size} is more than rollout.prompts {recipe.rollout.prompts}",
            "lower it, or set it to null for the whole batch",
        )


class EStepSettings(Section):
    """Binary Classifier Optimization of the teacher (arXiv 2605.15113, Eq. 7 to 9)."""

    every: Positive = Field(
        1, description="F: an E-step before every F-th M-step, on the same rollouts. 5 as published."
    )
    beta: float = Field(0.1, gt=0, description="Scale of the implicit reward.")
    prior: Literal["dynamic", "fixed"] = Field(
        "dynamic", description="Anchor: the student at the start of this E-step, or the initial model."
    )
    delta: Literal["fresh", "ema"] = Field(
        "fresh", description="Reward shift: this E-step's class midpoint, or its EMA."
    )
    delta_rate: float = Field(0.1, gt=0, le=1, description="Weight of this E-step's midpoint when `delta: ema`.")
    length_normalise: bool = Field(False, description="Divide each implicit reward by its completion's length.")
    contexts: Literal["own", "crossed"] = Field(
        "own",
        description="`own`: each completion under its own context, as published. `crossed`: a failure's context is also "
        "paired with a correct sibling's completion, so that the kind of context does not give the label away.",
    )
    anchor: float = Field(
        0.0,
        ge=0,
        description="Weight of -log q per token of successes, added to the loss: it holds up what BCO would let sink. "
        "0 as published.",
    )
    floor: float = Field(
        0.0,
        ge=0,
        description="Weight of max(0, log pi_old - log q) per token of successes, added to the loss: an anchor that pulls only "
        "while the teacher finds a success less likely than the student does (arXiv 2402.13228). 0 as published.",
    )
    token_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of each completion's tokens that the implicit reward sums: those where teacher and student differ "
        "most. 1 as published.",
    )
    hints: float = Field(
        0.0,
        ge=0,
        description="Weight of a divergence that pulls the teacher behind a failure's context onto the teacher behind a "
        "success's own, on the tokens of that success. 0 as published.",
    )
    until_auc: float | None = Field(
        0.9,
        ge=0.5,
        le=1,
        description="Leave out an E-step whose teacher tells right from wrong completions this surely as it is: the probability "
        "that a right one's implicit reward is larger. null leaves none out, as published.",
    )
    minibatch_prompts: Positive | None = Field(None, description="Problems per update; null takes the whole batch.")
    epochs: Positive = Field(1, description="Passes over the batch, all against the same prior and reward shift.")
    learning_rate_ratio: float = Field(1.0, gt=0, description="The E-step's rate over `optimizer.learning_rate`.")

    def faults(self, recipe: Any) -> Iterator[Fault]:
        """A minibatch is a part of the batch, and what goes across contexts needs some that are no solutions of siblings."""
        yield from minibatch_faults("e_step", self.minibatch_prompts, recipe)
        if "e_step" not in recipe.entry.sections or set(recipe.feedback.sources) - {"sibling", "attempts"}:
            return
        what = f"needs contexts of failures that are no sibling's solution, and feedback.sources is {recipe.feedback.sources}"
        remedy = "add another source, such as verifier"
        if self.contexts == "crossed":
            yield Fault("e_step.contexts", f"`crossed` {what}", f"{remedy}, or leave it at own")
        if self.hints:
            yield Fault("e_step.hints", f"{self.hints:g} {what}", f"{remedy}, or leave it at 0")


class MStepSettings(Section):
    """Distillation of the teacher into the student (Eq. 10)."""

    alpha: Unit = Field(0.5, description="0 is KL(teacher|student), 1 is KL(student|teacher), 0.5 Jensen-Shannon.")
    top_k: Positive | None = Field(
        None, description="Support: the student's k likeliest tokens; null is the vocabulary."
    )
    tail: bool = Field(True, description="With top_k: a bucket for the remaining mass; otherwise renormalise.")
    weighting: Literal["sequence", "token"] = Field(
        "sequence", description="Mean over sequences of their token means, or mean over all tokens."
    )
    entry_clip: float | None = Field(
        None,
        gt=0,
        description="Most nats that one vocabulary entry adds to a token's divergence, so that words of style do not outweigh "
        "the rest; null clips nothing.",
    )
    pass_rate_weights: bool = Field(
        False,
        description="Weigh completions by 2 sqrt(p (1 - p)) with p their group's share of successes; groups that are all right "
        "or all wrong then teach nothing (arXiv 2605.27765).",
    )
    importance_clip: float | None = Field(
        None, gt=0, description="Multiply by min(pi / pi_sampler, this), without gradient; null does not."
    )
    minibatch_prompts: Positive | None = Field(None, description="Problems per update; null takes the whole batch.")
    epochs: Positive = Field(1, description="Passes over the batch.")

    def faults(self, recipe: Any) -> Iterator[Fault]:
        """A minibatch is a part of the batch."""
        yield from minibatch_faults("m_step", self.minibatch_prompts, recipe)


class TeacherSettings(Section):
    """Which weights stand behind the teacher's prompt in the M-step."""

    weights: TeacherKind | None = Field(
        None,
        description="`live` weights; `frozen` for each batch; an `ema` of the student; `trust_region`: logits "
        "between the initial model's and the student's; `adapter`: a second LoRA of its own, which the E-step trains; `gated`: a "
        "copy of the student, renewed only when the reward rose and lengths are sane. null: `adapter` under algorithms with an "
        "E-step, else `ema`.",
    )
    ema_rate: float = Field(0.05, gt=0, le=1, description="Share of the student taken into the EMA after each batch.")
    trust_region: Unit = Field(
        0.5, description="Where the trust-region teacher's logits lie: 0 the initial model's, 1 the student's."
    )

    @classmethod
    def of(cls, recipe: Any) -> TeacherSettings:
        """The recipe's section, with the kind of teacher that its algorithm has where the recipe names none."""
        section: TeacherSettings = recipe.section(cls)
        own: TeacherKind = "adapter" if "e_step" in recipe.entry.sections else "ema"
        return section if section.weights is not None else section.model_copy(update={"weights": own})

    def faults(self, recipe: Any) -> Iterator[Fault]:
        """A teacher's own adapter needs an E-step that trains it, and what scores tokens alone needs a set of weights."""
        if self.weights == "trust_region" and recipe.algorithm == "rlcsd":
            yield Fault(
                "teacher.weights", "`trust_region` mixes logits, and rlcsd reads scores", "use another kind of teacher"
            )
        if self.weights == "adapter" and "teacher" in recipe.entry.sections and "e_step" not in recipe.entry.sections:
            yield Fault(
                "teacher.weights",
                f"`adapter` is trained by the E-step, which {recipe.algorithm} does not have",
                "use algorithm vpd, or another kind of teacher",
            )


class GrpoSettings(Section):
    """Group-relative policy optimisation, and its share in the hybrids."""

    scale: Literal["none", "group", "batch"] = Field(
        "none", description="Divide advantages by nothing, by the group's or by the batch's standard deviation."
    )
    clip_low: float = Field(0.2, gt=0, lt=1, description="The ratio is clipped below at 1 - this.")
    clip_high: float = Field(0.28, gt=0, description="The ratio is clipped above at 1 + this.")
    dual_clip: float | None = Field(3.0, gt=1, description="Bound of the loss for negative advantages; null has none.")
    weighting: Literal["sequence", "token"] = Field("token", description="Mean over sequences, or over all tokens.")
    kl: float = Field(0.0, ge=0, description="Coefficient of the k3 estimate of KL(student|initial model).")
    drop_uniform_groups: bool = Field(
        False, description="DAPO's filter: groups whose scores are all equal are left out."
    )
    minibatch_prompts: Positive | None = Field(None, description="Problems per update; null takes the whole batch.")
    epochs: Positive = Field(1, description="Passes over the batch.")

    def faults(self, recipe: Any) -> Iterator[Fault]:
        """A minibatch is a part of the batch, and an advantage needs a group."""
        yield from minibatch_faults("grpo", self.minibatch_prompts, recipe)
        if "grpo" in recipe.entry.sections and recipe.rollout.group_size == 1:
            yield Fault(
                "rollout.group_size",
                f"1 makes every advantage 0 under {recipe.algorithm}",
                "set rollout.group_size to 2 or more",
            )


class HybridSettings(Section):
    """How joint, reshape, reweight, srpo and rlcsd mix the two signals."""

    distill: float = Field(
        0.5, ge=0, description="Weight of the distillation (joint, srpo) or of log q - log pi (reshape)."
    )
    reward: float = Field(
        0.5, ge=0, description="Weight of the policy gradient (joint, srpo) or of the advantage (reshape)."
    )
    mix: Unit = Field(1.0, description="reweight, rlcsd: share of the teacher's token weights at the first step.")
    mix_decay_steps: Positive | None = Field(
        None, description="reweight, rlcsd: steps over which `mix` falls linearly to 0; null keeps it."
    )
    weight_clip: float = Field(0.2, gt=0, lt=1, description="reweight, rlcsd: token weights stay within 1 +- this.")

    def faults(self, recipe: Any) -> Iterator[Fault]:
        """Something must be learned, and a context must be read."""
        sources = recipe.feedback.sources
        if recipe.entry.wrong_hints and "sibling" in sources and sources[0] != "sibling":
            what = f"{sources} asks {sources[0]} first, and {recipe.algorithm} contrasts siblings' answers"
            yield Fault("feedback.sources", what, "name sibling first")
        if recipe.algorithm == "srpo" and recipe.feedback.on_success:
            what = "means nothing under srpo, whose right completions learn without feedback"
            yield Fault("feedback.on_success", what, "take it out, or use algorithm joint")
        if recipe.algorithm in ("joint", "srpo") and self.distill == 0 and self.reward == 0:
            yield Fault("hybrid.distill", "0, and hybrid.reward is 0: nothing would be learned", "raise one of them")
