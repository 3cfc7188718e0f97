"""What the layers of a call are given beside their hidden states.

Shapes: B batch, T tokens of this call, D width.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import Cache
from transformers.masking_utils import create_masks_for_generate


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
    ) -> "LayerInputs":
        """Make masks and rotary embeddings as the parent's own forward would.

        Args:
            body: The `RecurrentModel` whose layers will run.
            embeds_BTD: Token embeddings.
            attention_mask: 1 for tokens, (B, T seen so far), or masks that are made already.
            position_ids: Positions, (B, T), or None to count on from the cache.
            cache: The cache of the call.
            extra: What the caller passes on to the layers.
        """
        base, rotary = body.config.base_config, body.rotary_emb
        if position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            steps = torch.arange(embeds_BTD.shape[1], device=embeds_BTD.device)
            position_ids = (steps + seen)[None]
        masks = attention_mask
        if not isinstance(attention_mask, dict):
            masks = create_masks_for_generate(
                config=base,
                inputs_embeds=embeds_BTD,
                attention_mask=attention_mask,
                past_key_values=cache,
                position_ids=position_ids,
            )
        if body.rotary_by_type:
            kinds = dict.fromkeys(base.layer_types)
            embeddings = {kind: rotary(embeds_BTD, position_ids, kind) for kind in kinds}
        else:
            embeddings = rotary(embeds_BTD, position_ids)
        return cls(masks, embeddings, position_ids, extra)

    def rows(self, rows: torch.Tensor) -> "LayerInputs":
        """Restrict to some rows of the batch."""

        def take(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: take(item) for key, item in value.items()}
            if isinstance(value, tuple):
                return tuple(take(item) for item in value)
            if value is None or value.shape[0] == 1:
                return value
            return value.index_select(0, rows)

        return replace(
            self,
            masks=take(self.masks),
            position_embeddings=take(self.position_embeddings),
            position_ids=take(self.position_ids),
        )

    def also(self, **extra: Any) -> "LayerInputs":
        """Give the layers something more."""
        return replace(self, extra=self.extra | extra)
