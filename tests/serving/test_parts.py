"""The parts of the engine, each by itself: pages, tables, prefixes, and who goes next."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rondo.errors import UserError
from rondo.modeling.exits_recurrent import ExitRule
from rondo_serve.config import ServeConfig, bytes_of
from rondo_serve.engine import schedule
from rondo_serve.engine.arena import Arena, Pages, Shape
from rondo_serve.engine.opening import context_of, kv_bytes_of, limits_of
from rondo_serve.engine.prefixes import STRIDE, Prefixes
from rondo_serve.engine.rows import Flight
from rondo_serve.policy import Limits, efforts_of
from rondo_serve.requests import Ask, Load, Refused

SHAPE = Shape(num_prelude=2, num_core=3, num_coda=1, heads=2, head_dim=4, dtype=torch.float32)


# ---- pages and tables


@given(
    once=st.integers(0, 30),
    core=st.integers(1, 30),
    tokens=st.integers(1, 300),
    depth=st.integers(1, 9),
)
def test_rows_fill_as_many_pages_as_were_told_and_share_no_entry(
    once: int, core: int, tokens: int, depth: int
) -> None:
    shape = Shape(once // 2, core, once - once // 2, heads=1, head_dim=1, dtype=torch.float32)
    each = shape.pages_for(tokens, depth)
    arena = Arena(shape, 2 * each, torch.device("cpu"))
    units: list[int] = []
    for _ in range(2):
        tables = arena.take_tables(1 + depth, tokens)
        assert len(arena.fill(tables, 0, tokens)) == each
        for number, table in enumerate(tables):
            entries = arena.tables[table, :tokens]
            size = shape.entry_units(number > 0)
            units += (entries[:, None] + torch.arange(size)).flatten().tolist()
    assert arena.pages.free == 0
    assert len(set(units)) == len(units)
    # Page 0 is nobody's, and no entry reaches beyond the memory.
    assert not units or min(units) >= shape.page_units
    assert not units or max(units) < len(arena.keys)


def test_a_page_is_free_once_its_last_holder_has_released_it() -> None:
    pages = Pages(3)
    taken = pages.take(2)
    pages.hold(taken[:1], prefix=True)
    assert (pages.free, pages.spare) == (1, 0)
    pages.release(taken)
    assert (pages.free, pages.spare) == (2, 1)
    pages.hold(taken[:1])
    assert pages.spare == 0
    pages.release(taken[:1])
    pages.release(taken[:1], prefix=True)
    assert (pages.free, pages.spare) == (3, 0)
    with pytest.raises(AssertionError, match="released by nobody"):
        pages.release(taken[:1])


def test_tables_grow_and_keep_what_they_hold() -> None:
    arena = Arena(SHAPE, 40, torch.device("cpu"))
    first = arena.take_tables(3, 10)
    arena.fill(first, 0, 10)
    kept = arena.tables[first].clone()
    second = arena.take_tables(5, 33)
    assert not set(first) & set(second)
    assert torch.equal(arena.tables[first][:, :10], kept[:, :10])


def test_a_token_that_left_lends_its_last_entry_to_deeper_readers_only() -> None:
    arena = Arena(SHAPE, 40, torch.device("cpu"))
    tables = arena.take_tables(5, 6)
    arena.fill(tables, 0, 6)
    before = arena.tables[tables].clone()
    arena.lend(tables, torch.tensor([1, 4]), 2)
    after = arena.tables[tables]
    assert torch.equal(after[:3], before[:3])
    for deeper in (3, 4):
        assert after[deeper, [1, 4]].tolist() == before[2, [1, 4]].tolist()
        assert torch.equal(after[deeper, [0, 2, 3, 5]], before[deeper, [0, 2, 3, 5]])


# ---- prefixes


@settings(max_examples=60)
@given(
    texts=st.lists(
        st.tuples(st.sampled_from("ab"), st.lists(st.integers(0, 1), max_size=60)), max_size=8
    ),
    asked=st.tuples(st.sampled_from("ab"), st.lists(st.integers(0, 1), min_size=1, max_size=60)),
)
def test_what_is_found_is_a_common_prefix_of_the_same_key(texts: Any, asked: Any) -> None:
    prefixes = Prefixes(Pages(9))
    for key, tokens in texts:
        prefixes.keep(key, tokens, torch.zeros(1, len(tokens)), [])
    key, tokens = asked
    found = prefixes.find(key, tokens)
    if found is None:
        starts = [text[:STRIDE] for other, text in texts if other == key and len(text) >= STRIDE]
        assert len(tokens) <= STRIDE or tokens[:STRIDE] not in starts
    else:
        prefix, count = found
        assert prefix.key == key
        assert list(prefix.tokens[:count]) == tokens[:count]
        assert STRIDE <= count < len(tokens)


def test_the_prefix_that_was_used_last_stays_longest() -> None:
    pages = Pages(9)
    prefixes = Prefixes(pages)
    kept: dict[str, list[int]] = {}
    for key in "abc":
        kept[key] = pages.take(1)
        prefixes.keep(key, range(20), torch.zeros(1, 20), kept[key])
        pages.release(kept[key])
    assert prefixes.find("a", range(30)) is not None
    for gone in "bca":
        assert prefixes.evict()
        assert prefixes.find(gone, range(30)) is None
    assert pages.free == 9
    assert not prefixes.evict()


def test_a_prefix_takes_the_place_of_those_that_it_goes_on_from() -> None:
    pages = Pages(9)
    prefixes = Prefixes(pages)
    for length in (20, 20, 33, 40):
        taken = pages.take(2)
        prefixes.keep("a", range(length), torch.zeros(1, length), taken)
        pages.release(taken)
        assert pages.free == 7
    found = prefixes.find("a", range(50))
    assert found is not None
    assert found[1] == 40


def test_a_prefix_is_found_again_after_one_that_began_alike_is_gone() -> None:
    prefixes = Prefixes(Pages(9))
    longer, other = [*range(48)], [*range(20), *range(90, 100)]
    prefixes.keep("a", longer, torch.zeros(1, 48), [])
    prefixes.keep("a", other, torch.zeros(1, 30), [])
    prefixes.find("a", longer)  # so that the other goes first
    prefixes.evict()
    found = prefixes.find("a", [*range(40), 7])
    assert found is not None
    assert found[1] == 40


# ---- who goes next


def a_row(depth: int = 4, prompt: int = 1, read: int | None = None, **fields: Any) -> Any:
    """What the schedule looks at of a row."""
    ask = SimpleNamespace(prompt=tuple(range(prompt)))
    read = prompt if read is None else read
    plain = {"rule": None, "flight": None, "shares": True, "asked_at": 0.0}
    return SimpleNamespace(depth=depth, ask=ask, read=read, **(plain | fields))


def a_flight(count: int, depth: int = 4, iteration: int = 0, waited: int = 0) -> Flight:
    row: Any = a_row(depth, prompt=count, read=0)
    return Flight(row, 0, count, iteration=iteration, waited=waited)


@pytest.mark.parametrize(
    ("depths", "starting"),
    [
        ((2, 4, 8), (0, 2, 4, 6)),
        ((16, 8), (0, 4)),
        ((3, 6), (0, 3, 6)),
        ((3, 4), tuple(range(8))),
        ((1, 8), tuple(range(8))),
    ],
)
def test_rows_start_together_where_that_delays_nobody_for_long(
    depths: tuple[int, ...], starting: tuple[int, ...]
) -> None:
    rows = [a_row(depth) for depth in depths]
    found = [phase for phase in range(8) if schedule.ready(rows, phase, False)]
    assert tuple(found) == starting


def test_rows_that_leave_when_they_like_start_at_once() -> None:
    rule = ExitRule("kl", 0.1)
    assert all(schedule.ready([a_row(4), a_row(4, rule=rule)], phase, False) for phase in range(8))


def test_in_lockstep_nobody_starts_before_all_can() -> None:
    idle, busy = a_row(2), a_row(8, flight=a_flight(1))
    assert schedule.ready([idle, busy], 0, True) == []
    assert schedule.ready([idle, a_row(8)], 3, True) != []


def test_prompts_are_read_in_chunks_within_their_room() -> None:
    rows = [a_row(prompt=100, read=90), a_row(prompt=100, read=0), a_row(prompt=100, read=0)]
    found = schedule.chunks(rows, [a_flight(5)], room=40, chunk=20)
    assert [count for _, count in found] == [10, 20, 5]


def test_a_prompt_that_is_read_at_once_waits_for_the_others_and_is_not_overtaken() -> None:
    whole, short = a_row(prompt=100, read=0, shares=False), a_row(prompt=3, read=0)
    assert schedule.chunks([whole, short], [a_flight(5)], room=40, chunk=20) == []
    assert schedule.chunks([whole, short], [], room=40, chunk=20) == [(whole, 100)]


@pytest.mark.parametrize(("favour", "first"), [("shallow", 1), ("deep", 9), ("even", 5)])
def test_whoever_is_favoured_goes_first_where_not_all_can(favour: Any, first: int) -> None:
    flights = [a_flight(1, 9), a_flight(1, 5, waited=1), a_flight(1, 1)]
    (chosen,) = schedule.choose(flights, 1, favour)
    assert chosen.row.depth == first


@pytest.mark.parametrize("favour", ["shallow", "deep", "even"])
def test_nobody_starves(favour: Any) -> None:
    flights = [a_flight(1, depth) for depth in (1, 3, 9, 20)]
    last = dict.fromkeys(map(id, flights), 0)
    for tick in range(1, 200):
        chosen = schedule.choose(flights, 2, favour)
        for one in flights:
            one.waited = 0 if one in chosen else one.waited + 1
            last[id(one)] = tick if one in chosen else last[id(one)]
    assert min(last.values()) > 160


def test_the_queue_is_first_in_first_out_unless_depth_is_favoured() -> None:
    rows = [a_row(8, asked_at=1.0), a_row(2, asked_at=2.0), a_row(16, asked_at=3.0)]

    def first(favour: Any, now: float = 4.0) -> int:
        found = schedule.next_admitted(rows, favour, now, lambda row: False)
        assert found is not None
        return found.depth

    assert [first(favour) for favour in ("even", "shallow", "deep")] == [8, 2, 16]
    held = schedule.next_admitted(rows, "even", 4.0, lambda row: row.depth == 8)
    assert held is not None
    assert held.depth == 2


# ---- what may be spent, and settings


def test_efforts_double_and_halve_the_default_within_the_bounds() -> None:
    assert efforts_of(4, 1, 32) == {
        "none": 1, "minimal": 1, "low": 2, "medium": 4, "high": 8, "xhigh": 16, "max": 32,
    }  # fmt: skip
    assert set(efforts_of(4, 3, 6).values()) == {3, 4, 6}


def test_a_depth_outside_the_bounds_is_refused_and_none_is_the_default() -> None:
    limits = Limits(default=4, cap=8, floor=2)

    def asking(**fields: Any) -> Ask:
        return Ask("x", (1,), 1, **fields)

    assert limits.allow([asking()], Load())[0].depth == 4
    assert limits.allow([asking(effort="high")], Load())[0].depth == 8
    assert limits.allow([asking(num_recurrences=2)], Load())[0].depth == 2
    for depth in (1, 9):
        with pytest.raises(Refused, match="between 2 and 8"):
            limits.allow([asking(num_recurrences=depth)], Load())


@pytest.mark.parametrize(
    ("text", "size"), [("4GB", 4e9), ("1.5 MB", 1.5e6), ("64kB", 64e3), ("123", 123)]
)
def test_sizes_are_read(text: str, size: float) -> None:
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "nan", "inf GB", "4 GiB", "0"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a size such as"):
        bytes_of(text)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"efforts": {"lots": 3}}, "no effort 'lots'"),
        ({"min_recurrences": 4, "max_recurrences": 2}, "must not fall"),
        ({"kv_memory": "much"}, "a size such as"),
        ({"default_new_tokens": 9, "max_new_tokens": 8}, "beyond --max-new-tokens"),
        ({"port": 70000}, "port"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        ServeConfig(model="x", **fields)


def a_shape(**base: Any) -> Any:
    return SimpleNamespace(
        num_recurrences=4,
        max_recurrences=16,
        max_position_embeddings=100,
        base_config=SimpleNamespace(**base),
    )


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"max_recurrences": 17}, "beyond the model's cap of 16"),
        ({"efforts": {"max": 17}}, "outside 1 to 16"),
        ({"min_recurrences": 5, "num_recurrences": 17}, "outside 5 to 16"),
    ],
)
def test_depths_that_the_model_does_not_have_are_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        limits_of(ServeConfig(model="x", **fields), a_shape())


def test_a_model_that_scales_its_positions_is_served_up_to_where_it_begins() -> None:
    config = ServeConfig(model="x")
    longrope = {"rope_type": "longrope", "original_max_position_embeddings": 40}
    assert context_of(config, a_shape()) == 100
    assert context_of(config, a_shape(rope_parameters=longrope)) == 40
    by_kind = {"full_attention": longrope, "sliding_attention": {"rope_type": "default"}}
    assert context_of(config, a_shape(rope_parameters=by_kind)) == 40
    with pytest.raises(UserError, match="beyond the 40 tokens"):
        context_of(ServeConfig(model="x", max_context=41), a_shape(rope_parameters=longrope))


def test_memory_that_is_not_free_is_refused() -> None:
    cpu = torch.device("cpu")
    assert kv_bytes_of("1GB", 2 * 10**9, cpu) == 10**9
    assert kv_bytes_of(None, 4 * 10**9, cpu) == 10**9
    with pytest.raises(UserError, match="more than there is"):
        kv_bytes_of("3GB", 2 * 10**9, cpu)
    with pytest.raises(UserError, match="give --kv-memory"):
        kv_bytes_of(None, None, cpu)
