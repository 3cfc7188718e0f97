"""The model in vLLM: its Transformers backend, with keys and values for each iteration.

Layers, norms, embeddings and head are what that backend makes of the parent family's own, sharded
by the parent's plan. The order they run in is `rondo.modeling`'s. So nothing here is of a family.

Shapes: T tokens of a step, whoever's they are, D width.
"""

from typing import Any

import torch
from torch import nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.transformers import TransformersForCausalLM

from rondo.modeling.inputs_recurrent import LayerInputs
from rondo.modeling.slots_recurrent import core_slot
from rondo_vllm.processor import DepthOfRows

# Those whose metadata names where each row's tokens begin; the first is tried, the others read.
BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN")


class AttentionByIteration(nn.ModuleList):
    """The attention of a core layer: one `Attention`, with its keys and values, per iteration."""

    def turn_to(self, iteration: int) -> None:
        """Attend as in this iteration (1-based) from now on."""
        self.current = iteration - 1

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend, each of shape (T, heads * head dimension)."""
        return self[self.current](query, key, value)


class RecurrentForCausalLM(TransformersForCausalLM):
    """A depth-recurrent model over the decoder layers of any family of the Transformers backend.

    Raises:
        ValueError: The attention backend does not say whose tokens are whose.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        assert DepthOfRows.newest is not None, "a runner makes its processors before its model"
        self.depths = DepthOfRows.newest
        divisor = getattr(self.text_config, "logits_scaling", None)
        if divisor is not None:  # Granite, whose division the backend does not know
            self.logits_processor.scale /= divisor

    def _decorate_for_torch_compile(self) -> None:
        """Leave the model uncompiled: how often it loops is read from the batch."""

    def recursive_replace(self) -> None:
        """Shard the layers by the plan of the parent, whose they are."""
        self.model.tp_plan = self.model.parent[0].tp_plan
        super().recursive_replace()

    def _create_attention_instances(self, prefix: str = "") -> None:
        """Give each core layer an attention for each iteration up to the cap."""
        super()._create_attention_instances(prefix)
        self.loops = []
        first = self.config.num_prelude_layers
        for layer in range(first, first + self.config.num_core_layers):
            name, _ = self.attention_fusers[layer]
            module = self.get_submodule(name)
            if (backend := module.attn.attn_backend.get_name()) not in BACKENDS:
                raise ValueError(
                    f"{backend} does not say whose tokens are whose: choose one of "
                    f"{', '.join(BACKENDS)} with --attention-backend"
                )
            iterations = range(2, self.config.max_recurrences + 1)
            slots = [core_slot(self.config, iteration) + layer - first for iteration in iterations]
            deeper = [self._like(module.attn, layer, slot) for slot in slots]
            module.attn = AttentionByIteration([module.attn, *deeper])
            self.loops.append(module.attn)

    def _like(self, attention: Attention, layer: int, slot: int) -> Attention:
        """Return an attention like a layer's, whose keys and values have a slot of their own."""
        return Attention(
            num_heads=attention.num_heads,
            head_size=attention.head_size,
            scale=attention.impl.scale,
            num_kv_heads=attention.num_kv_heads,
            cache_config=self.cache_config,
            quant_config=self.quant_config,
            logits_soft_cap=getattr(self.text_config, "attn_logit_softcapping", None),
            per_layer_sliding_window=attention.sliding_window,
            prefix=attention.layer_name.replace(f".{layer}.", f".{slot}."),
        )

    def forward(
        self,
        input_ids: Any,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Run prelude, loop and coda over the tokens (T,) of a step, to (T, D)."""
        body, place_1T = self.model, positions[None]
        embeds = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        embeds = body.embed(None, embeds[None])
        # The backend knows itself what each token may look at.
        inputs = LayerInputs(None, body.rotary(embeds, place_1T), place_1T, {})
        e_1TD = body.run(slice(0, self.config.num_prelude_layers), embeds, inputs, None)
        s_1TD = body.initial_state(e_1TD, place_1T, seed=0)
        s_1TD = self.loop(s_1TD, e_1TD, inputs)
        return body.finish(s_1TD, inputs, None)[0]

    def loop(self, s_1TD: torch.Tensor, e_1TD: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        """Run each token to the depth of its request.

        A token that is done runs on with the others, but keeps its state. What it leaves among the
        keys and values of deeper iterations is read by its own request alone, which has none.
        """
        deepest, depth_1T1 = self.depth_of_tokens(e_1TD)
        for iteration in range(1, deepest + 1):
            for attention in self.loops:
                attention.turn_to(iteration)
            moved = self.model.iterate(iteration, s_1TD, e_1TD, inputs, None)
            s_1TD = torch.where(depth_1T1 >= iteration, moved, s_1TD)
        return s_1TD

    def depth_of_tokens(self, x_1TD: torch.Tensor) -> tuple[int, torch.Tensor]:
        """Return the deepest depth of a step, and that of each token, (1, T, 1)."""
        rows, metadata = self.depths.rows, get_forward_context().attn_metadata
        if not rows or metadata is None:  # vLLM measures memory, and nobody is served
            return 1, torch.ones(1, 1, 1, device=x_1TD.device)
        starts = next(iter(metadata.values())).query_start_loc[1 : len(rows)]
        token_T = torch.arange(x_1TD.shape[1], device=x_1TD.device)
        row_T = torch.bucketize(token_T, starts.to(token_T), right=True)
        depth_T = torch.tensor(rows, device=x_1TD.device)[row_T]
        return max(rows), depth_T[None, :, None]
