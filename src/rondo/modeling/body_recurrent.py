"""The body of a depth-recurrent model: prelude, core repeated r times, coda, norm.

The layers, the norm, the rotary embedding and the token embedding are the parent family's own
modules; this file only says in which order they run, so it serves every family.

Shapes: B batch, T tokens of this call, D width.
"""

import contextlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import MODEL_MAPPING, Cache, PreTrainedModel
from transformers.utils import ModelOutput

from .cache_recurrent import Projection, RecurrentCache, Stopped, View
from .configuration_recurrent import RecurrentConfig
from .deltas_recurrent import DeltaLinear, DeltaVectors, add_deltas, delta_index
from .exits_recurrent import ExitChecks, ExitGate
from .injection_recurrent import Injection, positional_noise
from .inputs_recurrent import LayerInputs, Selection
from .loops_recurrent import Way, run_loop
from .slots_recurrent import CacheAtIteration, core_slot, make_room


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
    # A model that gets a gate starts it anew.
    _keys_to_ignore_on_load_missing = [r"exit_gate\."]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (Injection, ExitGate)):
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
        self.exit_gate = ExitGate(config) if config.exit_gate else None
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

    def rotary(self, x_BTD: torch.Tensor, position_ids: torch.Tensor) -> Any:
        """Return the rotary embeddings of positions (B, T), by kind of layer where those differ.

        Args:
            x_BTD: Hidden states, for their type.
            position_ids: The positions.
        """
        if not self.rotary_by_type:
            return self.rotary_emb(x_BTD, position_ids)
        kinds = dict.fromkeys(self.config.base_config.layer_types)
        return {kind: self.rotary_emb(x_BTD, position_ids, kind) for kind in kinds}

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
        if isinstance(num_recurrences, torch.Tensor) and num_recurrences.dim() == 0:
            num_recurrences = int(num_recurrences)
        if isinstance(num_recurrences, int):
            lowest = deepest = num_recurrences
        else:
            # Here, where the rows are counted, and not where the model runs.
            num_recurrences = torch.as_tensor(num_recurrences).cpu().reshape(-1)
            if num_recurrences.is_floating_point():
                raise ValueError("num_recurrences must be whole numbers")
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
            if isinstance(cache, View):
                cache.turn_to(index)
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

    def _enter(
        self,
        iteration: int,
        inputs: LayerInputs,
        cache: Any,
        selection: Selection | None,
        kind: type[View] = View,
    ) -> tuple[LayerInputs, Any]:
        """Return what the core is given in an iteration: the inputs and the cache as it sees it."""
        if selection is not None:
            inputs = inputs.take(selection)
        if self.config.delta_rank:
            index = delta_index(self.config, iteration, inputs.position_ids.device)
            inputs = inputs.also(delta_index=index)
        if isinstance(cache, RecurrentCache):
            return inputs, cache.enter(iteration, selection, kind)
        if cache is None:
            return inputs, None
        offset = core_slot(self.config, iteration) - self.config.num_prelude_layers
        return inputs, CacheAtIteration(cache, offset)

    def iterate(
        self,
        iteration: int,
        s_BTD: torch.Tensor,
        e_BTD: torch.Tensor,
        inputs: LayerInputs,
        cache: Cache | None,
        selection: Selection | None = None,
    ) -> torch.Tensor:
        """Run one iteration (1-based) of the core, for all tokens or for those selected."""
        if selection is not None:
            s_BTD, e_BTD = selection.take(s_BTD), selection.take(e_BTD)
        inputs, view = self._enter(iteration, inputs, cache, selection)
        first = self.config.num_prelude_layers
        core = slice(first, first + self.config.num_core_layers)
        return self.run(core, self.injection(s_BTD, e_BTD), inputs, view)

    def project(
        self,
        iteration: int,
        s_BTD: torch.Tensor,
        e_BTD: torch.Tensor,
        inputs: LayerInputs,
        cache: RecurrentCache,
        selection: Selection | None,
    ) -> None:
        """Cache what each core layer makes of a state as keys and values, and run none of them."""
        if selection is not None:
            s_BTD, e_BTD = selection.take(s_BTD), selection.take(e_BTD)
        inputs, view = self._enter(iteration, inputs, cache, selection, Projection)
        entering = self.injection(s_BTD, e_BTD)
        first = self.config.num_prelude_layers
        for layer in range(first, first + self.config.num_core_layers):
            with contextlib.suppress(Stopped):
                self.run(slice(layer, layer + 1), entering, inputs, view)

    def finish(
        self,
        s_BTD: torch.Tensor,
        inputs: LayerInputs,
        cache: Cache | None,
        selection: Selection | None = None,
        branch_at: int = 0,
    ) -> torch.Tensor:
        """Run the coda and the final norm on the states of all tokens, or of those selected.

        A coda that branches off at an iteration does not disturb what the others keep of theirs.
        """
        if selection is not None:
            s_BTD, inputs = selection.take(s_BTD), inputs.take(selection)
        view: Any = cache
        if isinstance(cache, RecurrentCache):
            view = cache.branching(branch_at) if branch_at else cache.outside(selection)
        start = self.config.num_prelude_layers + self.config.num_core_layers
        return self.norm(self.run(slice(start, len(self.layers)), s_BTD, inputs, view))

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
        branch_at: int = 0,
        checks: ExitChecks | None = None,
        warm_start: bool = False,
        state_seed: int | torch.Tensor = 0,
        checkpoint_iterations: bool = False,
        **kwargs: Any,
    ) -> RecurrentModelOutput:
        """Run prelude, loop and coda; ValueError where options exclude each other.

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
            branch_at: Iteration at which a coda that keeps its own keys branches off, 0 for none.
            checks: When tokens leave the loop before the depth.
            warm_start: Whether a single token starts at the state of the one before it.
            state_seed: Seed of a `normal` initial state, one or one per row.
            checkpoint_iterations: Recompute the inside of iterations in the backward pass.
            **kwargs: Passed on to the layers.
        """
        embeds = self.embed(input_ids, inputs_embeds)
        depth = self.check_depth(num_recurrences, embeds.shape[0])
        way = Way(output_recurrences, backprop_depth, checkpoint_iterations, branch_at, checks)
        cache = self._cache_for(past_key_values, bool(use_cache), depth, way, warm_start)
        apart = checks is not None and embeds.shape[1] > 1
        inputs = LayerInputs.prepare(
            self, embeds, attention_mask, position_ids, cache, kwargs, whole_masks=apart
        )
        own = cache if isinstance(cache, RecurrentCache) else None
        if own is not None:
            own.begin(embeds.shape[:2], depth, embeds.device)
        outside = cache if own is None else own.outside()
        e_BTD = self.run(slice(0, self.config.num_prelude_layers), embeds, inputs, outside)
        s_BTD = self.initial_state(e_BTD, inputs.position_ids, state_seed)
        if warm_start and own is not None and own.state is not None and embeds.shape[1] == 1:
            s_BTD = own.state[:, None]
        real = _real(attention_mask, embeds)
        loop = run_loop(self, way, depth, real, s_BTD, e_BTD, inputs, cache)
        hidden_BTD = self.finish(loop.state, inputs, cache) if loop.hidden is None else loop.hidden
        if own is not None:
            own.state = loop.state[:, -1]
        cache = cache if use_cache else None
        return RecurrentModelOutput(hidden_BTD, cache, loop.branches, loop.state)

    def _cache_for(
        self,
        cache: Cache | None,
        use_cache: bool,
        depth: Any,
        way: Way,
        warm_start: bool,
    ) -> Cache | None:
        """Return the cache of a call, with room for its depth.

        Raises:
            ValueError: The cache, the depth and the options do not go together.
        """
        by_row, exits = not isinstance(depth, int), way.checks is not None
        if way.branches and (use_cache or by_row or exits):
            raise ValueError(
                "branches and a backprop_depth need one depth for all rows, no cache, no exits"
            )
        if cache is None and (use_cache or exits):
            cache = RecurrentCache(self.config, "ragged" if exits else "full")
        if cache is None or isinstance(cache, RecurrentCache):
            return cache
        if by_row or exits or way.branch_at or warm_start:
            raise ValueError(
                "rows of different depth, exits, contrasts and warm starts need a RecurrentCache, "
                f"got {type(cache).__name__}: give one depth for all rows and none of these, or "
                "let generate() make the cache"
            )
        make_room(cache, self.config, depth)
        return cache


def _real(attention_mask: Any, embeds: torch.Tensor) -> torch.Tensor:
    """Return which tokens (B, T) of a call are no padding."""
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
        return attention_mask[:, -embeds.shape[1] :].bool()
    return torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
