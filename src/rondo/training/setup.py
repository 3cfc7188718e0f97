"""What a run is made of: model, text, optimizers and plan, loaded and checked before it begins."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from rondo import provenance
from rondo.config import TrainConfig
from rondo.data import TrainingRows, load_tokenizer, read_documents
from rondo.errors import UserError
from rondo.flops import Costs, costs_of, costs_of_parent
from rondo.modeling.modeling_recurrent import RecurrentForCausalLM
from rondo.training import optim
from rondo.training.budget import plan_steps


@dataclass
class Progress:
    """Counters of a run, saved with it."""

    step: int = 0
    rows: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0


@dataclass
class Run:
    """Everything the loop touches."""

    config: TrainConfig
    directory: Path
    model_directory: Path
    model: Any
    costs: Costs
    rows: TrainingRows
    total_steps: int
    optimizers: list[torch.optim.Optimizer]
    device: torch.device
    dtype: torch.dtype
    cap: int
    data: dict[str, Any]
    progress: Progress = field(default_factory=Progress)


def setup(config: TrainConfig) -> Run:
    """Load model, text and optimizers, and lay out the run.

    Raises:
        UserError: A directory, the text or a setting does not fit.
    """
    directory = Path(config.output_dir)
    checkpoint_facts = provenance.read_json(Path(config.model) / "run.json")
    if "parent" not in checkpoint_facts:
        raise UserError(f"{config.model} is no recurrent checkpoint: make one with rondo convert")
    device = provenance.choose_device(config.device)
    dtype = provenance.choose_dtype(config.dtype, device)
    model_directory = Path(config.model)
    model: Any
    if config.mode == "static":
        model_directory = parent_directory(checkpoint_facts["parent"])
        model = load(AutoModelForCausalLM, model_directory)
        costs, cap = costs_of_parent(model), 1
    else:
        model = load(RecurrentForCausalLM, model_directory)
        costs, cap = costs_of(model), model.config.max_recurrences
        check_depths(config, cap)
    model.to(device).train()
    documents = read_documents(config.data)
    tokenizer = load_tokenizer(model_directory)
    rows = TrainingRows(documents, tokenizer, config.seq_len + 1, config.seed)
    return Run(
        config=config,
        directory=directory,
        model_directory=model_directory,
        model=model,
        costs=costs,
        rows=rows,
        total_steps=plan_steps(config, costs, cap),
        optimizers=optim.make_optimizers(model, config.optimizer),
        device=device,
        dtype=dtype,
        cap=cap,
        data={
            "name": documents.name,
            "path": documents.path,
            "sha256": documents.sha256,
            "tokens": rows.num_tokens,
        },
    )


def load(model_class: Any, directory: Path) -> Any:
    """Load a model in float32.

    Raises:
        UserError: The directory holds none of this kind.
    """
    try:
        return model_class.from_pretrained(directory, dtype=torch.float32)
    except (ValueError, OSError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{directory} holds no model that can be trained: {reason}") from error


def parent_directory(parent: dict[str, Any]) -> Path:
    """Return where a parent lies, fetched from the hub where it is a hub id.

    Raises:
        UserError: It cannot be had as a directory.
    """
    path = Path(parent["path"])
    if (path / "config.json").is_file():
        return path
    if path.is_absolute() or path.suffix == ".gguf" or parent["path"] == "smollm2":
        raise UserError(
            f"the static twin needs the parent as a directory, and {path} is none: for a GGUF "
            "file, convert from the output of rondo dequantize"
        )
    try:
        return Path(snapshot_download(parent["path"], revision=parent.get("revision")))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise UserError(f"the parent {path} cannot be had from the hub: {error}") from error


def check_depths(config: TrainConfig, cap: int) -> None:
    """Refuse depths that the model's cap would silently change.

    Raises:
        UserError: A setting is beyond the cap.
    """
    setting = config.recurrence
    most = min(setting.cap or cap, cap)
    if max(setting.minimum, setting.mean) > most:
        raise UserError(
            f"recurrence.mean {setting.mean} and minimum {setting.minimum} must not exceed the "
            f"cap of {most} (recurrence.cap, or max_recurrences in the model's config.json)"
        )
