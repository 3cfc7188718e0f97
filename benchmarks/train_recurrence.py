"""What a training step costs at each depth, against the parent's step and against its FLOPs.

    python benchmarks/train_recurrence.py CONVERTED_DIRECTORY [--seq-len 256] [--output FILE.json]

In one process and one run: every repetition times the parent's step and the recurrent step at each
depth in turn, so that a slow moment of the machine meets them alike; figures are medians of the
repetitions, with the middle half beside them. `ideal` is the parent's rate times the ratio of
executed FLOPs, `of ideal` the measured rate over it. Peak memory is taken in a process of its own
for each depth. Three more lines: drawing depths, packing by documents, and saving, each as a share
of a step.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rondo.config import BatchConfig, BudgetConfig, DataConfig, RecurrenceConfig, TrainConfig
from rondo.processes import World, join
from rondo.provenance import record
from rondo.training import train
from rondo.training.budget import Draw, StepPlan, step_flops, step_plan
from rondo.training.recurrence import Depth
from rondo.training.setup import Run, setup

DEPTHS = (1, 2, 4, 8)


def prepared(arguments: argparse.Namespace, world: World, out: Path, **changes: Any) -> Run:
    """Return a run that is ready to step."""
    settings: dict[str, Any] = {
        "model": arguments.model,
        "output_dir": str(out),
        "batch": BatchConfig(
            seq_len=arguments.seq_len,
            micro_batch_size=arguments.batch_size,
            global_batch_size=arguments.batch_size,
        ),
        "recurrence": RecurrenceConfig(distribution="fixed", mean=1),
        "budget": BudgetConfig(steps=1000),
        **changes,
    }
    return setup(TrainConfig(**settings), world, None)


def at_depth(depth: int) -> StepPlan:
    """Return a step of one depth with gradient through all of it."""
    return StepPlan((Draw(Depth(depth, depth), None),), depth, depth, 0)


def step(run: Run, depth: int) -> float:
    """Make one whole optimizer step at a depth and return its seconds."""
    plan = replace(at_depth(depth), seq_len=run.config.batch.seq_len)
    if run.world.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    train.gradients(run, plan, [])
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    for optimizer in run.optimizers:
        optimizer.step()
    run.objective.zero_grad(set_to_none=True)
    if run.world.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def flops(run: Run, depth: int) -> float:
    """Return the executed FLOPs of a step."""
    plan = replace(at_depth(depth), seq_len=run.config.batch.seq_len)
    return step_flops(run.config, run.costs, plan)


def spread(values: list[float]) -> dict[str, float]:
    """Return the median and the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "low": low, "high": high}


def timed(function: Callable[[], Any], repetitions: int) -> float:
    """Return the median seconds of a call."""
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def peak_memory(arguments: argparse.Namespace, depth: int) -> float:
    """Return the peak bytes of a process that makes two steps at a depth, 0 for the parent."""
    words = [sys.executable, __file__, arguments.model, "--only", str(depth)]
    words += ["--seq-len", str(arguments.seq_len), "--batch-size", str(arguments.batch_size)]
    answer = subprocess.run(words, capture_output=True, text=True, check=True)
    return float(answer.stdout.splitlines()[-1])


def only(arguments: argparse.Namespace, world: World, out: Path) -> None:
    """Make two steps at one depth and print the peak of this process's memory."""
    mode = "recurrent" if arguments.only else "static"
    run = prepared(arguments, world, out, mode=mode)
    for _ in range(2):
        step(run, arguments.only or 1)
    if world.device.type == "cuda":
        print(torch.cuda.max_memory_allocated())
    else:
        # Not getrusage, whose peak a child inherits from the process that started it.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        print(1024 * int(status.partition("VmHWM:")[2].split()[0]))


def overheads(arguments: argparse.Namespace, world: World, out: Path, seconds: float) -> Any:
    """Return drawing, packing and saving as shares of a step of the given seconds."""
    sampled = prepared(arguments, world, out, recurrence=RecurrenceConfig(mean=4))
    drawn = timed(lambda: step_plan(sampled.config, sampled.cap, 7, 1000), 200)
    both = {
        packing: prepared(arguments, world, out, data=DataConfig(packing=packing))
        for packing in ("wrapped", "documents")
    }
    pairs: list[tuple[float, float]] = []
    for _ in range(arguments.repetitions):
        pairs.append((step(both["wrapped"], 4), step(both["documents"], 4)))
    packed = statistics.median(right / left for left, right in pairs) - 1
    out.mkdir(parents=True, exist_ok=True)
    saved = timed(lambda: train.save(sampled), 3)
    every = sampled.config.safety.save_every
    return {
        "depth_sampling": drawn / seconds,
        "packing_by_documents": packed,
        "saving": saved / (every * seconds),
        "save_seconds": saved,
        "save_every": every,
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--output")
    parser.add_argument("--only", type=int)
    arguments = parser.parse_args()
    world = join("auto")
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.only is not None:
            only(arguments, world, Path(scratch))
            return
        parent = prepared(arguments, world, Path(scratch), mode="static")
        looped = prepared(arguments, world, Path(scratch))
        times: dict[int, list[float]] = {depth: [] for depth in (0, *DEPTHS)}
        for repetition in range(arguments.repetitions + 1):
            for depth, found in times.items():
                seconds = step(looped if depth else parent, depth or 1)
                if repetition:  # the first one warms up
                    found.append(seconds)
        tokens = arguments.seq_len * arguments.batch_size
        base = flops(parent, 1)
        rows = []
        for depth, found in times.items():
            cost = flops(looped, depth) if depth else base
            ratios = [
                (reference / base) / (seconds / cost)
                for reference, seconds in zip(times[0], found, strict=True)
            ]
            rows.append(
                {
                    "depth": depth or "parent",
                    "tokens_per_s": tokens / statistics.median(found),
                    "seconds": spread(found),
                    "flops": cost,
                    "of_ideal": spread(ratios),
                    "peak_bytes": peak_memory(arguments, depth),
                }
            )
        shares = overheads(arguments, world, Path(scratch), statistics.median(times[4]))
        facts = record(looped.config, kind="benchmark", rows=rows, overheads=shares)
    print(f"{'depth':>8}{'tokens/s':>10}{'of ideal':>10}{'middle half':>16}{'peak GB':>9}")
    for row in rows:
        ideal = row["of_ideal"]
        print(
            f"{row['depth']!s:>8}{row['tokens_per_s']:>10.1f}{ideal['median']:>10.3f}"
            f"{ideal['low']:>9.3f}-{ideal['high']:.3f}{row['peak_bytes'] / 1e9:>10.2f}"
        )
    print("shares of a step at r = 4: " + json.dumps(shares))
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
