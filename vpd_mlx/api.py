"""The front door for notebooks: the command line's recipes and run folders, from Python (docs/python.md).

Keywords are recipe keys. A recipe is plain text and cannot hold functions or problems: it has their names and a file of rows;
`Handed` carries the objects beside it. So a run from Python resumes and reports like any other. MLX is imported late.
"""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from vpd_mlx.common.streams import lasting
from vpd_mlx.errors import RunError, config_error
from vpd_mlx.recipe import NAME, Recipe, resolve_recipe_path
from vpd_mlx.recipe import load_recipe as load_recipe_file
from vpd_mlx.run import folder as run_folder
from vpd_mlx.run.folder import Evaluation
from vpd_mlx.run.handed import Feedback, Problems, combine, resumed
from vpd_mlx.run.log import RECIPE_FILE, claimed_folder
from vpd_mlx.types import Group

if TYPE_CHECKING:
    from vpd_mlx.common.functions import Handed
    from vpd_mlx.run.progress import Progress, Stop
    from vpd_mlx.run.step import Trainer

__all__ = ["Run", "Session", "evaluate", "load_recipe", "load_run", "train"]


class Run(run_folder.Run):
    """A run folder, as it was when it was read."""

    def report(self, out: str | Path | None = None, rollouts: int = 400) -> Path:
        """Write the run as one HTML page, `report.html` in its folder unless told otherwise; returns the page's path."""
        from vpd_mlx.report.page import run_page, save

        path = self.path / "report.html" if out is None else Path(out)
        save(path, run_page(self, rollouts))
        return path


def load_run(folder: str | Path) -> Run:
    """Read a run folder, of a run that ended or still goes on.

    Raises:
        VpdError: there is no run, or a file of it is broken.
    """
    found = run_folder.load_run(Path(folder))
    return Run(**{f.name: getattr(found, f.name) for f in fields(found)})


def load_recipe(recipe: str | Path, **keys: Any) -> Recipe:
    """A built-in recipe by name or a recipe file, with keys set, nested ones as dicts: `rollout={"group_size": 8}`.

    Raises:
        ConfigError: every fault found, at once.
    """
    return load_recipe_file(resolve_recipe_path(str(recipe)), list(run_folder.by_dotted_key(keys).items()))


def train(
    model: str | Path | Recipe,
    *,
    problems: Problems | None = None,
    held_out: Problems | None = None,
    verify: Callable[..., Any] | None = None,
    feedback: Feedback | None = None,
    algorithm: str | Callable[..., Any] | None = None,
    steps: int | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    **keys: Any,
) -> Run:
    """Train a model on problems with a verifier, and return the run.

    Args:
        model: a model folder, a hub id, or a `Recipe` whose keys hold unless given here.
        problems: dicts with `prompt` and whatever the verifier needs (`answer`, `reference`), or `Problem` objects.
        held_out: problems to evaluate on; without them a share of `problems`, chosen by a hash of each.
        verify: (problem, completion) -> score in 0..1, a bool, or (score, feedback text).
        feedback: names of feedback sources and functions (problem, rollout) -> text or None, in order of preference; or the
            recipe's section as a dict.
        algorithm: a name, or a function (policy, groups, step) -> metrics.
        steps: rollout batches of the whole run.
        out: the run folder; `runs/<name>` by default, or with -2, -3 … behind it.
        resume: go on with the run in `out`. Its recipe, problems and verifier must be the same.
        overwrite: replace the run in `out`.
        quiet: print warnings only.
        keys: any key of a recipe (docs/recipe.md), nested ones as dicts. `rollout.prompts` is at most the number of problems
            unless it is given.

    Raises:
        VpdError: an argument is wrong or the run cannot go on; the message is one line for each fault.
    """
    if isinstance(model, Recipe):
        raw = model.model_dump(mode="json")
    else:
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(str(model)).name).strip("._-") or "run"
        raw = {"model": str(model) if isinstance(model, Path) else model, "name": name}
    if steps is not None:
        keys["steps"] = steps
    with contextlib.ExitStack() as claims:
        folder = _folder(claims, out, str(keys.get("name", raw["name"])), resume, overwrite)
        keys |= {"problems": problems, "held_out": held_out, "feedback": feedback, "algorithm": algorithm}
        recipe, handed = combine("vpd.train", raw, folder, verify=verify, **keys)
        if resume:
            handed = resumed("vpd.train", folder, recipe, handed)
        _train(recipe, folder, resume, overwrite, quiet, handed)
    return load_run(folder)


def _train(recipe: Recipe, folder: Path, resume: bool, overwrite: bool, quiet: bool, handed: Handed) -> None:
    from vpd_mlx.report.live import make_view
    from vpd_mlx.run.loop import train as run
    from vpd_mlx.run.progress import Stop

    stop = Stop()
    with (
        _asked(stop),
        lasting(f"the run goes on in {folder}"),
        make_view(f"{recipe.name} ({recipe.algorithm})", quiet=quiet) as view,
    ):
        run(recipe, folder, resume=resume, overwrite=overwrite, progress=view, stop=stop, handed=handed)


def evaluate(
    run: str | Path | run_folder.Run | Recipe,
    *,
    adapter: str | Path | None = None,
    split: Literal["held-out", "train"] = "held-out",
    greedy: bool = False,
    base: bool = True,
    verify: Callable[..., Any] | None = None,
    feedback: Feedback | None = None,
    progress: Progress | None = None,
    **keys: Any,
) -> dict[str, Any]:
    """Student and teacher on a run's or a recipe's problems, and what training changed: what `vpd-mlx eval --json` prints.

    Args:
        run: a `Run` or its folder, a recipe, its name or its file.
        adapter: an adapter's folder; the run's by default, none for a recipe.
        split: which problems.
        greedy: the likeliest completion alone; nothing is sampled.
        base: evaluate the base model, too, and pair the two problem by problem.
        verify: the verifier, and
        feedback: the feedback sources, of a run that was trained with functions.
        progress: what is told how far it is; nothing by default.
        keys: keys of the recipe, e.g. `evaluation={"samples": 8}`.

    Raises:
        VpdError: an argument is wrong, the verifier failed, or a problem was trained on.
    """
    from vpd_mlx.run.change import evaluate_change

    folder = None
    if isinstance(run, run_folder.Run):
        run = run.path
    if not isinstance(run, Recipe) and (Path(run) / RECIPE_FILE).is_file():
        folder = Path(run)
        run, adapter = load_recipe(folder / RECIPE_FILE), folder / "adapters" if adapter is None else adapter
    elif not isinstance(run, Recipe):
        run = load_recipe(run)
    raw, keys = run.model_dump(mode="json"), {**keys, "feedback": feedback}
    recipe, handed = combine("vpd.evaluate", raw, folder or Path(), verify=verify, **keys)
    at = None if adapter is None else Path(adapter)
    return evaluate_change(recipe, at, folder, split, base=base, greedy=greedy, progress=progress, handed=handed)


class Session:
    """A run in your hands, without a run folder: roll out, look, learn, evaluate, save.

    `for groups in session.rollouts(): session.learn(groups)` makes the updates that `vpd-mlx train` makes.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.step = 0
        self._rolled_out: Any = None

    @classmethod
    def load(
        cls,
        recipe: str | Path | Recipe,
        *,
        problems: Problems | None = None,
        held_out: Problems | None = None,
        verify: Callable[..., Any] | None = None,
        feedback: Feedback | None = None,
        algorithm: str | Callable[..., Any] | None = None,
        progress: Progress | None = None,
        **keys: Any,
    ) -> Self:
        """Load all that a recipe needs: a `Recipe`, a built-in one's name or a file. The other arguments are those of `train`.

        Raises:
            VpdError: an argument, data or model is unusable.
        """
        raw = (recipe if isinstance(recipe, Recipe) else load_recipe(recipe)).model_dump(mode="json")
        keys |= {"problems": problems, "held_out": held_out, "feedback": feedback, "algorithm": algorithm}
        cfg, handed = combine("vpd.Session.load", raw, Path(), verify=verify, **keys)
        from vpd_mlx.run.step import Trainer

        trainer = Trainer.build(cfg, progress, handed=handed)
        trainer.sources.ready()
        return cls(trainer)

    @property
    def recipe(self) -> Recipe:
        """The recipe, every key resolved."""
        return self.trainer.recipe

    def rollouts(self) -> Iterator[list[Group]]:
        """The groups of one step after another, graded and with contexts, until the recipe's last step."""
        from vpd_mlx.common.stats import Clock

        while self.step < self.recipe.steps:
            self.step += 1
            clock = Clock()
            batch, groups = self.trainer.roll_out(self.step, clock)
            self._rolled_out = batch, clock
            yield groups

    def learn(self, groups: Sequence[Group]) -> dict[str, Any]:
        """Let the algorithm learn from groups of the current step; returns the step's metrics.

        Raises:
            RunError: nothing was rolled out yet, or numbers are not finite.
        """
        if self._rolled_out is None:
            raise RunError("session.learn: no rollouts yet; call it with the groups that session.rollouts() yields")
        batch, clock = self._rolled_out
        return self.trainer.learn(self.step, batch, groups, clock)[0]

    def evaluate(self) -> Evaluation:
        """Student and teacher on the held-out problems, by the weights of now."""
        return Evaluation(self.trainer.evaluate(self.step)[0])

    def save(self, folder: str | Path) -> Path:
        """Write the adapter in mlx-lm's format; returns its folder."""
        self.trainer.policy.save_adapter(Path(folder))
        return Path(folder)

    def close(self) -> None:
        """End what feedback sources have under way."""
        self.trainer.sources.close()


def _folder(claims: contextlib.ExitStack, out: str | Path | None, name: str, resume: bool, overwrite: bool) -> Path:
    """The folder to train in, once it is seen to fit what is asked; one that is chosen here is claimed for as long."""
    base = Path("runs") / name
    own = out is None and not resume and not overwrite and re.fullmatch(NAME, name) is not None
    folder = Path(out) if out is not None else claims.enter_context(claimed_folder(base)) if own else base
    held = (folder / RECIPE_FILE).is_file()
    if resume and not held:
        remedy = "name a run's folder with out=, or leave resume out"
        raise config_error("resume", f"{folder} holds no run", remedy, "vpd.train")
    if held and not resume and not overwrite:
        remedy = "name another folder, or give resume=True or overwrite=True"
        raise config_error("out", f"{str(folder)!r} holds a run already", remedy, "vpd.train")
    return folder


@contextlib.contextmanager
def _asked(stop: Stop) -> Iterator[None]:
    """Ctrl-C, or a notebook's stop button, stops the run alone; after any other signal the program ends as without a run."""
    from vpd_mlx.run.stopping import stoppable

    try:
        with stoppable(stop):
            yield
    finally:
        if stop.signal not in (None, signal.SIGINT):
            signal.raise_signal(stop.signal)
