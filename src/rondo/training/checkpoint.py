"""A run's state on disk: weights and optimizer moments as safetensors, counters as JSON."""

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from rondo.errors import UserError
from rondo.provenance import read_json, write_json

# Random state is not among it: depth, data and noise are functions of seed and step.
State = dict[str, Any]


def save_state(
    run_directory: Path,
    step: int,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    state: State,
    keep_last: int,
) -> None:
    """Write step_NNNNNN, whole or not at all, and remove the oldest beyond `keep_last`."""
    partial = Path(tempfile.mkdtemp(dir=run_directory, prefix=".step."))
    try:
        own = {name: parameter.detach() for name, parameter in model.named_parameters()}
        save_file(own, partial / "weights.safetensors")
        moments = {
            f"{number}/{index}/{name}": value.detach().contiguous()
            for number, optimizer in enumerate(optimizers)
            for index, values in optimizer.state_dict()["state"].items()
            for name, value in values.items()
        }
        save_file(moments, partial / "optimizer.safetensors")
        write_json(partial / "state.json", state)
        directory = run_directory / f"step_{step:06d}"
        shutil.rmtree(directory, ignore_errors=True)
        partial.rename(directory)
    except SafetensorError as error:
        raise UserError(
            f"cannot save step {step} in {run_directory}: {error}; free some space and resume"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for old in step_directories(run_directory)[:-keep_last]:
        shutil.rmtree(old)


def step_directories(run_directory: Path) -> list[Path]:
    """Return the saved states of a run, oldest first."""
    return sorted(
        path for path in run_directory.glob("step_*") if re.fullmatch(r"step_\d{6,}", path.name)
    )


def load_state(directory: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> State:
    """Restore weights and optimizers in place and return the counters.

    Raises:
        UserError: The state is damaged or belongs to another model.
    """
    try:
        weights = load_file(directory / "weights.safetensors")
        moments = load_file(directory / "optimizer.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{directory} is damaged ({error}): remove it, and the run resumes from the one before"
        ) from error
    own = dict(model.named_parameters())
    if own.keys() != weights.keys():
        raise UserError(f"{directory} belongs to another model than the run's")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])
    for number, optimizer in enumerate(optimizers):
        values: dict[int, dict[str, torch.Tensor]] = {}
        for key, tensor in moments.items():
            owner, index, name = key.split("/")
            if int(owner) == number:
                values.setdefault(int(index), {})[name] = tensor
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": values, "param_groups": groups})
    return read_json(directory / "state.json")
