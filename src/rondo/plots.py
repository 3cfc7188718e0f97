"""The figures of the reports, each defined once: interactive in HTML, still as SVG or PNG.

The only user of altair and vl-convert, which come with the extra `report`. Charts take plain rows
(dicts) and are as wide as their container; `to_svg` and `to_png` fix the width. Text in the charts
names no colour, so that a page can restyle it for a dark background.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

from rondo.errors import UserError

try:
    import altair as alt
    import vl_convert
except ImportError as error:
    raise UserError(
        "figures need altair and vl-convert; install with: pip install 'rondo-lm[report]'"
    ) from error

Row = dict[str, Any]
XAxis = Literal["depth", "FLOPs per token", "ms per token"]
YAxis = Literal["loss", "bits per byte"]

X_AXES: tuple[XAxis, ...] = get_args(XAxis)
Y_AXES: tuple[YAxis, ...] = get_args(YAxis)

_X: dict[XAxis, tuple[str, str]] = {
    "depth": ("num_recurrences", "recurrence r (times the core runs)"),
    "FLOPs per token": ("flops_per_token", "executed FLOPs per token (log)"),
    "ms per token": ("ms_per_token", "milliseconds per token"),
}
_Y: dict[YAxis, tuple[str, str]] = {
    "loss": ("value", "loss (nats per token)"),
    "bits per byte": ("bits_per_byte", "bits per byte"),
}
_TOOLTIP = (
    ("model", "model", None),
    ("dataset", "dataset", None),
    ("num_recurrences", "recurrence r", None),
    ("value", "loss", ".4f"),
    ("stderr", "stderr", ".4f"),
    ("bits_per_byte", "bits per byte", ".4f"),
    ("flops_per_token", "FLOPs/token", ".3~s"),
    ("kv_bytes_per_token", "KV bytes/token", ","),
    ("ms_per_token", "ms/token", ".3~f"),
    ("training_tokens", "training tokens", ","),
    ("training_flops", "training FLOPs", ".3~s"),
    ("seed", "seed", None),
    ("dtype", "dtype", None),
    ("device", "device", None),
    ("date", "date", None),
)

# All have a contrast of about 3:1 or more on white and on near-black, and the first five stay
# apart under the common colour-vision deficiencies (after Okabe and Ito); shapes say it again.
_BLUE, _GREEN, _GREY, _VERMILION, _PINK = "#1F83C6", "#009E73", "#7F7F7F", "#D55E00", "#BF6A9B"
_SPARE_COLORS = ("#8A6D3B", "#7B61C4", "#3A8FA6", "#B0483A")
_SHAPES = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross")
_ROLE_STYLES = {
    ("recurrent", "after"): (_BLUE, "circle"),
    ("recurrent", "before"): (_GREEN, "square"),
    ("parent", "before"): (_GREY, "triangle-up"),
    ("static", "after"): (_VERMILION, "diamond"),
    ("random", "after"): (_PINK, "triangle-down"),
}
_STILL_WIDTH = 560
_CURVES_HEIGHT = 300
_LABEL_HEIGHT = 15
_DIFFERENCE_TICKS = (-3, -1, -0.3, -0.1, -0.03, -0.01, 0, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)


def depth_chart(rows: Sequence[Row], y: YAxis = "loss", x: XAxis = "depth") -> alt.LayerChart:
    """Draw one dataset's loss against recurrence, one line per recurrent model.

    Models without a loop (parent, static twin) are a point and a dashed line of reference.

    Args:
        rows: Flat rows of one dataset: `model`, `role`, `stage` and the columns of results.json.
        y: What is measured.
        x: What it is set against; a page may offer each.
    """
    return _curves(rows, x, y, f"{rows[0]['dataset']}: {_finding(rows, y)}")


def can_draw(rows: Sequence[Row], y: YAxis = "loss", x: XAxis = "depth") -> bool:
    """Whether there is anything finite to draw."""
    return bool(_points(rows, x, y))


def compute_chart(rows: Sequence[Row]) -> alt.LayerChart:
    """Draw one dataset's loss against executed FLOPs per token; rows as for `depth_chart`."""
    title = f"{rows[0]['dataset']}: the loss that each token's FLOPs buy"
    return _curves(rows, "FLOPs per token", "loss", title)


def layer_chart(rows: Sequence[Row]) -> alt.LayerChart:
    """Draw how much each layer of the parent changes the state; the core is shaded.

    Args:
        rows: `layer`, `block_influence`, `angular_distance` and `part` (prelude, core or coda).
    """
    measures = ("block influence", "angular distance")
    points: list[Row] = [
        {"layer": row["layer"], "part": row["part"], "measure": measure, "change": change}
        for row in rows
        for measure, change in zip(
            measures, (row["block_influence"], row["angular_distance"]), strict=True
        )
    ]
    core = [row["layer"] for row in rows if row["part"] == "core"]
    shades: list[Row] = [{"from": layer - 0.5, "to": layer + 0.5} for layer in core]
    scale = alt.Scale(domain=[-0.5, rows[-1]["layer"] + 0.5], nice=False)
    axis = alt.Axis(tickMinStep=1, format="d", grid=False)
    title = "layer of the parent"
    lines = _layer("points").encode(
        x=alt.X("layer:Q", title=title, scale=scale, axis=axis),
        # A root shows the small changes of the middle beside the large ones of the outer layers.
        y=alt.Y("change:Q", title="change (root scale)", scale=alt.Scale(type="sqrt", zero=True)),
        color=_color("measure", measures, (_BLUE, _VERMILION)),
        shape=_shape("measure", measures),
        tooltip=["layer:Q", "part:N", "measure:N", alt.Tooltip("change:Q", format=".4f")],
    )
    layers = [
        _layer("core")
        .mark_rect(opacity=0.16, color=_BLUE)
        .encode(x=alt.X("from:Q", title=title, scale=scale, axis=axis), x2="to:Q"),
        lines.mark_line(strokeWidth=1.5),
        lines.mark_point(filled=True, size=45, opacity=1),
    ]
    finding = f"Layers {core[0]} to {core[-1]} are the core" if core else "Change by layer"
    subtitle = "How much each layer changes the state; 0 is not at all. Shaded: the core."
    return _finish(layers, {"points": points, "core": shades}, finding, subtitle, 220)


def core_chart(rows: Sequence[Row]) -> alt.LayerChart:
    """Draw what looping each candidate core does to the parent's loss, the best on top.

    Args:
        rows: `core` (a name, such as '12-18'), `num_recurrences`, `mixing`, `difference` (loss
            less the parent's) and `chosen`.
    """
    points: list[Row] = [
        {**row, "depth": f"r = {row['num_recurrences']}", "start": f"mixing {row['mixing']:g}"}
        for row in sorted(rows, key=lambda row: (row["num_recurrences"], row["mixing"]))
        if _is_finite(row["difference"])
    ]
    best: dict[str, float] = {}
    for point in points:
        best[point["core"]] = min(point["difference"], best.get(point["core"], math.inf))
    order = sorted(best, key=best.__getitem__)
    chosen = next((point["core"] for point in points if point["chosen"]), order[0])
    low, high = _span([0.0, *(point["difference"] for point in points)])
    x = alt.X(
        "difference:Q",
        title="loss less the parent's (nats per token, log away from 0)",
        # Bad cores are worse by orders of magnitude than good ones are better.
        scale=alt.Scale(type="symlog", constant=0.02, domain=[low, high], nice=False),
        axis=alt.Axis(values=[t for t in _DIFFERENCE_TICKS if low <= t <= high], format="~g"),
    )
    y = alt.Y("core:N", title="candidate core", sort=order, axis=alt.Axis(grid=True))
    depths, starts = _distinct(points, "depth"), _distinct(points, "start")
    layers = [
        _layer("chosen")
        .mark_rect(opacity=0.16, color=_BLUE)
        .encode(y=y, x=alt.XValue(0), x2=alt.X2Value("width")),
        _layer("parent").mark_rule(strokeDash=[4, 3], color=_GREY).encode(x=x),
        _layer("points")
        .mark_point(filled=True, size=75, opacity=0.9)
        .encode(
            x=x,
            y=y,
            color=_color("depth", depths, (_BLUE, _VERMILION, _GREEN, *_SPARE_COLORS)),
            shape=_shape("start", starts),
            tooltip=["core:N", "depth:N", "start:N", alt.Tooltip("difference:Q", format="+.4f")],
        ),
    ]
    change = best[chosen]
    effect = f"lowers the loss by up to {-change:.4f}"
    if change >= 0:
        effect = f"raises the loss by {change:.4f} or more"
    subtitle = "Untrained. Left of the dashed line is better than the parent. Shaded: the choice."
    data = {"points": points, "chosen": [{"core": chosen}], "parent": [{"difference": 0}]}
    return _finish(layers, data, f"Looping core {chosen} {effect}", subtitle, alt.Step(20))


def to_svg(chart: alt.LayerChart) -> str:
    """Render a chart as a still picture, on white so that it reads on any page."""
    return vl_convert.vegalite_to_svg(_still(chart))


def to_png(chart: alt.LayerChart) -> bytes:
    """Render a chart as a PNG at twice the size of the SVG."""
    return vl_convert.vegalite_to_png(_still(chart), scale=2)


def to_spec(chart: alt.LayerChart) -> Row:
    """Return the chart as Vega-Lite for a browser."""
    # Checking the schema takes most of the time, and the still picture has been checked.
    return chart.to_dict(validate=False)


@functools.cache
def javascript() -> str:
    """Return all code that draws the charts in a browser, so that a page need load none."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")


def _still(chart: alt.LayerChart) -> Row:
    return chart.properties(width=_STILL_WIDTH, background="white", padding=12).to_dict()


def _curves(rows: Sequence[Row], x: XAxis, y: YAxis, title: str) -> alt.LayerChart:
    points = _points(rows, x, y)
    models = _distinct(points, "model")
    references = [point for point in points if not point["loops"]]
    y_span = _span([edge for point in points for edge in (point["low"], point["high"])])
    y_title, y_scale = _Y[y][1], alt.Scale(domain=y_span, nice=False)
    along_x = _x_encoding(points, x)
    along_y, from_low = (
        alt.Y(f"{column}:Q", title=y_title, scale=y_scale, axis=alt.Axis(tickCount=6))
        for column in ("y", "low")
    )
    colors, shapes = zip(*_styles(points), strict=True)
    color = _color("model", models, colors).legend(None)
    shape = _shape("model", models, shapes).legend(None)
    # The page sets `isolate` to show one model alone.
    alone = {"test": "!isolate || datum.model == isolate", "value": 1}
    shown = alt.OpacityValue(0.07, condition=alone)
    styled = {"color": color, "opacity": shown}
    labels = _layer("labels").encode(alt.XValue("width"), along_y, shown)
    layers = [
        _layer("references")
        .mark_rule(strokeDash=[6, 4], strokeWidth=1.5)
        .encode(y=along_y, **styled),
        _layer("points").mark_rule(strokeWidth=1).encode(along_x, from_low, y2="high:Q", **styled),
        _layer("loops").mark_line(strokeWidth=2).encode(along_x, along_y, **styled),
        _layer("points").mark_point(filled=True, size=70).encode(along_x, along_y, shape, **styled),
        labels.mark_point(filled=True, size=50, xOffset=14)
        .encode(color, shape)
        .properties(name="label_symbols"),
        labels.mark_text(align="left", dx=24, limit=190)
        .encode(alt.Text("model:N"))
        .properties(name="labels"),
        # Invisible, because fingers are wider than points.
        _layer("points")
        .mark_point(filled=True, size=700, opacity=0)
        .encode(along_x, along_y, tooltip=[_tooltip(*entry) for entry in _TOOLTIP]),
    ]
    subtitle = ["Bars: one standard error over documents; paired differences are surer."]
    if references:
        subtitle.append("Dashed: models without a loop.")
    data = {
        "points": points,
        "loops": [point for point in points if point["loops"]],
        "references": references,
        "labels": _labels(points, y_span),
    }
    chart = _finish(layers, data, title, " ".join(subtitle), _CURVES_HEIGHT)
    return chart.add_params(alt.param(name="isolate", value=""))


def _points(rows: Sequence[Row], x: XAxis, y: YAxis) -> list[Row]:
    """Make what is drawn of the rows that have finite numbers to draw."""
    points: list[Row] = []
    for row in rows:
        at_x, at_y = row[_X[x][0]], row[_Y[y][0]]
        if not (_is_finite(at_x) and _is_finite(at_y)):
            continue
        # Bits per byte are the loss in another unit, and so is its standard error.
        stderr = row["stderr"] * at_y / row["value"] if _is_finite(row["stderr"]) else 0.0
        shown = {column: row.get(column) for column, _, _ in _TOOLTIP}
        points.append(
            {name: value for name, value in shown.items() if _is_plain(value)}
            | {"x": at_x, "y": at_y, "low": at_y - stderr, "high": at_y + stderr}
            | {"loops": row["role"] in ("recurrent", "random")}
            | {"role": row["role"], "stage": row["stage"]}
        )
    return points


def _labels(points: Sequence[Row], y_span: list[float]) -> list[Row]:
    """Place each model's name at the right edge, near its last point and clear of the others."""
    last: dict[str, Row] = {}
    for point in sorted(points, key=lambda point: point["x"]):
        last[point["model"]] = point
    gap = _LABEL_HEIGHT / _CURVES_HEIGHT * (y_span[1] - y_span[0])
    labels: list[Row] = []
    floor = y_span[0]
    for point in sorted(last.values(), key=lambda point: point["y"]):
        height = max(point["y"], floor)
        labels.append({"model": point["model"], "y": height})
        floor = height + gap
    ceiling = y_span[1]
    for label in reversed(labels):
        label["y"] = min(label["y"], ceiling)
        ceiling = label["y"] - gap
    return labels


def _x_encoding(points: Sequence[Row], x: XAxis) -> alt.X:
    values = sorted({point["x"] for point in points})
    match x:
        case "depth":
            scale = alt.Scale(type="log", base=2, domain=_span([1, 2, *values], log=True))
            axis = alt.Axis(values=values, format="d", grid=False)
        case "FLOPs per token":
            scale = alt.Scale(type="log", domain=_span(values, log=True))
            axis = alt.Axis(format=".3~s", tickCount=6, labelOverlap=True, grid=False)
        case "ms per token":
            scale = alt.Scale(domain=_span(values))
            axis = alt.Axis(format="~g", tickCount=6, labelOverlap=True, grid=False)
    return alt.X("x:Q", title=_X[x][1], scale=scale, axis=axis)


def _styles(points: Sequence[Row]) -> list[tuple[str, str]]:
    """Give each model the colour and shape of its role, or spare ones to a second of that role."""
    spare = itertools.cycle(zip(_SPARE_COLORS, itertools.cycle(_SHAPES)))
    styles: dict[str, tuple[str, str]] = {}
    for point in points:
        if point["model"] not in styles:
            style = _ROLE_STYLES.get((point["role"], point["stage"]))
            if style is None or style in styles.values():
                style = next(spare)
            styles[point["model"]] = style
    return list(styles.values())


def _finding(rows: Sequence[Row], y: YAxis) -> str:
    """Say where the loop does best, after training and before it."""
    places = []
    for stage, when in (("after", "after training"), ("before", "before training")):
        loops = [
            row
            for row in rows
            if row["role"] == "recurrent" and row["stage"] == stage and _is_finite(row[_Y[y][0]])
        ]
        if loops:
            best = min(loops, key=lambda row: row[_Y[y][0]])
            places.append(f"at r = {best['num_recurrences']} {when}")
    return f"{y} is lowest {', '.join(places)}" if places else f"{y} of models without a loop"


def _span(values: Sequence[float], log: bool = False) -> list[float]:
    """Enclose the values with a margin; the margin of a single value is a share of it."""
    low, high = min(values), max(values)
    if log:
        margin = (high / low) ** 0.04 if high > low else 1.1
        return [low / margin, high * margin]
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return [low - margin, high + margin]


def _layer(data: str) -> alt.Chart:
    """Start a layer on data that `_finish` adds, since Altair copies rows at every step."""
    return alt.Chart(alt.NamedData(data))


def _color(column: str, names: Sequence[str], colors: Sequence[str]) -> alt.Color:
    scale = alt.Scale(domain=list(names), range=_cycled(colors, len(names)))
    return alt.Color(f"{column}:N", title=None, scale=scale)


def _shape(column: str, names: Sequence[str], shapes: Sequence[str] = _SHAPES) -> alt.Shape:
    scale = alt.Scale(domain=list(names), range=_cycled(shapes, len(names)))
    return alt.Shape(f"{column}:N", title=None, scale=scale)


def _cycled(values: Sequence[str], count: int) -> list[str]:
    return [values[index % len(values)] for index in range(count)]


def _tooltip(column: str, title: str, number: str | None) -> alt.Tooltip:
    if number is None:
        return alt.Tooltip(f"{column}:N", title=title)
    return alt.Tooltip(f"{column}:Q", title=title, format=number)


def _distinct(rows: Iterable[Row], column: str) -> list[str]:
    return list(dict.fromkeys(row[column] for row in rows))


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is_plain(value: object) -> bool:
    """Refuse NaN, which no browser reads as JSON."""
    return not isinstance(value, float) or math.isfinite(value)


def _finish(
    layers: list[alt.Chart],
    data: dict[str, list[Row]],
    title: str,
    subtitle: str,
    height: int | alt.Step,
) -> alt.LayerChart:
    """Join the layers, and add their data and what all figures share."""
    return (
        alt.LayerChart(layer=layers)
        .properties(
            datasets=data,
            width="container",
            height=height,
            title=alt.Title(title, subtitle=subtitle, anchor="start", offset=14),
        )
        .configure(
            font="Helvetica, Arial, sans-serif",
            axis=alt.AxisConfig(labelFontSize=12, titleFontSize=12, titleFontWeight="normal"),
            axisY=alt.AxisConfig(gridOpacity=0.6, domain=False, ticks=False),
            legend=alt.LegendConfig(orient="bottom", labelFontSize=12, symbolSize=80),
            text=alt.MarkConfig(fontSize=12),
            title=alt.TitleConfig(fontSize=15, subtitleFontSize=12),
            view=alt.ViewConfig(stroke=None),
        )
    )
