"""Low-rank adapters through PEFT: put on before training, folded into the weights at its end."""

import importlib
from typing import Any

import torch
from torch import nn

from rondo.config import LoraConfig
from rondo.errors import UserError


def add_adapters(model: nn.Module, config: LoraConfig) -> None:
    """Freeze a model and give its linear layers adapters; what only loops use stays trainable.

    Raises:
        UserError: PEFT is missing, or no layer has one of the names.
    """
    try:
        peft: Any = importlib.import_module("peft")
    except ImportError as error:
        raise UserError('adapters need PEFT: pip install "rondo-lm[lora]"') from error
    names = config.targets.split(",")
    targets = config.targets if names == ["all-linear"] else names
    try:
        peft.inject_adapter_in_model(
            peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=targets), model
        )
    except ValueError as error:
        raise UserError(f"lora.targets {config.targets}: {error}") from error
    for name, parameter in model.named_parameters():
        if ".injection." in name or ".delta_" in name:
            parameter.requires_grad_(True)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # what moves by small steps


def folded(state: dict[str, torch.Tensor], config: LoraConfig) -> dict[str, torch.Tensor]:
    """Return a state without adapters: each weight plus alpha / rank times B A, in float32."""
    scale = config.alpha / config.rank
    plain = {}
    for name, tensor in state.items():
        stem, wrapped, rest = name.partition(".base_layer.")
        if wrapped and rest == "weight":
            down, up = (state[f"{stem}.lora_{one}.default.weight"] for one in "AB")
            update = scale * (up.float() @ down.float())
            plain[f"{stem}.weight"] = tensor.float() + update
        elif ".lora_" not in name:
            plain[f"{stem}.{rest}" if wrapped else name] = tensor
    return plain
