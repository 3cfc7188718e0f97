"""Several processes as one: the process group, sharding (FSDP2, HSDP), sums over ranks.

The one door for torch.distributed, beside `checkpoint`. With one process all of it is a no-op.
"""

import datetime
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

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


def shard(root: nn.Module, once: Sequence[nn.Module], world: World, replicas: int) -> None:
    """Split the weights of a model over the ranks, in place; make optimizers afterwards.

    Weights are gathered and gradients summed in float32, so that bfloat16 is the affair of autocast
    alone and many ranks compute what one does. Gradients become means over the ranks. Only the
    forward of `root` may be called from then on.

    Args:
        root: What is called. It owns all weights not under `once`, the core's among them, and
            they are gathered once per forward, not once per iteration.
        once: Layers outside the loop, each gathered when its turn comes.
        world: The processes.
        replicas: Groups of ranks that each hold the whole model (HSDP).

    Raises:
        UserError: The ranks do not divide into so many groups.
    """
    if world.size == 1:
        return
    if world.size % replicas:
        raise UserError(
            f"machine.replicas {replicas} does not divide the {world.size} processes: choose a "
            "divisor, or 1 to shard over all of them"
        )
    shape = (world.size,) if replicas == 1 else (replicas, world.size // replicas)
    mesh = init_device_mesh(
        world.device.type, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :]
    )
    for module in (*once, root):
        fully_shard(module, mesh=mesh)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights that train by name; of sharded ones, this rank's shards."""
    # A forward without backward leaves the root's weights gathered, in copies that no optimizer
    # knows; asking for the state puts the shards back in their place.
    model.state_dict()
    return {name: one for name, one in model.named_parameters() if one.requires_grad}


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scale the gradients down to a norm, over all ranks, and return what it was."""
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


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


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the full weights on the CPU of the first rank, for `save_pretrained`; {} elsewhere.

    What the model ties is one tensor there too, so that it is written once.
    """
    state: dict[str, Any] = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = first.setdefault(id(parameter), name)
        if owner in state:
            state[name] = state[owner]
    return state
