"""A depth-recurrent language model over the decoder layers of any transformers family.

    e   = prelude(embed(ids))                  once
    s_0 = start(e)
    s_i = core(inject(s_{i-1}, e))             i = 1 .. r, the same weights each time
    logits = head(norm(coda(s_r)))

The method is that of arXiv:2511.07384. The layers, the norm, the rotary embedding and the token
embedding are the parent family's own modules; this file only says in which order they run, so it
serves every family and travels inside each checkpoint.

Shapes: B batch, T tokens of this call, D width, V vocabulary.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    MODEL_MAPPING,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from .cache_recurrent import CacheAtIteration, RecurrentCache, core_slot, make_room
from .configuration_recurrent import RecurrentConfig
from .deltas_recurrent import DeltaLinear, DeltaVectors, add_deltas, delta_index
from .injection_recurrent import Injection, positional_noise
from .inputs_recurrent import LayerInputs


@dataclass
class RecurrentModelOutput(ModelOutput):
    """Output of the body.

    Attributes:
        last_hidden_state: Normed coda output at the depth of each row, (B, T, D).
        past_key_values: The cache, if one is used.
        branches: Normed coda output at each of `output_recurrences`, each (B, T, D).
        state: The last state of each row, (B, T, D).
    """

    last_hidden_state: torch.Tensor | None = None
    past_key_values: Cache | None = None
    branches: tuple[torch.Tensor, ...] | None = None
    state: torch.Tensor | None = None


class RecurrentPreTrainedModel(PreTrainedModel):
    """What body and head share towards transformers."""

    config: Any
    config_class = RecurrentConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Injection):
            module.initialize()
        elif isinstance(module, RecurrentModel):
            return
        else:
            body = self if isinstance(self, RecurrentModel) else self.model
            body.parent[0]._init_weights(module)
        if isinstance(module, (DeltaLinear, DeltaVectors)):
            module.initialize()


class RecurrentModel(RecurrentPreTrainedModel):
    """The body: prelude, core repeated r times, coda, norm."""

    def __init__(self, config: RecurrentConfig):
        super().__init__(config)
        parent_class: Any = MODEL_MAPPING[type(config.base_config)]
        parent = parent_class(config.base_config)
        # In a tuple, so that it is not registered as a submodule: it lends its modules and the
        # way its family initialises them, and its parameters must not count twice.
        self.parent = (parent,)
        self._no_split_modules = parent._no_split_modules
        self.embed_tokens = parent.embed_tokens
        self.layers = parent.layers
        self.norm = parent.norm
        self.rotary_emb = parent.rotary_emb
        self.injection = Injection(config)
        if config.delta_rank:
            for layer in self.core:
                add_deltas(layer, config.delta_rank, config.num_delta_iterations)
        self.rotary_by_type = (
            "layer_type" in inspect.signature(parent.rotary_emb.forward).parameters
        )
        # Granite multiplies in Model.forward; families without such a factor have no such field.
        self.embedding_factor = getattr(config.base_config, "embedding_multiplier", None)
        self.post_init()

    @property
    def prelude(self) -> Sequence[nn.Module]:
        """Layers before the loop."""
        return self.layers[: self.config.num_prelude_layers]

    @property
    def core(self) -> Sequence[nn.Module]:
        """Layers of the loop."""
        start = self.config.num_prelude_layers
        return self.layers[start : start + self.config.num_core_layers]

    @property
    def coda(self) -> Sequence[nn.Module]:
        """Layers after the loop."""
        return self.layers[self.config.num_prelude_layers + self.config.num_core_layers :]

    def embed(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Embed token ids (B, T) as the parent does, to (B, T, D), or take embeddings as given.

        Raises:
            ValueError: Both are given, or neither.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        return embeds if self.embedding_factor is None else embeds * self.embedding_factor

    def initial_state(
        self, e_BTD: torch.Tensor, position_ids: torch.Tensor, seed: int | torch.Tensor
    ) -> torch.Tensor:
        """Return s_0 for the prelude's output."""
        if self.config.state_init == "input":
            return e_BTD
        if self.config.state_init == "zeros":
            return torch.zeros_like(e_BTD)
        noise = positional_noise(position_ids, e_BTD.shape[-1], self.config.state_std, seed)
        return noise.to(e_BTD).expand_as(e_BTD)

    def check_depth(
        self, num_recurrences: int | Sequence[int] | torch.Tensor | None, batch_size: int
    ) -> int | torch.Tensor:
        """Return the depth as an int, or as a tensor (B,) where the rows differ.

        Raises:
            ValueError: A depth is below 1 or above the cap, or their number is not B.
        """
        if num_recurrences is None:
            return self.config.num_recurrences
        if isinstance(num_recurrences, int):
            lowest = deepest = num_recurrences
        else:
            num_recurrences = torch.as_tensor(num_recurrences).flatten()
            if len(num_recurrences) != batch_size:
                raise ValueError(
                    f"num_recurrences names {len(num_recurrences)} depths for {batch_size} rows"
                )
            lowest, deepest = int(num_recurrences.min()), int(num_recurrences.max())
        if lowest < 1 or deepest > self.config.max_recurrences:
            raise ValueError(
                f"num_recurrences must lie between 1 and {self.config.max_recurrences} "
                f"(max_recurrences in the model's config), got {lowest if lowest < 1 else deepest}"
            )
        return deepest if lowest == deepest else num_recurrences

    def run(
        self, part: slice, hidden_BTD: torch.Tensor, inputs: LayerInputs, cache: Any
    ) -> torch.Tensor:
        """Run a range of the stored layers once over (B, T, D)."""
        for index in range(part.start, part.stop):
            mask, rotary = inputs.masks, inputs.position_embeddings
            if isinstance(mask, dict):
                mask = mask[self.config.base_config.layer_types[index]]
            if isinstance(rotary, dict):
                rotary = rotary[self.config.base_config.layer_types[index]]
            hidden_BTD = self.layers[index](
                hidden_BTD,
                attention_mask=mask,
                position_embeddings=rotary,
                position_ids=inputs.position_ids,
                past_key_values=cache,
                use_cache=cache is not None,
                **inputs.extra,
            )
        return hidden_BTD

    def iterate(
        self,
        iteration: int,
        s_BTD: torch.Tensor,
        e_BTD: torch.Tensor,
        inputs: LayerInputs,
        cache: Cache | None,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run one iteration (1-based) of the core, for all rows or for those named."""
        if rows is not None:
            s_BTD, e_BTD = s_BTD.index_select(0, rows), e_BTD.index_select(0, rows)
            inputs = inputs.rows(rows)
        if self.config.delta_rank:
            inputs = inputs.also(delta_index=delta_index(self.config, iteration, s_BTD.device))
        first, view = self.config.num_prelude_layers, None
        if cache is not None:
            slot = core_slot(self.config, iteration)
            if isinstance(cache, RecurrentCache):
                cache.claim(slot, rows)
            view = CacheAtIteration(cache, slot - first)
        core = slice(first, first + self.config.num_core_layers)
        return self.run(core, self.injection(s_BTD, e_BTD), inputs, view)

    def finish(self, s_BTD: torch.Tensor, inputs: LayerInputs, cache: Cache | None) -> torch.Tensor:
        """Run the coda and the final norm on a state."""
        start = self.config.num_prelude_layers + self.config.num_core_layers
        return self.norm(self.run(slice(start, len(self.layers)), s_BTD, inputs, cache))

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        num_recurrences: int | Sequence[int] | torch.Tensor | None = None,
        backprop_depth: int | None = None,
        output_recurrences: Sequence[int] = (),
        state_seed: int | torch.Tensor = 0,
        checkpoint_iterations: bool = False,
        **kwargs: Any,
    ) -> RecurrentModelOutput:
        """Run prelude, loop and coda.

        Args:
            input_ids: Token ids, (B, T); or `inputs_embeds`, (B, T, D).
            attention_mask: 1 for tokens, 0 for padding, (B, T seen so far).
            position_ids: Positions, (B, T).
            past_key_values: A cache of transformers; slots for the depth are added to it.
            inputs_embeds: Embeddings in place of ids.
            use_cache: Whether to return a cache; one is made where none is given.
            num_recurrences: Depth r; one per row stops each row at its own.
            backprop_depth: Iterations up to each output that carry gradient; None for all.
            output_recurrences: Depths at which the coda is branched off the one trajectory.
            state_seed: Seed of a `normal` initial state, one or one per row.
            checkpoint_iterations: Recompute the inside of iterations in the backward pass.
            **kwargs: Passed on to the layers.

        Raises:
            ValueError: The depth is out of range, or the options exclude each other.
        """
        embeds = self.embed(input_ids, inputs_embeds)
        depth = self.check_depth(num_recurrences, embeds.shape[0])
        deepest = depth if isinstance(depth, int) else int(depth.max())
        if (output_recurrences or backprop_depth) and (use_cache or not isinstance(depth, int)):
            raise ValueError("branches and a backprop_depth need one depth for all rows, no cache")
        cache = past_key_values
        if use_cache and cache is None:
            cache = RecurrentCache(self.config)
        if cache is not None:
            make_room(cache, self.config, deepest)
        inputs = LayerInputs.prepare(self, embeds, attention_mask, position_ids, cache, kwargs)
        prelude = slice(0, self.config.num_prelude_layers)
        e_BTD = self.run(prelude, embeds, inputs, cache)
        s_BTD = self.initial_state(e_BTD, inputs.position_ids, state_seed)
        if output_recurrences or backprop_depth:
            iterate = _recomputed(self.iterate) if checkpoint_iterations else self.iterate
            return self._loop_with_branches(
                iterate, depth, output_recurrences, backprop_depth, s_BTD, e_BTD, inputs
            )
        if not isinstance(depth, int):
            s_BTD = self._loop_by_row(depth.to(e_BTD.device), s_BTD, e_BTD, inputs, cache)
        else:
            for iteration in range(1, depth + 1):
                s_BTD = self.iterate(iteration, s_BTD, e_BTD, inputs, cache)
        hidden_BTD = self.finish(s_BTD, inputs, cache)
        return RecurrentModelOutput(hidden_BTD, cache, state=s_BTD)

    def _loop_by_row(
        self,
        depth_B: torch.Tensor,
        s_BTD: torch.Tensor,
        e_BTD: torch.Tensor,
        inputs: LayerInputs,
        cache: Cache | None,
    ) -> torch.Tensor:
        if cache is not None and not isinstance(cache, RecurrentCache):
            raise ValueError(
                f"rows of different depth need a RecurrentCache, got {type(cache).__name__}; "
                "give one depth for all rows, or let generate() make the cache"
            )
        for iteration in range(1, int(depth_B.max()) + 1):
            rows = (depth_B >= iteration).nonzero().flatten()
            if len(rows) == len(depth_B):
                s_BTD = self.iterate(iteration, s_BTD, e_BTD, inputs, cache)
            else:
                moved = self.iterate(iteration, s_BTD, e_BTD, inputs, cache, rows)
                s_BTD = s_BTD.index_copy(0, rows, moved)
        return s_BTD

    def _loop_with_branches(
        self,
        iterate: Callable[..., torch.Tensor],
        depth: Any,
        output_recurrences: Sequence[int],
        backprop_depth: int | None,
        s_BTD: torch.Tensor,
        e_BTD: torch.Tensor,
        inputs: LayerInputs,
    ) -> RecurrentModelOutput:
        wanted = set(output_recurrences)
        if wanted and not 1 <= min(wanted) <= max(wanted) <= depth:
            raise ValueError(f"output_recurrences {sorted(wanted)} must lie in 1..{depth}")
        window = backprop_depth or depth
        outputs, finished = wanted | {depth}, {}
        for iteration in range(1, depth + 1):
            starts = [output - window + 1 for output in outputs if output >= iteration]
            # Cut between windows. Where two overlap, the deeper one reaches back through both.
            if iteration > 1 and not any(start < iteration for start in starts):
                s_BTD = s_BTD.detach()
            carries = any(start <= iteration for start in starts)
            with torch.set_grad_enabled(torch.is_grad_enabled() and carries):
                s_BTD = iterate(iteration, s_BTD, e_BTD, inputs, None)
            if iteration in outputs:
                finished[iteration] = self.finish(s_BTD, inputs, None)
        branches = tuple(finished[output] for output in output_recurrences)
        return RecurrentModelOutput(finished[depth], None, branches, s_BTD)


def _recomputed(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Keep a function's inputs only, and compute what is inside again in the backward pass."""
    return partial(checkpoint, function, use_reentrant=False)


def lm_logits(head: nn.Module, base_config: Any, hidden_BTD: torch.Tensor) -> torch.Tensor:
    """Map normed hidden states (B, T, D) to logits (B, T, V), as a family's head does.

    A few families scale or cap their logits outside any module; each such operation is named by a
    field that only their configs have.
    """
    logits = head(hidden_BTD)
    if (divisor := getattr(base_config, "logits_scaling", None)) is not None:  # Granite
        logits = logits / divisor
    if (factor := getattr(base_config, "logit_scale", None)) is not None:  # Cohere
        logits = logits * factor
    if (cap := getattr(base_config, "final_logit_softcapping", None)) is not None:  # Gemma
        logits = torch.tanh(logits / cap) * cap
    return logits


class RecurrentForCausalLM(RecurrentPreTrainedModel, GenerationMixin):
    """The body with its language-model head; `generate` takes `num_recurrences`."""

    _tied_weights_keys: Any = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: RecurrentConfig):
        super().__init__(config)
        self.model = RecurrentModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @staticmethod
    def create_masks_for_generate(config: RecurrentConfig, **kwargs: Any) -> Any:
        """Make the masks of a compiled decoding step by the parent's rules."""
        return create_masks_for_generate(config=config.base_config, **kwargs)

    def logits(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Map normed coda output (B, T, D) to logits (B, T, V), as the parent's head does."""
        return lm_logits(self.lm_head, self.config.base_config, hidden_BTD)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_recurrences: int | Sequence[int] | torch.Tensor | None = None,
        state_seed: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the model; see `RecurrentModel.forward` for what is not said here.

        Args:
            input_ids: Token ids, (B, T).
            attention_mask: 1 for tokens, 0 for padding.
            position_ids: Positions, (B, T).
            past_key_values: A cache of transformers.
            inputs_embeds: Embeddings in place of ids.
            labels: Token ids to predict, (B, T), -100 where no loss is wanted.
            use_cache: Whether to return a cache.
            logits_to_keep: Number of last positions, or their indices, to compute logits for.
            num_recurrences: Depth r, one for all rows or one per row.
            state_seed: Seed of a `normal` initial state.
            **kwargs: Passed on to the layers and the loss.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            num_recurrences=num_recurrences,
            state_seed=state_seed,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.logits(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values
        )

    def _expand_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        # Beams and samples repeat each row; a depth per row must be a tensor to be repeated too.
        if isinstance(kwargs.get("num_recurrences"), (list, tuple)):
            kwargs["num_recurrences"] = torch.as_tensor(kwargs["num_recurrences"])
        parent: Any = super()
        return parent._expand_inputs_for_generation(*args, **kwargs)

    # pyrefly: ignore[bad-override]
    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        parent: Any = super()
        parent._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        by_row = isinstance(model_kwargs.get("num_recurrences"), torch.Tensor)
        cache = model_kwargs.get("past_key_values")
        if by_row and type(cache) is DynamicCache and not cache.get_seq_length():
            model_kwargs["past_key_values"] = RecurrentCache(self.config)
