"""Weights split over several processes: sharding (FSDP2, HSDP), and whole again.

Beside `checkpoint` and `rondo.processes` the only door for torch.distributed. With one process all
of it is a no-op.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from rondo.errors import UserError
from rondo.processes import World


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
