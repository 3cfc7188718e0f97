"""Where the keys and values of (layer, iteration) lie in an ordinary transformers cache.

It serves where all rows and tokens have one depth; `cache_recurrent` serves where they differ.

Slots 0 .. P+N+C-1 are the stored layers, the core's being those of the first iteration; each
further iteration appends N slots. So r = 1 is the parent's own layout, and going deeper moves
nothing. Any `Cache` of transformers serves, because a slot is just one more of its layers.
"""

import copy
from typing import Any

import torch
from transformers import Cache

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
