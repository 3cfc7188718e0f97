"""Directories of models: fetched from the hub where they are hub ids, and loaded."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError

from rondo import modeling
from rondo.errors import UserError

# Weights as safetensors only: pickles are not even fetched.
MODEL_FILES = ("model*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
# The code that travels with each checkpoint.
MODELING_FILES = (
    "body_recurrent.py",
    "cache_recurrent.py",
    "configuration_recurrent.py",
    "deltas_recurrent.py",
    "exits_recurrent.py",
    "generation_recurrent.py",
    "injection_recurrent.py",
    "inputs_recurrent.py",
    "loops_recurrent.py",
    "modeling_recurrent.py",
    "slots_recurrent.py",
    "speculation_recurrent.py",
    "stores_recurrent.py",
)


def fetch(name: str, revision: str | None, patterns: Sequence[str] = MODEL_FILES) -> Path:
    """Fetch files of a model from the hub.

    Raises:
        UserError: The name is neither a directory nor a model that can be reached.
    """
    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=list(patterns), ignore_patterns=["*/*"]
            )
        )
    except HFValidationError as error:
        raise UserError(f"{name} is neither a directory nor a hub id") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{name} is no directory here and cannot be had from the hub: {reason}"
        ) from error


def parent_directory(parent: dict[str, Any], patterns: Sequence[str] = MODEL_FILES) -> Path:
    """Return where a parent lies, fetched from the hub where it is a hub id.

    Raises:
        UserError: It cannot be had as a directory.
    """
    path = Path(parent["path"])
    if (path / "config.json").is_file():
        return path
    if path.is_absolute() or path.suffix == ".gguf" or parent["path"] == "smollm2":
        raise UserError(
            f"the parent is needed as a directory, and {path} is none: for a GGUF file, convert "
            "from the output of rondo dequantize"
        )
    return fetch(parent["path"], parent.get("revision"), patterns)


def load_model(model_class: Any, directory: Path, dtype: torch.dtype, **options: Any) -> Any:
    """Load a model of a transformers class, remote code only if the options say so.

    Raises:
        UserError: The directory holds none of this kind.
    """
    try:
        return model_class.from_pretrained(directory, dtype=dtype, **options)
    except (ValueError, OSError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{directory} holds no model that can be loaded: {reason}") from error


def copy_code(directory: Path) -> None:
    """Put the modelling code beside the weights, so that they load without this package."""
    for name in MODELING_FILES:
        shutil.copyfile(Path(modeling.__file__).parent / name, directory / name)
