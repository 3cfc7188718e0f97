"""What the layers of a call are given beside their hidden states.

Shapes: B batch, T tokens of this call, D width; n of the T tokens in B' of the rows are selected.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import Cache
from transformers.masking_utils import create_masks_for_generate


def _everywhere(batch: Any, head: Any, query: Any, key: torch.Tensor) -> torch.Tensor:
    return key >= 0


@dataclass(frozen=True)
class Selection:
    """The tokens of a call that go on; the others take no part.

    Attributes:
        rows: Rows with such tokens, (B',).
        columns: Their places in each row, (B', n), or None for all T; a row with fewer than n is
            filled up with tokens that do not count.
        kept: Which of those places count, (B', n), or None for all.
    """

    rows: torch.Tensor
    columns: torch.Tensor | None = None
    kept: torch.Tensor | None = None

    @classmethod
    def of(cls, chosen_BT: torch.Tensor) -> "Selection | None":
        """Return the selection of some tokens, None if it is all of them."""
        if bool(chosen_BT.all()):
            return None
        rows = chosen_BT.any(1).nonzero().flatten()
        chosen = chosen_BT.index_select(0, rows)
        if bool(chosen.all()):
            return cls(rows)
        most = int(chosen.sum(1).max())
        columns = chosen.int().argsort(dim=1, descending=True, stable=True)[:, :most]
        return cls(rows, columns, chosen.gather(1, columns))

    def take(self, x: torch.Tensor, spare: int | None = None) -> torch.Tensor:
        """Take from (B or 1, T, ...) what is selected, (B' or 1, n, ...).

        Args:
            x: What every token has.
            spare: What stands where a token does not count; whatever it has unless given.
        """
        rows = self.rows if x.shape[0] > 1 else torch.zeros_like(self.rows)
        if self.columns is None:
            return x.index_select(0, rows) if x.shape[0] > 1 else x
        taken = x[rows[:, None], self.columns]
        if spare is not None and self.kept is not None:
            taken = torch.where(self.kept, taken, spare)
        return taken

    def tokens(self, x: torch.Tensor, offset: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rows and places (N,) of the selected tokens; x (B, T, ...) has the places."""
        rows, columns = self.rows[:, None], self.columns
        if columns is None:
            columns = torch.arange(x.shape[1], device=rows.device)[None]
        rows, columns = torch.broadcast_tensors(rows, columns)
        if self.kept is not None:
            return rows[self.kept], columns[self.kept] + offset
        return rows.flatten(), columns.flatten() + offset

    def count(self, x: torch.Tensor) -> int:
        """Return how many tokens of x (B, T, ...) are selected."""
        return len(self.tokens(x)[0])

    def put(self, x: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Return (B, T, ...) with what is selected replaced by (B', n, ...)."""
        if self.columns is None:
            return x.index_copy(0, self.rows, new)
        values = new.flatten(0, 1) if self.kept is None else new[self.kept]
        return x.index_put(self.tokens(x), values)


@dataclass(frozen=True)
class LayerInputs:
    """What the layers of one call are given beside their hidden states, by layer type or once."""

    masks: Any
    position_embeddings: Any
    position_ids: torch.Tensor
    extra: dict[str, Any]

    @classmethod
    def prepare(
        cls,
        body: Any,
        embeds_BTD: torch.Tensor,
        attention_mask: torch.Tensor | dict | None,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
        extra: dict[str, Any],
        whole_masks: bool = False,
    ) -> "LayerInputs":
        """Make masks and rotary embeddings as the parent's own forward would.

        Args:
            body: The `RecurrentModel` whose layers will run.
            embeds_BTD: Token embeddings.
            attention_mask: 1 for tokens, (B, T seen so far), or masks that are made already.
            position_ids: Positions, (B, T), or None to count on from the cache.
            cache: The cache of the call.
            extra: What the caller passes on to the layers.
            whole_masks: Make masks out of which tokens can be taken.
        """
        if position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            steps = torch.arange(embeds_BTD.shape[1], device=embeds_BTD.device)
            position_ids = (steps + seen)[None]
        masks = attention_mask
        if not isinstance(attention_mask, dict):
            masks = create_masks_for_generate(
                config=body.config.base_config,
                inputs_embeds=embeds_BTD,
                attention_mask=attention_mask,
                past_key_values=cache,
                position_ids=position_ids,
                # No mask means "causal" to a kernel, which is wrong for some of the tokens.
                and_mask_function=_everywhere if whole_masks else None,
            )
        return cls(masks, body.rotary(embeds_BTD, position_ids), position_ids, extra)

    def take(self, selection: "Selection") -> "LayerInputs":
        """Restrict to some tokens of the call.

        Raises:
            ValueError: Tokens are singled out, and the masks are not those of sdpa or eager.
        """

        def of(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: of(item) for key, item in value.items()}
            if isinstance(value, tuple):
                return tuple(of(item) for item in value)
            return None if value is None else selection.take(value)

        def mask_of(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: mask_of(item) for key, item in value.items()}
            if selection.columns is None and (value is None or isinstance(value, torch.Tensor)):
                return (
                    value
                    if value is None or value.shape[0] == 1
                    else value.index_select(0, selection.rows)
                )
            if not isinstance(value, torch.Tensor) or value.dim() != 4:
                raise ValueError(
                    "tokens of one row that differ in depth need attn_implementation sdpa or eager"
                )
            return selection.take(value.transpose(1, 2)).transpose(1, 2)

        return replace(
            self,
            masks=mask_of(self.masks),
            position_embeddings=of(self.position_embeddings),
            position_ids=of(self.position_ids),
        )

    def also(self, **extra: Any) -> "LayerInputs":
        """Give the layers something more."""
        return replace(self, extra=self.extra | extra)
