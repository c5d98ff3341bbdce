"""A run, from its recipe to its folder.

One step, file by file:

- `loop` calls `trainer.step(number)`, writes what comes back, evaluates and checkpoints when that is due, and ends the run.
- `step` has the trainer: it picks the step's problems, rolls out, adds feedback, and lets the algorithm learn from the groups.
- `collect` samples the completions and has each one verified while the others are still being decoded.
- `records` declares the rows that a step, a completion and an evaluation leave in the logs, and makes the first two.
- `log` appends them to the run folder's files, which one process holds.
- `warnings` looks through the rows for what goes wrong. `watch` finds a collapse in them within three steps, by the reward and by
  lengths, entropy and the first token (`style`); `collapse` does what the recipe says about it.
- `evaluate` measures student and teacher on held-out problems, `selection` the student alone on those set aside to choose the
  adapter by. `best` calls both when they are due, and hands over the best adapter.
- `answers` chooses the problems of which a person is shown the answers.
- `state` keeps where the run stands and turns it into a checkpoint, or a checkpoint into it.

Before any training `probe` measures student and teachers, `shift` what a teacher's prompt does to the style of answers, and
`advice` says what follows; the loop asks it about its first evaluation.

Before the first step `plan` refuses what does not fit into memory, `setup` builds and checks the parts of a run, and `followers`
starts the processes that send figures to logging services. `progress` is what the loop tells a view, and how a view stops it.

The folder is the only bus: after the run, or during it, `folder` reads it for the report, the commands and Python.
"""

__all__: list[str] = []
