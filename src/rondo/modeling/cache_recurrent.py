"""Where the keys and values of (layer, iteration) lie in an ordinary transformers cache.

Slots 0 .. P+N+C-1 are the stored layers, the core's being those of the first iteration; each
further iteration appends N slots. So r = 1 is the parent's own layout, and going deeper moves
nothing. Any `Cache` of transformers serves, because a slot is just one more of its layers.
"""

import copy
from typing import Any

import torch
from transformers import Cache, DynamicCache

from .configuration_recurrent import RecurrentConfig


def core_slot(config: RecurrentConfig, iteration: int) -> int:
    """Return the slot of the first core layer in an iteration (1-based)."""
    if iteration == 1:
        return config.num_prelude_layers
    return config.num_hidden_layers + (iteration - 2) * config.num_core_layers


def make_room(cache: Cache, config: RecurrentConfig, num_recurrences: int) -> None:
    """Append the slots that a depth needs to a cache built for the stored layers.

    Raises:
        ValueError: The cache holds tokens that were computed at a smaller depth, so the deeper
            iterations have no keys and values of them to attend to.
    """
    if cache.layer_class_to_replicate is None:
        needed = config.num_hidden_layers + (num_recurrences - 1) * config.num_core_layers
        for slot in range(len(cache.layers), needed):
            core_layer = (slot - config.num_hidden_layers) % config.num_core_layers
            template: Any = cache.layers[config.num_prelude_layers + core_layer]
            cache.layers.append(
                copy.deepcopy(template) if not template.is_initialized else _emptied(template)
            )
    seen = cache.get_seq_length()
    deepest = cache.get_seq_length(core_slot(config, num_recurrences))
    # A static cache counts in tensors; comparing them would break a compiled graph.
    if isinstance(seen, int) and isinstance(deepest, int) and deepest < seen:
        raise ValueError(
            f"the cache holds {seen} tokens, but only {deepest} of them at iteration "
            f"{num_recurrences}: continue at the depth the prompt was computed at, or start anew"
        )


def _emptied(layer: Any) -> Any:
    fresh = copy.copy(layer)
    fresh.keys = fresh.values = None
    fresh.is_initialized = False
    return fresh


class CacheAtIteration:
    """The cache as the layers of one pass see it: their own index leads to this pass's slot.

    Passing this view leaves `layer_idx` of the shared layers alone, so nothing of the model
    changes while it runs.

    Args:
        cache: The cache of the whole call.
        offset: What is added to a layer's own index to find its slot.
        rows: Rows of the batch that take part, or None for all.
    """

    def __init__(self, cache: Any, offset: int, rows: torch.Tensor | None):
        self._cache = cache
        self._offset = offset
        self._rows = rows

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new keys and values (B, heads, T, head_dim) and return all of the slot."""
        slot = layer_idx + self._offset
        if self._rows is not None:
            self._cache.claim(slot, self._rows)
        return self._cache.update(key_states, value_states, slot, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the tokens seen by the slot of a layer."""
        return self._cache.get_seq_length(layer_idx + self._offset)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


class RecurrentCache(DynamicCache):
    """A dynamic cache for batches whose rows differ in depth.

    A slot of a later iteration holds only the rows that reach it, so a row that is done costs
    neither compute nor memory. Beam search reorders rows; this class translates.
    """

    def __init__(self, config: RecurrentConfig):
        super().__init__(config=config.base_config)
        self._slot_rows: dict[int, torch.Tensor] = {}

    def claim(self, slot: int, rows: torch.Tensor) -> None:
        """Declare which rows of the batch a slot holds.

        Raises:
            ValueError: The slot holds other rows already.
        """
        known = self._slot_rows.setdefault(slot, rows)
        if known is not rows and not torch.equal(known, rows):
            raise ValueError(
                "the depth of a row changed while its cache was in use: keep num_recurrences "
                "the same for the prompt and its continuation"
            )

    def _take_rows(self, index: torch.Tensor) -> None:
        layers: list[Any] = self.layers
        batch_size = layers[0].keys.shape[0]
        for slot, layer in enumerate(layers):
            if layer.get_seq_length() == 0:
                continue
            rows = self._slot_rows.get(slot)
            if rows is None:
                layer.batch_select_indices(index)
                continue
            place = torch.full((batch_size,), -1, dtype=torch.long, device=index.device)
            place[rows] = torch.arange(len(rows), device=index.device)
            self._slot_rows[slot] = (place[index] >= 0).nonzero().flatten()
            layer.batch_select_indices(place[index][self._slot_rows[slot]])

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let row i continue what row beam_idx[i] held."""
        self._take_rows(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the given rows of the batch."""
        self._take_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        first: Any = self.layers[0]
        rows = torch.arange(first.keys.shape[0], device=first.keys.device)
        self._take_rows(rows.repeat_interleave(repeats))
