"""Settings of training, in groups: `recurrence.mean` in a recipe, --recurrence.mean as a flag."""

from typing import Annotated, ClassVar, Literal

import tyro
from pydantic import Field, model_validator

from rondo.config.base import Config, Depths

Distribution = Literal["poisson-lognormal", "poisson-lognormal-honest", "uniform", "fixed"]
Schedule = Literal["none", "linear", "1-sqrt"]
Fraction = Annotated[float, Field(gt=0, le=1)]


class DataConfig(Config):
    """What is read, and how it becomes rows of tokens."""

    group: ClassVar[str] = "data"

    sources: Annotated[tuple[str, ...], Field(min_length=1)] = ("math",)
    """Texts, each [NAME=]WHERE[@WEIGHT]; WHERE is a sample (math, general), a file (.jsonl, .txt,
    .parquet, the first two also .gz or .zst), a folder of such files, or hub:REPO[:CONFIG[:SPLIT]]
    for one of the datasets library. Weights are shares of the rows, equal unless given. A blank
    line ends a document of a .txt."""
    phases: tuple[str, ...] = ()
    """Mixtures that follow each other, in place of sources: 'UNTIL: SOURCE SOURCE ...', UNTIL
    being the fraction of the training at which the phase ends, 1 for the last."""
    field: str = "text"
    """Field of JSON lines, Parquet and datasets that holds the text."""
    format: Literal["text", "chat"] = "text"
    """chat puts `messages`, or a prompt and its answer, through the chat template."""
    loss_on: Literal["all", "answers"] = "all"
    """answers leaves prompts out of the loss."""
    packing: Literal["wrapped", "documents"] = "wrapped"
    """wrapped lets attention run across the documents of a row (the paper), documents does not."""
    streaming: bool = False
    """Tokenise while training, in the order of the source, in place of a shuffled token cache."""
    cache_dir: str | None = None
    """Where tokens are kept; ~/.cache/rondo unless given."""


class RecurrenceConfig(Config):
    """How deep each training step runs."""

    group: ClassVar[str] = "recurrence"

    distribution: Distribution = "poisson-lognormal"
    """The paper's (whose mean is mean + 1), its honest form, or a plain one."""
    mean: int = Field(4, ge=1)
    """Target mean depth."""
    minimum: int = Field(1, ge=1)
    """Shallowest depth drawn."""
    cap: int | None = Field(None, ge=1)
    """Deepest depth drawn; the model's max_recurrences unless given."""
    schedule: Schedule = "none"
    """How the mean grows."""
    schedule_fraction: Fraction = 0.75
    """Part of the training over which the mean grows."""
    schedule_start: int = Field(1, ge=1)
    """Mean from which it grows."""
    backprop_depth: int = Field(8, ge=1)
    """Last iterations that carry gradient."""
    backprop_schedule: Literal["none", "linear"] = "none"
    """How backprop_depth grows from 1."""
    backprop_schedule_fraction: Fraction = 0.25
    """Part of the training over which backprop_depth grows."""
    draws_per_step: int = Field(1, ge=1)
    """Depths drawn for each optimizer step; each is run by its share of the sequences, on all
    processes alike."""

    @model_validator(mode="after")
    def _ordered(self) -> "RecurrenceConfig":
        if self.minimum > self.mean or (self.cap is not None and self.cap < self.minimum):
            raise ValueError(
                f"minimum {self.minimum}, mean {self.mean} and cap {self.cap} are out of order"
            )
        if self.schedule_start > self.mean:
            raise ValueError(f"schedule_start {self.schedule_start} exceeds mean {self.mean}")
        return self


class LossConfig(Config):
    """What a step minimises."""

    group: ClassVar[str] = "loss"

    kind: Literal["last", "deep", "deep+distil"] = "last"
    """last supervises the last iteration (the paper), deep a shallower one as well, deep+distil
    lets the shallower one also learn from the last one and from the frozen parent."""
    shallow: Literal["uniform", "first"] = "uniform"
    """The shallower iteration: drawn uniformly from those before the last, or always the first."""
    shallow_weight: float = Field(0.5, gt=0)
    """Weight of the shallower iteration's loss; the last one's is 1, and the sum is normalised."""
    distil_weight: float = Field(0.5, ge=0, le=1)
    """With deep+distil: share of the shallower loss that is the divergence from the last one."""
    parent_weight: float = Field(0.0, ge=0, le=1)
    """With deep+distil: share of the shallower loss that is the divergence from the parent."""
    temperature: float = Field(1.0, gt=0)
    """Softens both distributions of a divergence, which is multiplied by its square."""

    @model_validator(mode="after")
    def _shares(self) -> "LossConfig":
        if self.parent_weight and self.kind != "deep+distil":
            raise ValueError(f"parent_weight has no meaning with kind {self.kind}")
        if self.distil_weight + self.parent_weight > 1:
            raise ValueError(
                f"distil_weight {self.distil_weight} and parent_weight {self.parent_weight} are "
                "shares of one loss and exceed 1 together"
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
    """Multiplies the learning rate of what only loops use: the injection's vectors and the deltas
    of each iteration, which are few and start coarse."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's."""
    weight_decay: float = Field(1e-4, ge=0)
    """Decoupled, on matrices only."""
    warmup_fraction: float = Field(0.1, ge=0, le=1)
    """Part of the training with rising learning rate."""
    decay_fraction: float = Field(0.3, ge=0, le=1)
    """Part of the training with falling learning rate."""
    decay_floor: float = Field(0.0, ge=0, lt=1)
    """What the falling learning rate tends to, as a fraction of its peak; 0.001 in the paper."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this norm."""
    ema_decay: float = Field(0.0, ge=0, lt=1)
    """Keep an exponential moving average of the weights and write it as final; 0 is off."""


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
            raise ValueError(
                f"the budget is given {len(given)} times ({', '.join(given)}): choose, and take "
                "back what a recipe says with None, as in --budget.steps None"
            )
        return self


class BatchConfig(Config):
    """How many sequences of what length a step takes."""

    group: ClassVar[str] = "batch"

    micro_batch_size: int = Field(4, ge=1)
    """Most sequences per forward and backward of one process."""
    global_batch_size: int = Field(4, ge=1)
    """Sequences per optimizer step, over all processes."""
    seq_len: int = Field(256, ge=8)
    """Tokens per sequence."""
    seq_schedule: Literal["none", "doubling"] = "none"
    """doubling cuts the same stream of tokens into short sequences first, each twice as long as
    those before."""
    seq_schedule_start: int = Field(128, ge=8)
    """Length of the first sequences; seq_len is halved as long as it stays above."""
    seq_schedule_fraction: Fraction = 0.5
    """Part of the training after which sequences have seq_len."""

    @model_validator(mode="after")
    def _halves(self) -> "BatchConfig":
        half = self.seq_len // 2
        if self.seq_schedule == "doubling" and (self.seq_len % 2 or half < self.seq_schedule_start):
            raise ValueError(
                f"seq_len {self.seq_len} cannot be halved above seq_schedule_start "
                f"{self.seq_schedule_start}, so doubling would do nothing"
            )
        return self


class SafetyConfig(Config):
    """What is saved, and what happens to a step that goes wrong."""

    group: ClassVar[str] = "safety"

    save_every: int = Field(50, ge=1)
    """Steps between resumable checkpoints."""
    keep_last: int = Field(2, ge=1)
    """Checkpoints kept."""
    spike_factor: float = Field(0.0, ge=0)
    """A step whose loss exceeds the median of the last 32 by this factor is skipped; 0 is off. A
    non-finite step is always skipped."""
    patience: int = Field(5, ge=1)
    """Skipped steps in a row that roll the run back to its last checkpoint, on later data."""
    max_rollbacks: int = Field(3, ge=0)
    """Rollbacks before the run gives up."""


class WatchConfig(Config):
    """What is shown and recorded while training runs."""

    group: ClassVar[str] = "watch"

    data: str | None = None
    """Held-out text for validation: a sample (math-test, general-test) or as in data.sources."""
    every: int = Field(50, ge=1)
    """Steps between validations."""
    recurrences: Depths = (1, 2, 4, 8)
    """Depths of the validation; those beyond the model's cap are left out."""
    rows: int = Field(16, ge=1)
    """Sequences of the validation."""
    telemetry: bool = True
    """At each validation (which needs watch.data) also watch the loop: norms of its state, and how
    far an iteration expands a disturbance; alarms are printed and recorded."""
    tracker: Literal["none", "trackio", "wandb", "tensorboard"] = "none"
    """Send what goes to metrics.jsonl there as well."""
    project: str = "rondo"
    """Project of the tracker."""


class MachineConfig(Config):
    """Where and in which precision it runs."""

    group: ClassVar[str] = "machine"

    device: str = "auto"
    """cuda where there is one, cpu elsewhere."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast type; weights and their updates stay in float32."""
    compile: bool = False
    """Compile the layers; depth never recompiles them."""
    activation_checkpointing: Literal["none", "iteration", "all"] = "none"
    """Keep only the state of each iteration and recompute the rest backward; all does so for the
    layers outside the loop as well."""
    replicas: int = Field(1, ge=1)
    """With several processes: groups of them that each hold the whole model (HSDP)."""


class LoraConfig(Config):
    """Train low-rank adapters on the layers (PEFT) and the injection, in place of all weights."""

    group: ClassVar[str] = "lora"

    rank: int = Field(0, ge=0)
    """0 trains all weights."""
    alpha: float = Field(32.0, gt=0)
    """Adapters are scaled by alpha / rank."""
    targets: str = "all-linear"
    """Names of the linear layers, separated by commas."""


class TrainConfig(Config):
    """Train a recurrent checkpoint, its static or random twin, or its learned exit alone."""

    words: ClassVar[tuple[str, ...]] = ("model",)

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A recurrent checkpoint (with --mode static its parent is trained), or a run to resume."""
    output_dir: str = "out/train"
    """Directory of the run."""
    mode: Literal["recurrent", "static", "random", "gate"] = "recurrent"
    """What is trained: the checkpoint, its parent, its shape with random weights, or only the gate
    that lets tokens leave the loop, which learns to expect how far recurrence.mean iterations would
    still take the answer."""
    data: DataConfig = DataConfig()
    """What is read."""
    recurrence: RecurrenceConfig = RecurrenceConfig()
    """How deep each step runs."""
    loss: LossConfig = LossConfig()
    """What a step minimises."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """What moves the weights."""
    budget: BudgetConfig = BudgetConfig()
    """When it ends; 100 steps unless given."""
    batch: BatchConfig = BatchConfig()
    """What a step takes."""
    safety: SafetyConfig = SafetyConfig()
    """What is saved."""
    watch: WatchConfig = WatchConfig()
    """What is shown."""
    machine: MachineConfig = MachineConfig()
    """Where it runs."""
    lora: LoraConfig = LoraConfig()
    """Low-rank adapters."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of data order, depth and initial state."""
    resume: bool = False
    """Go on where the run in output_dir stopped."""
    overwrite: bool = False
    """Replace an existing run."""

    @model_validator(mode="after")
    def _whole_draws(self) -> "TrainConfig":
        draws, size = self.recurrence.draws_per_step, self.batch.global_batch_size
        if size % draws:
            raise ValueError(
                f"batch.global_batch_size {size} is no multiple of "
                f"recurrence.draws_per_step {draws}"
            )
        return self

    @model_validator(mode="after")
    def _gate_alone(self) -> "TrainConfig":
        if self.mode != "gate":
            return self
        idle = {
            "loss.kind": self.loss.kind != "last",
            "lora.rank": self.lora.rank > 0,
            "recurrence.schedule": self.recurrence.schedule != "none",
        }
        if given := [name for name, one in idle.items() if one]:
            raise ValueError(
                f"with mode gate {' and '.join(given)} would do nothing: the exit gate alone is "
                "trained, by its own loss, against the answer after recurrence.mean iterations"
            )
        if self.recurrence.mean < 2:
            raise ValueError(
                "mode gate needs a recurrence.mean of at least 2: the gate is asked before the "
                "deepest iteration"
            )
        return self


class PlanConfig(TrainConfig):
    """Say what a training will take, before it is paid for: nothing is loaded, nothing written.

    Of MODEL only config.json is read. Where there is none yet, that of the folder of recipes/ that
    its path names stands in: recipes/tinyllama-1.1b for out/tinyllama-1.1b/base. With --mode static
    the parent's config.json is read instead.
    """

    gpus: int = Field(1, ge=1)
    """Processes to plan for."""
    throughput: float | None = Field(None, gt=0)
    """FLOP/s each process will achieve; hours are left out unless given."""
    json_output: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print the plan as JSON."""
