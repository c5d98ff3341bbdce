"""The recipe: one YAML file, a strict model behind it, and all faults reported at once.

Precedence is preset < recipe < `--set key=value` < named flag. Each part of the program carries its own section of the recipe.
Here they are put together: those of the engine and the run by name, those of tasks, feedback sources and algorithms from the
lists `TASKS`, `SOURCES` and `ALGORITHMS`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeVar, Union

from pydantic import Field, create_model
from pydantic.fields import FieldInfo

from vpd_mlx.algos import ALGORITHMS, Entry
from vpd_mlx.algos.presets import EARLIER, PRESETS
from vpd_mlx.common.settings import OneOf, Positive, Section, absolute, merged, parse_yaml, spelt_out, to_yaml, validate
from vpd_mlx.engine.settings import LoraSettings, MemorySettings, OptimizerSettings, RolloutSettings
from vpd_mlx.errors import ConfigError, Fault, config_error
from vpd_mlx.feedback import FeedbackSettings
from vpd_mlx.feedback.prompts import Templates
from vpd_mlx.tasks import TASKS
from vpd_mlx.tasks.general import RetainSettings

__all__ = [
    "NAME",
    "Recipe",
    "builtin_recipes",
    "check_recipe",
    "dump",
    "json_schema",
    "load_recipe",
    "made_recipe",
    "model_fields",
    "preset_faults",
    "resolve_recipe_path",
    "schema_file",
]

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"  # of a run, which is that of its folder, too
RECIPE_VERSION = 4
"""Goes up when a key that a run folder leaves `null`, or does not have, comes to mean something else (`EARLIER`)."""


class EvaluationSettings(Section):
    """Evaluation on held-out problems, before, after and during training."""

    every: Positive | None = Field(None, description="Evaluate every n steps; null evaluates before and after only.")
    patience: Positive | None = Field(
        None,
        description="Stop after this many selections without a better student, or evaluations where there are no selections "
        "(then it needs `every`). null never stops.",
    )
    keep_best: bool = Field(
        True,
        description="End with the best adapter instead of the last one. It is chosen on held-out problems that are set aside for "
        "that and never reported on; with fewer than 8 held-out problems none are, and the last one is handed over.",
    )
    selection: Annotated[int, Field(ge=2)] = Field(
        32, description="Most problems to set aside for `keep_best`; never more than a quarter of the held-out ones."
    )
    selection_every: Positive = Field(
        10, description="Score the student on them every n steps: a likeliest and a sampled completion of each."
    )
    problems: Positive = Field(200, description="Most held-out problems to evaluate on.")
    samples: Positive = Field(4, description="k of avg@k: sampled completions per problem.")
    temperature: float = Field(0.6, gt=0, description="Sampling temperature.")
    top_p: float = Field(0.95, gt=0, le=1, description="Nucleus sampling.")

    def notes(self, recipe: Any) -> Iterator[str]:
        """Trained is the policy at the temperature of the rollouts."""
        trained = recipe.rollout.temperature
        if self.temperature > trained:
            yield (
                f"evaluation.temperature: {self.temperature:g} is above rollout.temperature {trained:g}, at which the policy is "
                "trained: evaluated is a hotter one; lower it, or raise rollout.temperature"
            )

    def faults(self, recipe: Any) -> Iterator[Fault]:
        """Patience counts selections, or evaluations during training."""
        if self.patience is not None and self.every is None and not self.keep_best:
            remedy = "set evaluation.every or evaluation.keep_best, too"
            yield Fault("evaluation.patience", "needs evaluations during training", remedy)


class WarmStartSettings(Section):
    """Supervised steps on demonstrations before the first step, for a student that succeeds at nothing: there is then no right
    answer to learn from. Left out where it is right in one of a few sampled answers to training problems."""

    paths: ClassVar[tuple[str, ...]] = ("data",)

    steps: int = Field(
        0,
        ge=0,
        description="Supervised steps of `rollout.prompts` demonstrations each, at `optimizer.learning_rate`; 0 has none.",
    )
    data: str | None = Field(
        None,
        description="Rows with a right answer, in the task's columns; null takes the task's training rows. None may be held out.",
    )

    def faults(self, recipe: Any) -> Iterator[Fault]:
        """Demonstrations are for steps."""
        if self.data is not None and not self.steps:
            yield Fault("warm_start.data", "means nothing with warm_start.steps 0", "set warm_start.steps, e.g. to 20")


class CheckpointSettings(Section):
    """What a run keeps, to be resumed from."""

    every: Positive = Field(20, description="Steps between checkpoints. One is written at every stop as well.")
    keep: Positive = Field(2, description="Newest checkpoints kept; each holds the best adapter so far, too.")


class LoggingSettings(Section):
    """Services that receive the run's figures and recipe, never its texts. If one fails, a note says so and the run goes on."""

    to: list[Literal["wandb", "swanlab", "trackio", "tensorboard"]] = Field(
        [],
        description="Services, each an extra of its own: `pip install 'vpd-mlx[wandb]'`. Log in to each as it requires.",
    )
    project: str = Field("vpd-mlx", min_length=1, description="Project at wandb, swanlab or trackio.")

    def faults(self, recipe: Any) -> Iterator[Fault]:
        """A service is named once."""
        if len(set(self.to)) != len(self.to):
            yield Fault("logging.to", f"{self.to} names a service twice", "name each once")


Kind = TypeVar("Kind", bound=Section)
_TASK: Any = Annotated[Union[tuple(settings for settings, _ in TASKS)], Field(discriminator="kind")]  # noqa: UP007


class _Core(Section):
    """Everything that decides a run."""

    paths: ClassVar[tuple[str, ...]] = ("adapter",)

    version: Literal[4] = Field(
        4,
        description="Version of the recipe format. Versions 1 to 3, which older run folders hold, keep the defaults of then.",
    )
    name: str = Field(pattern=f"^{NAME}$", description="Name of the run folder.")
    description: str = Field("", description="One line for `vpd-mlx recipes`.")
    algorithm: Annotated[str, OneOf(ALGORITHMS)] = Field(
        "vpd", description="What is learned from the rollouts of a step."
    )
    preset: Annotated[str, OneOf(PRESETS)] = Field(
        "default",
        description="Values laid under the keys that the recipe gives, for its algorithm: see [presets](#presets).",
    )
    model: str = Field(description="A folder (relative to the recipe) or a hub id, in mlx-lm's format.")
    model_revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    thinking: bool = Field(False, description="Let the chat template turn thinking on, for student and teacher.")
    seed: int = Field(0, ge=0, description="Seed of everything random.")
    on_collapse: Literal["stop", "revert", "warn"] = Field(
        "revert",
        description="When the run is being harmed (docs/reading-curves.md): `revert` goes back to the best adapter so far and on "
        "at half the learning rate, three times at most; `stop` ends with the best adapter; `warn` only says so.",
    )
    steps: Positive = Field(100, description="Rollout batches of the whole run.")
    on_no_gap: Literal["stop", "warn"] = Field(
        "stop",
        description="What to do before the first step when the teacher under feedback is no better than the student, measured on "
        "8 problems or more: `stop`, or `warn` and train. Only for algorithms that learn from feedback.",
    )
    task: _TASK = Field(description="Problems and verifier.")
    adapter: str | None = Field(
        None,
        description="Adapter folder in mlx-lm's format, of `mlx_lm.lora` or of a run here, to continue from. Its rank, scale, "
        "layers and keys are taken over; null starts with a fresh adapter.",
    )
    warm_start: WarmStartSettings = WarmStartSettings()
    lora: LoraSettings = LoraSettings()
    feedback: FeedbackSettings = FeedbackSettings()
    templates: Templates = Templates()
    rollout: RolloutSettings = RolloutSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    memory: MemorySettings = MemorySettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    retain: RetainSettings = RetainSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    logging: LoggingSettings = LoggingSettings()

    @property
    def entry(self) -> Entry:
        """The recipe's algorithm in `ALGORITHMS`."""
        return ALGORITHMS[self.algorithm]

    @property
    def max_teacher_tokens(self) -> int:
        """Most tokens of the teacher's prompt."""
        return self.feedback.max_prompt_tokens or self.rollout.max_prompt_tokens

    def section(self, kind: type[Kind]) -> Kind:
        """The section of this type. This is how an algorithm finds its own, which the type of a recipe does not name."""
        return next(value for value in self.sections().values() if isinstance(value, kind))

    def sections(self) -> dict[str, Section]:
        """All sections by name."""
        return {name: value for name in type(self).model_fields if isinstance(value := getattr(self, name), Section)}

    def contradictions(self) -> Iterator[Fault]:
        """Values that are valid alone and contradict each other."""
        for section in self.sections().values():
            yield from section.faults(self)

    def notices(self) -> list[str]:
        """What deserves a word when a run begins."""
        return [note for section in self.sections().values() for note in section.notes(self)]

    def located(self, folder: Path) -> Self:
        """The recipe with every path in it absolute, as seen from its folder."""
        recipe, local = super().located(folder), absolute(self.model, folder)
        if not self.model.startswith((".", "/", "~")) and not Path(local).exists():
            return recipe  # a model on the hub
        return recipe.model_copy(update={"model": local})


# Which sections algorithms read is known only when their list is: the model is made then. A type checker cannot follow that; it
# sees the fields above, and the type that `section` returns.
if TYPE_CHECKING:
    Recipe = _Core
else:
    _sections = {name: kind for entry in ALGORITHMS.values() for name, kind in entry.sections.items()}
    Recipe = create_model(
        "Recipe",
        __base__=_Core,
        __module__=__name__,
        __doc__=_Core.__doc__,
        **{name: (kind, kind()) for name, kind in _sections.items()},
    )


# --- reading


def _shipped() -> Path:
    package = Path(__file__).parent
    # A wheel carries the recipes inside the package; in a checkout they stand beside it.
    return package / "_recipes" if (package / "_recipes").is_dir() else package.parent / "recipes"


def schema_file() -> Path:
    """The file of `json_schema` that comes with the package."""
    return _shipped() / "recipe.schema.json"


def json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe's file, by which editors complete and check; what keys say of each other only loading tells."""
    schema = Recipe.model_json_schema()
    version = schema["properties"]["version"]
    del version["const"]
    version["enum"] = [*EARLIER, RECIPE_VERSION]  # loading turns the earlier ones into this one
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def builtin_recipes() -> dict[str, Path]:
    """Name -> file of every recipe that comes with the package."""
    files = sorted(_shipped().glob("*/*.yaml"))
    return {f.parent.name if f.stem == f.parent.name else f"{f.parent.name}/{f.stem}": f for f in files}


def resolve_recipe_path(recipe: str) -> Path:
    """The file of a recipe, by its built-in name or its path.

    Raises:
        ConfigError: neither exists.
    """
    known = builtin_recipes()
    if recipe in known:
        return known[recipe]
    path = Path(recipe).expanduser()
    if path.is_file():
        return path
    close = difflib.get_close_matches(recipe, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else "give a .yaml file, or a name that `vpd-mlx recipes` lists"
    what = "there is no such file or built-in recipe"
    if path.is_dir():
        inside = next(iter(sorted(path.glob("*.yaml"))), path / "….yaml")
        what, hint = "is a folder, not a file", f"name the recipe in it, e.g. {inside}"
    raise config_error(recipe, what, hint)


def load_recipe(path: Path, overrides: list[tuple[str, Any]] | None = None) -> Recipe:
    """Read, override and check a recipe; paths in it, which are relative to its folder, become absolute.

    Raises:
        ConfigError: every fault found, at once.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise config_error(str(path), f"cannot be read ({error})", "give a readable text file") from None
    raw = parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        kind = "empty" if raw is None else f"a {type(raw).__name__}"
        remedy = "write keys and values, e.g. `name: mine`"
        raise config_error("text", f"the recipe is {kind}", remedy, str(path))
    return made_recipe(raw, str(path), path.parent, overrides)


def made_recipe(
    raw: dict[str, Any], where: str, folder: Path, overrides: list[tuple[str, Any]] | None = None
) -> Recipe:
    """The recipe of these values, overridden and checked; paths in it, which are relative to `folder`, become absolute.

    Raises:
        ConfigError: every fault found, at once; `where` says what is wrong.
    """
    version = raw.get("version", RECIPE_VERSION)
    if isinstance(version, int) and not isinstance(version, bool) and version > RECIPE_VERSION:
        raise config_error(
            "version", f"{version} is newer than {RECIPE_VERSION}", "update vpd-mlx to read this recipe", where
        )
    faults = []
    for key, value in overrides or []:
        raw = spelt_out(Recipe, raw)
        faults += _assign(raw, key, value)
    if any(key == "preset" for key, _ in overrides or []):
        faults += preset_faults(raw)
    try:
        return check_recipe(raw, where, folder, faults)
    except ConfigError as error:
        overridden = {key for key, _ in overrides or []}
        blamed = any(f.path in overridden for f in error.faults)
        raise ConfigError(error.faults, f"{where}, as overridden" if blamed else where) from None


def _assign(raw: dict[str, Any], key: str, value: Any) -> list[Fault]:
    """Set a dotted key in a tree of mappings; a value where a section is needed is a fault."""
    *parents, last = key.split(".")
    node = raw
    for i, part in enumerate(parents):
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            place = ".".join(parents[: i + 1])
            return [Fault(key, f"{place} is {child!r}, not a section", f"set {place} itself")]
        node = child
    node[last] = value
    return []


def check_recipe(raw: dict[str, Any], where: str, folder: Path, faults: Sequence[Fault] = ()) -> Recipe:
    """The recipe of these values; paths in it, which are relative to `folder`, become absolute.

    Raises:
        ConfigError: every fault found, `faults` among them; `where` says what is wrong.
    """
    recipe, found = validate(Recipe, _complete(spelt_out(Recipe, raw)))
    found = [*faults, *found]
    if recipe is not None:
        known = {f.path for f in found}  # a key that was dropped as faulty is not reported a second time
        found += [f for f in recipe.contradictions() if f.path not in known]
    if found or recipe is None:
        raise ConfigError(found, where)
    return recipe.located(folder)


def _complete(raw: dict[str, Any]) -> dict[str, Any]:
    """The values with those of the preset laid under them, and for an earlier version what it meant where it says nothing."""
    algorithm, version = _algorithm(raw), raw.get("version", RECIPE_VERSION)
    if (name := _preset(raw)) is not None:
        raw = merged(PRESETS[name].values_for(algorithm), raw)
    if type(version) is int and version in EARLIER:
        raw = {**_filled(raw, EARLIER[version].values_for(algorithm)), "version": RECIPE_VERSION}
    return raw


def _preset(raw: Mapping[str, Any]) -> str | None:
    name = raw.get("preset")
    return name if isinstance(name, str) and name in PRESETS else None


def _algorithm(raw: Mapping[str, Any]) -> str:
    return str(raw.get("algorithm", Recipe.model_fields["algorithm"].default))


def _filled(raw: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, with others where they are missing or null."""
    out = dict(raw)
    for key, value in values.items():
        if isinstance(value, Mapping):
            inner = out.get(key, {})
            out[key] = _filled(inner, value) if isinstance(inner, Mapping) else inner
        elif out.get(key) is None:
            out[key] = value
    return out


def _gives(raw: Any, values: Mapping[str, Any]) -> bool:
    """Whether the recipe has every key of these values."""
    return isinstance(raw, Mapping) and all(
        key in raw and (not isinstance(value, Mapping) or _gives(raw[key], value)) for key, value in values.items()
    )


def preset_faults(raw: Mapping[str, Any]) -> list[Fault]:
    """A preset that is chosen for a recipe which gives every key itself, as that of a run folder does."""
    name = _preset(raw)
    values = {} if name is None else PRESETS[name].values_for(_algorithm(raw))
    if not values or not _gives(raw, values):
        return []
    remedy = "set the keys themselves, or name the preset where a recipe is first read"
    return [Fault("preset", f"{name!r} changes nothing: the recipe gives every key that it has", remedy)]


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every key written out."""
    return to_yaml(recipe.model_dump(mode="json"))


def model_fields(model: type[Section] = Recipe, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(dotted key, field) of every key of a recipe, depth first. `task`, which is one of several sections, is one key."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from model_fields(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field
