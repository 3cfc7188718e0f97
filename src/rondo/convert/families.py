"""Which parents can be looped: whatever exposes the parts, by inspection, not by a list.

A family that cannot be done is refused by name and reason before anything is written.
"""

import inspect
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)

from rondo.errors import UserError

PARTS = ("embed_tokens", "layers", "norm", "rotary_emb")
ATTENTION_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}
STATE_SPACE = {"mamba", "mamba2", "linear_attention", "conv", "recurrent", "hybrid"}

# What inspection cannot say in words a user would use.
KNOWN_REASONS = {
    "rondo": "it is recurrent already",
    "gemma3n": "its layers share keys and values across the stack and take per-layer embeddings",
    "gemma4": "its layers share keys and values across the stack and take per-layer embeddings",
    "gemma4_text": "its layers share keys and values and take per-layer embeddings",
    "gpt2": "its positions are learned embeddings added in the model, not rotary ones",
    "opt": "its positions are learned embeddings added in the model, not rotary ones",
    "mamba": "it is a state-space model, without attention layers to loop",
    "mamba2": "it is a state-space model, without attention layers to loop",
    "falcon_mamba": "it is a state-space model, without attention layers to loop",
    "rwkv": "it is a recurrent model, without attention layers to loop",
    "xlstm": "it is a recurrent model, without attention layers to loop",
    "jamba": "it mixes state-space layers in, whose running state has no place for r iterations",
    "bamba": "it mixes state-space layers in, whose running state has no place for r iterations",
    "zamba": "it mixes state-space layers in, whose running state has no place for r iterations",
    "zamba2": "it mixes state-space layers in, whose running state has no place for r iterations",
    "falcon_h1": "it mixes state-space layers in, whose state has no place for r iterations",
    "granitemoehybrid": "it mixes state-space layers in, whose state has no place for iterations",
    "deepseek_v32": "its attention keeps an index cache of its own beside keys and values",
}


def refuse(config: PreTrainedConfig, reason: str) -> UserError:
    """Return the refusal of a family, by name and reason."""
    return UserError(
        f"{config.model_type} cannot be made recurrent: {reason}. Any decoder-only family with "
        f"{', '.join(PARTS)} can (README, 'What is supported')"
    )


def check_config(config: PreTrainedConfig) -> None:
    """Refuse, from the config alone, what cannot be looped.

    Raises:
        UserError: With the family's name and the reason.
    """
    kinds = set(getattr(config, "layer_types", None) or ())
    kinds |= set(getattr(config, "layers_block_type", None) or ())
    if getattr(config, "is_encoder_decoder", False):
        raise refuse(config, "it is an encoder-decoder, not a decoder-only model")
    if config.model_type in KNOWN_REASONS:
        raise refuse(config, KNOWN_REASONS[config.model_type])
    if config.get_text_config() is not config:
        raise refuse(config, "it is multimodal; convert its text model saved on its own")
    if getattr(config, "num_kv_shared_layers", 0):
        raise refuse(config, "its layers share keys and values across the stack")
    if kinds & STATE_SPACE:
        raise refuse(config, f"it is a hybrid with {', '.join(sorted(kinds & STATE_SPACE))} layers")
    if kinds - ATTENTION_KINDS - {"attention"}:
        strange = ", ".join(sorted(kinds - ATTENTION_KINDS))
        raise refuse(config, f"its {strange} layers keep a cache that iterations cannot address")
    if getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None):
        raise refuse(
            config,
            "it is a mixture of experts, whose tensors transformers regroups while it loads them",
        )
    if getattr(config, "use_bidirectional_attention", None):
        raise refuse(config, "its attention looks both ways")
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"this {config.model_type} checkpoint is quantised; convert the full-precision one"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) not in MODEL_MAPPING:
        raise refuse(config, "transformers has no causal language model for it")


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the parent on the meta device, without memory, and check that it can be looped.

    Raises:
        UserError: With the family's name and the reason.
    """
    check_config(config)
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    try:
        with torch.device("meta"):
            model: Any = model_class(config)
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"transformers cannot build this {config.model_type} from its config: "
            f"{type(error).__name__}: {error}"
        ) from error
    body = model.base_model
    missing = [part for part in PARTS if getattr(body, part, None) is None]
    if missing:
        raise refuse(config, f"its body does not expose {', '.join(missing)}")
    for layer in body.layers:
        _check_layer(config, layer)
    head: Any = model.get_output_embeddings()
    named = {id(parameter) for part in PARTS for parameter in getattr(body, part).parameters()}
    named |= {id(parameter) for parameter in head.parameters() if parameter is not head.bias}
    strays = [name for name, parameter in model.named_parameters() if id(parameter) not in named]
    if strays:
        raise refuse(config, f"it has weights outside its layers and its head: {strays[0]}")
    return model


def _check_layer(config: PreTrainedConfig, layer: torch.nn.Module) -> None:
    parameters = inspect.signature(layer.forward).parameters
    for name in ("attention_mask", "position_embeddings", "past_key_values"):
        if name not in parameters:
            raise refuse(config, f"its layers do not take {name}")
    needed = [
        name
        for name, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    foreign = set(needed) - {"hidden_states", "position_embeddings", "attention_mask"}
    if foreign:
        raise refuse(config, f"its layers need {', '.join(sorted(foreign))} beside the usual")


def cut_config(config: PreTrainedConfig, layers: list[int]) -> dict[str, Any]:
    """Return the parent's config for a subset of its layers, per-layer lists cut alike."""
    fields = config.to_dict()
    depth = config.num_hidden_layers
    for name, value in fields.items():
        if isinstance(value, list) and len(value) == depth and "layer" in name:
            fields[name] = [value[index] for index in layers]
    fields["num_hidden_layers"] = len(layers)
    return fields
