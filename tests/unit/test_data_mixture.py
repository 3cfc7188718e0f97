"""Which source gives which row: the shares hold at every prefix, and phases follow each other."""

from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rondo.config import DataConfig
from rondo.data.mixture import Mixture, Phase, read_mixture
from rondo.data.sources import Source, parse_source
from rondo.errors import UserError

weights = st.lists(st.fractions(Fraction(1, 1000), 1000), min_size=1, max_size=8)


def sources_of(values: list[Fraction]) -> tuple[Source, ...]:
    return tuple(Source(str(n), str(n), (), weight) for n, weight in enumerate(values))


def bound(number: int) -> Fraction:
    return (1 + sum((Fraction(1, n) for n in range(1, number - 1)), Fraction(0))) / 2


def test_light_sources_do_not_add_up_against_a_heavy_one() -> None:
    mixture = Mixture([Phase(0, sources_of([*[Fraction(1)] * 7, Fraction(1000)]))])
    for rows in range(3000):
        assert abs(mixture.taken(rows)["7"] - Fraction(1000, 1007) * rows) <= 1


@given(weights, st.integers(0, 300), st.integers(0, 10**8))
def test_shares_hold_at_every_prefix(values: list[Fraction], near: int, far: int) -> None:
    mixture = Mixture([Phase(0, sources_of(values))])
    for rows in (near, far):
        taken = mixture.taken(rows)
        assert sum(taken.values()) == rows
        for source, weight in enumerate(values):
            exact = rows * weight / sum(values)
            assert abs(taken[str(source)] - exact) <= bound(len(values))


@given(weights, weights, st.integers(0, 40), st.integers(0, 10**8))
def test_each_row_is_the_next_of_one_source(
    first: list[Fraction], second: list[Fraction], change: int, far: int
) -> None:
    mixture = Mixture([Phase(0, sources_of(first)), Phase(change, sources_of(second))])
    counts = dict.fromkeys(mixture.sources, 0)
    for row in range(80):
        assert mixture.taken(row) == counts
        path, number = mixture.place(row)
        assert number == counts[path]
        assert int(path) < len(first if row < change else second)
        counts[path] += 1
    path, number = mixture.place(far)
    assert number == mixture.taken(far)[path] == mixture.taken(far + 1)[path] - 1


def test_phases(tmp_path: Path) -> None:
    (tmp_path / "a b.txt").write_text("x")
    phases = ("0.5: general@3 math", f"3/4: math-test '{tmp_path}/a b.txt@0.5'", "1: math general")
    mixture = read_mixture(DataConfig(phases=phases), 1000)
    assert [phase.first_row for phase in mixture.phases] == [0, 500, 750]
    assert [source.name for source in mixture.sources.values()] == [
        "general",
        "math",
        "math-test",
        "a b",
    ]
    middle, end = mixture.taken(500), mixture.taken(1000)
    assert list(middle.values()) == [375, 125, 0, 0]
    # What returns goes on where it was.
    assert end["sample general"] == 375 + 125
    assert end["sample math-test"] == 167
    assert mixture.taken(2000)["sample math"] == 125 + 125 + 500


@pytest.mark.parametrize(
    ("phases", "told"),
    [
        (("math",), "does not read UNTIL"),
        (("half: math",), "does not read UNTIL"),
        (("1/0: math",), "does not read UNTIL"),
        (("1: 'math",), "does not read UNTIL"),
        (("1:",), "must name a source"),
        (("0: math", "1: math"), "end between 0, where it begins, and 1"),
        (("0.5: math", "0.5: math"), "end between 0.5, where"),
        (("0.5: math", "1.5: math"), "end between 0.5, where"),
        (("0.5: math",), "must end at 1, not at 0.5"),
        (("1: math nowhere",), "there is no text nowhere"),
        (("1: math math@2",), "named twice"),
        (("1: math@0",), "must be positive"),
    ],
)
def test_phases_that_make_no_sense(phases: tuple[str, ...], told: str) -> None:
    with pytest.raises(UserError, match=told):
        read_mixture(DataConfig(phases=phases), 100)


def test_phases_take_the_place_of_sources() -> None:
    mixture = read_mixture(DataConfig(sources=("general",), phases=("1: math",)), 100)
    assert list(mixture.sources) == ["sample math"]


def test_a_text_may_not_be_named_twice() -> None:
    with pytest.raises(UserError, match="named twice"):
        read_mixture(DataConfig(sources=("math", "other=math")), 100)


def test_weights(tmp_path: Path) -> None:
    assert parse_source("math").weight == 1
    assert parse_source("x=math@0.1").weight == Fraction(1, 10)
    assert parse_source("hub:a/b:c@1/3").weight == Fraction(1, 3)
    assert parse_source("hub:a/b:c@1/3").path == "hub:a/b:c"
    (tmp_path / "a@2").mkdir()
    (tmp_path / "a@2" / "b.txt").write_text("x")
    found = parse_source(f"{tmp_path}/a@2")
    assert (found.name, found.weight) == ("a@2", 1)
    assert parse_source(f"{tmp_path}/a@2@3").weight == 3
    assert parse_source(f"{tmp_path}/a@2/b.txt").weight == 1
