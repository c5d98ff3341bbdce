"""A variant of the E-step's data: every context of a group judges a right answer as well as the wrong one it was written about.

In the paper each completion is scored under its own context, so a failure's feedback is only ever seen with a wrong answer
behind it, and the kind of context gives the label away: the teacher learns "after a checker's words, make what follows less
likely", right answers included. Here a failure's context is also paired with a correct sibling's completion, as a success. Both
classes then occur under the same contexts, and what tells them apart is what the words say of the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vpd_mlx.engine.gradients import Sample
from vpd_mlx.types import TokenRow

__all__ = ["crossed"]


def crossed(samples: Sequence[Sample]) -> list[Sample]:
    """The samples, and for each failure with a context of its own the group's first success behind that context.

    A context that is itself a sibling's solution is left out: behind it that very answer would be a copy.
    """
    first: dict[int, Sample] = {}
    for s in samples:
        if s.rollout.success:
            first.setdefault(s.group, s)
    extra = []
    for s in samples:
        right = first.get(s.group)
        context = s.rollout.context
        if (
            right is None
            or s.rollout.success
            or s.teacher is None
            or context is None
            or context.kind in ("sibling", "both")
        ):
            continue
        extra.append(
            Sample(
                group=s.group,
                student=right.student,
                teacher=TokenRow(s.teacher.prompt, right.student.completion),
                rollout=replace(right.rollout, context=context, teacher_prompt=s.teacher.prompt),
            )
        )
    return [*samples, *extra]
