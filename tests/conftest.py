"""Tiny random parents of many families, their tokenizer, and recurrent models made of them.

Every parent has 6 layers. Its weights are drawn wide and its norms and biases moved off their
neutral values, so that a norm, a factor or a layer in the wrong place shows.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from rondo.convert.families import cut_config
from rondo.modeling.configuration_recurrent import RecurrentConfig
from rondo.modeling.exits_recurrent import ExitRule
from rondo.modeling.modeling_recurrent import RecurrentForCausalLM


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep tokens of test texts out of the user's cache, in subprocesses too."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


# Models this small gain nothing from threads, and lose much where several tests run at once.
torch.set_num_threads(1)

VOCAB, WIDTH, LAYERS, WINDOW = 300, 32, 6, 8
PAD, BOS, EOS = 0, 1, 2

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# Two of each kind within any prelude, core and coda of two layers, and a kind that a layer would
# have by its new index alone never equals the one it has by its old.
SLIDING_THEN_FULL = ["sliding_attention", "full_attention"] * 3
FULL_LAST = ["sliding_attention"] * 3 + ["full_attention", "sliding_attention", "full_attention"]
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}

# Thresholds at which tokens of the small llama leave here and there.
THRESHOLDS = {
    "kl": 0.03,
    "entropy": 5.38,
    "margin": 0.996,
    "argmax_stable": 0.4,
    "state_distance": 0.22,
    "gate": 0.6,
}
RULES = {name: ExitRule(name, threshold) for name, threshold in THRESHOLDS.items()}

# What each family has that the plain decoder has not.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama3": {"model_type": "llama", "rope_parameters": LLAMA3_ROPE, "head_dim": 16},
    "olmo2": {"model_type": "olmo2"},
    "olmo3": {"model_type": "olmo3", "sliding_window": WINDOW, "layer_types": FULL_LAST},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": WINDOW},
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 5.0,
        "sliding_window": WINDOW,
        "layer_types": SLIDING_THEN_FULL,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {
        "model_type": "gemma3_text",
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "final_logit_softcapping": 5.0,
        "sliding_window": WINDOW,
        "layer_types": FULL_LAST,
        "tie_word_embeddings": True,
    },
    "phi3": {"model_type": "phi3", "rope_parameters": {"partial_rotary_factor": 0.5}},
    "granite": {
        "model_type": "granite",
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.5,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
    },
    "smollm3": {
        "model_type": "smollm3",
        "no_rope_layers": [1, 0, 1, 1, 0, 1],
        "tie_word_embeddings": True,
    },
    "cohere2": {
        "model_type": "cohere2",
        "logit_scale": 0.3,
        "sliding_window": WINDOW,
        "layer_types": SLIDING_THEN_FULL,
        "tie_word_embeddings": True,
    },
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"model_type": "qwen3_moe", "num_experts": 4, "head_dim": 16, **MOE},
}


def family_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """The config of a tiny parent."""
    return AutoConfig.for_model(**(COMMON | FAMILIES[family] | overrides))


def random_parent(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A parent with random weights, none of them at a neutral value."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parent = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()
        with torch.no_grad():
            for parameter in parent.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.3 * torch.randn_like(parameter))
    return parent


_PARENTS: dict[str, PreTrainedModel] = {}


def parent_of(family: str, **overrides: Any) -> PreTrainedModel:
    """The tiny parent of a family, in memory. It is shared: leave it as it is."""
    key = f"{family} {sorted(overrides.items())}"
    if key not in _PARENTS:
        _PARENTS[key] = random_parent(family_config(family, **overrides))
    return _PARENTS[key]


def recurrent(
    family: str,
    layers: Sequence[int] = range(LAYERS),
    sizes: tuple[int, int, int] = (2, 2, 2),
    overrides: dict[str, Any] | None = None,
    **fields: Any,
) -> RecurrentForCausalLM:
    """A recurrent model with the weights of the tiny parent, built without the conversion.

    Args:
        family: Key of `FAMILIES`.
        layers: The parent's layers that are kept.
        sizes: How many of them are prelude, core and coda.
        overrides: Fields of the parent's config.
        **fields: Fields of the recurrent config.
    """
    parent = parent_of(family, **(overrides or {}))
    config = RecurrentConfig(
        base_config=cut_config(parent.config, list(layers)),
        num_prelude_layers=sizes[0],
        num_core_layers=sizes[1],
        num_coda_layers=sizes[2],
        source_layers=list(layers),
        **fields,
    )
    model = RecurrentForCausalLM(config)
    weights = {f"model.injection.{n}": t for n, t in model.model.injection.state_dict().items()}
    place = {index: position for position, index in enumerate(layers)}
    for name, tensor in parent.state_dict().items():
        head, _, rest = name.partition("model.layers.")
        if head:
            weights[name] = tensor
        elif int(rest.split(".")[0]) in place:
            index, tail = rest.split(".", 1)
            weights[f"model.layers.{place[int(index)]}.{tail}"] = tensor
    model.load_state_dict(weights)
    _move_off_neutral(model)
    return model.eval()


@torch.no_grad()
def _move_off_neutral(model: RecurrentForCausalLM) -> None:
    """Give each channel a mixing of its own; a linear injection keeps its start."""
    injection = model.model.injection
    if injection.kind == "mix":
        injection.mixing.copy_(torch.linspace(0.1, 0.9, WIDTH))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 264 tokens, with a few merges."""
    merges = [("t", "h"), ("th", "e"), ("i", "n"), ("a", "n"), ("e", "r")]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<pad>", "<s>", "</s>", *alphabet, *(left + right for left, right in merges)]
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(piece, special=True) for piece in pieces[:3]])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that saves the tiny parent of a family with its tokenizer, once each."""

    saved: dict[str, Path] = {}

    def save(family: str, **overrides: Any) -> Path:
        key = f"{family} {sorted(overrides.items())}"
        if key not in saved:
            directory = tmp_path_factory.mktemp("base") / family
            parent_of(family, **overrides).save_pretrained(directory)
            byte_tokenizer().save_pretrained(directory)
            saved[key] = directory
        return saved[key]

    return save
