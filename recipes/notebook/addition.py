"""Train from a notebook: a tiny model that forgets every carry learns to carry, from a verifier written here.

Open it in an editor that runs cells (`# %%`), or run it whole: `python recipes/notebook/addition.py`. It takes a minute or two.
"""

# %% A task: problems, and a verifier that says what is wrong
import random

import vpd_mlx as vpd

STEPS = 40

rng = random.Random(0)
sums = [(rng.randrange(10, 100), rng.randrange(10, 100)) for _ in range(600)]
problems = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in dict.fromkeys(sums)]


def verify(problem, completion):
    """1 for the right sum, else 0 and a word for each digit, from the ones upwards."""
    got, want = completion.strip(), problem.answer
    if got == want:
        return 1.0
    if not got.isdigit() or len(got) > 3:
        return 0.0, "not a sum"
    words = []
    for place, name in enumerate(["ones", "tens", "hundreds"][: max(len(got), len(want))], 1):
        a, b = got[-place:][:1] if place <= len(got) else "", want[-place:][:1] if place <= len(want) else ""
        words.append(f"{name} {'missing' if not a else 'right' if a == b else 'too low' if a < b else 'too high'}")
    return 0.0, ", ".join(words)


# %% Train, with the quickstart's model and limits; for a model of your own, name it in place of the recipe
run = vpd.train(
    vpd.load_recipe("quickstart", evaluation={"problems": 40}),
    problems=problems[100:],
    held_out=problems[:100],
    verify=verify,
    feedback=["sibling", "verifier"],
    algorithm="vpd",
    steps=STEPS,
    out="runs/notebook",
    overwrite=True,
)

# %% What changed
print(f"before: {run.before.student:.0%}, after: {run.after.student:.0%}, adapters in {run.adapters}")
print("reward:", [round(row["reward"], 2) for row in run.metrics[::5]])
print("page:", run.report())

# %% One step by hand
session = vpd.Session.load(vpd.load_recipe(run.path / "config.yaml", rollout={"prompts": 2}), verify=verify)
groups = next(session.rollouts())
for group in groups:
    for rollout in group.rollouts:
        words = rollout.context.text if rollout.context else "-"
        print(group.problem.prompt, rollout.text, rollout.verdict.score, "|", words)
print("reward:", session.learn(groups)["reward"])
session.close()
