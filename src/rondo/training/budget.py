"""How each step of a run will go, and how many steps a budget pays for: pure functions."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rondo.config import TrainConfig
from rondo.errors import UserError
from rondo.flops import Costs
from rondo.provenance import read_json
from rondo.training.recurrence import (
    Depth,
    backprop_window,
    sample_depth,
    scheduled_mean,
    scheduled_seq_len,
    scheduled_window,
    shallower_depth,
    step_generator,
)

DEFAULT_STEPS = 100


@dataclass(frozen=True)
class Draw:
    """How a share of a step's sequences runs: its depth, and the shallower one supervised too."""

    depth: Depth
    shallow: int | None


@dataclass(frozen=True)
class StepPlan:
    """How a step runs.

    Attributes:
        draws: One per equal share of the sequences.
        mean: What the curriculum asks for.
        window: Most iterations that carry gradient.
        seq_len: Tokens per sequence; the number of sequences grows as they shrink.
    """

    draws: tuple[Draw, ...]
    mean: int
    window: int
    seq_len: int


def step_plan(config: TrainConfig, cap: int, step: int, total_steps: int) -> StepPlan:
    """Return how a step runs: a pure function of seed and step, alike on every process."""
    batch, setting = config.batch, config.recurrence
    seq_len = batch.seq_len
    if batch.seq_schedule == "doubling":
        seq_len = scheduled_seq_len(
            step, total_steps, seq_len, batch.seq_schedule_start, batch.seq_schedule_fraction
        )
    if config.mode in ("static", "gate"):
        # The gate is taught by the deepest answer, which is always the same one's.
        depth = Depth(1, 1) if config.mode == "static" else Depth(setting.mean, 0)
        return StepPlan((Draw(depth, None),) * setting.draws_per_step, *depth, seq_len)
    mean = scheduled_mean(
        step,
        total_steps,
        setting.mean,
        setting.schedule,
        setting.schedule_fraction,
        max(setting.minimum, setting.schedule_start),
    )
    window = setting.backprop_depth
    if setting.backprop_schedule == "linear":
        window = scheduled_window(step, total_steps, window, setting.backprop_schedule_fraction)
    if setting.distribution.startswith("poisson"):
        # The paper's rule: a curriculum below the window narrows the window.
        window = backprop_window(mean, window)
    draws = tuple(
        _draw(config, min(setting.cap or cap, cap), step, number, mean, window)
        for number in range(setting.draws_per_step)
    )
    return StepPlan(draws, mean, window, seq_len)


def _draw(config: TrainConfig, cap: int, step: int, number: int, mean: int, window: int) -> Draw:
    generator = step_generator(config.seed, step, number)
    setting = config.recurrence
    depth = sample_depth(setting.distribution, mean, setting.minimum, cap, window, generator)
    shallow = None
    if config.loss.kind != "last":
        shallow = shallower_depth(depth.num_recurrences, generator)
        if config.loss.shallow == "first" and shallow is not None:
            shallow = 1
    return Draw(depth, shallow)


def step_flops(
    config: TrainConfig, costs: Costs, plan: StepPlan, parent: Costs | None = None
) -> float:
    """Return the training FLOPs of a step, forward and backward, without doing it.

    What is computed a second time to save memory (the head's chunks, checkpointed activations) is
    not counted, nor the weight gradients of adapters, which are few.

    Args:
        config: The run.
        costs: Of the model trained.
        plan: The step.
        parent: Costs of the parent, where it teaches.
    """
    length, total, frozen = plan.seq_len, 0, config.lora.rank > 0
    if config.mode == "gate":
        return float(costs.gate_train_flops(plan.mean, length) * step_tokens(config))
    for draw in plan.draws:
        total += costs.train_flops(*draw.depth, length, frozen)
        if draw.shallow is not None:
            # Coda and head run once more, forward and backward; where the shallow output lies
            # before the window, the iterations that lead to it carry gradient as well.
            extra = extra_iterations(draw)
            total += 3 * costs.finish_flops(length) + 2 * extra * costs.iteration_flops(length)
            total -= frozen * (costs.finish_flops(0) + extra * costs.iteration_flops(0))
            if parent is not None:
                total += parent.forward_flops(1, length)
    return float(total * step_tokens(config) // len(plan.draws))


def paper_step_flops(config: TrainConfig, costs: Costs, plan: StepPlan) -> float:
    """Return a step's training FLOPs in the paper's account: layers only, at the nominal mean."""
    if config.mode == "gate":
        codas = 2 * (plan.mean - 1) * costs.coda_parameters
        return float((costs.paper_forward_flops(plan.mean) + codas) * step_tokens(config))
    per_token = costs.paper_train_flops(plan.mean, plan.window)
    if config.mode == "static":
        per_token += 6 * costs.norm_parameters
    return float(per_token * step_tokens(config))


def step_tokens(config: TrainConfig) -> int:
    """Return the tokens of an optimizer step, over all processes."""
    return config.batch.global_batch_size * config.batch.seq_len


def extra_iterations(draw: Draw) -> int:
    """Return how many iterations carry gradient only because of the shallower output."""
    depth, window = draw.depth
    shallow = draw.shallow or 0
    last = set(range(depth - window + 1, depth + 1))
    return len(set(range(max(1, shallow - window + 1), shallow + 1)) - last)


def plan_steps(config: TrainConfig, costs: Costs, cap: int, parent: Costs | None = None) -> int:
    """Return the number of optimizer steps a budget pays for, at least one.

    Raises:
        UserError: The run whose FLOPs are to be matched is not finished.
    """
    budget = config.budget
    if budget.steps is not None:
        return budget.steps
    if budget.tokens is not None:
        return max(1, round(budget.tokens / step_tokens(config)))
    flops = budget.flops
    if budget.like is not None:
        finished = Path(budget.like) / "final" / "run.json"
        if not finished.is_file():
            raise UserError(f"--budget.like {budget.like}: there is no finished run to match")
        facts = read_json(finished)
        flops = facts.get("gate", facts.get("training"))["flops"]
    if flops is None:
        return DEFAULT_STEPS

    @cache
    def spent(total: int) -> float:
        plans = (step_plan(config, cap, step, total) for step in range(total))
        return sum(step_flops(config, costs, plan, parent) for plan in plans)

    return steps_for(flops, spent)


def steps_for(flops: float, spent: Callable[[int], float]) -> int:
    """Return the number of steps whose FLOPs come nearest to a budget.

    Curricula are laid out over the total, so what a step costs depends on it: search, do not
    divide. What is spent is nearly proportional to the total, so two proportional guesses enclose
    the answer closely before the interval is halved.

    Args:
        flops: The budget.
        spent: FLOPs of a run of that many steps, growing.
    """
    low, high = 0, 1
    while spent(high) <= flops:
        low, high = high, max(high + 1, min(8 * high, int(high * flops / spent(high))))
    for margin in (0.99, 1.01):
        guess = int(margin * high * flops / spent(high))
        if low < guess < high:
            low, high = (guess, high) if spent(guess) <= flops else (low, guess)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if spent(middle) <= flops else (low, middle)
    if low == 0:
        return 1
    return high if spent(high) - flops < flops - spent(low) else low
