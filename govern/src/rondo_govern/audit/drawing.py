"""What a page is made of: stacked columns, lying bars and tables, as plain numbers."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

Cell = str | int | float | Decimal | None

# Letters that stand side by side beneath a chart on a phone.
MOST_LETTERS = 32


@dataclass(frozen=True)
class Bar:
    """A part of a column, in percent of the chart, y downwards."""

    x: float
    y: float
    width: float
    height: float
    style: str
    told: str


@dataclass(frozen=True)
class Chart:
    """Stacked columns, and lying bars beneath them.

    Attributes:
        legend: Names and their styles.
        ticks: How high in percent, and what is written there.
        labels: How far to the right in percent, and what is written there.
        lying: Names, lengths in percent, what is written there.
        style: Of the lying bars.
    """

    title: str
    about: str
    legend: Sequence[tuple[str, str]]
    bars: Sequence[Bar]
    ticks: Sequence[tuple[float, str]]
    labels: Sequence[tuple[float, str]]
    lying: Sequence[tuple[str, float, str]]
    style: str


@dataclass(frozen=True)
class Table:
    """Lines under a head; a folded one is opened by whoever wants it."""

    title: str
    head: Sequence[str]
    lines: Sequence[Sequence[Cell]]
    folded: bool = False


@dataclass(frozen=True)
class Section:
    """Charts, and the same in tables."""

    title: str
    about: str
    charts: Sequence[Chart]
    tables: Sequence[Table]


def columns(
    title: str,
    about: str,
    places: Sequence[str],
    heights: Mapping[str, Sequence[float]],
    styles: Mapping[str, str],
    write: Callable[[float], str],
    most: float = 0.0,
    lying: Sequence[tuple[str, float, str]] = (),
) -> Chart:
    """Stack columns.

    Args:
        title: What is drawn.
        about: A sentence on it.
        places: What stands beneath each column.
        heights: By name, one for each place; the first name lies at the bottom.
        styles: A name's class in the page's style sheet.
        write: How a height is written.
        most: What the scale must hold besides.
        lying: Bars beneath.
    """
    top = round_up(max(most, *(sum(parts) for parts in zip(*heights.values(), strict=True))))
    step, bars = 100 / len(places), []
    for column, place in enumerate(places):
        y = 100.0
        for name, values in heights.items():
            height = 100 * values[column] / top
            y -= height
            if height:
                told = f"{name}, {place}: {write(values[column])}"
                bars.append(Bar(step * (column + 0.08), y, 0.84 * step, height, styles[name], told))
    each = math.ceil(len(places) * max(map(len, places)) / MOST_LETTERS)
    return Chart(
        title,
        about,
        [(name, styles[name]) for name in heights] if len(heights) > 1 else [],
        bars,
        [(part, write(top * part / 100)) for part in (0, 50, 100)],
        [(step * (at + 0.5), places[at]) for at in range(0, len(places), each)],
        lying,
        styles[next(iter(heights))],
    )


def round_up(value: float) -> float:
    """Return the next round number, 1 for nothing."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(one * power for one in (1, 1.2, 1.5, 2, 3, 4, 5, 6, 8, 10) if one * power >= value)


def scale_of(value: float) -> tuple[float, str]:
    """Return the metric prefix that makes a number short."""
    steps = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
    return next((step for step in steps if value >= step[0]), (1.0, ""))


def short(value: float) -> str:
    """Write a count with three digits."""
    factor, prefix = scale_of(value)
    return f"{value / factor:.3g}{prefix}"


def cell(value: Cell) -> str:
    """Write what a table holds."""
    if value is None:
        return "\u2013"
    if isinstance(value, Decimal):
        return f"{value:,.4f}"
    return (
        value
        if isinstance(value, str)
        else f"{value:,.2f}"
        if isinstance(value, float)
        else f"{value:,}"
    )
