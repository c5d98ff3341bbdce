"""Sets of values by name, laid under the keys that a recipe gives: the recipe's `preset`.

`paper` is the algorithm as published (arXiv 2605.15113) under the paper's settings, whatever the defaults of this package are: it
names every key of the sections that decide an update. It goes by the recipe's `algorithm`, so a baseline has its own settings.
From SDPO's reference code, which the paper builds on: AdamW, warm-up, sampling, clips, what a mean is taken over. Ours: the
weights of the hybrids' two signals, and rates ten times the paper's, which trains all weights where this trains LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vpd_mlx.common.settings import merged

__all__ = ["EARLIER", "PRESETS", "Preset"]

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Preset:
    """Values by section and key.

    Attributes:
        what: one line on it.
        values: those for every algorithm.
        of: those of a single algorithm, laid over them.
    """

    what: str
    values: Values
    of: Mapping[str, Values] = field(default_factory=dict)

    def values_for(self, algorithm: str) -> dict[str, Any]:
        """What it says for an algorithm; one that it does not know gets the values for every algorithm."""
        return merged(self.values, self.of.get(algorithm, {}))


_PUBLISHED: Values = {
    "on_no_gap": "warn",  # nothing steps in
    "on_collapse": "warn",
    "templates": {"style": "sdpo"},
    "feedback": {
        "with_solution": False,
        "include_attempt": False,
        "on_success": False,
        "max_tokens": 8192,  # a whole completion
        "max_prompt_tokens": 10240,  # the reference's limit of the teacher's prompt
    },
    "rollout": {
        "prompts": 32,
        "group_size": 8,
        "max_prompt_tokens": 2048,
        "max_completion_tokens": 8192,
        "temperature": 1.0,
        "top_p": 1.0,
        "success_threshold": 0.5,
    },
    "optimizer": {
        "warmup_steps": 10,
        "warmup_by": "steps",
        "weight_decay": 0.01,
        "beta1": 0.9,
        "beta2": 0.999,
        "grad_clip": 1.0,
    },
    "e_step": {
        "every": 5,
        "beta": 0.1,
        "prior": "dynamic",
        "delta": "fresh",
        "delta_rate": 0.1,
        "length_normalise": False,
        "contexts": "own",
        "anchor": 0.0,
        "floor": 0.0,
        "token_share": 1.0,
        "until_auc": None,
        "hints": 0.0,
        "minibatch_prompts": None,  # 32: the whole batch
        "epochs": 1,
        "learning_rate_ratio": 1.0,
    },
    "m_step": {
        "tail": True,
        "weighting": "sequence",
        "entry_clip": None,
        "pass_rate_weights": False,
        "importance_clip": None,
        "epochs": 1,
    },
    "teacher": {"trust_region": 0.5},
    "grpo": {
        "scale": "none",
        "clip_low": 0.2,
        "clip_high": 0.28,
        "dual_clip": 3.0,
        "weighting": "token",
        "kl": 0.0,
        "drop_uniform_groups": False,
        "epochs": 1,
    },
    "hybrid": {"distill": 0.5, "reward": 0.5, "mix": 1.0, "mix_decay_steps": None, "weight_clip": 0.2},
    "memory": {"micro_batch_tokens": 18432},  # one sequence of that length
    "evaluation": {"keep_best": False, "temperature": 0.6, "top_p": 0.95},
}

_EMA: Values = {"teacher": {"weights": "ema"}}
_ALGORITHMS: Mapping[str, Values] = {
    "vpd": {"teacher": {"weights": "live"}},
    "sdpo": _EMA,
    "opsd": {**_EMA, "feedback": {"sources": ["reference"]}},
    "grpo": {},
    "joint": _EMA,  # the hybrids distil as SDPO does
    "reshape": _EMA,
    "reweight": _EMA,
    "srpo": _EMA,
    "rlcsd": _EMA,
}


def _column(
    what: str,
    *,
    rate: float,
    alpha: float,
    top_k: int | None,
    minibatch: int | None,
    ema_rate: float,
    sources: list[str],
    samples: int,
) -> Preset:
    """A column of the paper's table of settings; a minibatch of 32 problems is the whole batch, None."""
    values = {
        "feedback": {"sources": sources},
        "optimizer": {"learning_rate": rate},
        "m_step": {"alpha": alpha, "top_k": top_k, "minibatch_prompts": minibatch},
        "teacher": {"ema_rate": ema_rate},
        "grpo": {"minibatch_prompts": minibatch},
        "evaluation": {"samples": samples},
    }
    return Preset(what, merged(_PUBLISHED, values), _ALGORITHMS)


_CODE = _column(
    "the paper's settings for code: reverse KL on 20 tokens, a problem an update",
    rate=1e-5,
    alpha=1.0,
    top_k=20,
    minibatch=1,
    ema_rate=0.01,
    sources=["sibling", "verifier"],
    samples=4,
)
_SCIENCE = _column(
    "the paper's settings for science: Jensen-Shannon on 100 tokens",
    rate=1e-4,
    alpha=0.5,
    top_k=100,
    minibatch=None,
    ema_rate=0.05,
    sources=["sibling"],
    samples=16,
)
_MATH = _column(
    "the paper's settings for mathematics: forward KL on the whole vocabulary",
    rate=5e-5,
    alpha=0.0,
    top_k=None,
    minibatch=None,
    ema_rate=0.05,
    sources=["sibling"],
    samples=4,
)

PRESETS: dict[str, Preset] = {
    "default": Preset("nothing: the defaults of this page", {}),
    "paper": Preset(
        "the literal algorithm, with the settings of the paper's main ablations: `paper-science`",
        _SCIENCE.values,
        _SCIENCE.of,
    ),
    "paper-code": _CODE,
    "paper-science": _SCIENCE,
    "paper-math": _MATH,
}

_EVERY_FIFTH = {"e_step": {"every": 5, "until_auc": None}}
_COUNTED = {"optimizer": {"warmup_by": "updates"}}

EARLIER: Mapping[int, Preset] = {
    1: Preset(
        "what recipes of version 1 meant where they say nothing",
        {
            "templates": {"style": "closing"},
            "teacher": {"weights": "live"},
            "on_collapse": "warn",
            "on_no_gap": "warn",
            "evaluation": {"keep_best": False},
            **_COUNTED,
            **_EVERY_FIFTH,
        },
        {"sdpo": _EMA, "opsd": _EMA},
    ),
    2: Preset("what recipes of version 2 meant where they say nothing", {**_COUNTED, **_EVERY_FIFTH, **_EMA}),
    3: Preset("what recipes of version 3 meant where they say nothing", {**_EVERY_FIFTH, **_EMA}),
}
"""By version of the recipe format: so a run that began under other defaults is resumed as it began."""
