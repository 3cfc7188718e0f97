"""Which optimizer moves which weight, by role, and how fast at which step."""

import math

import torch
from torch import nn

from rondo.config import OptimizerConfig


def learning_rate_factor(
    step: int, total_steps: int, warmup_fraction: float, decay_fraction: float
) -> float:
    """Return the factor on the learning rate for a step (0-based): warm up, hold, decay.

    Warm-up is linear and reaches 1 at its last step; decay is a half cosine that would reach 0
    one step after the last, so that no step is without effect.
    """
    warmup = math.ceil(warmup_fraction * total_steps)
    decay = math.ceil(decay_fraction * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    into_decay = step - (total_steps - decay)
    if into_decay < 0:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (into_decay + 1) / (decay + 1)))


def role(name: str, parameter: nn.Parameter, muon: bool) -> str:
    """Return what a parameter is to the optimizers: muon, matrix, vector or injection.

    Muon's orthogonalised updates suit matrices between hidden states only; embeddings and the
    head stay on AdamW (as in arXiv:2511.07384), as do vectors and matrices of one row.
    """
    if ".injection." in name and parameter.dim() < 2:
        return "injection"
    if parameter.dim() < 2:
        return "vector"
    body = ".layers." in name or ".injection." in name
    return (
        "muon"
        if muon and body and parameter.dim() == 2 and min(parameter.shape) > 1
        else ("matrix")
    )


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
            "lr": config.lr * (config.injection_lr_factor if kind == "injection" else 1),
            "weight_decay": config.weight_decay if kind == "matrix" else 0.0,
        }
        for kind in ("matrix", "vector", "injection")
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
