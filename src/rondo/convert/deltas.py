"""Stride sharing with deltas: what sets each iteration of the core apart, fitted to the parent.

In each iteration a core layer stands for one of the parent's layers that the split has replaced.
The difference of that layer from the shared one is stored as far as a low rank can hold it
(arXiv:2410.20672), by truncated SVD: no other matrix of that rank comes closer. Biases and norms
are stored whole.

Which layer it stands for is a choice. In order, the iterations run the replaced layers as the
parent did: at full rank and without re-injection (`--mixing 1`) they give the parent back. By
group, iteration i of a core layer stands for the i-th of the k layers from it on; the first needs
no delta, so r = 1 stays the parent without the replaced layers, and the others are fitted to near
neighbours, which at the low ranks that are worth storing harms an untrained model less.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedConfig

from rondo.convert.families import cut_config
from rondo.convert.source import Source, parse_layer, read_tensors, write_tensors
from rondo.convert.split import Split
from rondo.errors import UserError
from rondo.modeling.configuration_recurrent import RecurrentConfig
from rondo.provenance import write_json

# The parent's layer that each core layer stands for, by iteration.
Targets = list[list[int]]


@dataclass(frozen=True)
class Deltas:
    """Fitted deltas.

    Attributes:
        targets: The parent's layer that each core layer stands for, by iteration.
        tensors: Both factors of each, and the vectors, by their names in the checkpoint.
        errors: What the factors miss, by iteration and core layer: the Frobenius norm of the
            rest relative to that of the whole difference.
    """

    targets: Targets
    tensors: dict[str, Tensor]
    errors: list[list[float]]


def choose_targets(core: Sequence[int], stride: int, in_order: bool) -> Targets:
    """Return what every k-th layer of a range stands for in each of k iterations."""
    if in_order:
        starts = [core[0] + iteration * len(core) for iteration in range(stride)]
        return [list(range(start, start + len(core))) for start in starts]
    return [[layer + offset for layer in core] for offset in range(stride)]


def check_rank(rank: int, core: Any) -> None:
    """Check that the core's layers (on the meta device) have matrices of such a rank.

    Raises:
        UserError: They have not.
    """
    shapes = [one.shape for layer in core for one in layer.parameters() if one.dim() == 2]
    full = max(min(shape) for shape in shapes)
    if rank > full:
        raise UserError(f"--delta-rank {rank} is beyond {full}, the core's full rank")


def check_targets(targets: Targets, chosen: Split, parent: PreTrainedConfig) -> None:
    """Check that deltas can make the shared layers those that they stand for.

    Args:
        targets: What they stand for.
        chosen: The parent's layers of each part.
        parent: The parent's config.

    Raises:
        UserError: They cannot.
    """
    if len(targets) < 2 or targets[-1][-1] != chosen.coda[0] - 1:
        raise UserError(
            "fitted deltas need a --stride of at least 2 that divides the range it thins, but "
            f"{len(targets)} thins {chosen.coda[0] - chosen.core[0]} layers: give another, or "
            "--sizes whose middle it divides"
        )
    kinds = cut_config(parent, list(chosen.core))
    for layers in targets:
        for name, value in cut_config(parent, layers).items():
            if value != kinds[name]:
                raise UserError(
                    f"deltas change weights only, but {name} of the layers {layers} is {value}, "
                    f"and of the layers {list(chosen.core)}, which would stand for them, "
                    f"{kinds[name]}: choose another --stride, --sizes or --delta-target, or leave "
                    "--delta-rank out"
                )


def low_rank(difference: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return up (out, rank) and down (rank, in), whose product is nearest to a difference.

    Where there is no difference, up is zero and down is drawn, so that training can open it.
    """
    if not difference.any():
        rank, width = min(rank, *difference.shape), difference.shape[1]
        down = torch.randn(rank, width, generator=generator) * width**-0.5
        return difference.new_zeros(len(difference), rank), down
    left, values, right = torch.linalg.svd(difference, full_matrices=False)
    return left[:, :rank] * values[:rank], right[:rank]


def fit(source: Source, config: RecurrentConfig, core: Any, targets: Targets, seed: int) -> Deltas:
    """Fit the deltas of every core layer, reading the parent's tensors one at a time.

    Args:
        source: The parent.
        config: Config of the recurrent model.
        core: Its core layers, on the meta device.
        targets: What they stand for.
        seed: Seed of what is drawn where there is nothing to fit.

    Raises:
        UserError: A tensor cannot be read, or holds NaN or infinity.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = config.dtype or torch.float32
    tensors: dict[str, Tensor] = {}
    for place in tqdm(range(len(core)), desc="fit deltas", unit="layer", disable=None):
        for name, parameter in core[place].named_parameters():
            owner, _, leaf = name.rpartition(".delta_")
            position = config.num_prelude_layers + place
            target = f"model.layers.{position}.{owner}.delta_"
            if leaf == "up":
                wholes = differences(source, config, targets, position, f"{owner}.weight")
                factors = [low_rank(one, parameter.shape[-1], generator) for one in wholes]
                tensors[f"{target}up"] = torch.stack([up for up, _ in factors]).to(dtype)
                tensors[f"{target}down"] = torch.stack([down for _, down in factors]).to(dtype)
            elif owner and leaf != "down":
                wholes = differences(source, config, targets, position, f"{owner}.{leaf}")
                tensors[f"{target}{leaf}"] = torch.stack(list(wholes)).to(dtype)
    return Deltas(targets, tensors, fit_errors(source, config, targets, tensors))


def differences(
    source: Source, config: RecurrentConfig, targets: Targets, position: int, name: str
) -> Iterator[Tensor]:
    """Yield, by iteration, how a parameter differs from that of a stored layer.

    Raises:
        UserError: It cannot be read, or holds NaN or infinity.
    """
    kept: Any = config.source_layers
    shared = source.layer_tensor(kept[position], name).float()
    for layers in targets:
        target = layers[position - config.num_prelude_layers]
        yield source.layer_tensor(target, name).float() - shared


def fit_errors(
    source: Source, config: RecurrentConfig, targets: Targets, tensors: dict[str, Tensor]
) -> list[list[float]]:
    """Return what stored factors miss, as `Deltas.errors` has it.

    Raises:
        UserError: The parent's tensors cannot be read.
    """
    whole = torch.zeros(config.num_delta_iterations, config.num_core_layers)
    missed = torch.zeros_like(whole)
    for up_name, up in tensors.items():
        owner, _, leaf = up_name.rpartition(".delta_")
        if leaf != "up":
            continue
        down = tensors[f"{owner}.delta_down"]
        _, position, name = parse_layer(owner)
        wholes = differences(source, config, targets, position, f"{name}.weight")
        for i, difference in enumerate(wholes):
            at = i, position - config.num_prelude_layers
            whole[at] += difference.square().sum()
            missed[at] += (difference - up[i].float() @ down[i].float()).square().sum()
    return (missed / whole.clamp(min=1e-30)).sqrt().tolist()


def merged(name: str, shared: Tensor, deltas: dict[str, Tensor], iteration: int) -> Tensor:
    """Return a parameter of the checkpoint as an iteration (1-based) has it, in float32.

    Args:
        name: Its name in the checkpoint.
        shared: What all iterations share of it.
        deltas: The checkpoint's deltas.
        iteration: The iteration.
    """
    owner, _, leaf = name.rpartition(".")
    up, down = deltas.get(f"{owner}.delta_up"), deltas.get(f"{owner}.delta_down")
    if leaf == "weight" and up is not None and down is not None:
        return shared.float() + up[iteration - 1].float() @ down[iteration - 1].float()
    return shared.float() + deltas[f"{owner}.delta_{leaf}"][iteration - 1].float()


def write_unrolled(
    source: Source, config: RecurrentConfig, deltas: dict[str, Tensor], depth: int, directory: Path
) -> None:
    """Write the plain model that a depth amounts to: the layers of each iteration, deltas merged.

    All its layers are of the parent's classes, and all else in it is the parent's.

    Raises:
        UserError: The parent's tensors cannot be read, or there is no room.
    """
    kept: Any = config.source_layers
    core_start = config.num_prelude_layers
    coda_start = core_start + config.num_core_layers
    run = [(position, 0) for position in range(core_start)]
    for iteration in range(1, depth + 1):
        run += [(position, iteration) for position in range(core_start, coda_start)]
    run += [(position, 0) for position in range(coda_start, len(kept))]
    directory.mkdir()
    fields = cut_config(source.config, [kept[position] for position, _ in run])
    write_json(directory / "config.json", fields)
    index: dict[str, Any] = {"metadata": {}, "weight_map": {}}
    for shard in source.shards():
        out: dict[str, Tensor] = {}
        for stored, tensor in read_tensors(shard):
            prefix, layer, name = parse_layer(stored)
            if layer < 0:
                out[stored] = tensor
            for place, (position, iteration) in enumerate(run):
                if kept[position] == layer:
                    ours = f"model.layers.{position}.{name}"
                    value = merged(ours, tensor, deltas, iteration) if iteration else tensor
                    out[f"{prefix}layers.{place}.{name}"] = value
        write_tensors(out, directory / shard.name)
        index["weight_map"] |= dict.fromkeys(out, shard.name)
    write_json(directory / "model.safetensors.index.json", index)
