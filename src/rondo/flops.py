"""What a recurrent model costs as a function of recurrence, in parameters, FLOPs and cache.

Two accounts are kept side by side. The paper's (arXiv:2511.07384) counts decoder layers only, at
nominal depth, and exists so that its numbers can be reproduced. The executed one counts every
matrix product a forward pass performs: injection, output head and attention scores too.

All results are exact integers per token. Norms, activations, softmax and the embedding lookup
perform no matrix product and are not counted; nor is the optimizer's work.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Costs:
    """What one recurrent model is made of and what it costs as a function of recurrence."""

    num_prelude_layers: int
    num_core_layers: int
    num_coda_layers: int

    prelude_parameters: int
    """Parameters of the decoder layers alone, as for the core and the coda."""
    core_parameters: int
    coda_parameters: int
    injection_parameters: int
    norm_parameters: int
    """Parameters of the final norm; the norms inside layers belong to their layers."""
    embedding_parameters: int
    head_parameters: int
    """Zero when the head is tied to the embedding."""

    prelude_matmul: int
    """Weights that multiply each token's activation: linear weights, without norms and biases."""
    core_matmul: int
    coda_matmul: int
    injection_matmul: int
    head_matmul: int
    """Counts a tied head too: sharing the weight does not spare the product."""

    attention_width: int
    """Query heads times head dimension, in one layer."""
    kv_width: int
    """Key/value heads times head dimension, in one layer."""

    delta_parameters: int = 0
    """Parameters of the core's per-iteration deltas; `core_parameters` are what iterations share,
    `core_matmul` counts one iteration's."""
    num_delta_iterations: int = 1
    gate_parameters: int = 0
    """Parameters of the exit gate: a weight for each of its features, and a bias."""

    @property
    def total_parameters(self) -> int:
        """Stored parameters, each shared one counted once."""
        return (
            self.prelude_parameters
            + self.core_parameters
            + self.delta_parameters
            + self.coda_parameters
            + self.injection_parameters
            + self.norm_parameters
            + self.embedding_parameters
            + self.head_parameters
            + self.gate_parameters
        )

    @property
    def iteration_parameters(self) -> int:
        """Parameters of the core that a token meets in one iteration."""
        return self.core_parameters + self.delta_parameters // self.num_delta_iterations

    def effective_depth(self, num_recurrences: int) -> int:
        """Layers a token passes."""
        return (
            self.num_prelude_layers + num_recurrences * self.num_core_layers + self.num_coda_layers
        )

    def effective_parameters(self, num_recurrences: int) -> int:
        """Layer parameters a token meets, the core's once per iteration (the paper's measure)."""
        return (
            self.prelude_parameters
            + num_recurrences * self.iteration_parameters
            + self.coda_parameters
        )

    def paper_forward_flops(self, num_recurrences: int) -> int:
        """Forward FLOPs per token in the paper's account: two per effective parameter."""
        return 2 * self.effective_parameters(num_recurrences)

    def paper_train_flops(self, mean: int, window: int = 8) -> int:
        """Training FLOPs per token in the paper's account, every step at the nominal mean.

        Six per parameter met with gradient, two per parameter met without.
        """
        with_gradient = self.effective_parameters(min(mean, window))
        without_gradient = max(0, mean - window) * self.iteration_parameters
        return 6 * with_gradient + 2 * without_gradient

    def iteration_flops(self, seq_len: int) -> int:
        """Executed FLOPs per token of one iteration: injection and core."""
        attention = 4 * self.attention_width * seq_len * self.num_core_layers
        return 2 * (self.injection_matmul + self.core_matmul) + attention

    def finish_flops(self, seq_len: int) -> int:
        """Executed FLOPs per token of the coda and the head, which each further output repeats."""
        attention = 4 * self.attention_width * seq_len * self.num_coda_layers
        return 2 * (self.coda_matmul + self.head_matmul) + attention

    def forward_flops(self, num_recurrences: int, seq_len: float) -> Any:
        """Executed FLOPs per token of one forward pass over `seq_len` tokens without a cache.

        Attention is counted as the full square, as `FlopCounterMode` counts it: no credit is given
        for the half that a causal mask hides.
        """
        matmul_weights = (
            self.prelude_matmul
            + num_recurrences * (self.injection_matmul + self.core_matmul)
            + self.coda_matmul
            + self.head_matmul
        )
        attention = 4 * self.attention_width * seq_len * self.effective_depth(num_recurrences)
        return 2 * matmul_weights + attention

    def generation_flops(self, num_recurrences: int, prompt: float, new: float) -> float:
        """Executed FLOPs per token of a prompt that is read at once and continued with a cache.

        The head runs once for the prompt, whose last token gives the first of the new ones, and
        the last new token is not read any more. Lengths may be means.
        """
        steps = max(0.0, new - 1)
        reading = prompt * self.forward_flops(num_recurrences, prompt)
        spared = 2 * self.head_matmul * (prompt - 1)
        decoding = steps * self.forward_flops(num_recurrences, prompt + (steps + 1) / 2)
        return (reading - spared + decoding) / (prompt + steps)

    def train_flops(
        self, num_recurrences: int, backprop_depth: int, seq_len: int, frozen: bool = False
    ) -> int:
        """Executed FLOPs per token of a forward pass and the backward pass of what has gradient.

        Only the last `backprop_depth` iterations carry gradient. What they, the prelude, the coda
        and the head cost backward is twice a forward pass of that depth; weights that are frozen
        pass gradient on and get none. Recomputation, by activation checkpointing or inside a fused
        attention kernel, is not counted.
        """
        differentiated = min(num_recurrences, backprop_depth)
        forward = self.forward_flops(num_recurrences, seq_len)
        backward = 2 * self.forward_flops(differentiated, seq_len)
        # Without attention (over no tokens) what is left is the products with weights.
        return forward + backward - frozen * self.forward_flops(differentiated, 0)

    def gate_train_flops(self, num_recurrences: int, seq_len: int) -> int:
        """Executed FLOPs per token of training the exit gate on one trajectory.

        The trajectory has no backward pass; coda and head follow each iteration, and the gate's
        readout, whose weights alone get gradient, each but the last.
        """
        each = self.finish_flops(seq_len) + 4 * (self.gate_parameters - 1)
        return self.forward_flops(num_recurrences, seq_len) + (num_recurrences - 1) * each

    def kv_values(self, num_recurrences: int) -> int:
        """Cached values per token when every iteration keeps its own keys and values."""
        return 2 * self.kv_width * self.effective_depth(num_recurrences)

    def kv_bytes(self, num_recurrences: int, bytes_per_value: int = 2) -> int:
        """Cache bytes per token; two bytes a value is bfloat16."""
        return bytes_per_value * self.kv_values(num_recurrences)


def costs_of(model: Any) -> Costs:
    """Count a recurrent model (`RecurrentForCausalLM`); the meta device is enough.

    The weights of experts count in `*_matmul` by the share of them that a token meets.
    """
    body, base = model.model, model.config.base_config
    costs = _count(
        model,
        base,
        body.prelude,
        body.core,
        body.coda,
        sum(parameter.numel() for parameter in body.injection.parameters()),
        body.injection.weight.numel() if body.injection.kind == "linear" else 0,
    )
    delta_parameters = sum(
        parameter.numel()
        for layer in body.core
        for name, parameter in layer.named_parameters()
        if ".delta_" in name
    )
    return replace(
        costs,
        core_parameters=costs.core_parameters - delta_parameters,
        delta_parameters=delta_parameters,
        num_delta_iterations=model.config.num_delta_iterations or 1,
        gate_parameters=0 if body.exit_gate is None else _parameters([body.exit_gate]),
    )


def costs_of_parent(model: Any) -> Costs:
    """Count a model without recurrence: all its layers are prelude, and r is always 1."""
    return _count(model, model.config, model.base_model.layers, (), (), 0, 0)


def _count(
    model: Any,
    config: Any,
    prelude: Iterable[nn.Module],
    core: Iterable[nn.Module],
    coda: Iterable[nn.Module],
    injection_parameters: int,
    injection_matmul: int,
) -> Costs:
    prelude, core, coda = list(prelude), list(core), list(coda)
    head = model.get_output_embeddings().weight
    embedding = model.get_input_embeddings().weight
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Costs(
        num_prelude_layers=len(prelude),
        num_core_layers=len(core),
        num_coda_layers=len(coda),
        prelude_parameters=_parameters(prelude),
        core_parameters=_parameters(core),
        coda_parameters=_parameters(coda),
        injection_parameters=injection_parameters,
        norm_parameters=_parameters([model.base_model.norm]),
        embedding_parameters=embedding.numel(),
        head_parameters=0 if config.tie_word_embeddings else head.numel(),
        prelude_matmul=_matmul_weights(prelude, config),
        core_matmul=_matmul_weights(core, config),
        coda_matmul=_matmul_weights(coda, config),
        injection_matmul=injection_matmul,
        head_matmul=head.numel(),
        attention_width=config.num_attention_heads * head_dim,
        kv_width=kv_heads_of(config) * head_dim,
    )


def kv_heads_of(config: Any) -> int:
    """Return the key/value heads of a layer, by a parent's config."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _parameters(modules: Iterable[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def _matmul_weights(layers: Iterable[nn.Module], config: Any) -> int:
    total = 0
    for layer in layers:
        for name, parameter in layer.named_parameters():
            if ".delta_" in name:  # stacked, of which one iteration uses one; vectors add only
                total += parameter[0].numel() if parameter.dim() == 3 else 0
            elif parameter.dim() == 2:
                total += parameter.numel()
            elif parameter.dim() == 3:  # experts, stacked
                total += parameter.numel() * config.num_experts_per_tok // parameter.shape[0]
    return total
