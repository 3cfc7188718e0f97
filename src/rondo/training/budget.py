"""How each micro-batch of a run will go, and how many steps a budget pays for: pure functions."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from rondo.config import TrainConfig
from rondo.errors import UserError
from rondo.flops import Costs
from rondo.provenance import read_json
from rondo.training.recurrence import (
    Depth,
    backprop_window,
    sample_depth,
    scheduled_mean,
    shallower_depth,
    step_generator,
)

DEFAULT_STEPS = 100


@dataclass(frozen=True)
class MicroBatch:
    """How one micro-batch runs: its depth, and the shallower iteration that is supervised."""

    depth: Depth
    shallow: int | None
    state_seed: int


def micro_batch(
    config: TrainConfig, cap: int, step: int, micro_step: int, total_steps: int
) -> MicroBatch:
    """Return how a micro-batch runs: a pure function of seed, step and micro-step."""
    generator = step_generator(config.seed, step, micro_step)
    if config.mode == "static":
        return MicroBatch(Depth(1, 1), None, 0)
    setting = config.recurrence
    mean = scheduled_mean(
        step,
        total_steps,
        setting.mean,
        setting.schedule,
        setting.schedule_fraction,
        min(setting.minimum, setting.mean),
    )
    # The paper's rule: a curriculum below the window narrows the window.
    paper = setting.distribution.startswith("poisson")
    window = backprop_window(mean, setting.backprop_depth) if paper else setting.backprop_depth
    depth = sample_depth(
        setting.distribution,
        mean,
        setting.minimum,
        min(setting.cap or cap, cap),
        window,
        generator,
    )
    shallow = None
    if config.loss == "deep":
        shallow = shallower_depth(depth.num_recurrences, generator)
    state_seed = int(torch.randint(2**31, (), generator=generator))
    return MicroBatch(depth, shallow, state_seed)


def step_flops(config: TrainConfig, costs: Costs, cap: int, step: int, total_steps: int) -> float:
    """Return the training FLOPs of a step, forward and backward, without doing it.

    What is computed a second time to save memory (the head's chunks) is not counted.
    """
    total = 0
    for micro_step in range(config.global_batch_size // config.micro_batch_size):
        batch = micro_batch(config, cap, step, micro_step, total_steps)
        per_token = costs.train_flops(*batch.depth, config.seq_len)
        if batch.shallow is not None:
            # Coda and head run once more, forward and backward; where the shallow output lies
            # before the window, the iterations that lead to it carry gradient as well.
            per_token += 3 * costs.finish_flops(config.seq_len)
            per_token += 2 * costs.iteration_flops(config.seq_len) * extra_iterations(batch)
        total += per_token * config.micro_batch_size * config.seq_len
    return float(total)


def extra_iterations(batch: MicroBatch) -> int:
    """Return how many iterations carry gradient only because of the shallower output."""
    depth, window = batch.depth
    shallow = batch.shallow or 0
    last = set(range(depth - window + 1, depth + 1))
    return len(set(range(max(1, shallow - window + 1), shallow + 1)) - last)


def plan_steps(config: TrainConfig, costs: Costs, cap: int) -> int:
    """Return the number of optimizer steps a budget pays for, at least one.

    Raises:
        UserError: The run whose FLOPs are to be matched has no metrics.
    """
    budget = config.budget
    tokens_per_step = config.global_batch_size * config.seq_len
    if budget.steps is not None:
        return budget.steps
    if budget.tokens is not None:
        return max(1, round(budget.tokens / tokens_per_step))
    flops = budget.flops
    if budget.like is not None:
        finished = Path(budget.like) / "final" / "run.json"
        if not finished.is_file():
            raise UserError(f"--budget.like {budget.like}: there is no finished run to match")
        flops = read_json(finished)["training"]["flops"]
    if flops is None:
        return DEFAULT_STEPS

    def spent(total: int) -> float:
        return sum(step_flops(config, costs, cap, step, total) for step in range(total))

    # The curriculum is laid out over the total, so depth depends on it: search, do not divide.
    low, high = (
        1,
        max(1, math.ceil(flops / (costs.train_flops(1, 1, config.seq_len) * tokens_per_step))),
    )
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if spent(middle) <= flops else (low, middle - 1)
    # The nearer of the two neighbours, so that twins end up equally close to the budget.
    return low + 1 if abs(spent(low + 1) - flops) < abs(spent(low) - flops) else low
