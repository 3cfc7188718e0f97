"""Several processes as one: what torchrun laid out, and sums and gifts between its ranks.

With one process all of it is a no-op. Sharding is the affair of `training.distributed`.
"""

import datetime
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from rondo.errors import UserError
from rondo.provenance import choose_device


@dataclass(frozen=True)
class World:
    """The processes of a run, as one of them sees it."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes and prints for all."""
        return self.rank == 0


def join(device: str, timeout_minutes: float = 10.0) -> World:
    """Enter the process group that torchrun laid out, or be a world of one.

    Args:
        device: "auto", "cpu" or "cuda"; each process takes the GPU of its local rank.
        timeout_minutes: How long a rank waits for the others before it gives up.

    Raises:
        UserError: The device does not exist here, there are more processes than GPUs, or several
            processes were started that do not know of each other.
    """
    chosen = choose_device(device)
    launched = distributed.is_torchelastic_launched()
    if not launched and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        raise UserError(
            "srun started several processes that do not know of each other: let it start one "
            "torchrun per machine (docs/guides/multi-node.md)"
        )
    size = int(os.environ["WORLD_SIZE"]) if launched else 1
    if size == 1:
        return World(0, 1, chosen)
    if chosen.type == "cuda":
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise UserError(
                f"torchrun started more processes than this machine has GPUs ({gpus}): "
                f"give it --nproc-per-node {gpus}"
            )
        chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)
    distributed.init_process_group(
        "nccl" if chosen.type == "cuda" else "gloo",
        timeout=datetime.timedelta(minutes=timeout_minutes),
        device_id=chosen if chosen.type == "cuda" else None,
    )
    return World(distributed.get_rank(), size, chosen)


def leave(world: World) -> None:
    """Leave the process group."""
    if world.size > 1:
        distributed.destroy_process_group()


def total(world: World, values: Sequence[float]) -> list[float]:
    """Return the sum over the ranks of each value, in float64."""
    if world.size == 1:
        return [float(value) for value in values]
    sums = torch.tensor(values, dtype=torch.float64, device=world.device)
    distributed.all_reduce(sums)
    return sums.tolist()


def gather(world: World, value: Any) -> list[Any]:
    """Return what each rank gives, on every rank."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    distributed.all_gather_object(values, value)
    return values


def barrier(world: World) -> None:
    """Wait for all ranks."""
    if world.size > 1:
        distributed.barrier()
