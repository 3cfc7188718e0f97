"""The training loop, top to bottom, on one process or many.

Depth, data and initial noise of a step are functions of the seed and the step alone, so a run
that was stopped repeats what it would have done, and processes agree without talking. The same
loop trains the twins: the parent itself from its own weights, or the shape from random ones.
"""

import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import torch

from rondo import processes, provenance
from rondo.config import TrainConfig
from rondo.data import Rows
from rondo.errors import UserError
from rondo.processes import World
from rondo.training import checkpoint, distributed, gate, guard, optim
from rondo.training.budget import (
    Draw,
    StepPlan,
    paper_step_flops,
    step_flops,
    step_plan,
    step_tokens,
)
from rondo.training.final import write_final
from rondo.training.metrics import Metrics
from rondo.training.recurrence import row_seeds, step_generator
from rondo.training.resume import prepare_directory, stored_facts
from rondo.training.setup import Progress, Run, setup, share
from rondo.training.telemetry import alarms


def precision(run: Run) -> AbstractContextManager[Any]:
    """Return the autocast of a forward pass."""
    if run.dtype == torch.float32:
        return nullcontext()
    # Without the cache: weights cast under no_grad for the first iterations would be reused in
    # the last ones, cut off from their gradient (pytorch/pytorch#65766).
    return torch.autocast(run.world.device.type, run.dtype, cache_enabled=False)


def micro_batches(run: Run, plan: StepPlan) -> Iterator[tuple[Draw, Rows, torch.Tensor]]:
    """Yield what this process runs in a step: draw, rows, and the seeds of their states."""
    config, world = run.config, run.world
    own, micro = share(config, world.size)
    pieces = config.batch.seq_len // plan.seq_len
    for number, draw in enumerate(plan.draws):
        first = run.progress.rows + (number * world.size + world.rank) * own
        for start in range(first, first + own, micro):
            indices = range(start, start + micro)
            seeds = row_seeds(config.seed, indices).repeat_interleave(pieces)
            yield draw, run.rows.batch(indices).cut(plan.seq_len), seeds


def gradients(run: Run, plan: StepPlan, wishes: list[int]) -> tuple[list[float], bool]:
    """Add up the gradients of a step; return its losses per token, and whether anyone stops.

    The losses are what is minimised, the last iteration's and the shallower one's.
    """
    batches = list(micro_batches(run, plan))
    own = float(sum((rows.labels != -100).sum() for _, rows, _ in batches))
    (counted,) = processes.total(run.world, [own])
    # A step of prompts alone has nothing to learn from, and nothing to divide by.
    counted = max(counted, 1.0)
    sums = torch.zeros(3, dtype=torch.float64, device=run.world.device)
    for number, (draw, rows, seeds) in enumerate(batches):
        # A parent's dropout draws from torch's own stream, which is thus a function of the step.
        stream = step_generator(run.config.seed, run.progress.step, number * 4096 + run.world.rank)
        torch.manual_seed(stream.initial_seed())
        with precision(run):
            losses = run.objective(
                "minimised", rows.to(run.world.device), draw, seeds.to(run.world.device)
            )
        # Sharding averages gradients over the processes; the sum over all tokens is wanted.
        (losses.objective * (run.world.size / counted)).backward()
        sums += torch.stack([one.detach().double() for one in losses])
    *found, stops = processes.total(run.world, [*sums.tolist(), float(bool(wishes))])
    return [value / counted for value in found], stops > 0


def train_step(run: Run, wishes: list[int]) -> tuple[dict[str, Any], bool]:
    """Make one optimizer step; return its metrics, and whether any process wishes to stop."""
    config, progress, started = run.config, run.progress, time.perf_counter()
    plan = step_plan(config, run.cap, progress.step, run.total_steps)
    (objective, last, shallow), stop = gradients(run, plan, wishes)
    settings = config.optimizer
    grad_norm = distributed.clip_gradients(run.model.parameters(), settings.max_grad_norm)
    factor = optim.learning_rate_factor(
        progress.step,
        run.total_steps,
        settings.warmup_fraction,
        settings.decay_fraction,
        settings.decay_floor,
    )
    refused = guard.refusal(objective, grad_norm, progress.recent, config.safety.spike_factor)
    if refused is None:
        optim.set_learning_rate(run.optimizers, factor)
        for optimizer in run.optimizers:
            optimizer.step()
        if run.ema is not None:
            optim.average(run.ema, run.model, settings.ema_decay)
        progress.recent = guard.remembered(progress.recent, objective)
    run.objective.zero_grad(set_to_none=True)
    flops = step_flops(config, run.costs, plan, run.parent_costs)
    progress.flops += flops
    progress.flops_paper += paper_step_flops(config, run.costs, plan)
    progress.step += 1
    progress.rows += config.batch.global_batch_size
    progress.tokens += step_tokens(config)
    progress.skipped += refused is not None
    progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if refused else 0
    seconds = time.perf_counter() - started
    progress.seconds += seconds
    depths = [draw.depth.num_recurrences for draw in plan.draws]
    row: dict[str, Any] = {
        "step": progress.step,
        "train/objective": objective,
        "train/grad_norm": grad_norm,
        "train/skipped": refused or False,
        "train/lr_factor": factor,
        "train/recurrence": sum(depths) / len(depths),
        "train/seq_len": plan.seq_len,
        "train/rows": progress.rows,
        "train/tokens": progress.tokens,
        "train/flops": progress.flops,
        "train/flops_paper": progress.flops_paper,
        "perf/seconds": progress.seconds,
        "perf/tokens_per_s": step_tokens(config) / seconds,
        "perf/mfu": flops / seconds / run.peak,
    }
    if config.mode != "gate":  # whose loss is none of the next token
        row["train/loss"] = last
    if any(draw.shallow for draw in plan.draws):
        row["train/loss_shallow"] = shallow
    return row, stop


@torch.no_grad()
def validation(run: Run) -> dict[str, float]:
    """Return the held-out loss at several depths and the telemetry of the loop.

    Of a model of which only the gate moves, both stand still: it returns how the gate does.
    """
    config, world = run.config, run.world
    if run.held_out is None:
        return {}
    gated, depths = config.mode == "gate", validated_depths(run)
    task, at = ("gauged", config.recurrence.mean) if gated else ("measured", depths)
    run.objective.eval()
    count = len(run.held_out.input_ids)
    # Every process makes the same number of calls: rows that cannot be dealt equally are
    # measured by all, which leaves the mean as it is.
    mine = range(world.rank, count, world.size) if count % world.size == 0 else range(count)
    micro = config.batch.micro_batch_size
    sums = torch.zeros(1, dtype=torch.float64)
    for start in range(0, len(mine), micro):
        indices = list(mine[start : start + micro])
        rows = run.held_out.take(indices).to(world.device)
        with precision(run):
            found = run.objective(task, rows, at, row_seeds(0, indices).to(world.device))
        sums = sums + torch.stack([*found, (rows.labels != -100).sum()]).double().cpu()
    *losses, counted = processes.total(world, sums.tolist())
    if gated:
        return gate.summary(losses, counted)
    row = {f"val/loss@r{r}": loss / counted for r, loss in zip(depths, losses, strict=True)}
    if config.mode != "static" and config.watch.telemetry:
        ids = run.held_out.input_ids[:1].to(world.device)
        with precision(run):
            row |= run.objective("health", ids, max(depths))
    run.objective.train()
    return row


def validated_depths(run: Run) -> tuple[int, ...]:
    """Return the depths of the validation that the model has."""
    depths = {one for one in run.config.watch.recurrences if one <= run.cap}
    return tuple(sorted(depths or {run.cap}))


@contextmanager
def stop_at_step_end() -> Iterator[list[int]]:
    """Turn Ctrl-C and SIGTERM into a wish that the loop honours between two steps.

    A second Ctrl-C stops at once; the last saved state is whole all the same.
    """
    wishes: list[int] = []

    def wish(number: int, frame: Any) -> None:
        if wishes and number == signal.SIGINT:
            raise KeyboardInterrupt
        wishes.append(number)

    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, wish) for number in signals]
    try:
        yield wishes
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def save(run: Run) -> None:
    """Save a state to resume from."""
    run.progress.stream = run.rows.state(run.progress.rows)
    checkpoint.save_state(
        run.directory,
        run.progress.step,
        run.model,
        run.optimizers,
        run.ema,
        asdict(run.progress),
        run.config.safety.keep_last,
        run.world,
    )


def restore(run: Run) -> bool:
    """Go back to the last whole state, if there is one, and say whether there was.

    Raises:
        UserError: All states are damaged, or they belong to another model.
    """
    state = checkpoint.load_latest(
        run.directory, run.model, run.optimizers, run.ema, run.world, say(run.world)
    )
    if state is None:
        return False
    run.progress = Progress(**state)
    run.rows.restore(run.progress.stream)
    return True


def roll_back(run: Run, metrics: Metrics | None) -> None:
    """Go back to the last saved weights, but on with the data: what it met last did not do.

    Raises:
        UserError: It has done so too often, or there is nothing to go back to.
    """
    spent = run.progress
    advice = (
        "start anew with a lower learning rate or without the text near those rows, or resume with "
        "another safety.spike_factor"
    )
    if spent.rollbacks >= run.config.safety.max_rollbacks or not restore(run):
        raise UserError(
            f"{spent.skipped_in_a_row} steps in a row were skipped up to row {spent.rows}, after "
            f"{spent.rollbacks} rollbacks; no such step reached the weights: {advice}"
        )
    step = run.progress.step
    # Compute that was spent stays spent: budgets and twins are told the truth.
    for name in ("rows", "tokens", "flops", "flops_paper", "seconds", "skipped"):
        setattr(run.progress, name, getattr(spent, name))
    run.progress.rollbacks = spent.rollbacks + 1
    # A new start: neither the streak nor the median of what came before it counts.
    run.progress.skipped_in_a_row, run.progress.recent = 0, []
    if metrics is not None:
        metrics.event(step, "rollback", skipped_to_row=spent.rows, from_step=spent.step)
        metrics.rewind(step)


def loop(run: Run, metrics: Metrics | None) -> bool:
    """Train until the last step, and say whether it was reached.

    Args:
        run: The run.
        metrics: Where the first process records; None elsewhere.

    Raises:
        UserError: Step after step was refused.
    """
    safety, watch, stop = run.config.safety, run.config.watch, False
    with stop_at_step_end() as wishes:
        while run.progress.step < run.total_steps and not stop:
            row, stop = train_step(run, wishes)
            step = run.progress.step
            if step % watch.every == 0 or step == run.total_steps:
                row |= validation(run)
            if metrics is not None:
                metrics.write(row)
                health = {key: value for key, value in row.items() if key.startswith("loop/")}
                for alarm in alarms(health, max(validated_depths(run))) if health else ():
                    metrics.event(step, "alarm", text=alarm)
            if run.progress.skipped_in_a_row >= safety.patience:
                roll_back(run, metrics)
            elif stop or (step % safety.save_every == 0 and not run.progress.skipped_in_a_row):
                save(run)
    return run.progress.step >= run.total_steps


def say(world: World) -> Any:
    """Return print for the first process, silence for the others."""
    return print if world.first else lambda *_: None


def begin(run: Run, stored: dict[str, Any] | None) -> None:
    """Create or restore the run's directory and state."""
    world = run.world
    if stored:
        if stored["data"] != run.rows.facts:
            raise UserError(
                f"the text of {run.directory} has changed since it was begun: put it back, or "
                "start anew with --overwrite"
            )
        if restore(run):
            say(world)(f"resumed from step {run.progress.step} of {run.total_steps}")
        return
    processes.barrier(world)
    if world.first:
        run.directory.mkdir(parents=True, exist_ok=True)
        for path in run.directory.iterdir():  # the directory itself may be a link or a mount
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        facts = {
            "kind": "run",
            "data": run.rows.facts,
            "total_steps": run.total_steps,
            "dtype": str(run.dtype).removeprefix("torch."),
            "num_processes": world.size,
        }
        provenance.write_json(run.directory / "run.json", provenance.record(run.config, **facts))
    processes.barrier(world)


def run(config: TrainConfig) -> None:
    """Run `rondo train`.

    Raises:
        UserError: Something the user can mend.
        KeyboardInterrupt: The user stopped twice; the last saved state is whole.
    """
    world = processes.join(config.machine.device)
    try:
        train(config, world)
    finally:
        processes.leave(world)


def train(config: TrainConfig, world: World) -> None:
    """Train on the processes of a world, from the beginning or from where it stopped."""
    directory, tell = prepare_directory(config), say(world)
    stored = stored_facts(config, directory)
    if stored and (directory / "final" / "run.json").is_file():
        tell(f"{config.output_dir} is finished already: {directory / 'final'}")
        return
    torch.manual_seed(config.seed)
    this = setup(config, world, stored)
    begin(this, stored)
    tell(
        f"{config.mode}: {this.total_steps} steps of {config.batch.global_batch_size} x "
        f"{config.batch.seq_len} tokens ({this.total_steps * step_tokens(config):,}), "
        f"{', '.join(one['name'] for one in this.rows.facts)} text, {world.size} x {world.device} "
        f"in {this.dtype}"
    )
    metrics = None
    if world.first:
        metrics = Metrics(
            directory,
            this.progress.step,
            this.total_steps,
            config.watch,
            config.model_dump(mode="json"),
        )
    try:
        finished = loop(this, metrics)
    finally:
        if metrics is not None:
            metrics.close()
    progress = this.progress
    if not finished:
        tell(f"stopped after step {progress.step}; go on: rondo train {directory} --resume")
        return
    if progress.step % config.safety.save_every:
        save(this)  # should final/ not be written, nothing is lost
    write_final(this)
    tell(
        f"wrote {directory / 'final'}: {progress.tokens:,} tokens, {progress.flops:.3g} FLOPs, "
        f"{progress.seconds:.0f} s"
    )
