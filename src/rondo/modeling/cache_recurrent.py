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
    if not torch.compiler.is_compiling():  # comparing lengths would break a compiled graph
        seen = int(cache.get_seq_length())
        deepest = int(cache.get_seq_length(core_slot(config, num_recurrences))) if seen else 0
        if deepest < seen:
            raise ValueError(
                f"the cache holds {seen} tokens, but only {deepest} of them at iteration "
                f"{num_recurrences}: continue at the depth the prompt was computed at, or start "
                "anew"
            )
    if cache.layer_class_to_replicate is None:
        needed = config.num_hidden_layers + (num_recurrences - 1) * config.num_core_layers
        for slot in range(len(cache.layers), needed):
            core_layer = (slot - config.num_hidden_layers) % config.num_core_layers
            added: Any = copy.deepcopy(cache.layers[config.num_prelude_layers + core_layer])
            added.reset()
            cache.layers.append(added)


class CacheAtIteration:
    """The cache as the layers of one pass see it: their own index leads to this pass's slot.

    Passing this view leaves `layer_idx` of the shared layers alone, so nothing of the model
    changes while it runs.

    Args:
        cache: The cache of the whole call.
        offset: What is added to a layer's own index to find its slot.
    """

    def __init__(self, cache: Any, offset: int):
        self._cache = cache
        self._offset = offset

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new keys and values (B, heads, T, head_dim) and return all of the slot."""
        return self._cache.update(
            key_states, value_states, layer_idx + self._offset, *args, **kwargs
        )

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
        self._num_core_layers = config.num_core_layers
        # Rows of each slot that holds fewer than all.
        self._slot_rows: dict[int, torch.Tensor] = {}

    def claim(self, first_slot: int, rows: torch.Tensor | None) -> None:
        """Declare which rows of the batch (None for all) the slots of an iteration hold.

        Raises:
            ValueError: They hold other rows already.
        """
        slots = range(first_slot, first_slot + self._num_core_layers)
        if self.get_seq_length(first_slot):
            known = self._slot_rows.get(first_slot)
            same = known is rows if known is None or rows is None else torch.equal(known, rows)
            if not same:
                raise ValueError(
                    "the depth of a row changed while its cache was in use: keep num_recurrences "
                    "the same for the prompt and its continuation"
                )
        elif rows is not None:
            self._slot_rows |= dict.fromkeys(slots, rows)

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self._slot_rows.clear()

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
            kept = (place[index] >= 0).nonzero().flatten()
            layer.batch_select_indices(place[index][kept])
            if len(kept) < len(index):
                self._slot_rows[slot] = kept
            else:  # the rows that are left all reach this iteration
                del self._slot_rows[slot]

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
