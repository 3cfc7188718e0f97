"""The figure that all is about: a task's score or loss against depth, or against what it costs."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from rondo.plots.theme import (
    GREY,
    Row,
    alt,
    color,
    distinct,
    finish,
    is_finite,
    is_plain,
    isolating,
    layer,
    place_labels,
    shape,
    span,
    styles,
    tooltip,
)

XAxis = Literal["depth", "FLOPs", "milliseconds", "price"]
Stage = Literal["after", "before"]

X_AXES: tuple[XAxis, ...] = get_args(XAxis)
COLUMNS: dict[XAxis, str] = {
    "depth": "num_recurrences",
    "FLOPs": "flops_per_token",
    "milliseconds": "ms_per_token",
    "price": "price",
}

_X_TITLES: dict[XAxis, str] = {
    "depth": "recurrence r (times the core runs)",
    "FLOPs": "executed FLOPs per token (log)",
    "milliseconds": "milliseconds per token",
    "price": "price of a million tokens",
}
_TOOLTIP = (
    ("model", "model", None),
    ("task", "task", None),
    ("metric", "metric", None),
    ("num_recurrences", "recurrence r", None),
    ("flops_per_token", "FLOPs per token", ".3~s"),
    ("kv_bytes_per_token", "KV bytes per token", ","),
    ("ms_per_token", "ms per token", ".3~f"),
    ("price", "price per million tokens", ".3~f"),
    ("samples", "answers per item", None),
    ("items", "items", ","),
    ("num_fewshot", "solved examples", None),
    ("seeds", "seeds", None),
    ("training_tokens", "training tokens", ","),
    ("training_flops", "training FLOPs", ".3~s"),
    ("training_seed", "training seed", None),
    ("dtype", "dtype", None),
    ("device", "device", None),
    ("date", "date", None),
)
_LOOPS = ("recurrent", "random")
_HEIGHT = 300
# What is compared must keep at least a third of the height, or nobody can see how it differs.
_WIDEST = 3.0


@dataclass(frozen=True, slots=True)
class Measure:
    """What is drawn upwards.

    Args:
        name: As a control of the page calls it.
        title: Of the axis.
        column: Of the rows.
        percent: Whether shares are drawn in percent.
        higher_is_better: Which way is up.
        chance: What guessing scores.
    """

    name: str
    title: str
    column: str = "value"
    percent: bool = False
    higher_is_better: bool = False
    chance: float | None = None


def measures_of(task: Row, percent: bool) -> list[Measure]:
    """Return what can be drawn of a task, as results.json describes it; the metric comes first.

    Args:
        task: Its `kind`, `metric`, `higher_is_better` and `chance`.
        percent: Whether the metric is a share.
    """
    if task["kind"] == "loss":
        return [
            Measure("nats per token", "loss (nats per token)"),
            Measure("bits per byte", "loss (bits per byte)", column="bits_per_byte"),
        ]
    metric = task["metric"]
    title = f"{metric} (%)" if percent else metric
    return [Measure(metric, title, "value", percent, task["higher_is_better"], task["chance"])]


def depth_chart(
    rows: Sequence[Row],
    measure: Measure,
    stage: Stage = "after",
    x: XAxis = "depth",
    fits: Sequence[Row] = (),
) -> Row:
    """Draw one task by depth, one line per recurrent model; models without a loop are dashed.

    Args:
        rows: Flat rows of one task and metric: `model`, `role`, `stage`, `value`, `stderr`, and
            the columns of the axes and of the conditions.
        measure: What is drawn upwards.
        stage: Models of this stage set the scale. What would flatten their curves, such as the
            loss of random weights, is left out, and the subtitle says so.
        x: What it is set against.
        fits: Points of fitted curves: `model`, `value`, and the columns of the axes.
    """
    points, absent = _shown(_points(rows, measure), stage)
    edges = [edge for point in points for edge in (point["low"], point["high"])]
    factor = 100 if measure.percent else 1
    chance = [{"y": factor * measure.chance}] if measure.chance else []
    if chance and not _fits_in([*edges, chance[0]["y"]], edges):
        absent.append(f"chance ({chance[0]['y']:.3g})")
        chance = []
    y_span = span([*edges, *(point["y"] for point in chance)])
    if measure.percent:
        y_span = [max(y_span[0], -1.5), min(y_span[1], 101.5)]
    references = [point for point in points if not point["loops"]]
    shown = {point["model"] for point in points}
    fitted = [
        {**fit, "y": factor * fit["value"]}
        for fit in fits
        if fit["model"] in shown and measure.column == "value"
    ]
    said = ["Bars: one standard error over items; paired differences are surer."]
    said += ["Dashed: models without a loop."] if references else []
    said += ["Thin: the fit."] if fitted else []
    said += ["Dotted: chance."] if chance else []
    said += [f"Off the chart: {', '.join(absent)}."] if absent else []
    data = {
        "points": points,
        "loops": [point for point in points if point["loops"]],
        "references": references,
        "chance": chance,
        "fit": fitted,
        "labels": place_labels(
            ({**point, "x": point["num_recurrences"]} for point in points), y_span, _HEIGHT
        ),
    }
    layers = _layers(points, measure, y_span, _x_encoding(points, x))
    title = (
        f"{rows[0]['task']}: {_finding([row for row in rows if row['model'] in shown], measure)}"
    )
    return finish(layers, data, title, " ".join(said), _HEIGHT)


def x_encodings(rows: Sequence[Row], measure: Measure, stage: Stage = "after") -> dict[XAxis, Any]:
    """Return what to put in place of the encoding of x for each axis that has numbers."""
    points, _ = _shown(_points(rows, measure), stage)
    return {
        x: _x_encoding(points, x).to_dict()
        for x in X_AXES
        if any(is_finite(point[COLUMNS[x]]) for point in points)
    }


def drawn_models(rows: Sequence[Row], measure: Measure, stage: Stage = "after") -> set[str]:
    """Return the models that `depth_chart` would draw, none where there is nothing finite."""
    return {point["model"] for point in _shown(_points(rows, measure), stage)[0]}


def _layers(
    points: Sequence[Row], measure: Measure, y_span: Sequence[float], along_x: alt.X
) -> list[alt.Chart]:
    scale = alt.Scale(domain=list(y_span), nice=False)
    along_y, from_low = (
        alt.Y(f"{column}:Q", title=measure.title, scale=scale, axis=alt.Axis(tickCount=6))
        for column in ("y", "low")
    )
    models = distinct(points, "model")
    colors, shapes = zip(*styles(points).values(), strict=True)
    by_color = color("model", models, colors).legend(None)
    by_shape = shape("model", models, shapes).legend(None)
    styled = {"color": by_color, "opacity": isolating()}
    labels = layer("labels").encode(alt.XValue("width"), along_y, isolating())
    hover = [*_TOOLTIP[:4], ("shown", measure.title, None), *_TOOLTIP[4:]]
    return [
        layer("chance").mark_rule(strokeDash=[1, 4], color=GREY, strokeWidth=1.5).encode(y=along_y),
        layer("references")
        .mark_rule(strokeDash=[6, 4], strokeWidth=1.5)
        .encode(y=along_y, **styled),
        layer("fit")
        .mark_line(strokeWidth=1, clip=True)
        .encode(along_x, along_y, color=by_color, opacity=isolating(0.8)),
        layer("points").mark_rule(strokeWidth=1).encode(along_x, from_low, y2="high:Q", **styled),
        layer("loops").mark_line(strokeWidth=2).encode(along_x, along_y, **styled),
        layer("points")
        .mark_point(filled=True, size=70)
        .encode(along_x, along_y, by_shape, **styled),
        labels.mark_point(filled=True, size=50, xOffset=14)
        .encode(by_color, by_shape)
        .properties(name="label_symbols"),
        labels.mark_text(align="left", dx=24, limit=190)
        .encode(alt.Text("series:N"))
        .properties(name="labels"),
        # Invisible, because fingers are wider than points.
        layer("points")
        .mark_point(filled=True, size=700, opacity=0)
        .encode(along_x, along_y, tooltip=[tooltip(*entry) for entry in hover]),
    ]


def _points(rows: Sequence[Row], measure: Measure) -> list[Row]:
    """Make what is drawn of the rows that have finite numbers to draw."""
    points: list[Row] = []
    for row in rows:
        value: Any = row.get(measure.column)
        if not is_finite(value):
            continue
        factor = 100 if measure.percent else 1
        stderr = row["stderr"] if is_finite(row["stderr"]) else 0.0
        if measure.column != "value":
            # Bits per byte are the loss in another unit, and so is its standard error.
            stderr *= value / row["value"]
        shown = {column: row.get(column) for column, _, _ in _TOOLTIP}
        points.append(
            {name: fact for name, fact in shown.items() if fact is not None and is_plain(fact)}
            | {column: row.get(column) for column in COLUMNS.values()}
            | {"y": factor * value, "series": row["model"]}
            | {"low": factor * (value - stderr), "high": factor * (value + stderr)}
            | {"shown": _with_error(factor * value, factor * stderr, measure)}
            | {"loops": row["role"] in _LOOPS, "role": row["role"], "stage": row["stage"]}
        )
    return points


def _with_error(value: float, stderr: float, measure: Measure) -> str:
    digits = 2 if measure.percent else 4
    return f"{value:.{digits}f} \u00b1 {stderr:.{digits}f}"


def _shown(points: list[Row], stage: Stage) -> tuple[list[Row], list[str]]:
    """Leave out models whose values would flatten the curves of the stage.

    Returns:
        The points of what is drawn, and words for each model that is not.
    """
    models = distinct(points, "model")
    focus = [
        model
        for model in models
        if any(_is_focus(point, stage) for point in points if point["model"] == model)
    ]
    edges = [edge for model in focus for edge in _edges(points, [model])]
    if not focus or all(len(_edges(points, [model])) == 2 for model in focus):
        return points, []
    low, high = min(edges), max(edges)
    others = [model for model in models if model not in focus]
    others.sort(
        key=lambda model: max(low, *_edges(points, [model])) - min(high, *_edges(points, [model]))
    )
    kept, absent = [*focus], []
    for model in others:
        own = _edges(points, [model])
        if _fits_in([*_edges(points, kept), *own], edges):
            kept.append(model)
        else:
            values = sorted(point["y"] for point in points if point["model"] == model)
            ends = dict.fromkeys(f"{value:.4g}" for value in (values[0], values[-1]))
            absent.append(f"{model} ({' to '.join(ends)})")
    return [point for point in points if point["model"] in kept], absent


def _is_focus(point: Row, stage: Stage) -> bool:
    return point["stage"] == stage and point["role"] in ("recurrent", "static")


def _edges(points: Sequence[Row], models: Collection[str]) -> list[float]:
    return [
        edge
        for point in points
        if point["model"] in models
        for edge in (point["low"], point["high"])
    ]


def _fits_in(edges: Sequence[float], focus: Sequence[float]) -> bool:
    return max(edges) - min(edges) <= _WIDEST * (max(focus) - min(focus))


def _x_encoding(points: Sequence[Row], x: XAxis) -> alt.X:
    column = COLUMNS[x]
    values = sorted({point[column] for point in points if is_finite(point[column])})
    match x:
        case "depth":
            scale = alt.Scale(type="log", base=2, domain=span([1, 2, *values], log=True))
            axis = alt.Axis(values=values, format="d", grid=False)
        case "FLOPs":
            scale = alt.Scale(type="log", domain=span(values, log=True))
            axis = alt.Axis(format=".3~s", tickCount=6, labelOverlap=True, grid=False)
        case _:
            scale = alt.Scale(domain=span(values))
            axis = alt.Axis(format="~g", tickCount=6, labelOverlap=True, grid=False)
    return alt.X(f"{column}:Q", title=_X_TITLES[x], scale=scale, axis=axis)


def _finding(rows: Sequence[Row], measure: Measure) -> str:
    """Say where the loop does best, after training and before it, of the first run of each."""
    best_of, most = (max, "highest") if measure.higher_is_better else (min, "lowest")
    what = "loss" if rows[0]["kind"] == "loss" else measure.name
    places = []
    for stage, when in (("after", "after training"), ("before", "before training")):
        loops = [
            row
            for row in rows
            if (row["role"], row["stage"]) == ("recurrent", stage) and is_finite(row["value"])
        ]
        runs = distinct(loops, "model")
        if len(runs) > 1:
            when += f" ({runs[0]})"
        own = [row for row in loops if row["model"] == runs[0]]
        if len({row["value"] for row in own}) == 1:
            places.append(f"the same at every depth {when}")
        elif own:
            best = best_of(own, key=lambda row: row["value"])
            places.append(f"{most} at r = {best['num_recurrences']} {when}")
    return f"{what} is {', '.join(places)}" if places else f"{what} without a loop"
