"""What a step minimises: next-token loss of the last iteration, or of a shallower one as well."""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

# Rows of logits that exist at one time; a vocabulary of 100,000 makes 400 MB of them in float32.
CHUNK_TOKENS = 1024


def next_token_loss(
    hidden_BTD: torch.Tensor, labels_BT: torch.Tensor, logits: Callable[..., torch.Tensor]
) -> torch.Tensor:
    """Return the mean cross-entropy (nats) of predicting labels from hidden states.

    Logits are made in chunks and again in the backward pass, so they never exist as a whole.

    Args:
        hidden_BTD: Normed output of the last layer, (B, T, D).
        labels_BT: The token that follows each position, (B, T), -100 where none counts.
        logits: Maps hidden states (N, D) to logits (N, V).
    """
    hidden, labels = hidden_BTD.flatten(0, 1), labels_BT.flatten()
    counted = (labels != -100).sum()
    total = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, len(labels), CHUNK_TOKENS):
        part = slice(start, start + CHUNK_TOKENS)
        total = total + checkpoint(
            _chunk_loss, hidden[part], labels[part], logits, use_reentrant=False
        )
    return total / counted


def _chunk_loss(
    hidden: torch.Tensor, labels: torch.Tensor, logits: Callable[..., torch.Tensor]
) -> torch.Tensor:
    return nn.functional.cross_entropy(logits(hidden).float(), labels, reduction="sum")


def combine(last: torch.Tensor, shallow: torch.Tensor | None, weight: float) -> torch.Tensor:
    """Return the mean of the last loss (weight 1) and the shallower one's, or the last alone."""
    return last if shallow is None else (last + weight * shallow) / (1 + weight)
