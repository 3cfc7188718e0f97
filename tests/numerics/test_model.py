"""The recurrent model against its parents' own code, and against itself by other routes."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    Cache,
    DynamicCache,
    PreTrainedModel,
    StaticCache,
)
from transformers.generation.streamers import BaseStreamer

from conftest import BOS, FAMILIES, VOCAB, parent_of, recurrent
from rondo.convert.families import cut_config
from rondo.modeling.cache_recurrent import RecurrentCache
from rondo.modeling.configuration_recurrent import RecurrentConfig
from rondo.modeling.injection_recurrent import positional_noise
from rondo.modeling.modeling_recurrent import RecurrentForCausalLM
from rondo.modeling.slots_recurrent import CacheAtIteration, core_slot

each_family = pytest.mark.parametrize("family", FAMILIES)
# A plain one, one whose cache slides and whose core has two kinds of layer, one with experts.
some_families = pytest.mark.parametrize("family", ["llama", "olmo3", "gemma3_text", "qwen3_moe"])
DEPTHS = (1, 3, 2)


@pytest.fixture(autouse=True)
def _without_gradient() -> Iterator[None]:
    with torch.no_grad():
        yield


def some_ids(batch: int = 2, length: int = 21, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(padding: Sequence[int] = (0, 4, 9), length: int = 21) -> dict[str, Tensor]:
    """A left-padded batch as generate() would present it."""
    mask = torch.ones(len(padding), length, dtype=torch.long)
    for row, count in enumerate(padding):
        mask[row, :count] = 0
    return {
        "input_ids": some_ids(len(padding), length) * mask,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
    }


def single(batch: dict[str, Tensor], row: int) -> Tensor:
    """One row of a padded batch without its padding, (1, T)."""
    return batch["input_ids"][row, batch["attention_mask"][row] == 1][None]


def in_pieces(
    model: PreTrainedModel, batch: dict[str, Tensor], cuts: Sequence[int], **options: Any
) -> Tensor:
    """Logits of a batch that is fed piece by piece through a cache."""
    pieces, cache = [], options.pop("past_key_values", None)
    length = batch["input_ids"].shape[1]
    for start, stop in pairwise((0, *cuts, length)):
        output = model(
            batch["input_ids"][:, start:stop],
            attention_mask=batch["attention_mask"][:, :stop],
            position_ids=batch["position_ids"][:, start:stop],
            past_key_values=cache,
            use_cache=True,
            **options,
        )
        cache = output.past_key_values
        pieces.append(output.logits)
    return torch.cat(pieces, dim=1)


def assert_close(found: Tensor, expected: Tensor) -> None:
    """The same up to the order of additions in fp32; logits here spread by about one."""
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-4)


def assert_real_close(found: Tensor, expected: Tensor, batch: dict[str, Tensor]) -> None:
    real = batch["attention_mask"] == 1
    assert_close(found[real], expected[real])


class Unrolled:
    """The parent's own code over prelude, r times the core, and coda, with injections by hooks.

    A reference that shares nothing with the model but the weights: not the loop, not the cache.
    """

    def __init__(self, model: RecurrentForCausalLM, family: str, depth: int) -> None:
        config, parent = model.config, parent_of(family)
        self.injection, self.start = model.model.injection, config.state_init
        kept = list(config.source_layers)
        prelude, size = config.num_prelude_layers, config.num_core_layers
        core = kept[prelude : prelude + size]
        order = kept[:prelude] + depth * core + kept[prelude + size :]
        unrolled = AutoConfig.for_model(**cut_config(parent.config, order))
        self.model = MODEL_FOR_CAUSAL_LM_MAPPING[type(unrolled)](unrolled).eval()
        weights = {n: t for n, t in parent.state_dict().items() if ".layers." not in n}
        for place, index in enumerate(order):
            for name, tensor in parent.base_model.layers[index].state_dict().items():
                weights[f"model.layers.{place}.{name}"] = tensor
        self.model.load_state_dict(weights)
        layers = self.model.base_model.layers
        layers[prelude].register_forward_pre_hook(self.begin)
        for iteration in range(1, depth):
            layers[prelude + iteration * size].register_forward_pre_hook(self.inject)

    def begin(self, layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.e = args[0]
        state = self.e if self.start == "input" else torch.zeros_like(self.e)
        return self.inject(layer, (state, *args[1:]))

    def inject(self, layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        s, e = args[0], self.e
        if self.injection.kind == "mix":
            mixed = (1 - self.injection.mixing) * e + self.injection.mixing * s
        elif self.injection.kind == "linear":
            on_state, on_inputs = self.injection.weight.chunk(2, dim=1)
            mixed = s @ on_state.T + e @ on_inputs.T
        else:
            mixed = s + e
        return (mixed, *args[1:])


def random_linear(model: RecurrentForCausalLM) -> RecurrentForCausalLM:
    generator = torch.Generator().manual_seed(5)
    model.model.injection.weight.normal_(0, 0.15, generator=generator)
    return model


# ---- r = 1 is the parent, and r > 1 is the parent unrolled


@each_family
@pytest.mark.parametrize(("injection", "start"), [("mix", "input"), ("add", "zeros")])
def test_one_iteration_is_the_parent_bit_for_bit(family: str, injection: str, start: str) -> None:
    model = recurrent(family, injection=injection, state_init=start)
    parent, batch = parent_of(family), padded()
    ids = batch["input_ids"]
    assert torch.equal(model(ids, num_recurrences=1).logits, parent(ids).logits)
    assert torch.equal(model(**batch, num_recurrences=1).logits, parent(**batch).logits)
    embeds = parent.get_input_embeddings()(ids)
    found = model(inputs_embeds=embeds, num_recurrences=1).logits
    assert torch.equal(found, parent(inputs_embeds=embeds).logits)


@each_family
def test_one_iteration_is_the_parent_without_the_dropped_layers(family: str) -> None:
    kept, ids = [0, 1, 3, 5], some_ids()
    found = recurrent(family, kept, sizes=(1, 2, 1))(ids, num_recurrences=1).logits
    parent = parent_of(family)
    skipped = [layer for i, layer in enumerate(parent.base_model.layers) if i not in kept]
    handles = [layer.register_forward_hook(lambda _, args, out: args[0]) for layer in skipped]
    expected = parent(ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    assert torch.equal(found, expected)


@each_family
def test_a_linear_injection_starts_at_the_parent(family: str) -> None:
    model, ids = recurrent(family, injection="linear"), some_ids()
    model.model.injection.initialize(0.25)
    assert_close(model(ids, num_recurrences=1).logits, parent_of(family)(ids).logits)
    closed, _ = model, model.model.injection.initialize(0.0)
    # With [0 | I] each iteration repeats the first, whatever the state.
    assert_close(closed(ids, num_recurrences=3).logits, parent_of(family)(ids).logits)


def test_one_iteration_is_the_parent_in_bfloat16() -> None:
    model = recurrent("llama").bfloat16()
    parent = type(parent_of("llama"))(parent_of("llama").config).bfloat16().eval()
    parent.load_state_dict(parent_of("llama").state_dict())
    ids = some_ids()
    assert torch.equal(model(ids, num_recurrences=1).logits, parent(ids).logits)


@each_family
def test_any_depth_is_the_unrolled_parent(family: str) -> None:
    model, batch = recurrent(family), padded()
    for depth in (2, 4):
        expected = Unrolled(model, family, depth).model(**batch).logits
        assert_real_close(model(**batch, num_recurrences=depth).logits, expected, batch)


@pytest.mark.parametrize("injection", ["mix", "linear", "add"])
@pytest.mark.parametrize("start", ["input", "zeros"])
def test_each_injection_and_start_is_the_unrolled_parent(injection: str, start: str) -> None:
    model = recurrent("llama", injection=injection, state_init=start)
    if injection == "linear":
        random_linear(model)
    ids = some_ids()
    for depth in (1, 2, 3):
        expected = Unrolled(model, "llama", depth).model(ids).logits
        assert_close(model(ids, num_recurrences=depth).logits, expected)


@some_families
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beam"])
def test_generation_is_that_of_the_unrolled_parent(family: str, options: dict[str, int]) -> None:
    model, batch = recurrent(family), padded()
    prompt = {name: batch[name] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 7, "do_sample": False, **options}
    expected = Unrolled(model, family, 3).model.generate(**prompt, **options)
    assert torch.equal(model.generate(**prompt, **options, num_recurrences=3), expected)


# ---- caches, padding, batches


@each_family
def test_cached_equals_uncached_with_padding_and_chunked_prefill(family: str) -> None:
    model, batch = recurrent(family), padded()
    for depth in (1, 2, 3, 4):
        whole = model(**batch, num_recurrences=depth).logits
        for cuts in (range(15, 21), (5, 6, 16, 18)):
            cached = in_pieces(model, batch, cuts, num_recurrences=depth)
            assert_real_close(cached, whole, batch)


@pytest.mark.parametrize("state_init", ["input", "normal"])
def test_positions_and_mask_follow_from_the_cache_where_none_are_given(state_init: str) -> None:
    model, ids = recurrent("llama", state_init=state_init, state_std=1.0), some_ids()
    pieces, cache = [], None
    for part in ids.split([9, 7, 1, 1, 3], dim=1):
        output = model(part, past_key_values=cache, use_cache=True, num_recurrences=3)
        cache = output.past_key_values
        pieces.append(output.logits)
    assert_close(torch.cat(pieces, dim=1), model(ids, num_recurrences=3).logits)


@each_family
def test_a_left_padded_batch_equals_single_rows(family: str) -> None:
    model, batch = recurrent(family), padded()
    for depth in (1, 3):
        whole = model(**batch, num_recurrences=depth).logits
        for row in range(3):
            alone = model(single(batch, row), num_recurrences=depth).logits
            assert_close(whole[row, -alone.shape[1] :], alone[0])


@each_family
def test_rows_of_different_depth_equal_separate_runs(family: str) -> None:
    model, batch = recurrent(family), padded()
    whole = model(**batch, num_recurrences=DEPTHS).logits
    for row, depth in enumerate(DEPTHS):
        alone = model(single(batch, row), num_recurrences=depth).logits
        assert_close(whole[row, -alone.shape[1] :], alone[0])
    for cuts in (range(15, 21), (5, 6, 16, 18)):
        cached = in_pieces(model, batch, cuts, num_recurrences=DEPTHS)
        assert_real_close(cached, whole, batch)


@some_families
def test_generating_rows_of_different_depth_equals_separate_runs(family: str) -> None:
    model, batch = recurrent(family), padded()
    options = {"max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False}
    together = model.generate(
        batch["input_ids"],
        attention_mask=batch["attention_mask"],
        num_recurrences=DEPTHS,
        **options,
    )
    for row, depth in enumerate(DEPTHS):
        alone = model.generate(single(batch, row), num_recurrences=depth, **options)
        assert torch.equal(together[row, -7:], alone[0, -7:])


class RowCounter:
    """Counts the rows that reach each layer, call by call."""

    def __init__(self, model: RecurrentForCausalLM) -> None:
        self.rows: list[list[int]] = [[] for _ in model.model.layers]
        for seen, layer in zip(self.rows, model.model.layers, strict=True):
            layer.register_forward_hook(lambda _, args, out, seen=seen: seen.append(len(args[0])))


def test_a_row_that_is_done_costs_nothing_more() -> None:
    model, batch = recurrent("llama"), padded()
    counter = RowCounter(model)
    cache = model(**batch, num_recurrences=DEPTHS, use_cache=True).past_key_values
    assert counter.rows == [[3], [3], [3, 2, 1], [3, 2, 1], [3], [3]]
    # Nor does it take memory: 21 tokens of three rows run 3 + 2 + 1 iterations.
    kept = [store.entries.used for store in cache.stores]
    assert kept == [21 * 3] * 2 + [21 * 6] * 2 + [21 * 3] * 2


def test_a_row_that_is_done_costs_nothing_more_in_generation() -> None:
    model, batch = recurrent("llama"), padded()
    counter = RowCounter(model)
    model.generate(
        batch["input_ids"],
        attention_mask=batch["attention_mask"],
        num_recurrences=list(DEPTHS),
        max_new_tokens=4,
        min_new_tokens=4,
    )
    assert counter.rows[0] == counter.rows[5] == 4 * [3]
    assert counter.rows[2] == counter.rows[3] == 4 * [3, 2, 1]


def test_one_depth_for_all_rows_runs_each_layer_depth_times() -> None:
    model = recurrent("llama")
    counter = RowCounter(model)
    model(some_ids(), num_recurrences=[4, 4])
    assert counter.rows == [[2], [2], 4 * [2], 4 * [2], [2], [2]]


@pytest.mark.parametrize("family", ["llama", "olmo3"])
def test_beam_search_by_row_with_a_cache_equals_without(family: str) -> None:
    model, batch = recurrent(family), padded()
    options = {
        "attention_mask": batch["attention_mask"],
        "num_recurrences": DEPTHS,
        "num_beams": 3,
        "num_return_sequences": 2,
        "max_new_tokens": 8,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    cached = model.generate(batch["input_ids"], **options)
    whole = model.generate(batch["input_ids"], use_cache=False, **options)
    assert torch.equal(cached.sequences, whole.sequences)
    assert_close(cached.sequences_scores, whole.sequences_scores)
    for row, depth in enumerate(DEPTHS):
        options |= {"num_recurrences": depth, "attention_mask": None}
        alone = model.generate(single(batch, row), **options)
        assert_close(cached.sequences_scores[2 * row : 2 * row + 2], alone.sequences_scores)


def test_sampling_depends_on_the_seed_alone() -> None:
    model, batch = recurrent("llama"), padded()

    def sample(seed: int, **options: Any) -> Tensor:
        torch.manual_seed(seed)
        return model.generate(
            batch["input_ids"],
            attention_mask=batch["attention_mask"],
            num_recurrences=DEPTHS,
            do_sample=True,
            num_return_sequences=2,
            max_new_tokens=6,
            **options,
        )

    first = sample(3)
    assert first.shape == (6, 27)
    assert torch.equal(first, sample(3))
    assert torch.equal(first, sample(3, use_cache=False))
    assert not torch.equal(first, sample(4))


@each_family
def test_a_static_cache_generates_what_a_dynamic_one_does(family: str) -> None:
    model, batch = recurrent(family), padded()
    prompt = {name: batch[name] for name in ("input_ids", "attention_mask")}
    options = {"num_recurrences": 3, "max_new_tokens": 6, "do_sample": False}
    dynamic = model.generate(**prompt, **options)
    assert torch.equal(model.generate(**prompt, **options, cache_implementation="static"), dynamic)


CACHES: dict[str, Callable[[RecurrentConfig], Cache]] = {
    "untyped": lambda config: DynamicCache(),
    "typed": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=64),
    "recurrent": lambda config: RecurrentCache(config),
}
cached_families = pytest.mark.parametrize("family", ["llama", "olmo3", "mistral"])
each_cache = pytest.mark.parametrize("kind", CACHES)


@cached_families
@each_cache
def test_any_cache_of_transformers_serves(family: str, kind: str) -> None:
    model, batch = recurrent(family), padded()
    cache = CACHES[kind](model.config)
    options = {"num_recurrences": 3, "past_key_values": cache}
    whole = model(**batch, num_recurrences=3).logits
    assert_real_close(in_pieces(model, batch, range(15, 21), **options), whole, batch)
    assert cache.get_seq_length() == 21


@cached_families
@each_cache
def test_a_cache_that_was_reset_serves_at_another_depth(family: str, kind: str) -> None:
    model, batch = recurrent(family), padded()
    cache = CACHES[kind](model.config)
    for depth in (1, 3, 2):
        options = {"num_recurrences": depth, "past_key_values": cache}
        whole = model(**batch, num_recurrences=depth).logits
        assert_real_close(in_pieces(model, batch, range(15, 21), **options), whole, batch)
        cache.reset()


def test_the_slots_of_a_cache_are_distinct_and_those_of_one_iteration_are_the_parents() -> None:
    config = recurrent("llama", sizes=(1, 3, 2)).config
    taken = [0, 4, 5]
    for iteration in range(1, 6):
        taken.extend(core_slot(config, iteration) + layer for layer in range(3))
    assert core_slot(config, 1) == 1
    assert sorted(taken) == list(range(3 + 5 * 3))


def test_the_layers_of_an_iteration_see_its_slots_as_their_own() -> None:
    model, ids = recurrent("llama"), some_ids()
    cache = DynamicCache()
    model(ids, past_key_values=cache, use_cache=True, num_recurrences=2)
    model(ids[:, :1], past_key_values=cache, use_cache=True, num_recurrences=1)
    for iteration, seen in ((1, 22), (2, 21)):
        view = CacheAtIteration(cache, core_slot(model.config, iteration) - 2)
        assert [view.get_seq_length(layer) for layer in (2, 3)] == [seen, seen]
        assert view.is_compileable == cache.is_compileable


def test_rows_of_different_depth_need_the_cache_that_knows_them() -> None:
    model = recurrent("llama")
    for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=32)):
        with pytest.raises(ValueError, match="RecurrentCache"):
            model(some_ids(), past_key_values=cache, use_cache=True, num_recurrences=[1, 2])
    with pytest.raises(ValueError, match="RecurrentCache"):
        model.generate(
            some_ids(), num_recurrences=[1, 2], max_new_tokens=2, cache_implementation="static"
        )


def test_a_cache_that_was_reset_serves_rows_of_other_depths() -> None:
    model, batch = recurrent("olmo3"), padded()
    cache = RecurrentCache(model.config)
    for depths in ([1, 3, 2], [3, 1, 2], [2, 2, 2], [1, 1, 4]):
        options = {"num_recurrences": depths, "past_key_values": cache}
        whole = model(**batch, num_recurrences=depths).logits
        assert_real_close(in_pieces(model, batch, range(15, 21), **options), whole, batch)
        cache.reset()


@cached_families
@each_cache
def test_going_deeper_than_the_prompt_is_refused(family: str, kind: str) -> None:
    model, ids = recurrent(family), some_ids()
    cache = CACHES[kind](model.config)
    model(ids[:, :12], past_key_values=cache, use_cache=True, num_recurrences=2)
    model(ids[:, 12:13], past_key_values=cache, use_cache=True, num_recurrences=2)
    with pytest.raises(ValueError, match=r"holds 13 tokens, but only 0 .* iteration 3"):
        model(ids[:, 13:14], past_key_values=cache, use_cache=True, num_recurrences=3)
    # Shallower goes; but then the deeper iterations lack a token.
    model(ids[:, 13:14], past_key_values=cache, use_cache=True, num_recurrences=1)
    with pytest.raises(ValueError, match=r"holds 14 tokens, but only 13 .* iteration 2"):
        model(ids[:, 14:15], past_key_values=cache, use_cache=True, num_recurrences=2)


def test_going_shallower_than_the_prompt_reads_the_shallower_iterations() -> None:
    model, ids = recurrent("llama"), some_ids()
    deep = model(ids[:, :20], use_cache=True, num_recurrences=3).past_key_values
    found = model(ids[:, 20:], past_key_values=deep, use_cache=True, num_recurrences=1)
    # The coda attends to what the deep run left there, so this is no plain shallow run.
    flat = model(ids, num_recurrences=1).logits[:, -1:]
    assert (found.logits - flat).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("before", "after"),
    [([1, 3], [3, 1]), ([2, 3], [3, 2]), ([1, 2], [2, 2])],
    ids=str,
)
def test_a_row_that_goes_deeper_midway_is_refused(before: list[int], after: list[int]) -> None:
    model, ids = recurrent("llama"), some_ids()
    cache = model(ids[:, :9], use_cache=True, num_recurrences=before).past_key_values
    with pytest.raises(ValueError, match="depth"):
        model(ids[:, 9:], past_key_values=cache, use_cache=True, num_recurrences=after)


def test_a_row_may_go_shallower_midway_as_it_may_alone() -> None:
    model, ids = recurrent("llama"), some_ids()
    cache = model(ids[:, :9], use_cache=True, num_recurrences=[2, 2]).past_key_values
    both = model(ids[:, 9:], past_key_values=cache, use_cache=True, num_recurrences=[1, 2]).logits
    for row, depth in ((0, 1), (1, 2)):
        one, how = ids[row, None], {"use_cache": True}
        cache = model(one[:, :9], num_recurrences=2, **how).past_key_values
        alone = model(one[:, 9:], past_key_values=cache, num_recurrences=depth, **how).logits
        assert_close(both[row, None], alone)


def test_rows_of_a_cache_can_be_selected_and_repeated() -> None:
    model, batch = recurrent("olmo3"), padded()
    start = {name: tensor[:, :15] for name, tensor in batch.items()}
    whole = model(**batch, num_recurrences=DEPTHS).logits
    for rows in ([2, 1], [0, 0, 1, 1, 2, 2], [0], [1, 2, 0]):
        cache = model(**start, num_recurrences=DEPTHS, use_cache=True).past_key_values
        if rows == [0, 0, 1, 1, 2, 2]:
            cache.batch_repeat_interleave(2)
        else:
            cache.batch_select_indices(torch.tensor(rows))
        found = model(
            batch["input_ids"][rows, 15:],
            attention_mask=batch["attention_mask"][rows],
            position_ids=batch["position_ids"][rows, 15:],
            past_key_values=cache,
            use_cache=True,
            num_recurrences=[DEPTHS[row] for row in rows],
        ).logits
        assert_close(found, whole[rows, 15:])


class Listener(BaseStreamer):
    """A streamer that keeps what it is told."""

    def __init__(self) -> None:
        self.heard: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.heard.extend(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def test_tokens_stream_as_they_are_generated() -> None:
    model, ids, listener = recurrent("llama"), some_ids(1), Listener()
    whole = model.generate(ids, num_recurrences=3, max_new_tokens=6, streamer=listener)
    assert listener.ended
    assert listener.heard == whole[0].tolist()


# ---- the depth argument


def test_depth_may_be_an_int_a_list_a_tuple_or_a_tensor() -> None:
    model, ids = recurrent("llama", num_recurrences=2), some_ids()
    expected = model(ids, num_recurrences=2).logits
    for depth in ([2, 2], (2, 2), torch.tensor([2, 2]), torch.tensor([[2], [2]]), None):
        assert torch.equal(model(ids, num_recurrences=depth).logits, expected)
    assert torch.equal(model(ids[:1], num_recurrences=torch.tensor(2)).logits, expected[:1])
    mixed = model(ids, num_recurrences=[1, 3]).logits
    for depth in ((1, 3), torch.tensor([1, 3]), torch.tensor([1, 3], dtype=torch.int32)):
        assert torch.equal(model(ids, num_recurrences=depth).logits, mixed)
    plain = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(ids, num_recurrences=[1, 3], **plain)
    for depth in ((1, 3), torch.tensor([1, 3])):
        assert torch.equal(model.generate(ids, num_recurrences=depth, **plain), expected)
    expected = model.generate(ids, **plain)
    for depth in (2, [2, 2], (2, 2), torch.tensor([2, 2])):
        assert torch.equal(model.generate(ids, num_recurrences=depth, **plain), expected)


@pytest.mark.parametrize(
    ("depth", "named"), [(0, 0), (-1, -1), (9, 9), ([1, 0], 0), ([8, 9], 9), ([9, 9], 9)]
)
def test_a_depth_out_of_range_is_refused_with_both_numbers(depth: Any, named: int) -> None:
    model = recurrent("llama", max_recurrences=8)
    for call in (model, lambda *args, **kwargs: model.generate(*args, **kwargs, max_new_tokens=2)):
        with pytest.raises(ValueError, match=rf"between 1 and 8 .*, got {named}$"):
            call(some_ids(), num_recurrences=depth)
    assert model(some_ids(), num_recurrences=8).logits.isfinite().all()


def test_options_that_exclude_each_other_are_refused() -> None:
    model, ids = recurrent("llama"), some_ids()
    with pytest.raises(ValueError, match="3 depths for 2 rows"):
        model(ids, num_recurrences=[1, 2, 3])
    for wrong in ({"use_cache": True}, {"num_recurrences": [1, 2]}):
        for option in ({"backprop_depth": 1}, {"output_recurrences": (1,)}):
            with pytest.raises(ValueError, match="no cache"):
                model(ids, **({"num_recurrences": 2} | wrong | option))
    for outside in ((0,), (1, 3)):
        with pytest.raises(ValueError, match=r"must lie in 1\.\.2"):
            model.model(ids, num_recurrences=2, output_recurrences=outside)
    with pytest.raises(ValueError, match="exactly one"):
        model(ids, inputs_embeds=torch.zeros(2, 21, 32))
    with pytest.raises(ValueError, match="exactly one"):
        model()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_core_layers": 3}, "= 7 layers, but base_config has 6"),
        ({"num_core_layers": 0, "num_coda_layers": 4}, "at least one layer"),
        ({"injection": "sum"}, "injection"),
        ({"state_init": "ones"}, "state_init"),
        ({"num_recurrences": 65}, "num_recurrences = 65 .* max_recurrences = 64"),
        ({"num_recurrences": 0}, "num_recurrences = 0"),
        ({"base_config": None}, "base_config"),
    ],
)
def test_a_config_that_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"num_prelude_layers": 2, "num_core_layers": 2, "num_coda_layers": 2}
    good["base_config"] = parent_of("llama").config.to_dict()
    assert RecurrentConfig(**good).num_hidden_layers == 6
    with pytest.raises(Exception, match=message):
        RecurrentConfig(**(good | fields))


# ---- the normal initial state


def test_noise_is_a_truncated_normal() -> None:
    std, positions = 0.5, torch.arange(400)[None]
    noise = positional_noise(positions, 512, std, seed=11)
    assert noise.shape == (1, 400, 512)
    assert noise.dtype == torch.float32
    number = noise.numel()
    # A normal cut at three standard deviations keeps 0.98658 of its standard deviation.
    assert abs(float(noise.mean())) < 4 * std / number**0.5
    assert float(noise.std()) == pytest.approx(0.98658 * std, rel=4 / (2 * number) ** 0.5)
    assert 2.99 * std < float(noise.abs().max()) <= 3 * std
    share = torch.special.ndtr(noise.flatten().double().sort().values / std)
    outside = float(torch.special.ndtr(torch.tensor(-3.0, dtype=torch.double)))
    expected = (share - outside) / (1 - 2 * outside)
    found = (torch.arange(number) + 0.5) / number
    assert float((found - expected).abs().max()) < 1.95 / number**0.5  # Kolmogorov, 0.1 %


def test_noise_at_other_seeds_positions_and_channels_is_unrelated() -> None:
    positions = torch.arange(200)[None]
    noise = positional_noise(positions, 512, 1.0, seed=0)[0]
    others = {
        "next seed": positional_noise(positions, 512, 1.0, seed=1)[0],
        "far seed": positional_noise(positions, 512, 1.0, seed=2**40)[0],
        "next position": noise.roll(1, 0),
        "next channel": noise.roll(1, 1),
        "next of all": positional_noise(positions + 1, 512, 1.0, seed=1)[0].roll(1, 1),
    }
    for name, other in others.items():
        correlation = torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1]
        assert abs(float(correlation)) < 4 / noise.numel() ** 0.5, name
        assert float((noise == other).float().mean()) < 1e-4, name


def test_noise_depends_on_seed_and_position_only() -> None:
    positions = torch.tensor([[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]])
    noise = positional_noise(positions, 16, 1.0, seed=4)
    alone = positional_noise(torch.arange(6)[None], 16, 1.0, seed=4)
    assert torch.equal(noise[1], alone[0])
    assert torch.equal(noise[0, 2:], alone[0, :4])
    assert torch.equal(positional_noise(torch.tensor([[5]]), 16, 1.0, 4)[0, 0], alone[0, 5])
    assert torch.equal(positional_noise(positions, 8, 1.0, 4), noise[..., :8])
    by_row = positional_noise(positions, 16, 1.0, torch.tensor([9, 4]))
    assert torch.equal(by_row[1], noise[1])
    assert torch.equal(by_row[0], positional_noise(positions, 16, 1.0, 9)[0])
    assert not torch.equal(by_row[0], noise[0])


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("depth", [1, 3, DEPTHS], ids=str)
def test_a_noisy_start_knows_neither_cache_nor_padding(family: str, depth: Any) -> None:
    model, batch = recurrent(family, state_init="normal", state_std=1.0), padded()
    options = {"num_recurrences": depth, "state_seed": torch.tensor([5, 6, 7])}
    whole = model(**batch, **options).logits
    for cuts in (range(15, 21), (5, 6, 16, 18)):
        assert_real_close(in_pieces(model, batch, cuts, **options), whole, batch)
    for row, seed in enumerate((5, 6, 7)):
        each = depth if isinstance(depth, int) else depth[row]
        alone = model(single(batch, row), num_recurrences=each, state_seed=seed).logits
        assert_close(whole[row, -alone.shape[1] :], alone[0])
    other = model(**batch, num_recurrences=depth, state_seed=8).logits
    assert (other - whole).abs().amax((1, 2)).min() > 1e-3


def test_a_noisy_start_generates_the_same_with_and_without_cache_and_padding() -> None:
    model, batch = recurrent("llama", state_init="normal", state_std=1.0), padded()
    seeds = torch.tensor([5, 6, 7])
    plain = {"max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False}
    options = plain | {"attention_mask": batch["attention_mask"], "state_seed": seeds}
    cached = model.generate(batch["input_ids"], num_recurrences=DEPTHS, **options)
    whole = model.generate(batch["input_ids"], num_recurrences=DEPTHS, use_cache=False, **options)
    assert torch.equal(cached, whole)
    for row, depth in enumerate(DEPTHS):
        alone = model.generate(
            single(batch, row), num_recurrences=depth, state_seed=int(seeds[row]), **plain
        )
        assert torch.equal(alone[0, -7:], cached[row, -7:])


# ---- saving, loading, attention kernels, the rest of the interface


@each_family
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_saved_and_loaded_gives_the_same_logits(family: str, tied: bool, tmp_path: Path) -> None:
    model, ids = recurrent(family, overrides={"tie_word_embeddings": tied}), some_ids()
    model.save_pretrained(tmp_path)
    again, facts = RecurrentForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not facts["missing_keys"]
    assert not facts["unexpected_keys"]
    assert not facts["mismatched_keys"]
    expected = model(ids, num_recurrences=3).logits
    assert torch.equal(again.eval()(ids, num_recurrences=3).logits, expected)
    for each in (model, again):
        shared = each.lm_head.weight.data_ptr() == each.model.embed_tokens.weight.data_ptr()
        assert shared == tied
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert ("lm_head.weight" in file.keys()) != tied  # noqa: SIM118 (no mapping)
    again.save_pretrained(tmp_path / "again")
    saved, once_more = (
        json.loads((directory / "config.json").read_text())
        for directory in (tmp_path, tmp_path / "again")
    )
    saved["base_config"]["dtype"] = "float32"  # which a model built in memory does not say
    assert once_more == saved


def test_no_parameter_is_counted_twice_or_left_behind() -> None:
    model, parent = recurrent("llama"), parent_of("llama")
    names = [name for name, _ in model.named_parameters()]
    assert len(names) == len(list(parent.parameters())) + 1
    assert sum(p.numel() for p in model.parameters()) == parent.num_parameters() + 32
    assert {id(p) for p in model.model.parent[0].parameters()} < {id(p) for p in model.parameters()}


ORDERS = {
    "rondo first": "import rondo, sys; assert 'torch' not in sys.modules; import transformers",
    "transformers first": "import transformers; transformers.AutoModelForCausalLM; import rondo",
    "the model first": "from rondo import RecurrentForCausalLM",
}
LOADS = """
import sys, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
path, expected = sys.argv[1], torch.load(sys.argv[1] + "/expected.pt")
assert type(AutoConfig.from_pretrained(path)).__name__ == "RecurrentConfig"
assert type(AutoModel.from_pretrained(path)).__name__ == "RecurrentModel"
model = AutoModelForCausalLM.from_pretrained(path).eval()
with torch.no_grad():
    assert torch.equal(model(expected["ids"], num_recurrences=3).logits, expected["logits"])
print(type(model).__module__)
"""


@pytest.mark.parametrize("order", ORDERS)
def test_auto_classes_load_it_once_rondo_is_imported(order: str, tmp_path: Path) -> None:
    model, ids = recurrent("qwen3"), some_ids()
    model.save_pretrained(tmp_path)
    logits = model(ids, num_recurrences=3).logits
    torch.save({"ids": ids, "logits": logits}, tmp_path / "expected.pt")
    command = [sys.executable, "-c", ORDERS[order] + LOADS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "rondo.modeling.modeling_recurrent"


@each_family
def test_attention_kernels_agree_and_are_those_asked_for(family: str, tmp_path: Path) -> None:
    model, batch = recurrent(family), padded()
    if family == "gemma2":  # sdpa cannot cap scores
        assert model.model.layers[0].self_attn.config._attn_implementation == "eager"
        return
    logits = {}
    for kernel in ("sdpa", "eager"):
        model.set_attn_implementation(kernel)
        assert model.model.layers[0].self_attn.config._attn_implementation == kernel
        logits[kernel] = model(**batch, num_recurrences=3).logits
    assert_real_close(logits["eager"], logits["sdpa"], batch)
    model.save_pretrained(tmp_path)
    loaded = RecurrentForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert loaded.model.layers[0].self_attn.config._attn_implementation == "eager"
    assert torch.equal(loaded(**batch, num_recurrences=3).logits, logits["eager"])


@each_family
def test_checkpointing_activations_leaves_the_gradients_alone(family: str) -> None:
    ids = some_ids()
    found: list[list[Tensor]] = []
    calls: list[int] = []
    for checkpointing in (False, True):
        model = recurrent(family).train()
        if checkpointing:
            older = "gradient_checkpointing_enable"  # deprecated where there is the newer
            newer = "activation_checkpointing_enable"
            getattr(model, newer if hasattr(model, newer) else older)()
        attention = model.model.core[0].self_attn
        attention.register_forward_hook(lambda *_, mark=checkpointing: calls.append(mark))
        with torch.enable_grad():
            loss = model(ids, labels=ids, num_recurrences=4, backprop_depth=2).loss
        loss.backward()
        found.append([parameter.grad for parameter in model.parameters()])
    assert calls.count(True) == calls.count(False) + 2  # it did take effect: two are run again
    for plain, checkpointed in zip(*found, strict=True):
        assert torch.equal(plain, checkpointed)


def test_loss_and_kept_logits_are_those_of_all_logits() -> None:
    model, ids = recurrent("gemma3_text"), some_ids()
    output = model(ids, labels=ids, num_recurrences=2)
    shifted = output.logits[:, :-1].reshape(-1, VOCAB)
    expected = nn.functional.cross_entropy(shifted, ids[:, 1:].reshape(-1))
    assert_close(output.loss, expected)
    for kept, places in ((1, [20]), (3, [18, 19, 20]), (torch.tensor([0, 7]), [0, 7])):
        found = model(ids, num_recurrences=2, logits_to_keep=kept).logits
        assert_close(found, output.logits[:, places])


def test_a_prompt_of_one_token_generates() -> None:
    model = recurrent("llama")
    ids = torch.full((1, 1), BOS)
    assert model.generate(ids, num_recurrences=2, max_new_tokens=3, min_new_tokens=3).shape == (
        1,
        4,
    )
