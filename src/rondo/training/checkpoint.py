"""A run's state on disk: one format for one process and many, whole or not there at all.

A state is step_NNNNNN/: safetensors that each rank writes its shards to, counters in state.json,
and in checksums.json the SHA-256 of every file. It loads on any number of ranks.
"""

import hashlib
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import checkpoint as dcp

from rondo.errors import UserError
from rondo.processes import World, gather
from rondo.provenance import read_json, write_json
from rondo.training.distributed import trainable

# Random state is not among it: depth, data and noise are functions of seed and step.
State = dict[str, Any]
Optimizers = list[torch.optim.Optimizer]
Tensors = dict[str, torch.Tensor]
CHECKSUMS, COUNTERS = "checksums.json", "state.json"


def save_state(
    run_directory: Path,
    step: int,
    model: nn.Module,
    optimizers: Optimizers,
    ema: Tensors | None,
    state: State,
    keep_last: int,
    world: World,
) -> None:
    """Write step_NNNNNN and then remove all but the last `keep_last`; every rank calls it.

    Raises:
        UserError: It cannot be written; what was saved before is untouched.
    """
    partial = run_directory / f".step_{step:06d}"
    tensors = _weights(model, ema)
    for name, parameter in trainable(model).items():
        for optimizer in optimizers:
            for moment, value in optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{moment}"] = value

    def prepare() -> None:
        _sweep(run_directory)
        partial.mkdir()

    def finish() -> None:
        write_json(partial / COUNTERS, state)
        digests[COUNTERS] = _sha256(partial / COUNTERS)
        write_json(partial / CHECKSUMS, digests)
        _publish(partial, step, keep_last)

    try:
        _on_first(world, prepare)
        with _dcp_errors():
            writer = dcp.HuggingFaceStorageWriter(str(partial), save_distributed=True)
            dcp.save(tensors, storage_writer=writer)
        written = {p.name: _sha256(p) for p in partial.glob(f"shard-{world.rank + 1:05d}-*")}
        digests = {name: one for each in gather(world, written) for name, one in each.items()}
        _on_first(world, finish)
    except OSError as error:
        _on_first(world, lambda: shutil.rmtree(partial, ignore_errors=True))
        raise UserError(
            f"cannot save step {step} in {run_directory}: {error.strerror or error}; what was "
            "saved before is untouched, so mend that and go on with --resume"
        ) from error


def _publish(partial: Path, step: int, keep_last: int) -> None:
    """Give a finished state its name, then remove the old ones and those of a lost future."""
    directory = partial.with_name(partial.name.removeprefix("."))
    if directory.exists():
        _hide(directory)
    partial.rename(directory)
    states = step_directories(directory.parent)
    kept = [path for path in states if _step(path) <= step][-keep_last:]
    for path in states:
        if path not in kept:
            _hide(path)
    _sweep(directory.parent)


def _hide(directory: Path) -> None:
    # Removing takes time, and a kill meanwhile must not leave half a state under its name.
    directory.rename(directory.with_name(f".{directory.name}.old"))


def _sweep(run_directory: Path) -> None:
    for hidden in run_directory.glob(".step_*"):
        shutil.rmtree(hidden, ignore_errors=True)


def step_directories(run_directory: Path) -> list[Path]:
    """Return the saved states of a run, oldest first."""
    found = (path for path in run_directory.glob("step_*") if re.fullmatch(r"step_\d+", path.name))
    return sorted(found, key=_step)


def _step(directory: Path) -> int:
    return int(directory.name.removeprefix("step_"))


def load_latest(
    run_directory: Path,
    model: nn.Module,
    optimizers: Optimizers,
    ema: Tensors | None,
    world: World,
    say: Callable[[str], None],
) -> State | None:
    """Restore the newest whole state in place and return its counters; None where there is none.

    Args:
        run_directory: The run's.
        model: As it was when saved, over any number of ranks.
        optimizers: Made of this model's parameters, in any order; only moments are restored.
        ema: Averaged weights by name, restored as well.
        world: The processes; every rank calls it.
        say: Told on the first rank of each damaged state that is passed over.

    Raises:
        UserError: All states are damaged, or it belongs to another model.
    """
    states = step_directories(run_directory)
    for directory in reversed(states):
        damage = _damage(directory, world)
        if damage is None:
            _restore(directory, model, optimizers, ema)
            return read_json(directory / COUNTERS)
        if world.first:
            say(f"passing over {directory}, which is damaged: {damage}")
    if states:
        raise UserError(
            f"every saved state in {run_directory} is damaged: put one back, or start anew with "
            "--overwrite"
        )
    return None


def _damage(directory: Path, world: World) -> str | None:
    """Return what is wrong with a state's files, the same on every rank; each checks a share."""
    found = None
    try:
        sums = read_json(directory / CHECKSUMS)
        for name in sorted(sums)[world.rank :: world.size]:
            if _sha256(directory / name) != sums[name]:
                found = f"{name} does not match {CHECKSUMS}"
    except (OSError, UserError) as error:
        found = str(error)
    return next((one for one in gather(world, found) if one), None)


def _restore(
    directory: Path, model: nn.Module, optimizers: Optimizers, ema: Tensors | None
) -> None:
    reader = dcp.HuggingFaceStorageReader(str(directory))
    saved: dict[str, Any] = reader.read_metadata().state_dict_metadata
    tensors, own = _weights(model, ema), trainable(model)
    shapes = {key: one.size for key, one in saved.items() if not key.startswith("optimizer.")}
    if shapes != {key: tensor.shape for key, tensor in tensors.items()}:
        raise UserError(
            f"{directory} belongs to another model than the run's: name the model the run was "
            "begun with, or start anew with --overwrite"
        )
    moments: dict[nn.Parameter, Tensors] = {}
    for key, one in saved.items():
        if key in shapes:
            continue
        name, moment = key.removeprefix("optimizer.").rsplit(".", 1)
        weight, dtype = own[name], one.properties.dtype
        # A moment is laid out as its weight is; the count of updates is a number of its own.
        like = weight if weight.shape == one.size else torch.empty(one.size)
        tensors[key] = torch.zeros_like(like, dtype=dtype, requires_grad=False)
        moments.setdefault(weight, {})[moment] = tensors[key]
    with _dcp_errors():
        dcp.load(tensors, storage_reader=reader)
    for optimizer in optimizers:
        held = [one for group in optimizer.param_groups for one in group["params"]]
        state = {index: moments[one] for index, one in enumerate(held) if one in moments}
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def _weights(model: nn.Module, ema: Tensors | None) -> Tensors:
    tensors = {f"weights.{name}": one.detach() for name, one in trainable(model).items()}
    return tensors | {f"ema.{name}": tensor for name, tensor in (ema or {}).items()}


def _on_first(world: World, act: Callable[[], None]) -> None:
    """Let the first rank do something while the others wait; what fails there fails on all."""
    failure = None
    if world.first:
        try:
            act()
        except OSError as error:
            failure = error
    if (failure := gather(world, failure)[0]) is not None:
        raise failure


@contextmanager
def _dcp_errors() -> Iterator[None]:
    """Let an error of the disk come out as itself, whichever rank met it."""
    try:
        with warnings.catch_warnings():
            # What it warns of, being alone, is what is meant.
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except dcp.CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
