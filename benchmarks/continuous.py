"""transformers' own continuous batching of a recurrent model, at one depth for all.

The library packs the tokens of all texts in flight into one row and keeps keys and values in pages
by layer index. A loop runs the same layers again, so here each iteration sees the pages through a
view that adds to the index, and the config reports as many layers as a depth runs.
"""

import copy
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.requests import GenerationOutput

from rondo.modeling.body_recurrent import RecurrentModel
from rondo.modeling.cache_recurrent import View
from rondo.modeling.configuration_recurrent import RecurrentConfig
from rondo.modeling.inputs_recurrent import LayerInputs, Selection
from rondo.modeling.modeling_recurrent import RecurrentForCausalLM
from rondo.modeling.slots_recurrent import core_slot

PAGE = 32


class PagesAtIteration(PagedAttentionCache):
    """The pages as one iteration sees them; of the library's class, which attention asks for."""

    def __init__(self, pages: PagedAttentionCache, offset: int):
        self._pages, self._offset = pages, offset

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new keys and values, and return all of the texts'."""
        return self._pages.update(key_states, value_states, layer_idx + self._offset, kwargs)


class UnrolledConfig(RecurrentConfig):
    """A config that reports the layers that its depth runs, by which pages are sized."""

    def get_text_config(self, decoder: Any = None, encoder: Any = None) -> Any:
        """Return the parent's config, with as many layers as run."""
        base = copy.copy(self.base_config)
        again = self.num_recurrences - 1
        base.num_hidden_layers = self.num_hidden_layers + again * self.num_core_layers
        if (types := getattr(base, "layer_types", None)) is not None:
            first = self.num_prelude_layers
            base.layer_types = types + again * types[first : first + self.num_core_layers]
        return base


class PagedModel(RecurrentModel):
    """The body, each iteration of which has pages of its own."""

    def _enter(
        self,
        iteration: int,
        inputs: LayerInputs,
        cache: Any,
        selection: Selection | None,
        kind: type[View] = View,
    ) -> tuple[LayerInputs, Any]:
        inputs, cache = super()._enter(iteration, inputs, cache, selection, kind)
        offset = core_slot(self.config, iteration) - self.config.num_prelude_layers
        return inputs.also(cache=PagesAtIteration(inputs.extra["cache"], offset)), cache


class PagedForCausalLM(RecurrentForCausalLM):
    """The model that the library's manager is given."""

    config_class = UnrolledConfig

    def __init__(self, config: UnrolledConfig):
        super().__init__(config)
        self.model = PagedModel(config)
        self.post_init()


def at_depth(model: RecurrentForCausalLM, depth: int) -> PagedForCausalLM:
    """Return the same weights as the library's manager can run them, at one depth."""
    config: Any = UnrolledConfig.from_dict({**model.config.to_dict(), "num_recurrences": depth})
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        paged = PagedForCausalLM(config)
    paged.load_state_dict(model.state_dict(), assign=True)
    paged.model.rotary_emb = model.model.rotary_emb  # its buffers are in no state
    return paged.eval()


@contextmanager
def serving(
    model: PagedForCausalLM, in_flight: int, longest: int, tick_tokens: int
) -> Iterator[ContinuousBatchingManager]:
    """Run the library's manager.

    Args:
        model: What it runs.
        in_flight: Texts at once.
        longest: Tokens of the longest text, prompt and answer.
        tick_tokens: Tokens of one pass.
    """
    settings = ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=(in_flight + 1) * -(-longest // PAGE),
        max_batch_tokens=tick_tokens,
        max_requests_per_batch=in_flight,
        allow_block_sharing=False,
    )
    greedy = GenerationConfig(do_sample=False, eos_token_id=-1)
    with model.continuous_batching_context_manager(
        generation_config=greedy, continuous_batching_config=settings
    ) as manager:
        yield manager
    gc.collect()


def answers(
    manager: ContinuousBatchingManager, prompts: list[tuple[int, ...]], new_tokens: int
) -> tuple[float, list[GenerationOutput]]:
    """Continue all prompts, as many at once as the manager may.

    Returns:
        Seconds, and each answer with the times of its tokens.

    Raises:
        RuntimeError: The library failed.
    """
    start = time.perf_counter()
    names = manager.add_requests(
        [list(prompt) for prompt in prompts], max_new_tokens=new_tokens, record_timestamps=True
    )
    found: dict[str, GenerationOutput] = {}
    while len(found) < len(names):
        answer = manager.get_result(timeout=1)
        if answer is None and not manager.is_running():
            raise RuntimeError("transformers' continuous batching stopped by itself")
        if answer is not None and answer.is_finished():
            if answer.error:
                raise RuntimeError(f"transformers' continuous batching failed: {answer.error}")
            found[answer.request_id] = answer
    return time.perf_counter() - start, [found[name] for name in names]
