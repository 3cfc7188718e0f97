"""What a step minimises: next-token loss of the last iteration, and of a shallower one as well.

Every function returns sums over tokens: a step is shared by micro-batches and processes, which
hold unequal numbers of counted tokens, and is normalised once by their total.

Shapes: B batch, T tokens, D width, N tokens of a chunk, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rondo.config import LossConfig

# Rows of logits that exist at one time; a vocabulary of 100,000 makes 400 MB of them in float32.
CHUNK_TOKENS = 1024

Head = Callable[[torch.Tensor], torch.Tensor]


class Hidden(NamedTuple):
    """Normed hidden states (B, T, D) that the head turns into logits."""

    last: torch.Tensor
    shallow: torch.Tensor | None = None
    """Of a shallower iteration."""
    parent: torch.Tensor | None = None
    """Of the frozen parent."""


class Losses(NamedTuple):
    """Sums over counted tokens, in nats."""

    objective: torch.Tensor
    last: torch.Tensor
    """Cross-entropy of the last iteration."""
    shallow: torch.Tensor
    """Cross-entropy of the shallower one, 0 where there is none."""


def chunked_losses(
    hidden: Hidden, labels_BT: torch.Tensor, loss: LossConfig, head: Head, parent_head: Head
) -> Losses:
    """Return the sums of a micro-batch without ever holding all of its logits.

    Logits are made chunk by chunk, and again in the backward pass.

    Args:
        hidden: Normed states.
        labels_BT: The token that follows each position, -100 where none counts.
        loss: The mixture.
        head: Maps (N, D) to logits (N, V).
        parent_head: The same for the parent's states.
    """
    flat = [None if one is None else one.flatten(0, 1) for one in hidden]
    labels = labels_BT.flatten()
    zero = hidden.last.new_zeros((), dtype=torch.float32)
    sums = (zero, zero, zero)
    for start in range(0, len(labels), CHUNK_TOKENS):
        part = slice(start, start + CHUNK_TOKENS)
        pieces = [None if one is None else one[part] for one in flat]
        found = checkpoint(
            _chunk, *pieces, labels[part], loss, head, parent_head, use_reentrant=False
        )
        sums = tuple(left + right for left, right in zip(sums, found, strict=True))
    return Losses(*sums)


def _chunk(
    last: torch.Tensor,
    shallow: torch.Tensor | None,
    parent: torch.Tensor | None,
    labels: torch.Tensor,
    loss: LossConfig,
    head: Head,
    parent_head: Head,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = head(last).float()
    deepest = nn.functional.cross_entropy(logits, labels, reduction="sum")
    if shallow is None:
        return deepest, deepest, torch.zeros_like(deepest)
    shallow_logits = head(shallow).float()
    plain = nn.functional.cross_entropy(shallow_logits, labels, reduction="sum")
    mixed = plain
    if loss.kind == "deep+distil":
        counted = labels != -100
        mixed = (1 - loss.distil_weight - loss.parent_weight) * plain
        taught = loss.distil_weight * divergence(logits, shallow_logits, counted, loss.temperature)
        mixed = mixed + taught
        if parent is not None:
            teacher = parent_head(parent).float()
            mixed = mixed + loss.parent_weight * divergence(
                teacher, shallow_logits, counted, loss.temperature
            )
    return combine(deepest, mixed, loss.shallow_weight), deepest, plain


def divergence(
    teacher: torch.Tensor, student: torch.Tensor, counted: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Return the sum of KL(teacher || student), times the squared temperature.

    The teacher gets no gradient: the deep iteration is not to be drawn towards the shallow one.

    Args:
        teacher: Logits (N, V).
        student: Logits (N, V).
        counted: Which of the N tokens count.
        temperature: Divides both logits; its square keeps gradients of one size
            (arXiv:1503.02531).
    """
    target = (teacher.detach() / temperature).log_softmax(-1)
    found = (student / temperature).log_softmax(-1)
    each = nn.functional.kl_div(found, target, reduction="none", log_target=True).sum(-1)
    return temperature**2 * (each * counted).sum()


def combine(last: torch.Tensor, shallow: torch.Tensor, weight: float) -> torch.Tensor:
    """Return the mean of the last loss (weight 1) and the shallower one's."""
    return (last + weight * shallow) / (1 + weight)
