"""Random weights for the twin that has the shape of the recurrent model and none of its past."""

import math
from typing import Any

import torch
from torch import nn

# Linear layers that write to the residual stream, as the supported families call them, and the
# ungated half of the MLP, which the predecessors' code treats alike.
OUTPUTS = ("o_proj.weight", "down_proj.weight", "up_proj.weight")


@torch.no_grad()
def initialize(model: Any, mean: int) -> None:
    """Fill the matrices of a recurrent model as its predecessors did (arXiv:2502.05171).

    Truncated normal of standard deviation sqrt(2 / (5 D)); those of `OUTPUTS` are smaller by
    sqrt(2 L), L being the layers a token passes at the mean recurrence; an untied embedding is
    larger by sqrt(D). Vectors stay as the family initialises them.
    """
    config = model.config
    depth = config.num_prelude_layers + config.num_coda_layers + mean * config.num_core_layers
    std = math.sqrt(2 / (5 * config.hidden_size))
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        scale = 1.0
        if name.endswith(OUTPUTS):
            scale = 1 / math.sqrt(2 * depth)
        elif "embed_tokens" in name and not config.tie_word_embeddings:
            scale = math.sqrt(config.hidden_size)
        limit = 3 * std * scale
        nn.init.trunc_normal_(parameter, std=std * scale, a=-limit, b=limit)
