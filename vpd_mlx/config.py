"""The recipe: one YAML file, a strict model behind it, and all faults reported at once.

Precedence is recipe < `--set key=value` < named flag. Every field's description is its documentation: `docs/recipe.md`
is generated from here.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vpd_mlx.errors import ConfigError, Fault

__all__ = [
    "HUB",
    "RECIPE_VERSION",
    "DatasetTask",
    "Recipe",
    "builtin_recipes",
    "dump",
    "load_recipe",
    "model_fields",
    "parse_set",
    "resolve_recipe_path",
]

RECIPE_VERSION = 1
HUB = "hf://"  # what data on the Hugging Face hub begins with

Positive = Annotated[int, Field(ge=1)]
Unit = Annotated[float, Field(ge=0.0, le=1.0)]
Algorithm = Literal["vpd", "sdpo", "opsd", "grpo", "joint", "reshape", "reweight"]
SourceName = Literal["sibling", "verifier", "critique", "reference", "command", "server", "human", "replay"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Lora(_Section):
    """The adapter: low-rank matrices on the frozen base (mlx-lm's format)."""

    rank: Positive = Field(16, description="Rank of the two matrices.")
    scale: float = Field(2.0, gt=0, description="Factor of the low-rank product (mlx-lm's `scale`, not alpha / rank).")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout on the adapter's input in updates. Scores and rollouts never drop."
    )
    layers: int = Field(-1, ge=-1, description="Adapt the last n blocks; -1 adapts all.")
    keys: list[str] | None = Field(
        None, description="Names of the linear layers within a block, e.g. `self_attn.q_proj`; null adapts all of them."
    )


class AdditionTask(_Section):
    """Sums of two numbers of `digits` digits, made on the spot; the verifier answers in words per digit."""

    kind: Literal["addition"]
    digits: int = Field(2, ge=1, le=6, description="Digits of each number.")
    train_only: Literal["carry", "no-carry"] | None = Field(None, description="Train on such sums only; null on all.")
    eval_only: Literal["carry", "no-carry"] | None = Field(
        "carry", description="Evaluate on such held-out sums only; null on all."
    )


class DatasetTask(_Section):
    """Keys of every task whose rows come from a file."""

    data: str = Field(
        description="Training rows: a .jsonl, .json, .csv or .parquet file, relative to the recipe, or a file of a data set "
        "on the Hugging Face hub: `hf://owner/name@revision/path`."
    )
    data_revision: str | None = Field(
        None, description="Branch, tag or commit of `hf://` files that name none. One of the two must."
    )
    eval_data: str | None = Field(
        None, description="Held-out rows. Without it a share of `data` is held out, chosen by a hash of each row."
    )
    held_out: float = Field(
        0.1, gt=0, lt=1, description="Share of `data` held out for evaluation where there is no `eval_data`."
    )
    prompt: str = Field("prompt", description="Column of the prompt: text, or a list of chat messages.")
    answer: str = Field("answer", description="Column of the answer.")
    reference: str = Field("reference", description="Column of a worked solution, used where a row has it.")
    system: str = Field("system", description="Column of the system message, used where a row has it.")


class ExactTask(DatasetTask):
    """The completion must equal the answer, white space at the ends aside."""

    kind: Literal["exact"]
    ignore_case: bool = Field(False, description="Compare without regard to case.")


class MathTask(DatasetTask):
    r"""The final answer, in `\boxed{}` or after `####`, must equal the row's in value."""

    kind: Literal["math"]
    timeout: float = Field(10.0, gt=0, description="Seconds for one comparison; a longer one is no verdict.")


class McqTask(DatasetTask):
    """Multiple choice: the letter of the right option inside `<answer>` tags."""

    kind: Literal["mcq"]


class RegexTask(DatasetTask):
    """The completion must match a pattern."""

    kind: Literal["regex"]
    pattern: str | None = Field(None, description="Pattern of all rows; null takes each row's from the answer column.")
    match: Literal["whole", "anywhere"] = Field("whole", description="Where in the completion the pattern must match.")
    ignore_case: bool = Field(False, description="Match without regard to case.")
    timeout: float = Field(1.0, gt=0, description="Seconds for one match; a longer one is no verdict.")


class JsonSchemaTask(DatasetTask):
    """The completion must be JSON that fits a schema; where a row has an answer, it must equal that, too."""

    kind: Literal["json-schema"]
    # Not called `schema`, which is a method of every section.
    schema_file: str | None = Field(
        None, description="File with the schema of all rows, relative to the recipe; null takes each row's own."
    )
    schema_column: str = Field("schema", description="Column of a row's own schema: an object, or JSON text.")


class CodeTask(DatasetTask):
    """Write a program that passes tests: standard input and output, function calls, or assertions."""

    kind: Literal["code"]
    tests: str = Field("tests", description="Column of the tests that grade training and give feedback.")
    private_tests: str = Field(
        "private_tests", description="Column of the tests that decide in evaluation; without it `tests` decide."
    )
    entry_point: str = Field(
        "entry_point",
        description="Column with the name of the function under test, or with an object that holds it as `func_name`.",
    )
    setup: str = Field("setup", description="Column of code that assertions need; it never runs beside the completion.")
    strict: bool = Field(False, description="Refuse to run where the machine cannot isolate programs in full.")
    wall: float = Field(8.0, gt=0, description="Seconds for one program: one input, or all calls of a test set.")
    cpu: Positive = Field(4, description="The same in seconds of CPU time.")
    memory_mb: int = Field(512, ge=64, description="Memory of one program.")
    output_kb: Positive = Field(256, description="Most a program may print or return.")
    feedback_chars: int = Field(
        400, ge=20, description="Longest input, expected or got value in feedback, in characters; more is cut."
    )


class ReasoningGymTask(_Section):
    """Any task of the reasoning-gym library, by name and settings, judged by that library's own scorer."""

    kind: Literal["reasoning_gym"]
    name: str = Field(description="The library's name of the task, e.g. `spell_backward`.")
    settings: dict[str, Any] = Field({}, description="Settings of that task, as the library names them.")
    rows: Positive = Field(1000, description="Problems to make.")
    seed: int = Field(0, ge=0, description="Seed of the problems.")
    held_out: float = Field(0.1, gt=0, lt=1, description="Share held out for evaluation, by a hash of name and index.")
    partial_credit: bool = Field(True, description="Take over the scorer's part marks; else only a full score counts.")
    timeout: float = Field(10.0, gt=0, description="Seconds for scoring one answer; a longer one is no verdict.")


class PythonTask(DatasetTask):
    """A verifier of your own: a Python file with `verify(problem, completion)`."""

    kind: Literal["python"]
    verifier: str = Field(
        description="Python file, relative to the recipe, with `verify(problem, completion)` that returns a score in "
        "0..1, a bool, or `(score, feedback text)`."
    )


Task = Annotated[
    AdditionTask
    | ExactTask
    | MathTask
    | McqTask
    | RegexTask
    | JsonSchemaTask
    | CodeTask
    | ReasoningGymTask
    | PythonTask,
    Field(discriminator="kind"),
]


class Server(_Section):
    """A model behind an OpenAI-compatible endpoint, asked for feedback: mlx_lm.server, LM Studio, Ollama, llama.cpp …"""

    url: str | None = Field(
        None,
        pattern=r"^https?://[^/\s]+(/\S*)?$",
        description="Where it listens, e.g. `http://127.0.0.1:8080/v1`. Source `server` needs it.",
    )
    model: str = Field(
        "default_model", description="Name of the model in requests; mlx_lm.server knows `default_model`."
    )
    api_key_env: str | None = Field(
        None,
        description="Name of the environment variable that holds the key; the key itself never stands in a recipe.",
    )
    concurrency: Positive = Field(4, description="Requests under way at once.")
    timeout: float = Field(60.0, gt=0, description="Seconds for one answer.")
    retries: int = Field(
        3, ge=0, description="Further attempts after a timeout, a lost connection, status 429 or 5xx, each later."
    )
    budget_requests: Positive | None = Field(
        None,
        description="Most requests of a run, retries among them; then it has nothing more to say. null has no bound.",
    )
    cache_dir: str | None = Field(
        None, description="Folder of answers by request, to be shared by runs; null keeps them in the run folder."
    )
    temperature: float = Field(0.0, ge=0, description="Sampling temperature of the answers.")
    max_tokens: Positive = Field(256, description="Longest answer in tokens.")


class Feedback(_Section):
    """Where the teacher's context C comes from."""

    sources: list[SourceName] = Field(
        ["sibling", "verifier"],
        min_length=1,
        description="In order of preference: the first that has something to say.",
    )
    with_solution: bool = Field(
        False, description="A failure that has both a sibling solution and verifier text shows the teacher both."
    )
    include_attempt: bool = Field(
        False, description="Show the teacher the student's own failed attempt, too. It was found to hurt."
    )
    max_tokens: Positive = Field(1024, description="Longest context in tokens; more is cut from its middle.")
    critique_tokens: Positive = Field(160, description="Longest critique the model writes for itself, in tokens.")
    on_success: bool = Field(
        False,
        description="Ask command, server, human and replay about successes, too, so that having feedback does not give "
        "the failure away.",
    )
    max_failures: Positive = Field(
        20, description="Failures of command or server in a row, without one answer between, that stop the run."
    )
    command: list[str] | None = Field(
        None,
        min_length=1,
        description="Source `command`: the program and its arguments, files relative to the recipe. It reads and writes "
        "JSON lines, see docs/feedback-command.md.",
    )
    command_timeout: float = Field(30.0, gt=0, description="Seconds for one answer of the program, its start included.")
    command_workers: Positive = Field(1, description="Copies of the program that work side by side.")
    replay: str | None = Field(
        None,
        description="Source `replay`: a run folder, or a .jsonl file with `problem`, `feedback` and, where it is about one "
        "completion, `completion`.",
    )
    server: Server = Server()


class Templates(_Section):
    """Wording of the prompts. null keeps the built-in text; `{prompt}` and `{context}` are filled in."""

    student: str | None = Field(None, description="The student's user message, from `{prompt}`.")
    sibling: str | None = Field(None, description="The teacher's user message with another solution of the group.")
    verifier: str | None = Field(None, description="The teacher's user message with the verifier's words.")
    critique: str | None = Field(None, description="The teacher's user message with a critique.")
    reference: str | None = Field(None, description="The teacher's user message with the reference solution.")
    both: str | None = Field(None, description="The teacher's user message with `{solution}` and `{context}`.")
    review: str | None = Field(
        None, description="The teacher's user message with feedback from command, server, human or replay."
    )
    attempt: str | None = Field(None, description="Text before the feedback when `include_attempt`, with `{attempt}`.")
    critic: str | None = Field(
        None, description="What the critic is asked, with `{prompt}`, `{attempt}`, `{answer}` and `{feedback}`."
    )
    critic_right: str | None = Field(
        None, description="The same of a right attempt: what a server is asked when `feedback.on_success`."
    )


class Rollout(_Section):
    """Sampling in training."""

    prompts: Positive = Field(32, description="Problems per step.")
    group_size: Positive = Field(8, description="Completions per problem.")
    max_prompt_tokens: Positive = Field(2048, description="Longest prompt, student's or teacher's, in tokens.")
    max_completion_tokens: Positive = Field(1024, description="Longest completion in tokens.")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling; 1 samples from the whole distribution.")
    success_threshold: float = Field(0.5, gt=0, le=1, description="A score of at least this is a success.")


class Optimizer(_Section):
    """AdamW, warm-up, clipping. The E-step and the M-step have moments of their own."""

    learning_rate: float = Field(
        1e-4, gt=0, description="Rate after warm-up. LoRA wants about 10 x a full fine-tune's."
    )
    warmup_steps: int = Field(10, ge=0, description="Updates over which the rate rises linearly to its full value.")
    weight_decay: float = Field(0.01, ge=0, description="Decoupled weight decay.")
    beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the first moment.")
    beta2: float = Field(0.999, ge=0, lt=1, description="Decay of the second moment.")
    grad_clip: float | None = Field(1.0, gt=0, description="Largest gradient norm of one update; null clips nothing.")


class EStep(_Section):
    """Binary Classifier Optimization of the teacher (arXiv 2605.15113, Eq. 7 to 9)."""

    every: Positive = Field(5, description="F: an E-step before every F-th M-step, on the same rollouts.")
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
    minibatch_prompts: Positive | None = Field(None, description="Problems per update; null takes the whole batch.")
    learning_rate_ratio: float = Field(1.0, gt=0, description="The E-step's rate over `optimizer.learning_rate`.")


class MStep(_Section):
    """Distillation of the teacher into the student (Eq. 10)."""

    alpha: Unit = Field(0.5, description="0 is KL(teacher|student), 1 is KL(student|teacher), 0.5 Jensen-Shannon.")
    top_k: Positive | None = Field(
        None, description="Support: the student's k likeliest tokens; null is the vocabulary."
    )
    tail: bool = Field(True, description="With top_k: a bucket for the remaining mass; otherwise renormalise.")
    weighting: Literal["sequence", "token"] = Field(
        "sequence", description="Mean over sequences of their token means, or mean over all tokens."
    )
    importance_clip: float | None = Field(
        None, gt=0, description="Multiply by min(pi / pi_sampler, this), without gradient; null does not."
    )
    minibatch_prompts: Positive | None = Field(None, description="Problems per update; null takes the whole batch.")
    epochs: Positive = Field(1, description="Passes over the batch.")


class Teacher(_Section):
    """Which weights stand behind the teacher's prompt in the M-step."""

    weights: Literal["live", "frozen", "ema", "trust_region", "adapter"] | None = Field(
        None,
        description="`live` weights; `frozen` for each batch; an `ema` of the student; `trust_region`: logits "
        "between the initial model's and the student's; `adapter`: a second LoRA of its own. null: vpd and the hybrids "
        "live, sdpo and opsd ema.",
    )
    ema_rate: float = Field(0.05, gt=0, le=1, description="Share of the student taken into the EMA after each batch.")
    trust_region: Unit = Field(
        0.5, description="Where the trust-region teacher's logits lie: 0 the initial model's, 1 the student's."
    )


class Grpo(_Section):
    """Group-relative policy optimisation, and its share in the hybrids."""

    scale: Literal["none", "group", "batch"] = Field(
        "none", description="Divide advantages by nothing, by the group's or by the batch's standard deviation."
    )
    clip_low: float = Field(0.2, gt=0, lt=1, description="The ratio is clipped below at 1 - this.")
    clip_high: float = Field(0.28, gt=0, description="The ratio is clipped above at 1 + this.")
    dual_clip: float | None = Field(3.0, gt=1, description="Bound of the loss for negative advantages; null has none.")
    weighting: Literal["sequence", "token"] = Field("token", description="Mean over sequences, or over all tokens.")
    kl: float = Field(0.0, ge=0, description="Coefficient of the k3 estimate of KL(student|initial model).")
    drop_uniform_groups: bool = Field(False, description="DAPO's filter: groups all right or all wrong are left out.")
    minibatch_prompts: Positive | None = Field(None, description="Problems per update; null takes the whole batch.")
    epochs: Positive = Field(1, description="Passes over the batch.")


class Hybrid(_Section):
    """How joint, reshape and reweight mix the two signals."""

    distill: float = Field(0.5, ge=0, description="Weight of the distillation (joint) or of log q - log pi (reshape).")
    reward: float = Field(0.5, ge=0, description="Weight of the policy gradient (joint) or of the advantage (reshape).")
    mix: Unit = Field(1.0, description="reweight: share of the teacher's token weights at the first step.")
    mix_decay_steps: Positive | None = Field(
        None, description="reweight: steps over which `mix` falls linearly to 0; null keeps it."
    )
    weight_clip: float = Field(0.2, gt=0, lt=1, description="reweight: token weights stay within 1 +- this.")


class Memory(_Section):
    """What the run may take of the machine."""

    micro_batch_tokens: Positive = Field(
        8192, description="Most tokens, padding included, in one forward and backward. Changes memory and speed only."
    )
    head_chunk: Positive | None = Field(
        None, description="Completion tokens per vocabulary-sized chunk; null chooses from the vocabulary."
    )
    gradient_checkpointing: bool = Field(False, description="Recompute blocks in the backward pass to save memory.")
    rollout_rows: Positive | None = Field(None, description="Most sequences decoded side by side; null decodes all.")
    rollout_streams: Positive | None = Field(
        None,
        description="Threads among which the prompts are divided for decoding; null takes 2 on a CPU and 1 on a GPU. "
        "Another number draws other completions.",
    )
    cache_limit_gb: float | None = Field(None, gt=0, description="Limit of MLX's buffer cache; null leaves it.")
    limit_gb: float | None = Field(None, gt=0, description="Limit of MLX's memory; null leaves it.")
    wired_limit_gb: float | None = Field(
        None,
        gt=0,
        description="Memory that macOS may not page out; null takes what the GPU's driver recommends. Macs only.",
    )


class Evaluation(_Section):
    """Held-out problems, before, after and on the way."""

    every: Positive | None = Field(None, description="Evaluate every n steps; null only before and after.")
    patience: Positive | None = Field(
        None, description="Stop after so many evaluations without a better student; needs `every`. null never stops."
    )
    keep_best: bool = Field(False, description="End with the adapter of the best evaluation instead of the last one.")
    problems: Positive = Field(200, description="Most held-out problems.")
    samples: Positive = Field(4, description="k of avg@k: sampled completions per problem.")
    temperature: float = Field(0.6, gt=0, description="Sampling temperature.")
    top_p: float = Field(0.95, gt=0, le=1, description="Nucleus sampling.")


class Checkpoint(_Section):
    """What is kept for going on."""

    every: Positive = Field(20, description="Steps between checkpoints. One is written at every stop as well.")
    keep: Positive = Field(2, description="Newest checkpoints kept; each holds the best adapter by evaluation, too.")


class Logging(_Section):
    """Services that get the run's figures and recipe, never its texts. One that fails gets a note and never stops the run."""

    to: list[Literal["wandb", "swanlab", "trackio", "tensorboard"]] = Field(
        [],
        description="Services, each an extra of its own: `pip install 'vpd-mlx[wandb]'`. Log in to them as they ask.",
    )
    project: str = Field("vpd-mlx", min_length=1, description="Project at wandb, swanlab or trackio.")


class Recipe(_Section):
    """All that decides a run."""

    version: Literal[1] = Field(1, description="Version of the recipe format.")
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the run folder.")
    description: str = Field("", description="One line for `vpd-mlx recipes`.")
    algorithm: Algorithm = Field("vpd", description="What happens with the rollouts of a step.")
    model: str = Field(description="A folder (relative to the recipe) or a hub id, in mlx-lm's format.")
    model_revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    thinking: bool = Field(False, description="Let the chat template turn thinking on, for student and teacher.")
    seed: int = Field(0, ge=0, description="Decides everything random.")
    steps: Positive = Field(100, description="Rollout batches of the whole run.")
    task: Task = Field(description="Problems and verifier.")
    lora: Lora = Lora()
    feedback: Feedback = Feedback()
    templates: Templates = Templates()
    rollout: Rollout = Rollout()
    optimizer: Optimizer = Optimizer()
    e_step: EStep = EStep()
    m_step: MStep = MStep()
    teacher: Teacher = Teacher()
    grpo: Grpo = Grpo()
    hybrid: Hybrid = Hybrid()
    memory: Memory = Memory()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    logging: Logging = Logging()


# --- reading


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-5 as a number (YAML 1.1 takes it for text) and refuses a key given twice."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\d[\d_]*)(?:\.[\d_]*)?(?:[eE][-+]?\d+)$|^[-+]?\d[\d_]*\.[\d_]*$|^[-+]?\.\d+(?:[eE][-+]?\d+)?$"
    ),
    list("-+0123456789."),
)


def _mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if key.value in seen:
            line = key.start_mark.line + 1
            raise ConfigError([Fault(f"line {line}", f"the key {key.value!r} is given twice", "keep one of them")])
        seen.add(key.value)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except ConfigError as error:
        raise ConfigError(error.faults, where) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date, for one
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}" if mark is not None else "text"
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError([Fault(line, f"not valid YAML ({what})", "mend that line")], where) from None


def builtin_recipes() -> dict[str, Path]:
    """Name -> file of every recipe that comes with the package."""
    package = Path(__file__).parent
    # A wheel carries the recipes inside the package; in a checkout they stand beside it.
    root = package / "_recipes" if (package / "_recipes").is_dir() else package.parent / "recipes"
    found: dict[str, Path] = {}
    for path in sorted(root.glob("*/*.yaml")):
        name = path.parent.name if path.stem == path.parent.name else f"{path.parent.name}/{path.stem}"
        found[name] = path
    return found


def resolve_recipe_path(recipe: str) -> Path:
    """A recipe's file, from a built-in name or a path.

    Raises:
        ConfigError: there is neither.
    """
    known = builtin_recipes()
    if recipe in known:
        return known[recipe]
    path = Path(recipe).expanduser()
    if path.is_file():
        return path
    close = difflib.get_close_matches(recipe, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"give a .yaml file or one of: {', '.join(known)}"
    what = "is a folder, not a file" if path.is_dir() else "there is no such file or built-in recipe"
    raise ConfigError([Fault(recipe, what, hint)], "recipe")


def parse_set(items: list[str]) -> list[tuple[str, Any]]:
    """`a.b=value` pairs with values read as YAML.

    Raises:
        ConfigError: an item without `=` or with an empty key.
    """
    pairs, faults = [], []
    for item in items:
        key, eq, text = item.partition("=")
        if not eq or not key.strip() or not all(key.split(".")):
            faults.append(Fault(item, "is not of the form key=value", "write e.g. --set rollout.group_size=4"))
            continue
        pairs.append((key.strip(), _parse_yaml(text, f"--set {key}")))
    if faults:
        raise ConfigError(faults, "--set")
    return pairs


def load_recipe(path: Path, overrides: list[tuple[str, Any]] | None = None) -> Recipe:
    """Read, override and check a recipe; paths in it become absolute, relative to the recipe's folder.

    Raises:
        ConfigError: every fault found, at once.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([Fault(str(path), f"cannot be read ({error})", "give a readable text file")]) from None
    raw = _parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        kind = "empty" if raw is None else f"a {type(raw).__name__}"
        raise ConfigError(
            [Fault("text", f"the recipe is {kind}", "write keys and values, e.g. `name: mine`")], str(path)
        )
    faults: list[Fault] = []
    version = raw.get("version", RECIPE_VERSION)
    if isinstance(version, int) and not isinstance(version, bool) and version > RECIPE_VERSION:
        newer = Fault("version", f"{version} is newer than {RECIPE_VERSION}", "update vpd-mlx to read this recipe")
        raise ConfigError([newer], str(path))
    for key, value in overrides or []:
        faults += _assign(raw, key, value)
    recipe, found = _validate(raw)
    faults += found
    if recipe is not None:
        known = {f.path for f in faults}  # what was dropped as faulty is not missing besides
        faults += [f for f in _contradictions(recipe) if f.path not in known]
    if faults or recipe is None:
        overridden = {key for key, _ in overrides or []}
        blamed = any(f.path in overridden for f in faults)
        raise ConfigError(faults, f"{path}, as overridden" if blamed else str(path))
    return _absolute_paths(recipe, path.parent)


def _assign(raw: dict[str, Any], key: str, value: Any) -> list[Fault]:
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


def _validate(raw: dict[str, Any]) -> tuple[Recipe | None, list[Fault]]:
    """The recipe if it can be had, and the faults. Faulty keys are dropped and the rest is read again, so that values
    which contradict each other are reported in the same go as wrong types."""
    try:
        return Recipe.model_validate(raw), []
    except ValidationError as error:
        faults = [_fault(raw, e) for e in error.errors()]
        pruned = _without(raw, [_location(e) for e in error.errors()])
        try:
            return Recipe.model_validate(pruned), faults
        except ValidationError:
            return None, faults


def _location(error: Any) -> list[str | int]:
    # A tagged union puts the tag into the location: task.addition.digits -> task.digits.
    loc = list(error["loc"])
    return loc[:1] + loc[2:] if loc[:1] == ["task"] and len(loc) > 1 else loc


def _fault(raw: Any, error: Any) -> Fault:
    loc = _location(error)
    path = ".".join(str(p) for p in loc) or "recipe"
    kind, value = error["type"], error["input"]
    shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
    if kind == "extra_forbidden":
        names = _sibling_keys(raw, loc)
        close = difflib.get_close_matches(str(loc[-1]), names, n=1)
        remedy = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(names)}"
        return Fault(path, f"unknown key (value {shown})", remedy)
    if kind == "missing":
        return Fault(path, "is required and missing", f"add `{loc[-1]}: …`")
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        tags = ", ".join(_task_kinds())
        got = value.get("kind") if isinstance(value, dict) else value
        return Fault(f"{path}.kind", f"{got!r} is not a kind of task", f"use one of {tags}")
    if kind == "model_type":
        return Fault(path, f"got {shown}", f"needs keys of its own, e.g. {path}.{_sibling_keys(raw, [*loc, ''])[0]}")
    if kind == "too_short":
        return Fault(path, f"got {shown}", f"needs at least {error['ctx']['min_length']} of them")
    if kind == "string_pattern_mismatch" and path == "name":
        return Fault(path, f"got {shown}", "needs letters, digits, dots and dashes, a letter or digit first")
    message = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return Fault(path, f"got {shown}", f"needs {message}")


def _task_kinds() -> dict[str, type[BaseModel]]:
    return {str(t.model_fields["kind"].annotation.__args__[0]): t for t in _task_types()}  # type: ignore[union-attr]


def _task_types() -> tuple[type[_Section], ...]:
    return Task.__origin__.__args__  # type: ignore[attr-defined,no-any-return]


def _sibling_keys(raw: Any, loc: list[str | int]) -> list[str]:
    model: Any = Recipe
    for part in loc[:-1]:
        if part == "task":
            model = _task_kinds().get(raw["task"].get("kind"), AdditionTask)
        else:
            model = model.model_fields[part].annotation
    return list(model.model_fields)


def _without(raw: dict[str, Any], locations: list[list[str | int]]) -> dict[str, Any]:
    def copy(node: Any) -> Any:
        return {k: copy(v) for k, v in node.items()} if isinstance(node, dict) else node

    out: dict[str, Any] = copy(raw)
    for loc in locations:
        node: Any = out
        keys = list(loc)
        for part in keys[:-1]:
            if not isinstance(node, dict) or part not in node:
                break
            node = node[part]
        else:
            if isinstance(node, dict) and keys:
                node.pop(keys[-1], None)
    return out


def _contradictions(r: Recipe) -> Iterator[Fault]:
    """Values that are fine alone and make no sense together."""
    n, sources = r.rollout.group_size, r.feedback.sources
    uses_feedback = r.algorithm != "grpo"
    if uses_feedback and n == 1 and sources == ["sibling"]:
        yield Fault(
            "rollout.group_size",
            "1 leaves no sibling to learn from, and `feedback.sources` has only sibling",
            "set rollout.group_size to 2 or more, or add another source",
        )
    elif uses_feedback and n == 1 and "sibling" in sources:
        yield Fault(
            "rollout.group_size",
            "1 leaves no sibling to learn from, yet `feedback.sources` names sibling",
            "set rollout.group_size to 2 or more, or take sibling out of feedback.sources",
        )
    if r.algorithm in ("grpo", "joint", "reshape", "reweight") and n == 1:
        yield Fault(
            "rollout.group_size",
            f"1 makes every advantage 0 under {r.algorithm}",
            "set rollout.group_size to 2 or more",
        )
    if len(set(sources)) != len(sources):
        yield Fault("feedback.sources", f"{sources} names a source twice", "name each once")
    if r.algorithm == "opsd" and "reference" not in sources:
        yield Fault(
            "feedback.sources",
            f"{sources} has no reference, and opsd learns from reference solutions",
            "set feedback.sources to [reference]",
        )
    if r.feedback.with_solution and not {"sibling", "verifier"} <= set(sources):
        yield Fault("feedback.with_solution", "needs both sibling and verifier", "name both in feedback.sources")
    yield from _unset_sources(r.feedback)
    if r.feedback.max_tokens >= r.rollout.max_prompt_tokens:
        yield Fault(
            "feedback.max_tokens",
            f"{r.feedback.max_tokens} leaves no room in rollout.max_prompt_tokens {r.rollout.max_prompt_tokens}",
            "lower feedback.max_tokens or raise rollout.max_prompt_tokens",
        )
    for section in ("e_step", "m_step", "grpo"):
        size = getattr(r, section).minibatch_prompts
        if size is not None and size > r.rollout.prompts:
            yield Fault(
                f"{section}.minibatch_prompts",
                f"{size} is more than rollout.prompts {r.rollout.prompts}",
                "lower it, or set it to null for the whole batch",
            )
    if len(set(r.logging.to)) != len(r.logging.to):
        yield Fault("logging.to", f"{r.logging.to} names a service twice", "name each once")
    if r.evaluation.patience is not None and r.evaluation.every is None:
        yield Fault("evaluation.patience", "needs evaluations on the way", "set evaluation.every, too")
    if r.algorithm == "joint" and r.hybrid.distill == 0 and r.hybrid.reward == 0:
        yield Fault("hybrid.distill", "0, and hybrid.reward is 0: nothing would be learned", "raise one of them")
    if r.teacher.weights == "adapter" and r.algorithm != "vpd":
        yield Fault(
            "teacher.weights",
            f"`adapter` is trained by the E-step, which {r.algorithm} does not have",
            "use algorithm vpd, or another kind of teacher",
        )
    longest = r.rollout.max_prompt_tokens + r.rollout.max_completion_tokens
    if r.memory.micro_batch_tokens < longest:
        yield Fault(
            "memory.micro_batch_tokens",
            f"{r.memory.micro_batch_tokens} cannot hold one sequence of {longest} tokens "
            "(rollout.max_prompt_tokens + rollout.max_completion_tokens)",
            f"raise it to {longest} or lower those two",
        )
    yield from _unpinned(r)
    for key, needed in (("student", ("{prompt}",)), *((k, ("{prompt}", "{context}")) for k in _CONTEXT_TEMPLATES)):
        text = getattr(r.templates, key)
        missing = [p for p in needed if text is not None and p not in text]
        if missing:
            yield Fault(f"templates.{key}", f"lacks {' and '.join(missing)}", "put it where the text belongs")
    for key, known in _TEMPLATE_FIELDS.items():
        # Braces of other tongues, LaTeX's \boxed{x} for one, are left alone: only what looks like one of our names counts.
        names = re.findall(r"(?<!\w)\{(\w+)\}", getattr(r.templates, key) or "")
        ours = {n for fields in _TEMPLATE_FIELDS.values() for n in fields}
        unknown = [n for n in names if n not in known and difflib.get_close_matches(n, ours, n=1, cutoff=0.75)]
        if unknown:
            yield Fault(
                f"templates.{key}",
                f"{{{unknown[0]}}} is filled by nothing",
                f"use {', '.join(f'{{{n}}}' for n in known)}, or take it out",
            )


def _unset_sources(f: Feedback) -> Iterator[Fault]:
    """A source that is named needs to know where to ask."""
    settings = {
        "command": ("command", f.command, "give the program as a list, e.g. [python3, critic.py]"),
        "server": ("server.url", f.server.url, "give its address, e.g. http://127.0.0.1:8080/v1"),
        "replay": ("replay", f.replay, "give a run folder or a .jsonl file"),
    }
    for name, (key, value, remedy) in settings.items():
        if name in f.sources and value is None:
            yield Fault(f"feedback.{key}", f"is not set, and `feedback.sources` names {name}", remedy)
    if f.on_success and not {"command", "server", "human", "replay"} & set(f.sources):
        yield Fault(
            "feedback.on_success",
            f"means nothing for {f.sources}",
            "name command, server, human or replay in feedback.sources, or take it out",
        )


def _unpinned(r: Recipe) -> Iterator[Fault]:
    """Data sets on the hub change; a run that is to be repeated names a revision."""
    if not isinstance(r.task, DatasetTask):
        return
    on_hub = {key: value for key in ("data", "eval_data") if (value := getattr(r.task, key)) and value.startswith(HUB)}
    for key, value in on_hub.items():
        if not re.fullmatch(HUB + r"[^/@]+/[^/@]+(@[^/@]+)?/.*[^/]", value):
            remedy = "write hf://owner/name@revision/path of a file in it"
            yield Fault(f"task.{key}", f"{value!r} names no file of a data set", remedy)
        elif "@" not in value and r.task.data_revision is None:
            yield Fault(
                f"task.{key}",
                f"{value!r} is not pinned",
                "set task.data_revision to a commit, or add @revision after the name",
            )
    if r.task.data_revision is not None and not any("@" not in value for value in on_hub.values()):
        yield Fault("task.data_revision", "no hf:// file takes its revision from here", "remove it")


_TEMPLATE_FIELDS = {
    "student": ("prompt",),
    **dict.fromkeys(("sibling", "verifier", "critique", "reference", "review"), ("prompt", "context")),
    "both": ("prompt", "context", "solution"),
    "attempt": ("attempt",),
    **dict.fromkeys(("critic", "critic_right"), ("prompt", "attempt", "answer", "feedback")),
}
_CONTEXT_TEMPLATES = ("sibling", "verifier", "critique", "reference", "both", "review")


def _absolute_paths(r: Recipe, folder: Path) -> Recipe:
    changes: dict[str, Any] = {}
    local = (folder / Path(r.model).expanduser()).resolve()
    looks_local = r.model.startswith((".", "/", "~")) or local.exists()
    if looks_local:
        changes["model"] = str(local)
    task = {}
    for key in ("data", "eval_data", "verifier", "schema_file"):
        value = getattr(r.task, key, None)
        if isinstance(value, str) and not value.startswith(HUB):
            task[key] = str((folder / Path(value).expanduser()).resolve())
    if task:
        changes["task"] = r.task.model_copy(update=task)
    changes["feedback"] = _absolute_feedback(r.feedback, folder)
    return r.model_copy(update=changes)


def _absolute_feedback(f: Feedback, folder: Path) -> Feedback:
    def absolute(path: str | None) -> str | None:
        return None if path is None else str((folder / Path(path).expanduser()).resolve())

    # Of a command's words, those that name a file beside the recipe; a program that is looked for in PATH stays a name.
    # (os.path.isfile says no where a word is too long to be a name.)
    words = [
        absolute(w) if os.path.isfile(folder / w) or w.startswith(("./", "../", "~/")) else w for w in f.command or []
    ]
    return f.model_copy(
        update={
            "command": words or None,
            "replay": absolute(f.replay),
            "server": f.server.model_copy(update={"cache_dir": absolute(f.server.cache_dir)}),
        }
    )


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every key written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def model_fields(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """(path, field, extras) of every key of a recipe, depth first; `task` is left to its kinds."""
    for name, info in model.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from model_fields(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info, {"section": model.__doc__}
