"""Splits: reading and writing them, what each rule keeps, and what is refused."""

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rondo.convert.split import (
    PRESETS,
    Split,
    drop_split,
    format_indices,
    keep_split,
    parse_sizes,
    parse_split,
    preset_split,
    stride_split,
)
from rondo.errors import UserError

DEPTHS = st.integers(3, 80)


@st.composite
def splits(draw: Any) -> tuple[Split, int]:
    """Any split whatever, with the depth of its parent."""
    depth = draw(DEPTHS)
    layers = sorted(draw(st.sets(st.integers(0, depth - 1), min_size=3)))
    first = draw(st.integers(1, len(layers) - 2))
    second = draw(st.integers(first + 1, len(layers) - 1))
    parts = layers[:first], layers[first:second], layers[second:]
    return Split(*map(tuple, parts)), depth


@st.composite
def sizes_within(draw: Any) -> tuple[int, tuple[int, int, int]]:
    """A depth, and sizes of three parts that fit into it."""
    prelude, core, coda = (draw(st.integers(1, 12)) for _ in range(3))
    return prelude + core + coda + draw(st.integers(0, 12)), (prelude, core, coda)


# ---- reading and writing


@given(splits())
def test_reading_undoes_writing(case: tuple[Split, int]) -> None:
    split, depth = case
    assert parse_split(str(split), depth) == split


@given(splits())
def test_parts_are_disjoint_and_rising_and_account_for_every_layer(case: tuple[Split, int]) -> None:
    split, depth = case
    assert sorted(split.layers) == list(split.layers)
    assert len(split.layers) == sum(split.sizes) == len(set(split.layers))
    assert sorted(split.layers + split.dropped(depth)) == list(range(depth))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0-2,2-4,4-6", ((0, 1), (2, 3), (4, 5))),
        ("0,1,5", ((0,), (1,), (5,))),
        ("0+2,3-6:2,6+8-10", ((0, 2), (3, 5), (6, 8, 9))),
        (" 0-2 , 2-4 ,4-6 ", ((0, 1), (2, 3), (4, 5))),
        ("0-3:2,3-9:3,9", ((0, 2), (3, 6), (9,))),
    ],
)
def test_ranges_are_half_open_and_steps_and_lists_are_read(text: str, expected: Any) -> None:
    assert parse_split(text, 10) == Split(*expected)


@pytest.mark.parametrize(
    ("indices", "text"),
    [
        ((0, 1, 2, 3), "0-4"),
        ((4, 6, 8), "4-9:2"),
        ((7,), "7"),
        ((2, 5), "2+5"),
        ((0, 1, 4, 6, 8, 9), "0-2+4-9:2+9"),
    ],
)
def test_indices_are_written_as_they_are_typed(indices: tuple[int, ...], text: str) -> None:
    assert format_indices(indices) == text


@given(st.text(alphabet="0123456789-+:, x", max_size=24), st.integers(0, 20))
@example("²-4,4,5", 8)
def test_any_text_is_a_split_or_the_users_mistake(text: str, depth: int) -> None:
    try:
        split = parse_split(text, depth)
    except UserError:
        return
    assert max(split.layers) < depth


@given(st.text(max_size=9) | st.from_regex(r"\d,\d,\d", fullmatch=True))
@example("²,1,1")
@example("1,2,3,")
def test_any_text_is_sizes_or_the_users_mistake(text: str) -> None:
    try:
        sizes = parse_sizes(text)
    except UserError:
        return
    assert len(sizes) == 3
    assert min(sizes) > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0-4,4-8", "names 2 parts"),
        ("0-2,2-4,4-6,6-8", "names 4 parts"),
        ("", "names 1 parts"),
        ("a,1,2", "cannot read 'a'"),
        ("0-2,,4-6", "cannot read ''"),
        ("0-2,2-4:0,4-6", "cannot read '2-4:0'"),
        ("-1,2,3", "cannot read '-1'"),
        ("0 - 2,2-4,4-6", "cannot read '0 - 2'"),
        ("0-2,2-2,4-6", "2-2 .* empty or leaves the model, whose 8 layers"),
        ("0-2,4-3,5-6", "4-3 .* empty"),
        ("0-2,2-4,4-9", "4-9 .* leaves the model, whose 8 layers"),
        ("0,1,8", "8 .* leaves the model"),
        ("0-3,2-4,4-6", "overlaps or runs backwards"),
        ("4-6,2-4,6-8", "overlaps or runs backwards"),
        ("0+0,2,3", "overlaps or runs backwards"),
    ],
)
def test_a_wrong_split_is_refused_with_the_reason(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_split(text, 8)


@pytest.mark.parametrize("empty", range(3))
def test_a_part_without_a_layer_is_refused(empty: int) -> None:
    parts: list[tuple[int, ...]] = [(0,), (1,), (2,)]
    parts[empty] = ()
    with pytest.raises(UserError, match=f"has no {('prelude', 'core', 'coda')[empty]}"):
        Split(*parts)


@pytest.mark.parametrize("text", ["4,8", "4,8,4,1", "0,8,4", "4,-8,4", "4,eight,4", "", "4;8;4"])
def test_wrong_sizes_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="three positive numbers"):
        parse_sizes(text)
    assert parse_sizes(" 4, 8 ,4") == (4, 8, 4)


# ---- the rules


@given(DEPTHS)
def test_keep_uses_every_layer_and_loops_the_middle_fifth(depth: int) -> None:
    split = keep_split(depth)
    assert split.layers == tuple(range(depth))
    assert split.dropped(depth) == ()
    prelude, core, _ = split.sizes
    assert abs(prelude - 0.4 * depth) <= 1
    assert abs(prelude + core - 0.6 * depth) <= 1.5


@given(sizes_within())
def test_keep_takes_sizes_that_add_up_and_no_others(case: tuple[int, tuple[int, ...]]) -> None:
    depth, sizes = case
    if sum(sizes) == depth:
        assert keep_split(depth, sizes).sizes == sizes
        assert keep_split(depth, sizes).layers == tuple(range(depth))
    else:
        with pytest.raises(UserError, match=f"add up to {sum(sizes)}"):
            keep_split(depth, sizes)


@given(sizes_within())
def test_drop_keeps_the_first_layers_and_the_last(case: tuple[int, tuple[int, ...]]) -> None:
    depth, sizes = case
    split = drop_split(depth, sizes)
    prelude, core, coda = sizes
    assert split.sizes == sizes
    assert split.prelude == tuple(range(prelude))
    assert split.core + split.coda == tuple(range(depth - core - coda, depth))
    assert split.dropped(depth) == tuple(range(prelude, depth - core - coda))
    with pytest.raises(UserError, match=f"the model has {sum(sizes) - 1}"):
        drop_split(sum(sizes) - 1, sizes)


@given(DEPTHS)
def test_drop_has_sizes_of_its_own(depth: int) -> None:
    split = drop_split(depth)
    assert split.prelude[0] == 0
    assert split.coda[-1] == depth - 1
    assert split.core[-1] + 1 == split.coda[0]


@given(DEPTHS, st.integers(1, 6))
def test_stride_thins_the_core_and_nothing_else(depth: int, stride: int) -> None:
    split, whole = stride_split(depth, stride), stride_split(depth, 1)
    assert whole.layers == tuple(range(depth))
    assert split.prelude == whole.prelude
    assert split.coda == whole.coda
    assert split.core == whole.core[::stride]
    # So many iterations run at least as many layers as the parent did.
    assert len(split.core) * stride >= len(whole.core)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_model_too_shallow_is_refused(depth: int) -> None:
    for rule in (keep_split, drop_split, lambda depth: stride_split(depth, 2)):
        with pytest.raises(UserError):
            rule(depth)


@given(st.integers(3, 30), st.tuples(*[st.integers(-3, 30)] * 3))
def test_any_sizes_are_a_split_or_the_users_mistake(depth: int, sizes: Any) -> None:
    for rule in (keep_split, drop_split, lambda depth, sizes: stride_split(depth, 2, sizes)):
        try:
            split = rule(depth, sizes)
        except UserError:
            continue
        assert split.prelude == tuple(range(sizes[0]))
        assert set(split.layers) <= set(range(depth))


# ---- the paper's layers, method.md 1.2

FAMILY = {"tinyllama-1.1b": "llama", "llama-3.2-1b": "llama", "olmo-2-1b": "olmo2"}
PAPER = {
    "tinyllama-1.1b": (22, (0, 3), (10, 17), (18, 21), tuple(range(4, 10))),
    "llama-3.2-1b": (16, (0, 3), (6, 11), (12, 15), (4, 5)),
    "olmo-2-1b": (16, (0, 3), (6, 11), (12, 15), (4, 5)),
}


@pytest.mark.parametrize("name", PAPER)
def test_presets_are_the_papers_layers(name: str) -> None:
    depth, *ends, dropped = PAPER[name]
    split = preset_split(name, FAMILY[name], depth)
    for part, (first, last) in zip((split.prelude, split.core, split.coda), ends, strict=True):
        assert part == tuple(range(first, last + 1))
    assert split.dropped(depth) == dropped
    # They follow the rule of the paper: the first P, then the last R + C.
    assert split == drop_split(depth, split.sizes)
    for other in (depth - 1, depth + 1):
        with pytest.raises(UserError, match=f"--preset {name} is for {depth} layers"):
            preset_split(name, FAMILY[name], other)


def test_every_preset_is_checked() -> None:
    assert PRESETS.keys() == PAPER.keys() == FAMILY.keys()


def test_a_preset_is_for_its_family() -> None:
    with pytest.raises(UserError, match="of olmo2"):
        preset_split("olmo-2-1b", "llama", 16)


def test_a_users_mistake_is_no_value_error() -> None:
    assert not issubclass(UserError, ValueError)  # the flag parser would swallow it
