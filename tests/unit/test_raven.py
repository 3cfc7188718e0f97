"""Import of released checkpoints: their layout, their refusals, and the formula behind them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig

from rondo.config import ConvertConfig, VerifyConfig
from rondo.convert import convert, raven, verify
from rondo.errors import UserError
from rondo.modeling.configuration_recurrent import RecurrentConfig
from rondo.modeling.modeling_recurrent import RecurrentForCausalLM

WIDTH, HEADS, KV_HEADS, HEAD_DIM, INNER, VOCAB, PADDED = 64, 4, 2, 16, 96, 258, 264
PRELUDE, CORE, CODA = 2, 3, 1
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FLAVOURS = ("llama", "olmo", "llama3")


def config_fields(flavour: str) -> dict[str, Any]:
    """A config.json as the releases have it, with what they inherit from Huginn's."""
    fields = {
        "architectures": ["RavenForCausalLM"],
        "model_type": "huginn_raven",
        "block_class_name": "SandwichBlock",
        "n_embd": WIDTH,
        "n_heads": HEADS,
        "num_key_value_heads": HEADS if flavour == "olmo" else KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": INNER,
        "n_layers": PRELUDE + CORE + CODA,
        "n_layers_in_prelude": PRELUDE,
        "n_layers_in_recurrent_block": CORE,
        "n_layers_in_coda": CODA,
        "vocab_size": VOCAB,
        "padded_vocab_size": PADDED,
        "block_size": 4096,
        "max_position_embeddings": 128,
        "norm_eps": 1e-6 if flavour == "olmo" else 1e-5,
        "rope_base": 500_000.0,
        "rope_theta": 10_000.0,
        "rope_scaling": LLAMA3 if flavour == "llama3" else None,
        "tie_embeddings": False,
        "qk_bias": False,
        "bias": False,
        "injection_type": "linear",
        "state_init": "like-init",
        "test_time_noise": 0,
        "mean_recurrence": 32,
        "init_values": {"std": 0.3, "embed_scale": 1.0},
        "bos_token_id": 65504,
        "eos_token_id": 65505,
        "pad_token_id": 65509,
        "torch_dtype": "float32",
    }
    return fields


def plain_weights(fields: dict[str, Any], olmo: bool) -> dict[str, Tensor]:
    """Random weights by the names of the recurrent model, large enough that each one tells."""
    draw = torch.Generator().manual_seed(7)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=draw) / columns**0.5

    def vector(width: int) -> Tensor:
        return 0.5 + torch.rand(width, generator=draw)

    queries, keys = HEADS * HEAD_DIM, fields["num_key_value_heads"] * HEAD_DIM
    weights = {
        "model.embed_tokens.weight": torch.randn(PADDED, WIDTH, generator=draw),
        "model.injection.weight": matrix(WIDTH, 2 * WIDTH),
        "model.norm.weight": vector(WIDTH),
        "lm_head.weight": matrix(PADDED, WIDTH),
    }
    for index in range(PRELUDE + CORE + CODA):
        layer = f"model.layers.{index}."
        shapes = {"q": (queries, WIDTH), "k": (keys, WIDTH), "v": (keys, WIDTH)}
        for part, shape in (shapes | {"o": (WIDTH, queries)}).items():
            weights[f"{layer}self_attn.{part}_proj.weight"] = matrix(*shape)
        for part, shape in {"gate": (INNER, WIDTH), "up": (INNER, WIDTH)}.items():
            weights[f"{layer}mlp.{part}_proj.weight"] = matrix(*shape)
        weights[f"{layer}mlp.down_proj.weight"] = matrix(WIDTH, INNER)
        weights[f"{layer}post_attention_layernorm.weight"] = vector(WIDTH)
        if olmo:
            weights[f"{layer}post_feedforward_layernorm.weight"] = vector(WIDTH)
            weights[f"{layer}self_attn.q_norm.weight"] = vector(queries)
            weights[f"{layer}self_attn.k_norm.weight"] = vector(keys)
        else:
            weights[f"{layer}input_layernorm.weight"] = vector(WIDTH)
    return weights


def fuse(weights: dict[str, Tensor], olmo: bool) -> dict[str, Tensor]:
    """The same weights in the releases' layout."""
    fused = {
        "transformer.wte.weight": weights["model.embed_tokens.weight"],
        "transformer.adapter.weight": weights["model.injection.weight"],
        "transformer.ln_f.weight": weights["model.norm.weight"],
        "lm_head.weight": weights["lm_head.weight"],
    }
    blocks = [("prelude", j) for j in range(PRELUDE)]
    blocks += [("core_block", j) for j in range(CORE)] + [("coda", j) for j in range(CODA)]
    for index, (stack, j) in enumerate(blocks):
        old, new = f"model.layers.{index}.", f"transformer.{stack}.{j}."
        attention = [weights[f"{old}self_attn.{part}_proj.weight"] for part in "qkv"]
        gate_up = [weights[f"{old}mlp.{part}_proj.weight"] for part in ("gate", "up")]
        fused[f"{new}attn.Wqkv.weight"] = torch.cat(attention)
        fused[f"{new}attn.proj.weight"] = weights[f"{old}self_attn.o_proj.weight"]
        fused[f"{new}mlp.fc.weight"] = torch.cat(gate_up)
        fused[f"{new}mlp.proj.weight"] = weights[f"{old}mlp.down_proj.weight"]
        after_attention = weights[f"{old}post_attention_layernorm.weight"]
        if olmo:
            fused[f"{new}norm_1.weight"] = after_attention
            fused[f"{new}norm_2.weight"] = weights[f"{old}post_feedforward_layernorm.weight"]
            fused[f"{new}attn.q_norm.weight"] = weights[f"{old}self_attn.q_norm.weight"]
            fused[f"{new}attn.k_norm.weight"] = weights[f"{old}self_attn.k_norm.weight"]
        else:
            fused[f"{new}norm_1.weight"] = weights[f"{old}input_layernorm.weight"]
            fused[f"{new}norm_2.weight"] = after_attention
    return fused


def write_checkpoint(directory: Path, fields: dict[str, Any], fused: dict[str, Tensor]) -> Path:
    """Write a directory as released, with Huginn's token ids beside another tokenizer."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(fields))
    save_file(fused, directory / "model.safetensors", metadata={"format": "pt"})
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "<s>", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None}
    settings = named | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    generation = {"bos_token_id": 65504, "eos_token_id": 65505, "pad_token_id": 65509}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


@pytest.fixture(scope="module", params=FLAVOURS)
def released(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A released checkpoint of each flavour."""
    flavour = request.param
    fields = config_fields(flavour)
    fused = fuse(plain_weights(fields, flavour == "olmo"), flavour == "olmo")
    return write_checkpoint(tmp_path_factory.mktemp("raven") / flavour, fields, fused)


# Vocabulary, MLP, heads of queries, of keys, layers of the core, and the parameters in all.
RELEASES = {
    "TinyLlama-3T": (32_000, 5632, 32, 4, 8, 844_171_264),
    "Llama-3.2": (128_256, 8192, 32, 8, 6, 1_385_228_288),
    "OLMo-2-0425": (100_352, 8192, 16, 16, 6, 1_359_071_232),
}


def read(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    fields = json.loads((directory / "config.json").read_text())
    return fields, load_file(directory / "model.safetensors")


def load(directory: Path) -> RecurrentForCausalLM:
    """The recurrent model over the translated tensors, without the rest of the conversion."""
    fields, fused = read(directory)
    prelude, core, coda = raven.sizes(fields)
    config = RecurrentConfig(
        base_config=raven.parent_config(fields, fused, directory),
        num_prelude_layers=prelude,
        num_core_layers=core,
        num_coda_layers=coda,
        **raven.recurrent_fields(fields),
    )
    model = RecurrentForCausalLM(config)
    weights: dict[str, Tensor] = {}
    for name, tensor in fused.items():
        weights |= raven.translate(fields, fused, name, tensor)
    model.load_state_dict(weights)
    return model.eval()


def some_ids() -> Tensor:
    return torch.randint(0, PADDED, (2, 40), generator=torch.Generator().manual_seed(1))


def test_translating_undoes_the_fusing(released: Path) -> None:
    fields, fused = read(released)
    expected = plain_weights(fields, released.name == "olmo")
    found: dict[str, Tensor] = {}
    for name, tensor in fused.items():
        found |= raven.translate(fields, fused, name, tensor)
    assert raven.check_names(fields, dict.fromkeys(fused, released)) == ()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_views_of_one_fused_tensor_survive_the_writing(released: Path, tmp_path: Path) -> None:
    fields, fused = read(released)
    name = "transformer.coda.0.attn.Wqkv.weight"
    parts = raven.translate(fields, fused, name, fused[name])
    convert.write_tensors(parts, tmp_path / "parts.safetensors")
    written = load_file(tmp_path / "parts.safetensors")
    assert torch.equal(torch.cat([written[part] for part in parts]), fused[name])
    assert (tmp_path / "parts.safetensors").stat().st_size < 1.1 * fused[name].nbytes


def test_the_parent_is_the_family_that_the_tensors_show(released: Path) -> None:
    fields, fused = read(released)
    config = raven.parent_config(fields, fused, released)
    assert raven.is_raven(fields)
    assert config.model_type == ("olmo2" if released.name == "olmo" else "llama")
    assert (config.num_hidden_layers, config.vocab_size) == (PRELUDE + CORE + CODA, PADDED)
    assert config.rope_parameters["rope_theta"] == 10_000
    assert config.rms_norm_eps == fields["norm_eps"]
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (256, 257, None)


@pytest.mark.parametrize("name", RELEASES)
def test_the_releases_have_their_published_size(name: str, tmp_path: Path) -> None:
    vocab, inner, heads, kv_heads, core, expected = RELEASES[name]
    fields = config_fields("llama") | {
        "n_embd": 2048,
        "n_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 2048 // heads,
        "intermediate_size": inner,
        "padded_vocab_size": vocab,
        "n_layers_in_prelude": 4,
        "n_layers_in_recurrent_block": core,
        "n_layers_in_coda": 4,
    }
    names = ["transformer.coda.0.attn.q_norm.weight"] if name.startswith("OLMo") else []
    config = RecurrentConfig(
        base_config=raven.parent_config(fields, names, tmp_path),
        num_prelude_layers=4,
        num_core_layers=core,
        num_coda_layers=4,
        **raven.recurrent_fields(fields),
    )
    with torch.device("meta"):
        model = RecurrentForCausalLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


@pytest.mark.parametrize("num_recurrences", [1, 3])
def test_the_model_computes_the_formula(released: Path, num_recurrences: int) -> None:
    fields, _ = read(released)
    shards, ids = [released / "model.safetensors"], some_ids()
    theirs = raven.reference_logits(fields, shards, ids, num_recurrences)
    with torch.no_grad():
        ours = load(released)(ids, num_recurrences=num_recurrences).logits
    assert theirs.shape == (2, 40, PADDED)
    assert float((ours - theirs).abs().max()) < 1e-5 * float(theirs.std())


@pytest.mark.parametrize(
    ("name", "dim"),
    [
        ("transformer.adapter.weight", 1),
        ("transformer.prelude.0.mlp.fc.weight", 0),
        ("transformer.core_block.1.attn.Wqkv.weight", 0),
        ("transformer.coda.0.norm_1.weight", 0),
    ],
)
def test_the_formula_tells_one_half_of_a_tensor_from_the_other(
    released: Path, tmp_path: Path, name: str, dim: int
) -> None:
    fields, fused = read(released)
    fused[name] = torch.cat(fused[name].chunk(2, dim)[::-1], dim).contiguous()
    other = write_checkpoint(tmp_path / "other", fields, fused)
    right, wrong = (
        raven.reference_logits(fields, [directory / "model.safetensors"], some_ids())
        for directory in (released, other)
    )
    assert float((right - wrong).abs().max()) > 0.01 * float(right.std())


def test_rotary_scaling_matters_to_the_formula(released: Path) -> None:
    fields, _ = read(released)
    shards, other = [released / "model.safetensors"], dict(fields)
    other["rope_scaling"] = None if fields["rope_scaling"] else LLAMA3
    right, wrong = (raven.reference_logits(each, shards, some_ids()) for each in (fields, other))
    assert float((right - wrong).abs().max()) > 0.01 * float(right.std())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"qk_bias": True}, "queries and keys have biases"),
        ({"init_values": {"std": 0.01, "embed_scale": 72.66}}, "multiplied by 72.66"),
        ({"test_time_noise": 0.1}, "noise disturbs"),
        ({"injection_type": "gate"}, "injection is gate"),
        ({"rope_theta": None}, "rope_theta None"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "embeddings are yarn"),
    ],
)
def test_configs_that_are_not_the_methods_are_refused(
    change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=reason):
        raven.parent_config(config_fields("llama") | change, (), tmp_path)


@pytest.mark.parametrize(
    ("added", "removed", "reason"),
    [
        ("transformer.coda.0.norm_3.weight", "", "its blocks have norm_3.weight, as Huginn's"),
        ("transformer.prelude.1.attn.qk_bias", "", "its blocks have attn.qk_bias"),
        ("transformer.prelude.2.norm_1.weight", "", "unknown tensor transformer.prelude.2.norm_1"),
        ("transformer.adapter.bias", "", "unknown tensor transformer.adapter.bias"),
        ("", "transformer.core_block.2.mlp.fc.weight", "lacks the tensor transformer.core_block.2"),
        ("", "lm_head.weight", "lacks the tensor lm_head.weight"),
    ],
)
def test_missing_and_unknown_tensors_are_refused(
    released: Path, added: str, removed: str, reason: str
) -> None:
    fields, fused = read(released)
    files = dict.fromkeys(({*fused} | {added}) - {"", removed}, released)
    with pytest.raises(UserError, match=reason):
        raven.check_names(fields, files)


def test_tables_and_a_tied_head_are_not_needed(released: Path) -> None:
    fields, fused = read(released)
    fields |= {"tie_embeddings": True, "tie_word_embeddings": False}
    files = dict.fromkeys([*fused, "freqs_cis"], released)
    assert raven.check_names(fields, files) == ("freqs_cis", "lm_head.weight")
    del files["lm_head.weight"]
    assert raven.check_names(fields, files) == ("freqs_cis",)
    assert raven.parent_config(fields, files, released).tie_word_embeddings
    assert not raven.translate(fields, files, "freqs_cis", torch.zeros(1))
    assert not raven.translate(fields, files, "lm_head.weight", torch.zeros(1))


def test_a_released_checkpoint_converts_and_verifies(released: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert.run(ConvertConfig(source=str(released), output_dir=str(out)))
    verify.run(VerifyConfig(model=str(out)))
    model = RecurrentForCausalLM.from_pretrained(out).eval()
    theirs = raven.reference_logits(
        read(released)[0], [released / "model.safetensors"], some_ids(), num_recurrences=2
    )
    with torch.no_grad():
        ours = model(some_ids(), num_recurrences=2).logits
    assert float((ours - theirs).abs().max()) < 1e-5 * float(theirs.std())
    assert GenerationConfig.from_pretrained(out).eos_token_id == 257
    assert model.config.eos_token_id == 257
