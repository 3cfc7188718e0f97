"""What a training will take, forecast before it is paid for: no weights, no text, no device.

The model is built of tensors that have a shape and no memory. What autograd would keep of a
forward pass is thus counted tensor by tensor, for any family, in place of a formula for each.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from rondo import provenance
from rondo.config import PlanConfig
from rondo.data import read_phases
from rondo.errors import UserError
from rondo.flops import Costs, costs_of, costs_of_parent
from rondo.loading import parent_directory
from rondo.modeling.configuration_recurrent import RecurrentConfig
from rondo.modeling.inputs_recurrent import LayerInputs
from rondo.training import adapters, gate
from rondo.training.budget import (
    StepPlan,
    extra_iterations,
    paper_step_flops,
    plan_steps,
    step_flops,
    step_plan,
    step_tokens,
)
from rondo.training.losses import CHUNK_TOKENS
from rondo.training.optim import role
from rondo.training.setup import check_depths, share

RECIPES = Path("recipes")
# Of a logit, at the peak of a chunk: itself, its log-softmax and its gradient, all in float32.
BYTES_PER_LOGIT = 12
BAD_CONFIG = (StrictDataclassError, LookupError, ValueError, TypeError, AttributeError, OSError)


@dataclass(frozen=True)
class Subject:
    """The model that will be trained, as shapes, and what it costs."""

    model: Any
    recurrent: bool
    dtype: torch.dtype
    """Of the computation; weights that train are float32."""
    parameters: dict[str, int]
    costs: Costs
    parent_costs: Costs | None
    """Where the parent teaches."""

    @property
    def cap(self) -> int:
        """Deepest recurrence."""
        return self.model.config.max_recurrences if self.recurrent else 1


def shape_directory(model: Path) -> Path:
    """Return where a model's config.json lies: with the model, or in a recipe folder.

    Raises:
        UserError: In neither.
    """
    recipe = () if model.is_absolute() or model.is_dir() else model.parts[1:2]
    for place in (model, *(RECIPES / part for part in recipe)):
        if (place / "config.json").is_file():
            return place
    raise UserError(
        f"there is no config.json in {model}, and no recipes/NAME stands in for an out/NAME/..: "
        "make the model with rondo convert, or name a directory that has a config.json of its shape"
    )


def parent_shape(directory: Path) -> Path:
    """Return where the config.json of a recurrent model's parent lies, fetched if on the hub.

    Raises:
        UserError: It cannot be had.
    """
    if (directory / "parent" / "config.json").is_file():  # a recipe folder
        return directory / "parent"
    facts = provenance.read_json(directory / "run.json")
    if "parent" not in facts:
        raise UserError(f"{directory} is no recurrent checkpoint: make one with rondo convert")
    return parent_directory(facts["parent"], ["config.json"])


def build(directory: Path, recurrent: bool, dtype: torch.dtype) -> Any:
    """Build a model from its config.json, on the meta device.

    Raises:
        UserError: It describes no model, or one of the other kind.
    """
    file = directory / "config.json"
    try:
        shape = AutoConfig.from_pretrained(directory)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shape, dtype=dtype)
    except BAD_CONFIG as error:
        raise UserError(f"{file} describes no model: {' '.join(str(error).split())}") from error
    if isinstance(shape, RecurrentConfig) != recurrent:
        wanted = "recurrent checkpoint" if recurrent else "parent"
        raise UserError(f"{file} is that of a {shape.model_type}, not of a {wanted}")
    return model


def subject(config: PlanConfig) -> Subject:
    """Build the model to be trained, in the types it has while it computes."""
    recurrent, asked = config.mode != "static", config.machine.dtype
    dtype = torch.bfloat16 if asked == "auto" else getattr(torch, asked)
    # What trains is float32, and what is sharded is alike; alone, frozen weights are held in less.
    held = dtype if config.lora.rank and config.gpus == 1 else torch.float32
    directory = shape_directory(Path(config.model))
    model = build(directory if recurrent else parent_shape(directory), recurrent, held)
    count = costs_of if recurrent else costs_of_parent
    if recurrent:
        with torch.device("meta"):
            gate.fit_exits(model, config.mode == "gate")
    plain = costs = count(model)
    if config.lora.rank:
        with torch.device("meta"):
            adapters.add_adapters(model, config.lora)
        costs = count(model)
    parent_costs = None
    if recurrent and config.loss.kind == "deep+distil" and config.loss.parent_weight:
        parent_costs = costs_of_parent(build(parent_shape(directory), False, dtype))
    parts = ("prelude", "core", "delta", "coda", "injection", "norm", "embedding", "head", "gate")
    parameters = {part: getattr(plain, f"{part}_parameters") for part in parts}
    parameters |= {
        "adapters": costs.total_parameters - plain.total_parameters,
        "total": costs.total_parameters,
        "trained": sum(one.numel() for one in model.parameters() if one.requires_grad),
    }
    return Subject(model, recurrent, dtype, parameters, costs, parent_costs)


def phases(
    config: PlanConfig, this: Subject, total_steps: int
) -> tuple[list[dict[str, Any]], int, int]:
    """Return the parts of a run between the corners of its schedules, and what is deepest in it.

    Returns:
        The parts, the most iterations that carry gradient, and the most that are supervised.
    """
    optimizer, depth, batch = config.optimizer, config.recurrence, config.batch
    warmup = math.ceil(optimizer.warmup_fraction * total_steps)
    decay = total_steps - math.ceil(optimizer.decay_fraction * total_steps)
    mixtures = read_phases(config.data)
    ramps = [float(until) for until, _ in mixtures]
    if batch.seq_schedule != "none":
        ramps.append(batch.seq_schedule_fraction)
    if this.recurrent and depth.schedule != "none":
        ramps.append(depth.schedule_fraction)
    if this.recurrent and depth.backprop_schedule != "none":
        ramps.append(depth.backprop_schedule_fraction)
    corners = {min(total_steps, math.ceil(ramp * total_steps)) for ramp in ramps}
    corners |= {0, min(warmup, total_steps), max(0, decay), total_steps}
    rows, window, outputs = [], 0, 2 if config.mode == "gate" else 1
    for start, stop in pairwise(sorted(corners)):
        plans = [step_plan(config, this.cap, step, total_steps) for step in range(start, stop)]
        rate = "warm-up" if start < warmup else "hold" if start < decay else "decay"
        rows.append(
            {
                "until": stop / total_steps,
                "last_step": stop,
                "learning_rate": rate,
                "data": next(
                    " ".join(text) for until, text in mixtures if start / total_steps < until
                ),
            }
            | summary(config, this, plans)
        )
        draws = [draw for plan in plans for draw in plan.draws]
        window = max(window, *(one.depth.backprop_depth + extra_iterations(one) for one in draws))
        outputs = max(outputs, *(1 if one.shallow is None else 2 for one in draws))
    return rows, window, outputs


def summary(config: PlanConfig, this: Subject, plans: list[StepPlan]) -> dict[str, Any]:
    """Return what steps amount to together."""
    depths = [draw.depth.num_recurrences for plan in plans for draw in plan.draws]
    return {
        "mean": (plans[0].mean, plans[-1].mean),
        "depth": sum(depths) / len(depths),
        "seq_len": (plans[0].seq_len, plans[-1].seq_len),
        "tokens": len(plans) * step_tokens(config),
        "flops": sum(step_flops(config, this.costs, plan, this.parent_costs) for plan in plans),
        "flops_paper": sum(paper_step_flops(config, this.costs, plan) for plan in plans),
    }


def kept(model: Any, call: Callable[[], torch.Tensor]) -> tuple[int, torch.Tensor]:
    """Return the bytes a backward pass of a call needs beside the weights, and its result."""
    storages = set()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages.add(tensor.untyped_storage())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = call()
    weights = {parameter.untyped_storage() for parameter in model.parameters()}
    return sum(storage.nbytes() for storage in storages - weights), result


def activations(this: Subject, size: tuple[int, int], window: int, outputs: int) -> dict[str, int]:
    """Return the bytes autograd keeps of a micro-batch, by kind of activation checkpointing.

    Args:
        this: The model.
        size: Of a micro-batch, (B, T).
        window: Iterations that carry gradient.
        outputs: Iterations that are supervised.
    """
    # On the meta device attention would be taken apart; as a fake CPU it is one fused kernel.
    this.model.to_empty(device="cpu")
    this.model.tie_weights()
    model, layers = this.model, len(this.model.base_model.layers)
    # Of tensors without values transformers cannot tell that no mask is needed, and makes one.
    for layer in model.base_model.layers:
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: (args, kwargs | {"attention_mask": None}), with_kwargs=True
        )
    ids = torch.zeros(size, dtype=torch.long)
    if not this.recurrent:
        whole, last = kept(model, lambda: model.base_model(ids, use_cache=False).last_hidden_state)
        lean = layers * last.nbytes + whole // layers
        return {"none": whole, "iteration": lean, "all": lean}
    body, shape = model.model, model.config
    embeds = body.embed(ids, None)
    inputs = LayerInputs.prepare(body, embeds, None, None, None, {})
    first = slice(0, shape.num_prelude_layers)
    prelude, e_BTD = kept(model, lambda: body.run(first, embeds, inputs, None))
    iteration, s_BTD = kept(model, lambda: body.iterate(1, e_BTD, e_BTD, inputs, None))
    coda, _ = kept(model, lambda: body.finish(s_BTD, inputs, None))
    once, states = prelude + outputs * coda, window * s_BTD.nbytes
    ends = shape.num_prelude_layers + outputs * shape.num_coda_layers
    return {
        "none": once + window * iteration,
        "iteration": once + states + iteration,
        "all": ends * s_BTD.nbytes + states + max(iteration, once // ends),
    }


def examples(this: Subject, size: tuple[int, int], depth: int) -> dict[str, int]:
    """Return the bytes of what an exit gate learns from, whatever the checkpointing.

    States and answers of each iteration, and the states once more as the gate's features.
    """
    held = 3 * depth * math.prod(size) * this.model.config.hidden_size * 4
    return dict.fromkeys(("none", "iteration", "all"), held)


def moment_bytes(config: PlanConfig, model: Any) -> int:
    """Return the bytes of the optimizers' moments: one of Muon, two of AdamW, in float32."""
    muon = config.optimizer.name == "muon"
    return sum(
        (4 if role(name, one, muon) == "muon" else 8) * one.numel()
        for name, one in model.named_parameters()
        if one.requires_grad
    )


def memory(
    config: PlanConfig, this: Subject, micro: int, window: int, outputs: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Return the bytes one process needs by use, and its activations by kind of checkpointing."""
    shards, size = config.gpus // config.machine.replicas, this.dtype.itemsize
    trained = this.parameters["trained"]
    held = size if config.lora.rank and config.gpus == 1 else 4
    frozen = held * (this.parameters["total"] - trained)
    weights = list(this.model.parameters())
    found = {
        "weights": (4 * trained + frozen) // shards,
        "gradients": 4 * trained // shards,
        "moments": moment_bytes(config, this.model) // shards,
        "average": 4 * trained // shards if config.optimizer.ema_decay else 0,
        "parent": size * this.parent_costs.total_parameters if this.parent_costs else 0,
    }
    if config.gpus == 1:
        # A gradient exists on its own before it is added to those of earlier micro-batches.
        found["gradients"] += max(4 * one.numel() for one in weights if one.requires_grad)
    else:
        body = this.model.base_model
        apart = [*body.prelude, *body.coda] if this.recurrent else list(body.layers)
        elsewhere = {one for layer in apart for one in layer.parameters()}
        root = [one for one in weights if one not in elsewhere]
        layer = max(sum(one.numel() for one in each.parameters()) for each in apart)
        # While one layer outside the root group computes, the next is gathered; gradients exist as
        # they are computed and as they are summed over the processes. All are float32.
        learned = sum(one.numel() for one in root if one.requires_grad)
        found["gathered"] = 4 * (sum(one.numel() for one in root) + 2 * layer + 2 * learned)
    length, lean = config.batch.seq_len, this.dtype != torch.float32
    if config.mode == "gate":
        kinds = examples(this, (micro, length), config.recurrence.mean)
    else:
        with (
            FakeTensorMode(allow_non_fake_inputs=True),
            torch.autocast("cpu", this.dtype, lean, cache_enabled=False),
        ):
            kinds = activations(this, (micro, length), window, outputs)
    found["activations"] = kinds[config.machine.activation_checkpointing]
    logits = min(CHUNK_TOKENS, micro * length) * this.model.config.vocab_size
    found["logits"] = (outputs + (this.parent_costs is not None)) * BYTES_PER_LOGIT * logits
    return found | {"sum": sum(found.values())}, kinds


def forecast(config: PlanConfig) -> dict[str, Any]:
    """Return the plan as JSON values.

    Raises:
        UserError: The model's shape cannot be had, or a setting does not fit.
    """
    if config.gpus % config.machine.replicas:
        raise UserError(
            f"machine.replicas {config.machine.replicas} does not divide --gpus {config.gpus}"
        )
    own, micro = share(config, config.gpus)
    this = subject(config)
    if this.recurrent:
        check_depths(config, this.cap)
    total_steps = plan_steps(config, this.costs, this.cap, this.parent_costs)
    rows, window, outputs = phases(config, this, total_steps)
    needed, kinds = memory(config, this, micro, window, outputs)
    flops, trained = sum(row["flops"] for row in rows), this.parameters["trained"]
    copies = 2 if config.optimizer.ema_decay else 1
    state = 4 * copies * trained + moment_bytes(config, this.model)
    final = 4 * this.parameters["total"]
    return {
        "model": config.model,
        "shape": str(shape_directory(Path(config.model)) / "config.json"),
        "mode": config.mode,
        "parameters": this.parameters,
        "steps": total_steps,
        "tokens": total_steps * step_tokens(config),
        "flops": flops,
        "flops_paper": sum(row["flops_paper"] for row in rows),
        "phases": rows,
        "gpus": config.gpus,
        "dtype": str(this.dtype).removeprefix("torch."),
        "micro_batches": config.recurrence.draws_per_step * own // micro,
        "micro_batch": (micro, config.batch.seq_len),
        "backprop_depth": window,
        "memory": needed,
        "activations": kinds,
        # One state more than is kept exists while it is written.
        "disk": (config.safety.keep_last + 1) * state + final,
        "state": state,
        "throughput": config.throughput,
        "hours": flops / (config.gpus * config.throughput) / 3600 if config.throughput else None,
    }


def describe(plan: dict[str, Any]) -> Iterator[str]:
    """Yield a plan as lines to read."""
    sequences, length = plan["micro_batch"]
    yield f"{plan['mode']} training of {plan['model']} on {plan['gpus']} x {plan['dtype']}"
    yield f"  as {plan['shape']} has it\n"
    for part, count in plan["parameters"].items():
        if count:
            yield f"  {part:<12}{count:>16,} parameters"
    yield (
        f"\n{plan['steps']:,} steps, each of {plan['micro_batches']} micro-batches of {sequences} "
        f"x {length} tokens per process\n\n"
        "   until  last step      rate   mean  drawn    length     tokens      FLOPs  (paper's)"
    )
    mixed = len({row["data"] for row in plan["phases"]}) > 1
    for row in plan["phases"]:
        mean, lengths = ("-".join(map(str, sorted({*row[key]}))) for key in ("mean", "seq_len"))
        yield (
            f"{row['until']:>8.2%}{row['last_step']:>11,}{row['learning_rate']:>10}{mean:>7}"
            f"{row['depth']:>7.2f}{lengths:>10}{row['tokens']:>11.3g}{row['flops']:>11.3g}"
            f"{row['flops_paper']:>11.3g}{'  ' + row['data'] if mixed else ''}"
        )
    yield (
        f"{'in all':>53}{plan['tokens']:>11.3g}{plan['flops']:>11.3g}{plan['flops_paper']:>11.3g}"
    )
    if plan["hours"] is not None:
        yield f"\n{plan['hours']:,.1f} hours at {plan['throughput']:.3g} FLOP/s per process"
    yield "\nMemory of one process, estimated:"
    for use, count in plan["memory"].items():
        if count:
            yield f"  {use:<12}{count / 2**30:>9.2f} GiB"
    kinds = ", ".join(f"{kind} {count / 2**30:.2f}" for kind, count in plan["activations"].items())
    yield (
        "  Activations are what autograd keeps of a micro-batch (iterations with gradient: "
        f"{plan['backprop_depth']});\n  by machine.activation_checkpointing: {kinds} GiB.\n"
        "  The parts do not all peak at once; kernels and buffers come on top.\n\n"
        f"Disk: {plan['disk'] / 2**30:.2f} GiB, of which {plan['state'] / 2**30:.2f} for each state"
    )


def run(config: PlanConfig) -> None:
    """Run `rondo plan`.

    Raises:
        UserError: Something the user can mend.
    """
    plan = forecast(config)
    print(json.dumps(plan, indent=1) if config.json_output else "\n".join(describe(plan)))
