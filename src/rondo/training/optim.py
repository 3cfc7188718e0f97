"""Which optimizer moves which weight, by role, and how fast at which step."""

import math

import torch
from torch import nn

from rondo.config import OptimizerConfig


def learning_rate_factor(
    step: int,
    total_steps: int,
    warmup_fraction: float,
    decay_fraction: float,
    decay_floor: float = 0.0,
) -> float:
    """Return the factor on the learning rate for a step (0-based): warm up, hold, decay.

    Warm-up is linear and reaches 1 at its last step; decay is a half cosine that would reach the
    floor one step after the last, so that no step is without effect.
    """
    warmup = math.ceil(warmup_fraction * total_steps)
    decay = math.ceil(decay_fraction * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    into_decay = step - (total_steps - decay)
    if into_decay < 0:
        return 1.0
    cosine = 0.5 * (1 + math.cos(math.pi * (into_decay + 1) / (decay + 1)))
    return decay_floor + (1 - decay_floor) * cosine


def role(name: str, parameter: nn.Parameter, muon: bool) -> str:
    """Return what a parameter is to the optimizers: muon, matrix, vector or loop.

    Muon's orthogonalised updates suit matrices between hidden states only: embeddings and the
    head stay on AdamW (as in arXiv:2511.07384), as do vectors, matrices of one row, and low-rank
    factors, whose product and not themselves is what acts. `loop` is what only iterations use:
    the injection's vectors and the deltas of each iteration.
    """
    if ".delta_" in name or (".injection." in name and parameter.dim() < 2):
        return "loop"
    if parameter.dim() < 2:
        return "vector"
    body = ".layers." in name or ".injection." in name
    suits = parameter.dim() == 2 and min(parameter.shape) > 1 and ".lora_" not in name
    return "muon" if muon and body and suits else "matrix"


def make_optimizers(model: nn.Module, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """Return AdamW, preceded by Muon where the config asks for it, over all trainable weights.

    Each group carries `base_lr`, which `set_learning_rate` scales.
    """
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(role(name, parameter, config.name == "muon"), []).append(parameter)
    optimizers: list[torch.optim.Optimizer] = []
    if groups.get("muon"):
        optimizers.append(
            torch.optim.Muon(
                groups["muon"],
                lr=config.muon_lr,
                momentum=0.95,
                nesterov=True,
                weight_decay=config.weight_decay,
            )
        )
    adamw_groups = [
        {
            "params": groups[kind],
            "lr": config.lr * (config.injection_lr_factor if kind == "loop" else 1),
            "weight_decay": config.weight_decay if kind == "matrix" else 0.0,
        }
        for kind in ("matrix", "vector", "loop")
        if groups.get(kind)
    ]
    optimizers.append(torch.optim.AdamW(adamw_groups, betas=config.betas, eps=1e-8))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def set_learning_rate(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Set every group's learning rate to its base times a factor."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor


def averages(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of the trainable weights, to become their moving average."""
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@torch.no_grad()
def average(ema: dict[str, torch.Tensor], model: nn.Module, decay: float) -> None:
    """Move the averages towards the weights: ema = decay * ema + (1 - decay) * weights."""
    for name, parameter in model.named_parameters():
        if name in ema:
            ema[name].lerp_(parameter.detach(), 1 - decay)
