"""What a run is made of: model, text, optimizers and plan, loaded and checked before it begins."""

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from rondo import processes, provenance
from rondo.config import TrainConfig
from rondo.data import Rows, TrainingRows, check_tokenizer, held_out_rows, load_tokenizer, open_rows
from rondo.errors import UserError
from rondo.flops import Costs, costs_of, costs_of_parent
from rondo.loading import load_model, parent_directory
from rondo.modeling.modeling_recurrent import RecurrentForCausalLM
from rondo.processes import World
from rondo.training import adapters, distributed, gate, optim
from rondo.training.budget import plan_steps
from rondo.training.initial import initialize
from rondo.training.metrics import import_tracker
from rondo.training.objective import Objective
from rondo.training.throughput import matmul_peak


@dataclass
class Progress:
    """Counters of a run, saved with it."""

    step: int = 0
    rows: int = 0
    tokens: int = 0
    flops: float = 0.0
    flops_paper: float = 0.0
    seconds: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    rollbacks: int = 0
    recent: list[float] = field(default_factory=list)
    """Losses of the last accepted steps."""
    stream: dict[str, Any] = field(default_factory=dict)
    """Where a streamed text stands."""


@dataclass
class Run:
    """Everything the loop touches."""

    config: TrainConfig
    world: World
    directory: Path
    model_directory: Path
    model: Any
    objective: Objective
    costs: Costs
    parent_costs: Costs | None
    cap: int
    rows: TrainingRows
    held_out: Rows | None
    total_steps: int
    optimizers: list[torch.optim.Optimizer]
    ema: dict[str, torch.Tensor] | None
    dtype: torch.dtype
    peak: float
    """FLOP/s of the machine's own matrix products, over all processes."""
    progress: Progress = field(default_factory=Progress)


def setup(config: TrainConfig, world: World, stored: dict[str, Any] | None) -> Run:
    """Load model, text and optimizers, and lay out the run.

    Args:
        config: The run.
        world: The processes it runs on.
        stored: The run's run.json where it goes on: what was measured at its start holds.

    Raises:
        UserError: A directory, the text or a setting does not fit.
    """
    share(config, world.size)
    if world.first and config.watch.tracker != "none":
        import_tracker(config.watch.tracker)
    model_directory, parent = directories(config)
    dtype = provenance.choose_dtype(config.machine.dtype, world.device)
    # What is measured may differ between processes: the first one's answer is everyone's.
    dtype = getattr(torch, processes.gather(world, str(dtype).removeprefix("torch."))[0])
    if stored and config.machine.dtype == "auto":
        dtype = getattr(torch, stored["dtype"])
    model = load(config, model_directory, dtype if world.size == 1 else torch.float32)
    recurrent = config.mode != "static"
    costs = costs_of(model) if recurrent else costs_of_parent(model)
    cap = model.config.max_recurrences if recurrent else 1
    if recurrent:
        check_depths(config, cap)
    teacher, parent_costs = None, None
    if recurrent and config.loss.kind == "deep+distil" and config.loss.parent_weight:
        teacher = load_model(AutoModelForCausalLM, parent_directory(parent), dtype)
        teacher.requires_grad_(False).to(world.device)
        parent_costs = costs_of_parent(teacher)
    total_steps = stored["total_steps"] if stored else plan_steps(config, costs, cap, parent_costs)
    tokenizer = load_tokenizer(model_directory)
    check_tokenizer(tokenizer, model.get_input_embeddings().num_embeddings)
    length, watch = config.batch.seq_len, config.watch
    total_rows = total_steps * config.batch.global_batch_size
    rows = open_rows(config.data, tokenizer, length, config.seed, total_rows)
    held_out = None
    if watch.data:
        held_out = held_out_rows(watch.data, config.data, tokenizer, length, watch.rows)
    objective = prepare(config, world, model, teacher, recurrent)
    return Run(
        config=config,
        world=world,
        directory=Path(config.output_dir),
        model_directory=model_directory,
        model=model,
        objective=objective,
        costs=costs,
        parent_costs=parent_costs,
        cap=cap,
        rows=rows,
        held_out=held_out,
        total_steps=total_steps,
        optimizers=optim.make_optimizers(model, config.optimizer),
        ema=optim.averages(model) if config.optimizer.ema_decay else None,
        dtype=dtype,
        peak=world.size * matmul_peak(world.device, dtype),
    )


def share(config: TrainConfig, num_processes: int) -> tuple[int, int]:
    """Return the sequences of a process in each draw, and how many of them run at once.

    Raises:
        UserError: They cannot be shared equally.
    """
    batch, draws = config.batch, config.recurrence.draws_per_step
    per_draw = batch.global_batch_size // draws
    if per_draw % num_processes:
        raise UserError(
            f"{per_draw} sequences per draw (batch.global_batch_size {batch.global_batch_size} / "
            f"recurrence.draws_per_step {draws}) cannot be shared equally by {num_processes} "
            "processes: change one of the three"
        )
    own = per_draw // num_processes
    micro = min(batch.micro_batch_size, own)
    if own % micro:
        raise UserError(
            f"{own} sequences per draw and process are no multiple of batch.micro_batch_size "
            f"{micro}: change batch.global_batch_size or batch.micro_batch_size"
        )
    return own, micro


def directories(config: TrainConfig) -> tuple[Path, dict[str, Any]]:
    """Return the directory of the model to train, and what is known of its parent.

    Raises:
        UserError: It is no recurrent checkpoint, or its parent cannot be had.
    """
    directory = Path(config.model)
    if not directory.is_dir():
        raise UserError(
            f"there is no directory {config.model}: make it with rondo convert (a recipe folder "
            "has a convert.yaml for it)"
        )
    facts = provenance.read_json(directory / "run.json")
    if "parent" not in facts:
        raise UserError(f"{config.model} is no recurrent checkpoint: make one with rondo convert")
    before = facts.get("training", {}).get("mode")
    going_on = ("static",) if before == "static" else ("recurrent", "gate")
    if before and config.mode not in going_on:
        raise UserError(
            f"{config.model} was trained in mode {before}, and mode {config.mode} would not go on "
            f"from it: train it in mode {' or '.join(going_on)}, or name the converted model"
        )
    if config.mode == "static" and before is None:
        directory = parent_directory(facts["parent"])
    return directory, facts["parent"]


def load(config: TrainConfig, directory: Path, dtype: torch.dtype) -> Any:
    """Return the model to train, in float32; what adapters freeze, in a dtype of its own.

    Raises:
        UserError: The directory holds none of this kind, or adapters do not fit.
    """
    stored = dtype if config.lora.rank else torch.float32
    model: Any
    if config.mode == "static":
        model = load_model(AutoModelForCausalLM, directory, stored)
    else:
        model = load_model(RecurrentForCausalLM, directory, stored)
        gate.fit_exits(model, config.mode == "gate")
    if config.mode == "random":
        torch.manual_seed(config.seed)
        model = RecurrentForCausalLM._from_config(model.config, dtype=stored)
        initialize(model, config.recurrence.mean)
    if config.lora.rank:
        adapters.add_adapters(model, config.lora)
    return model


def prepare(
    config: TrainConfig, world: World, model: Any, teacher: Any, recurrent: bool
) -> Objective:
    """Return the module that training calls: checkpointing, then compilation, then sharding."""
    machine = config.machine
    model.train(config.mode != "gate")  # a gate learns how the model answers, without dropout
    layers: list[nn.Module] = list(model.base_model.layers)
    once = [*model.model.prelude, *model.model.coda] if recurrent else layers
    if machine.activation_checkpointing == "all" or (
        machine.activation_checkpointing == "iteration" and not recurrent
    ):
        with warnings.catch_warnings():
            # The older of two names, which all of transformers 5 knows.
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in model.model.core if recurrent else ():
            layer.gradient_checkpointing = False  # its iteration is recomputed as a whole
    if machine.compile:
        # With gradient or without, while training or validating, short sequences or long: more
        # variants than the compiler keeps unasked. Depth is none of them.
        torch._dynamo.config.recompile_limit = 64
        for layer in layers:
            layer.compile()
    objective = Objective(
        model,
        recurrent,
        config.loss,
        teacher,
        checkpoint_iterations=machine.activation_checkpointing != "none",
        gated=config.mode == "gate",
    )
    if world.size == 1:
        return objective.to(world.device)
    distributed.shard(objective, once, world, machine.replicas)
    return objective


def check_depths(config: TrainConfig, cap: int) -> None:
    """Refuse depths that the model's cap would silently change.

    Raises:
        UserError: A setting is beyond the cap.
    """
    setting = config.recurrence
    most = min(setting.cap or cap, cap)
    deepest = 2 * setting.mean - setting.minimum if setting.distribution == "uniform" else 0
    if (setting.cap and setting.cap > cap) or deepest > most:
        raise UserError(
            f"recurrence.cap {setting.cap} or the deepest of a uniform depth, {deepest}, exceeds "
            f"the cap of {most} (max_recurrences in the model's config.json)"
        )
    if max(setting.minimum, setting.mean) > most:
        raise UserError(
            f"recurrence.mean {setting.mean} and minimum {setting.minimum} must not exceed the "
            f"cap of {most} (recurrence.cap, or max_recurrences in the model's config.json)"
        )
