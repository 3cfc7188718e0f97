"""Attention over the tokens of many rows, packed into one sequence for all other layers.

The linear layers see (1, N, D), so that one pass over the weights serves tokens of any row at any
iteration. Only attention must know which keys are whose: rows with a single token are attended in
one batch, those with several each by itself. The family's own kernel does it, as it was loaded
with; transformers lets an attention be registered beside its own, and hands it the mask as given.

Shapes: N packed tokens, B rows of a group, T tokens of each, S keys, H heads, d head dimension.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rondo_serve.engine.arena import Arena
from rondo_serve.requests import Refused

NAME = "rondo_packed"
Mask = Callable[..., Any]


@dataclass(frozen=True)
class Group:
    """Rows that are attended together.

    Attributes:
        start: First of their B * T packed tokens.
        queries: Places of their tokens, (B, T).
        read: Entries of what each may see, (B, S).
    """

    start: int
    queries: torch.Tensor
    read: torch.Tensor

    @property
    def stop(self) -> int:
        """One after the last packed token."""
        return self.start + self.queries.numel()


class Batch:
    """What the layers are given as their cache: writes what is new, and knows what is to be read.

    Args:
        arena: Where keys and values lie.
        write: Entries of the packed tokens, (N,).
        groups: Whose are whose, in the order of the packed tokens.
        attention: Which keys a query may see, by kind of layer.
    """

    def __init__(
        self,
        arena: Arena,
        write: torch.Tensor,
        groups: Sequence[Group],
        attention: "Attention",
    ):
        self._arena, self._write, self._groups = arena, write, groups
        self._attention = attention
        self._offset = 0
        self._masks: dict[str, list[torch.Tensor]] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the new keys and values (1, H, N, d) of a layer, which attends next."""
        self._offset = self._arena.shape.offsets[layer_idx]
        where = self._write + self._offset
        self._arena.keys.index_copy_(0, where, key_states[0].transpose(0, 1))
        self._arena.values.index_copy_(0, where, value_states[0].transpose(0, 1))
        return key_states, value_states

    def attend(
        self, kind: str, module: torch.nn.Module, query: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        """Return what queries (1, H, N, d) find, (1, N, H, d)."""
        kernel = self._attention.kernel(module)
        found = []
        for group, mask in zip(self._groups, self._mask(kind, query.dtype), strict=True):
            where = (group.read + self._offset).flatten()
            keys, values = (
                kept.index_select(0, where).unflatten(0, group.read.shape).transpose(1, 2)
                for kept in (self._arena.keys, self._arena.values)
            )
            rows, count = group.queries.shape
            asked = query[0, :, group.start : group.stop].unflatten(1, (rows, count))
            output, _ = kernel(module, asked.transpose(0, 1), keys, values, mask, **options)
            found.append(output.flatten(0, 1))
        return torch.cat(found)[None]

    def _mask(self, kind: str, dtype: torch.dtype) -> list[torch.Tensor]:
        if kind not in self._masks:
            self._masks[kind] = [self._attention.mask(kind, one, dtype) for one in self._groups]
        return self._masks[kind]


@dataclass(frozen=True)
class BatchMask:
    """A batch as the layers of one kind see it; they are handed it as their attention mask."""

    batch: Batch
    kind: str


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: BatchMask,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers' own functions do; keys and values are read from the batch."""
    seen = attention_mask
    return seen.batch.attend(seen.kind, module, query, **options), None


class Attention:
    """How the layers of a model attend, and how they are made to do so packed.

    Args:
        base: The parent's config.

    Raises:
        Refused: Some of its layers do not attend as transformers' plain ones do.
    """

    def __init__(self, base: Any):
        self._inner = base._attn_implementation
        if self._inner not in ("sdpa", "eager"):
            self._inner = "sdpa"
        kinds = getattr(base, "layer_types", None)
        self.by_type = bool(kinds)
        window = getattr(base, "sliding_window", None)
        chunk = getattr(base, "attention_chunk_size", None)
        if not kinds:
            kinds = ["sliding_attention" if window else "full_attention"]
        self.kinds = tuple(dict.fromkeys(kinds))
        self._masks: dict[str, Mask] = {"full_attention": causal_mask_function}
        if window:
            self._masks["sliding_attention"] = sliding_window_causal_mask_function(window)
        if chunk:
            # Nothing is padded on the left here.
            none = torch.zeros(1, dtype=torch.long)
            self._masks["chunked_attention"] = chunked_causal_mask_function(chunk, none)
        if unknown := set(self.kinds) - set(self._masks):
            raise Refused(f"layers of the kind {sorted(unknown)[0]} cannot be served yet")

    def take_over(self, base: Any) -> None:
        """Let the layers that read this config attend packed from now on."""
        AttentionInterface.register(NAME, packed_attention)
        base._attn_implementation = NAME

    def masks(self, batch: Batch) -> Any:
        """Return what stands for the masks of a batch, by kind of layer or for all."""
        if self.by_type:
            return {kind: BatchMask(batch, kind) for kind in self.kinds}
        return BatchMask(batch, self.kinds[0])

    def mask(self, kind: str, group: Group, dtype: torch.dtype) -> torch.Tensor:
        """Return which keys a group's queries may see, (B, 1, T, S), as the kernel wants it."""
        keys = torch.arange(group.read.shape[1], device=group.read.device)
        seen = self._masks[kind](0, 0, group.queries[:, None, :, None], keys)
        if self._inner == "sdpa":
            return seen
        least = torch.finfo(dtype).min
        return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, least)

    def kernel(self, module: torch.nn.Module) -> Callable[..., Any]:
        """Return the function that attends, of transformers or of the module's own family."""
        if self._inner == "eager":
            return sys.modules[type(module).__module__].eager_attention_forward
        return ALL_ATTENTION_FUNCTIONS["sdpa"]
