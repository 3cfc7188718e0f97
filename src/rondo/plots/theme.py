"""What all figures share: colours, scales, labels, and the ways out of Altair."""

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

from rondo.errors import UserError

try:
    import altair as alt
    import vl_convert
except ImportError as error:
    raise UserError(
        "figures need altair and vl-convert; install with: pip install 'rondo-lm[report]'"
    ) from error

Row = dict[str, Any]

# All have a contrast of about 3:1 or more on white and on near-black, and the first five stay
# apart under the common colour-vision deficiencies (after Okabe and Ito); shapes say it again.
BLUE, GREEN, GREY, VERMILION, PINK = "#1F83C6", "#009E73", "#7F7F7F", "#D55E00", "#BF6A9B"
BROWN = "#8A6D3B"
SPARE_COLORS = ("#7A4FD0", "#5B9A1F", "#C2185B", "#0093A8")
SHAPES = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross")
_STAR = "M0,-1L.25,-.34L.95,-.31L.4,.13L.59,.81L0,.42L-.59,.81L-.4,.13L-.95,-.31L-.25,-.34Z"
_SPARE_SHAPES = ("triangle-right", "triangle-left", _STAR)
_ROLE_STYLES = {
    ("recurrent", "after"): (BLUE, "circle"),
    ("recurrent", "before"): (GREEN, "square"),
    ("parent", "before"): (GREY, "triangle-up"),
    ("static", "after"): (VERMILION, "diamond"),
    ("random", "after"): (PINK, "triangle-down"),
    ("self-consistency", "before"): (BROWN, "cross"),
}
_STILL_WIDTH = 560
_LABEL_HEIGHT = 15


def to_svg(chart: Row) -> str:
    """Render a chart as a still picture, on white so that it reads on any page."""
    still = {"width": _STILL_WIDTH, "background": "white", "padding": 12}
    return vl_convert.vegalite_to_svg(chart | still)


@functools.cache
def javascript() -> str:
    """Return all code that draws the charts in a browser, so that a page need load none."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")


def styles(points: Iterable[Row]) -> dict[str, tuple[str, str]]:
    """Give each model the colour and shape of its role, or spare ones to a second of that role."""
    found: dict[str, tuple[str, str]] = {}
    spares = zip(itertools.cycle(SPARE_COLORS), itertools.cycle(_SPARE_SHAPES), strict=False)
    for point in points:
        if point["model"] in found:
            continue
        style = _ROLE_STYLES.get((point["role"], point["stage"]))
        if style is None or style in found.values():
            style = next(spares)
        found[point["model"]] = style
    return found


def place_labels(points: Iterable[Row], y_span: Sequence[float], height: int) -> list[Row]:
    """Place each series' name at the right edge, near its last point and clear of the others.

    Args:
        points: `series`, `model`, `x` and `y`, where `y` runs evenly over the span.
        y_span: Lower and upper end of the axis.
        height: Of the axis in pixels.
    """
    last: dict[str, Row] = {}
    for point in sorted(points, key=lambda point: point["x"]):
        last[point["series"]] = point
    gap = _LABEL_HEIGHT / height * (y_span[1] - y_span[0])
    labels: list[Row] = []
    floor = y_span[0]
    for point in sorted(last.values(), key=lambda point: point["y"]):
        place = max(point["y"], floor)
        labels.append({"series": point["series"], "model": point["model"], "y": place})
        floor = place + gap
    ceiling = y_span[1]
    for label in reversed(labels):
        label["y"] = min(label["y"], ceiling)
        ceiling = label["y"] - gap
    return labels


def isolating(opacity: float = 1) -> alt.OpacityValue:
    """Fade what does not belong to the model that the page's legend sets in `isolate`."""
    alone = {"test": "!isolate || datum.model == isolate", "value": opacity}
    return alt.OpacityValue(0.07 * opacity, condition=alone)


def span(values: Sequence[float], log: bool = False) -> list[float]:
    """Enclose the values with a margin; the margin of a single value is a share of it."""
    low, high = min(values), max(values)
    if log:
        margin = (high / low) ** 0.04 if high > low else 1.1
        return [low / margin, high * margin]
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return [low - margin, high + margin]


def layer(data: str) -> alt.Chart:
    """Start a layer on data that `finish` adds, since Altair copies rows at every step."""
    return alt.Chart(alt.NamedData(data))


def color(column: str, names: Sequence[str], colors: Sequence[str]) -> alt.Color:
    """Give each name its colour, in order."""
    scale = alt.Scale(domain=list(names), range=_cycled(colors, len(names)))
    return alt.Color(f"{column}:N", title=None, scale=scale)


def shape(column: str, names: Sequence[str], shapes: Sequence[str] = SHAPES) -> alt.Shape:
    """Give each name its shape, in order."""
    scale = alt.Scale(domain=list(names), range=_cycled(shapes, len(names)))
    return alt.Shape(f"{column}:N", title=None, scale=scale)


def _cycled(values: Sequence[str], count: int) -> list[str]:
    return [values[index % len(values)] for index in range(count)]


def tooltip(column: str, title: str, number: str | None) -> alt.Tooltip:
    """Show a column on hover, as a number of this format or as text."""
    if number is None:
        return alt.Tooltip(f"{column}:N", title=title)
    return alt.Tooltip(f"{column}:Q", title=title, format=number)


def distinct(rows: Iterable[Row], column: str) -> list[str]:
    """Return the values of a column in the order they appear in."""
    return list(dict.fromkeys(row[column] for row in rows))


def is_finite(value: object) -> bool:
    """Whether this is a number that can be drawn."""
    return isinstance(value, int | float) and math.isfinite(value)


def is_plain(value: object) -> bool:
    """Refuse NaN, which no browser reads as JSON."""
    return not isinstance(value, float) or math.isfinite(value)


def finish(
    layers: list[alt.Chart],
    data: dict[str, list[Row]],
    title: str,
    subtitle: str,
    height: int | dict[str, int],
) -> Row:
    """Join the layers, and add their data and what all figures share.

    Returns:
        Vega-Lite, which a page can isolate a model in by setting `isolate`.
    """
    datasets = {
        name: [{key: _held(value) for key, value in row.items()} for row in rows]
        for name, rows in data.items()
    }
    # Checking the schema would take most of the time; the tests do.
    return alt.LayerChart(layer=layers).to_dict(validate=False) | {
        "datasets": datasets,
        "width": "container",
        "height": height,
        "title": {"text": title, "subtitle": subtitle, "anchor": "start", "offset": 14},
        "description": title,
        "params": [{"name": "isolate", "value": ""}],
        "config": {
            "font": "Helvetica, Arial, sans-serif",
            "axis": {"labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal"},
            "axisY": {"gridOpacity": 0.6, "domain": False, "ticks": False},
            "legend": {"orient": "bottom", "labelFontSize": 12, "symbolSize": 80},
            "text": {"fontSize": 12},
            "title": {"fontSize": 15, "subtitleFontSize": 12},
            "view": {"stroke": None},
        },
    }


def _held(value: Any) -> Any:
    """Turn counts that fit in no 64 bits, such as training FLOPs, into what a renderer reads."""
    return float(value) if isinstance(value, int) and abs(value) >= 2**63 else value
