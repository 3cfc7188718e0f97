"""Import of released checkpoints of the method (arXiv:2511.07384), stored in Huginn's layout.

They call themselves `huginn_raven`, but their blocks are a Llama's or an OLMo-2's under other
names, with fused projections. Which of the two it is no config says; only an OLMo-2 has norms on
queries and keys. Huginn itself shares model type and names, not the blocks, and is refused.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaConfig, Olmo2Config, PreTrainedConfig

from rondo.errors import UserError
from rondo.modeling.injection_recurrent import positional_noise
from rondo.provenance import read_json

Table = dict[str, tuple[str, ...]]

COMPUTED = ("inv_freq", "freqs_cis")
STACKS = ("prelude", "core_block", "coda")
TOP = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.adapter.weight": "model.injection.weight",
    "transformer.ln_f.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
IN_LAYER: Table = {
    "attn.Wqkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.proj": ("self_attn.o_proj",),
    "mlp.fc": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.proj": ("mlp.down_proj",),
}
LLAMA_NORMS: Table = {"norm_1": ("input_layernorm",), "norm_2": ("post_attention_layernorm",)}
OLMO_NORMS: Table = {
    "norm_1": ("post_attention_layernorm",),
    "norm_2": ("post_feedforward_layernorm",),
    "attn.q_norm": ("self_attn.q_norm",),
    "attn.k_norm": ("self_attn.k_norm",),
}


def is_raven(fields: dict[str, Any]) -> bool:
    """Whether a config.json is of Huginn's layout, released checkpoint of the method or not."""
    return fields.get("model_type") == "huginn_raven"


def sizes(fields: dict[str, Any]) -> tuple[int, int, int]:
    """Return the layers of prelude, core and coda."""
    counts = (fields[f"n_layers_in_{part}"] for part in ("prelude", "recurrent_block", "coda"))
    prelude, core, coda = counts
    return prelude, core, coda


def recurrent_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Return what the loop is in the terms of `RecurrentConfig`."""
    std = float(fields["init_values"]["std"])
    return {"injection": "linear", "state_init": "normal", "state_std": std}


def parent_config(
    fields: dict[str, Any], names: Collection[str], directory: Path
) -> PreTrainedConfig:
    """Return the config of the plain decoder whose layers the checkpoint stacks.

    Args:
        fields: The checkpoint's config.json.
        names: Names of its tensors, which alone tell OLMo-2 from Llama.
        directory: Where its tokenizer lies; the token ids in the config are Huginn's still.

    Raises:
        UserError: It is not one of the method's own.
    """
    _check_fields(fields)
    theta, scaling = _rope(fields)
    heads, kv_heads, head_dim = _heads(fields)
    vocab_size = fields.get("padded_vocab_size") or fields["vocab_size"]
    return (Olmo2Config if "attn.q_norm" in _in_layer(names) else LlamaConfig)(
        vocab_size=vocab_size,
        hidden_size=fields["n_embd"],
        intermediate_size=fields["intermediate_size"],
        num_hidden_layers=sum(sizes(fields)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=fields.get("max_position_embeddings") or fields["block_size"],
        rms_norm_eps=fields["norm_eps"],
        rope_parameters={**scaling, "rope_theta": theta},
        tie_word_embeddings=_is_tied(fields),
        dtype=fields.get("dtype") or fields.get("torch_dtype") or "float32",
        **(_special_tokens(directory, vocab_size) | {"head_dim": head_dim}),
    )


def check_names(fields: dict[str, Any], files: Mapping[str, Path]) -> tuple[str, ...]:
    """Check that every tensor is there and none is unknown.

    Returns:
        The tensors that are not needed: tables that are computed anew, and a tied head.

    Raises:
        UserError: One is missing or unknown.
    """
    expected = set(TOP) | {
        f"transformer.{stack}.{index}.{part}.weight"
        for stack, count in zip(STACKS, sizes(fields), strict=True)
        for index in range(count)
        for part in _in_layer(files)
    }
    unused = {name for name in files if name.endswith(COMPUTED)}
    if _is_tied(fields):
        expected.remove("lm_head.weight")
        unused |= {"lm_head.weight"} & files.keys()
    unknown, missing = sorted(files.keys() - expected - unused), sorted(expected - files.keys())
    for name in unknown:
        if name.endswith(("norm_3.weight", "norm_4.weight", "attn.qk_bias")):
            raise _refusal(f"its blocks have {name.split('.', 3)[-1]}, as Huginn's own have")
    for verb, found in (("holds the unknown", unknown), ("lacks the", missing)):
        if found:
            raise _refusal(f"it {verb} tensor {found[0]}")
    return tuple(sorted(unused))


def translate(
    fields: dict[str, Any], names: Collection[str], name: str, tensor: Tensor
) -> dict[str, Tensor]:
    """Return a stored tensor under our names; fused ones are taken apart as views of it."""
    if name.endswith(COMPUTED) or (name == "lm_head.weight" and _is_tied(fields)):
        return {}
    if name in TOP:
        return {TOP[name]: tensor}
    _, stack, index, part = name.removesuffix(".weight").split(".", 3)
    layer = int(index) + sum(sizes(fields)[: STACKS.index(stack)])
    targets = _in_layer(names)[part]
    parts = tensor.split(_qkv_rows(fields)) if len(targets) == 3 else tensor.chunk(len(targets))
    new = [f"model.layers.{layer}.{target}.weight" for target in targets]
    return dict(zip(new, parts, strict=True))


def _refusal(reason: str) -> UserError:
    return UserError(
        f"this huginn_raven checkpoint is no retrofitted Llama or OLMo-2: {reason}; Huginn itself "
        "(huginn-0125) and what else shares its layout cannot be imported"
    )


def _check_fields(fields: dict[str, Any]) -> None:
    scale, injection = fields["init_values"]["embed_scale"], fields.get("injection_type", "linear")
    found = {
        "its queries and keys have biases": fields.get("qk_bias", True),
        f"its embeddings are multiplied by {scale:g}": scale != 1,
        "noise disturbs its state": fields.get("test_time_noise", 0),
        f"its injection is {injection}": injection != "linear",
    }
    if any(found.values()):
        raise _refusal(" and ".join(reason for reason, holds in found.items() if holds))


def _in_layer(names: Collection[str]) -> Table:
    olmo = any(name.endswith(".attn.q_norm.weight") for name in names)
    return IN_LAYER | (OLMO_NORMS if olmo else LLAMA_NORMS)


def _is_tied(fields: dict[str, Any]) -> bool:
    # tie_word_embeddings, where a config has it too, is overruled by this one.
    return bool(fields.get("tie_embeddings", True))


def _heads(fields: dict[str, Any]) -> tuple[int, int, int]:
    """Return the heads of queries, those of keys and values, and their width."""
    heads = fields["n_heads"]
    head_dim = fields.get("head_dim") or fields["n_embd"] // heads
    return heads, fields.get("num_key_value_heads") or heads, head_dim


def _qkv_rows(fields: dict[str, Any]) -> list[int]:
    heads, kv_heads, head_dim = _heads(fields)
    return [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]


def _rope(fields: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """Return base and scaling of the rotary embedding."""
    scaling = dict(fields.get("rope_parameters") or fields.get("rope_scaling") or {})
    # Not rope_base: the checkpoints' code never reads it, and in a TinyLlama's config it is wrong.
    theta = scaling.pop("rope_theta", None) or fields.get("rope_theta")
    kind = scaling.setdefault("rope_type", scaling.pop("type", "default"))
    if theta is None or kind not in ("default", "llama3"):
        raise _refusal(f"its rotary embeddings are {kind} with rope_theta {theta}")
    return float(theta), scaling


def _special_tokens(directory: Path, vocab_size: int) -> dict[str, Any]:
    """Return the ids of the special tokens that the tokenizer names."""
    ids: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    vocabulary, settings = directory / "tokenizer.json", directory / "tokenizer_config.json"
    if vocabulary.is_file() and settings.is_file():
        tokenizer, named = Tokenizer.from_file(str(vocabulary)), read_json(settings)
        for key in ids:
            token = named.get(key.removesuffix("_id"))
            content = token["content"] if isinstance(token, dict) else token
            found = tokenizer.token_to_id(content) if content else None
            ids[key] = found if found is not None and found < vocab_size else None
    return ids


@dataclass(frozen=True)
class _Formula:
    """The blocks of a checkpoint, written out over its stored tensors."""

    fields: dict[str, Any]
    weights: Mapping[str, Tensor]
    angles: Tensor

    def norm(self, name: str, x: Tensor) -> Tensor:
        scale = (x.square().mean(-1, keepdim=True) + self.fields["norm_eps"]).rsqrt()
        return x * scale * self.weights[f"{name}.weight"]

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T

    def run(self, stack: str, count: int, x: Tensor) -> Tensor:
        """Run a stack over (B, T, h): a Llama's norms come first in a block, an OLMo-2's last."""
        for block in (f"transformer.{stack}.{index}" for index in range(count)):
            attention, mlp = f"{block}.attn", f"{block}.mlp"
            if f"{attention}.q_norm.weight" in self.weights:
                x = x + self.norm(f"{block}.norm_1", self.attend(attention, x))
                x = x + self.norm(f"{block}.norm_2", self.mlp(mlp, x))
            else:
                x = x + self.attend(attention, self.norm(f"{block}.norm_1", x))
                x = x + self.mlp(mlp, self.norm(f"{block}.norm_2", x))
        return x

    def mlp(self, name: str, x: Tensor) -> Tensor:
        gate, up = self.linear(f"{name}.fc", x).chunk(2, dim=-1)
        return self.linear(f"{name}.proj", gate * gate.sigmoid() * up)

    def attend(self, name: str, x: Tensor) -> Tensor:
        heads, kv_heads, head_dim = _heads(self.fields)
        q, k, v = self.linear(f"{name}.Wqkv", x).split(_qkv_rows(self.fields), dim=-1)
        if f"{name}.q_norm.weight" in self.weights:
            q, k = self.norm(f"{name}.q_norm", q), self.norm(f"{name}.k_norm", k)
        q, k, v = (y.unflatten(-1, (-1, head_dim)).transpose(1, 2) for y in (q, k, v))
        q, k = self.rotate(q), self.rotate(k)
        k, v = (y.repeat_interleave(heads // kv_heads, dim=1) for y in (k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(head_dim)
        future = torch.ones(scores.shape[-2:]).triu(1).bool()
        mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ v
        return self.linear(f"{name}.proj", mixed.transpose(1, 2).flatten(-2))

    def rotate(self, y: Tensor) -> Tensor:
        # Channel i is paired with channel i + half, not with its neighbour as in Huginn.
        (left, right), cos, sin = y.chunk(2, dim=-1), self.angles.cos(), self.angles.sin()
        return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def _angles(fields: dict[str, Any], positions: Tensor) -> Tensor:
    """Return the rotary angles, (T, head_dim / 2)."""
    theta, scaling = _rope(fields)
    half = _heads(fields)[2] // 2
    frequency = theta ** (-torch.arange(half) / half)
    if scaling["rope_type"] == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) / scaling["factor"])
    return positions[:, None] * frequency


@torch.no_grad()
def reference_logits(
    fields: dict[str, Any], shards: list[Path], input_ids: Tensor, num_recurrences: int = 1
) -> Tensor:
    """Compute a checkpoint's logits from the stored tensors by the formula alone, in float32.

    It shares with the model that it proves only the initial state, an input of the formula.

    Args:
        fields: The checkpoint's config.json.
        shards: Its weight files.
        input_ids: Token ids, (B, T), without padding.
        num_recurrences: Iterations of the core.
    """
    weights = {name: x.float() for shard in shards for name, x in load_file(shard).items()}
    positions = torch.arange(input_ids.shape[1])
    formula = _Formula(fields, weights, _angles(fields, positions))
    prelude, core, coda = sizes(fields)
    e = formula.run("prelude", prelude, weights["transformer.wte.weight"][input_ids])
    std = fields["init_values"]["std"]
    s = positional_noise(positions[None], e.shape[-1], std, seed=0).expand_as(e)
    for _ in range(num_recurrences):
        s = formula.linear("transformer.adapter", torch.cat([s, e], dim=-1))
        s = formula.run("core_block", core, s)
    y = formula.norm("transformer.ln_f", formula.run("coda", coda, s))
    return formula.linear("transformer.wte" if _is_tied(fields) else "lm_head", y)
