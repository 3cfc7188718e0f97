"""Whatever the company, an answer is the one that `generate` gives to the request by itself."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from engines import (
    Arrivals,
    Heard,
    alone,
    asks_of,
    assert_as_alone,
    make_engine,
    prompt,
    serve,
    small,
    traffic,
)

from conftest import EOS, RULES, recurrent
from rondo.modeling.configuration_recurrent import RecurrentConfig
from rondo.modeling.exits_recurrent import CRITERIA, ExitRule
from rondo.modeling.modeling_recurrent import RecurrentForCausalLM
from rondo_serve.requests import Ask, Refused, Sampling

ROOMY = {"prompt_chunk": 64, "tick_tokens": 512}
TIGHT = {"prompt_chunk": 3, "tick_tokens": 7}


@pytest.fixture(autouse=True)
def _without_gradient() -> Iterator[None]:
    with torch.no_grad():
        yield


def assert_equal(
    model: RecurrentForCausalLM, arrivals: Arrivals, **settings: Any
) -> dict[str, Heard]:
    heard = serve(make_engine(model, **settings), arrivals)
    assert_as_alone(model, asks_of(arrivals), heard)
    return heard


# ---- families, and ways to loop


@pytest.mark.parametrize(
    "family",
    [
        "llama3",
        "qwen2",
        "qwen3",
        "olmo2",
        "olmo3",
        "mistral",
        "gemma3_text",
        "phi3",
        "granite",
        "smollm3",
        "cohere2",
    ],
)
def test_every_family_answers_in_company_as_alone(family: str) -> None:
    assert_equal(small(family), traffic(1, 6, new=5), prompt_chunk=5, tick_tokens=24)


def test_scores_that_are_capped_within_attention_are_so_in_company() -> None:
    """Only the family's own kernel does that, and it is chosen by hand."""
    models = []
    for cap in (3.0, 50.0):
        overrides = {"attn_logit_softcapping": cap}
        model = recurrent("gemma2", range(4), sizes=(1, 2, 1), overrides=overrides).double()
        model.set_attn_implementation("eager")
        models.append(model)
    arrivals = traffic(2, 6, new=5)
    assert_equal(models[0], arrivals, prompt_chunk=5, tick_tokens=24)
    asks = asks_of(arrivals)
    assert any(alone(models[0], ask).tokens != alone(models[1], ask).tokens for ask in asks)


@pytest.mark.parametrize("favour", ["shallow", "even", "deep"])
@pytest.mark.parametrize("room", [TIGHT, ROOMY], ids=["tight", "roomy"])
def test_who_goes_first_and_how_many_at_once_change_no_answer(
    favour: str, room: dict[str, int]
) -> None:
    arrivals = traffic(3, 12, new=5)
    assert_equal(small(), arrivals, favour=favour, **room)
    assert_equal(small(), arrivals, favour=favour, max_running=2, **room)


@pytest.mark.parametrize("injection", ["linear", "add"])
def test_every_injection_answers_in_company_as_alone(injection: str) -> None:
    assert_equal(small(injection=injection), traffic(4, 6), **TIGHT)


@pytest.mark.parametrize("state_init", ["zeros", "normal"])
def test_every_start_answers_in_company_as_alone(state_init: str) -> None:
    """Noise depends on the request's seed, and each has one of its own."""
    model = small(state_init=state_init, state_std=1.0)
    arrivals = traffic(5, 6)
    assert_equal(model, arrivals, prefix_cache=True, **TIGHT)
    if state_init == "normal":
        ask = asks_of(arrivals)[0]
        others = [replace(ask, sampling=Sampling(seed=seed)) for seed in range(20)]
        assert len({tuple(alone(model, one).tokens) for one in others}) > 1


def with_deltas(sets: int) -> RecurrentForCausalLM:
    """A small model whose iterations have weights of their own."""
    plain = small()
    fields = plain.config.to_dict() | {"delta_rank": 3, "num_delta_iterations": sets}
    model = RecurrentForCausalLM(RecurrentConfig(**fields))
    model.load_state_dict(plain.state_dict(), strict=False)
    stream = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".delta_" in name:
            parameter.data.normal_(std=0.3, generator=stream)
    return model.double().eval()


@pytest.mark.parametrize("sets", [2, 3])
def test_iterations_with_weights_of_their_own_keep_them_in_company(sets: int) -> None:
    assert_equal(with_deltas(sets), traffic(6, 6), prompt_chunk=5, tick_tokens=24)


def test_a_core_of_one_layer_and_one_of_many_answer_alike_in_company_and_alone() -> None:
    for sizes in ((1, 1, 3), (1, 4, 1), (3, 2, 1)):
        model = recurrent("llama", range(sum(sizes)), sizes=sizes).double()
        assert_equal(model, traffic(7, 6), prompt_chunk=20, tick_tokens=40)


def test_angles_that_depend_on_the_length_of_a_text_are_served_up_to_where_they_change() -> None:
    """Beyond, a long neighbour would turn the keys of a short one."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0}
    rope |= {"original_max_position_embeddings": 16, **factors}
    overrides = {"rope_parameters": rope}
    model = recurrent("llama", range(4), sizes=(1, 2, 1), overrides=overrides).double()
    with pytest.raises(Refused, match="beyond the model's 16"):
        make_engine(model)
    engine = make_engine(model, max_context=16)
    asks = [Ask(f"{n}", prompt(Random(n), n), 4, 2) for n in (6, 12, 9)]
    heard = serve(engine, [(0, ask) for ask in asks])
    for ask in asks:
        assert heard[ask.id].tokens == alone(copy.deepcopy(model), ask).tokens


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_long_random_traffic_is_answered_as_alone(seed: int) -> None:
    random = Random(seed)
    model = small(random.choice(["llama", "qwen3", "mistral", "gemma3_text"]), gate=True)
    exits = [None, None, *RULES.values()] if model.config.base_config.model_type == "llama" else []
    arrivals = traffic(seed, 30, exits=exits or (None,), sampled=random.random() < 0.5, new=20)
    room = {
        "prompt_chunk": random.choice((1, 4, 33)),
        "tick_tokens": random.choice((1, 9, 100)),
        "max_running": random.choice((1, 3, 12)),
        "favour": random.choice(("shallow", "even", "deep")),
        "prefix_cache": random.random() < 0.5,
    }
    assert_equal(model, arrivals, **room)


# ---- sampling


@pytest.mark.parametrize("room", [TIGHT, ROOMY], ids=["tight", "roomy"])
def test_draws_are_those_of_generate_at_the_same_seed(room: dict[str, int]) -> None:
    arrivals = traffic(8, 12, sampled=True, new=9)
    heard = assert_equal(small(), arrivals, **room)
    asks = asks_of(arrivals)
    greedy = [alone(small(), replace(ask, sampling=Sampling())) for ask in asks]
    assert sum(heard[a.id].tokens != one.tokens for a, one in zip(asks, greedy, strict=True)) > 6


def test_draws_are_of_a_stream_that_is_the_requests_own() -> None:
    ask = Ask("one", (5, 6, 7), 9, 3, sampling=Sampling(temperature=1.3, seed=11))
    engine, heard, going = make_engine(small()), Heard(), True
    engine.submit(ask, heard)
    while going:
        torch.rand(3)
        before = torch.get_rng_state()
        going = engine.tick()
        assert torch.equal(torch.get_rng_state(), before)
    assert heard.tokens == alone(small(), ask).tokens


@pytest.mark.parametrize("logprobs", [None, 0, 1, 20])
def test_probabilities_are_those_before_temperature_and_nucleus(logprobs: int | None) -> None:
    sampling = Sampling(0.5, top_p=0.4, top_k=3, seed=3, logprobs=logprobs)
    ask = Ask("one", (5, 6, 7), 6, 3, sampling=sampling)
    assert_equal(small(), [(0, ask)])


# ---- exits


def rules_of(name: str) -> list[ExitRule]:
    """A rule as it is, with a floor, and checked at an interval."""
    rule = RULES[name]
    wider = replace(rule, threshold=1.3 * rule.threshold)
    return [rule, replace(wider, min_recurrences=3), replace(wider, check_every=2)]


@pytest.mark.parametrize("room", [TIGHT, ROOMY], ids=["tight", "roomy"])
@pytest.mark.parametrize("name", CRITERIA)
def test_every_exit_lets_tokens_go_where_generate_does(name: str, room: dict[str, int]) -> None:
    """In the company of other depths, and of rows without exits."""
    model = small(gate=True)
    exits = [None, *rules_of(name), *rules_of(name)]
    arrivals = traffic(10, 9, depths=range(1, 7), exits=exits, longest=20)
    heard = assert_equal(model, arrivals, **room)
    assert len(depths_with(asks_of(arrivals), heard)) >= 3


def test_rows_of_all_exits_at_once_are_answered_as_alone() -> None:
    model = small(gate=True)
    exits = [rule for name in CRITERIA for rule in rules_of(name)]
    arrivals = traffic(11, 18, depths=range(1, 7), exits=exits, longest=12, new=5, apart=1)
    heard = assert_equal(model, arrivals, max_running=18, **ROOMY)
    assert len(depths_with(asks_of(arrivals), heard)) >= 4


def depths_with(asks: Sequence[Ask], heard: dict[str, Heard]) -> set[int]:
    """Iterations that tokens of rows with an exit took."""
    return {one.recurrences for ask in asks if ask.exit for one in heard[ask.id].told}


def test_exits_in_families_with_windows_and_types_of_layers() -> None:
    for family, rule in (
        ("gemma3_text", RULES["state_distance"]),
        ("mistral", RULES["state_distance"]),
        ("gemma3_text", ExitRule("kl", 0.03)),
    ):
        assert_equal(small(family), traffic(12, 6, exits=(rule,), depths=(6,)), **TIGHT)


def test_a_threshold_of_nothing_is_the_full_depth_and_a_high_one_the_floor() -> None:
    ask = Ask("never", (9, 8, 7, 6), 4, 5, exit=ExitRule("kl", 0.0))
    floor = Ask("at once", (9, 8, 7, 6), 4, 5, exit=ExitRule("entropy", 1e9, min_recurrences=2))
    heard = assert_equal(small(), [(0, ask), (0, floor)])
    assert [one.recurrences for one in heard["never"].told] == [5] * 4
    assert [one.recurrences for one in heard["at once"].told] == [2] * 4


# ---- where a text ends


def test_an_end_of_text_ends_it_and_is_told_without_text() -> None:
    model = copy.deepcopy(small())
    ask = Ask("one", prompt(Random(3), 9), 12, 3)
    free = alone(model, ask).tokens
    assert EOS not in free
    end = free[4]
    model.generation_config.eos_token_id = [EOS, end]
    alone.cache_clear()
    heard = assert_equal(model, [(0, ask), (1, replace(ask, id="two", num_recurrences=5))])
    assert heard["one"].tokens == free[: free.index(end) + 1]
    assert heard["one"].end.reason == "stop"


@pytest.mark.parametrize("room", [TIGHT, ROOMY], ids=["tight", "roomy"])
def test_stop_strings_end_a_text_before_they_are_told(room: dict[str, int]) -> None:
    model, random, arrivals, stopped = small(), Random(4), [], 0
    for tick, ask in traffic(13, 10, new=12):
        text = alone(model, ask).text
        start = random.randrange(max(1, len(text) - 2))
        part = text[start : start + random.randint(1, 3)].strip("\ufffd")
        stop = (part or "x", "never in it")
        arrivals.append((tick, replace(ask, stop=stop)))
    for ask in asks_of(arrivals):
        stopped += alone(model, ask).reason == "stop"
    assert stopped > 4
    assert_equal(model, arrivals, **room)


# ---- a cache of prefixes


def sharing(seed: int, count: int = 14, **fields: Any) -> list[tuple[int, Ask]]:
    """Requests whose prompts begin alike, up to different places."""
    random = Random(seed)
    begins = [prompt(random, 50) for _ in range(2)]
    arrivals = []
    for tick, ask in traffic(seed, count, depths=(2, 3), apart=12, **fields):
        begin = random.choice(begins)[: random.choice((50, 50, 33, 17, 16))]
        arrivals.append((tick, replace(ask, prompt=begin + ask.prompt[: random.randint(0, 9)])))
    return arrivals


@pytest.mark.parametrize("kv_bytes", [1 << 24, 1 << 19], ids=["much room", "little room"])
def test_what_is_taken_from_a_prefix_changes_no_answer(kv_bytes: int) -> None:
    """The oracle computes everything anew; what it took is compared, too."""
    arrivals = sharing(14)
    for room in (TIGHT | {"tick_tokens": 40}, ROOMY):
        heard = assert_equal(small(), arrivals, prefix_cache=True, kv_bytes=kv_bytes, **room)
        cached = [one.end.receipt.cached_tokens for one in heard.values()]
        assert any(cached)
        assert all(heard[a.id].end.receipt.cached_tokens < len(a.prompt) for a in asks_of(arrivals))
    without = serve(make_engine(small(), prefix_cache=False), arrivals)
    assert all(one.end.receipt.cached_tokens == 0 for one in without.values())


@pytest.mark.parametrize("name", ["state_distance", "gate", "kl"])
def test_prefixes_with_exits_change_no_answer(name: str) -> None:
    arrivals = sharing(15, exits=[None, RULES[name], replace(RULES[name], min_recurrences=2)])
    heard = assert_equal(small(gate=True), arrivals, prefix_cache=True)
    assert any(one.end.receipt.cached_tokens for one in heard.values())


def test_prefixes_of_seeded_starts_change_no_answer() -> None:
    arrivals = [(tick, replace(ask, sampling=Sampling(seed=tick % 2))) for tick, ask in sharing(16)]
    model = small(state_init="normal", state_std=1.0)
    heard = assert_equal(model, arrivals, prefix_cache=True)
    assert any(one.end.receipt.cached_tokens for one in heard.values())
