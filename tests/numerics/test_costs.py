"""Counted costs: the paper's models to the digit, and real forward passes by torch's counter."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, Olmo2Config, PreTrainedConfig

from conftest import VOCAB, parent_of, recurrent
from rondo.convert.families import cut_config, skeleton
from rondo.convert.split import preset_split
from rondo.flops import Costs, costs_of, costs_of_parent
from rondo.modeling.configuration_recurrent import RecurrentConfig
from rondo.modeling.modeling_recurrent import RecurrentForCausalLM

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# The parents as their releases describe them.
PARENTS: dict[str, PreTrainedConfig] = {
    "tinyllama-1.1b": LlamaConfig(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    ),
    "llama-3.2-1b": LlamaConfig(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131_072,
        rms_norm_eps=1e-5,
        rope_parameters=LLAMA3_ROPE,
        tie_word_embeddings=True,
    ),
    "olmo-2-1b": Olmo2Config(
        vocab_size=100_352,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=4096,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
    ),
}
SHAPES = {"tinyllama-1.1b": (4, 8, 4), "llama-3.2-1b": (4, 6, 4), "olmo-2-1b": (4, 6, 4)}
# Prelude, core, coda, adapter, embedding and head, total: method.md 1.5.
PARAMETERS = {
    "tinyllama-1.1b": (176_177_152, 352_354_304, 8_388_608, 131_072_000, 844_171_264),
    "llama-3.2-1b": (243_286_016, 364_929_024, 8_388_608, 525_336_576, 1_385_228_288),
    "olmo-2-1b": (268_468_224, 402_702_336, 8_388_608, 411_041_792, 1_359_071_232),
}
NON_EMBEDDING = {
    "tinyllama-1.1b": 968_976_384,
    "llama-3.2-1b": 973_146_112,
    "olmo-2-1b": 1_073_874_944,
}
# Training FLOPs per token at mean 4, 8, 16 and 32: method.md 5.
TRAIN_FLOPS = {
    "tinyllama-1.1b": (10_570_629_120, 19_027_132_416, 24_664_801_280, 35_940_139_008),
    "llama-3.2-1b": (11_677_728_768, 20_436_025_344, 26_274_889_728, 37_952_618_496),
    "olmo-2-1b": (12_886_474_752, 22_551_330_816, 28_994_568_192, 41_881_042_944),
}
# Cache bytes per token at r = 32 in bfloat16, and of the whole parent: method.md 8.
KV_BYTES = {
    "tinyllama-1.1b": (270_336, 22_528),
    "llama-3.2-1b": (409_600, 32_768),
    "olmo-2-1b": (1_638_400, 131_072),
}
each_preset = pytest.mark.parametrize("preset", PARENTS)


def paper_costs(preset: str) -> Costs:
    """Costs of the paper's model: its split, its linear injection, its untied head."""
    parent = PARENTS[preset]
    split = preset_split(preset, parent.model_type, parent.num_hidden_layers)
    base = cut_config(parent, list(split.layers)) | {"tie_word_embeddings": False}
    prelude, core, coda = split.sizes
    config = RecurrentConfig(
        base_config=base,
        num_prelude_layers=prelude,
        num_core_layers=core,
        num_coda_layers=coda,
        injection="linear",
        state_init="normal",
    )
    with torch.device("meta"):
        return costs_of(RecurrentForCausalLM(config))


@each_preset
def test_parameters_are_the_papers_to_the_digit(preset: str) -> None:
    costs = paper_costs(preset)
    outer, core, adapter, vocabulary, total = PARAMETERS[preset]
    shape = (costs.num_prelude_layers, costs.num_core_layers, costs.num_coda_layers)
    assert shape == SHAPES[preset]
    assert costs.prelude_parameters == costs.coda_parameters == outer
    assert costs.core_parameters == core
    assert costs.injection_parameters == costs.injection_matmul == adapter
    assert costs.norm_parameters == 2048
    assert costs.embedding_parameters + costs.head_parameters == vocabulary
    assert costs.total_parameters == total


@each_preset
def test_flops_and_cache_are_the_papers_to_the_digit(preset: str) -> None:
    costs = paper_costs(preset)
    means = (4, 8, 16, 32)
    assert tuple(costs.paper_train_flops(mean) for mean in means) == TRAIN_FLOPS[preset]
    assert costs.kv_bytes(32) == KV_BYTES[preset][0]
    outer, core, *_ = PARAMETERS[preset]
    for r in (1, 4, 32):
        assert costs.effective_parameters(r) == 2 * outer + r * core
        assert costs.paper_forward_flops(r) == 2 * (2 * outer + r * core)


@each_preset
def test_the_parents_parameters_and_cache_are_the_papers(preset: str) -> None:
    parent = PARENTS[preset]
    costs = costs_of_parent(skeleton(parent))
    assert costs.prelude_parameters + costs.norm_parameters == NON_EMBEDDING[preset]
    assert costs.kv_bytes(1) == KV_BYTES[preset][1]
    assert (costs.head_parameters == 0) == parent.tie_word_embeddings


# ---- real passes

LENGTH, BATCH = 9, 2
IDS = torch.randint(3, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
counted_families = pytest.mark.parametrize("family", ["llama", "llama3", "qwen3", "olmo2", "phi3"])


@counted_families
@pytest.mark.parametrize("injection", ["mix", "linear", "add"])
def test_parameters_are_those_the_model_holds(family: str, injection: str) -> None:
    model = recurrent(family, injection=injection)
    assert costs_of(model).total_parameters == sum(p.numel() for p in model.parameters())
    parent = parent_of(family)
    assert costs_of_parent(parent).total_parameters == parent.num_parameters()


@pytest.mark.parametrize(
    ("family", "injection"),
    [("llama", "mix"), ("llama", "linear"), ("qwen3", "mix"), ("olmo2", "mix"), ("phi3", "add")],
)
@pytest.mark.parametrize(
    ("depth", "window"), [(1, None), (3, None), (4, 2), (5, 1), (2, 8)], ids=str
)
@pytest.mark.parametrize("frozen", [False, True])
def test_executed_flops_are_those_torch_counts(
    family: str, injection: str, depth: int, window: int | None, frozen: bool
) -> None:
    model = recurrent(family, injection=injection, sizes=(1, 3, 2))
    costs = costs_of(model)
    if frozen:  # as under adapters, where the first layer's output has gradient all the same
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.dim() < 2)
        model.model.embed_tokens.register_forward_hook(lambda *call: call[-1].requires_grad_())
    # This kernel recomputes nothing, so its backward pass is exactly twice its forward pass.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = model(IDS, labels=IDS, num_recurrences=depth, backprop_depth=window)
        forward = counter.get_total_flops()
        output.loss.backward()
    tokens = BATCH * LENGTH
    assert forward == tokens * costs.forward_flops(depth, LENGTH)
    expected = tokens * costs.train_flops(depth, window or depth, LENGTH, frozen)
    assert counter.get_total_flops() == expected


@counted_families
def test_flops_of_a_parent_are_those_torch_counts(family: str) -> None:
    parent = parent_of(family)
    costs = costs_of_parent(parent)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        parent(IDS, labels=IDS).loss.backward()
    parent.zero_grad()
    assert counter.get_total_flops() == BATCH * LENGTH * costs.train_flops(1, 1, LENGTH)


@counted_families
def test_a_branch_costs_what_finishing_costs(family: str) -> None:
    model = recurrent(family)
    costs = costs_of(model)

    def count(outputs: tuple[int, ...]) -> int:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:
            found: Any = model.model(IDS, num_recurrences=4, output_recurrences=outputs)
            for hidden in (found.last_hidden_state, *found.branches):
                model.logits(hidden)
        return flops.get_total_flops()

    extra = (count((1, 2, 3)) - count((2,))) // 2
    assert extra == BATCH * LENGTH * costs.finish_flops(LENGTH)


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2", "gemma3_text", "mistral"])
def test_cached_values_are_those_the_cache_holds(family: str) -> None:
    model = recurrent(family, sizes=(1, 3, 2))
    short = IDS[:, :5]  # within every window
    with torch.no_grad():
        cache = model(short, num_recurrences=4, use_cache=True).past_key_values
    held = sum(store.nbytes for store in cache.stores) // 4
    costs = costs_of(model)
    assert held == short.numel() * costs.kv_values(4)
    assert costs.kv_bytes(4, bytes_per_value=4) == 4 * costs.kv_values(4)


@pytest.mark.parametrize(("family", "per_expert"), [("mixtral", 48), ("qwen3_moe", 24)])
def test_experts_count_by_the_share_that_a_token_meets(family: str, per_expert: int) -> None:
    model = recurrent(family)
    costs = costs_of(model)
    heads = model.config.base_config.num_attention_heads
    width = getattr(model.config.base_config, "head_dim", None) or 32 // heads
    attention = 2 * 32 * (4 + 2) * width
    router = 4 * 32
    assert costs.core_matmul == 2 * (attention + router + 2 * 3 * 32 * per_expert)
    assert costs.total_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize(("prompt", "new"), [(7, 1), (7, 6)])
def test_generating_executes_what_is_counted(depth: int, prompt: int, new: int) -> None:
    """A prompt at once, whose last place alone meets the head, then a token at a time."""
    model = recurrent("llama")
    model.set_attn_implementation("eager")
    ids = torch.arange(prompt)[None] % VOCAB
    with FlopCounterMode(display=False) as counter:
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            num_recurrences=depth,
            min_new_tokens=new,
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
    per_token = costs_of(model).generation_flops(depth, prompt, new)
    # The rotary embedding is a product of matrices in some versions, and is not counted.
    assert counter.get_total_flops() == pytest.approx(per_token * (prompt + new - 1), rel=2e-3)
