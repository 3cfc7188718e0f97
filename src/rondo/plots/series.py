"""Curves along a run or along the loop: loss against training FLOPs, states by iteration."""

from collections.abc import Sequence
from typing import Literal

from rondo.plots.theme import (
    Row,
    alt,
    color,
    distinct,
    finish,
    is_finite,
    isolating,
    layer,
    place_labels,
    shape,
    span,
    styles,
    tooltip,
)

StateMeasure = Literal["step", "kl_to_last", "loss"]

_HEIGHT = 260
_STATES: dict[StateMeasure, tuple[str, str, str, bool]] = {
    "step": (
        "How far the state moves",
        "step / norm of the state (log)",
        "Falling: it settles.",
        True,
    ),
    "kl_to_last": (
        "How far its prediction is from the last",
        "KL to the last iteration (nats, log)",
        "Through coda and head after each iteration.",
        True,
    ),
    "loss": (
        "What each iteration would predict",
        "loss of the next token (nats)",
        "Through coda and head after each iteration.",
        False,
    ),
}
_STATE_TOOLTIP = (
    ("model", "model", None),
    ("x", "iteration", None),
    ("step", "step / norm", ".3~g"),
    ("state_norm", "norm of the state", ".3~g"),
    ("cosine", "cosine to the state before", ".4f"),
    ("loss", "loss", ".4f"),
    ("kl_to_last", "KL to the last", ".3~g"),
    ("agreement", "agreement with the last", ".1%"),
    ("entropy", "entropy (nats)", ".3f"),
)
_TRAINING_TOOLTIP = (
    ("series", "curve", None),
    ("y", "loss (nats per token)", ".4f"),
    ("step", "step", ","),
    ("tokens", "training tokens", ",.3~s"),
    ("x", "training FLOPs", ".4~s"),
)
_CHECKPOINT_TOOLTIP = (
    ("model", "model", None),
    ("y", "score (%)", ".2f"),
    ("num_recurrences", "recurrence r", None),
    ("step", "step", ","),
    ("x", "training FLOPs", ".3~e"),
)


def training_chart(rows: Sequence[Row], fits: Sequence[Row] = ()) -> Row:
    """Draw the loss of trained models against executed training FLOPs.

    Args:
        rows: `model`, `role`, `stage`, `kind` (training, or what was held out), `step`, `tokens`,
            `flops` and `loss`, in the order of the steps.
        fits: Points of fitted curves: `model`, `flops` and `loss`.
    """
    points: list[Row] = [
        {key: row[key] for key in ("model", "role", "stage", "kind", "step", "tokens")}
        | {"series": f"{row['model']}, {row['kind']}", "x": row["flops"], "y": row["loss"]}
        for row in rows
        if is_finite(row["flops"]) and row["flops"] > 0 and is_finite(row["loss"])
    ]
    x_span, y_span = _without_warmup(points)
    early = any(point["x"] < x_span[0] or point["y"] > y_span[1] for point in points)
    said = ["Thick: held-out text. Faint: the training's own loss, on other text."]
    said += ["Thin: the fit."] if fits else []
    said += ["The first steps lie off the chart."] if early else []
    seen = {point["model"] for point in points if point["y"] <= y_span[1]}
    absent = [model for model in distinct(points, "model") if model not in seen]
    said += [f"Above the chart: {', '.join(absent)}."] if absent else []
    points = [point for point in points if point["model"] in seen]
    held_out = [point for point in points if point["kind"] != "training"]
    data = {
        "points": [point for point in points if point["x"] >= x_span[0]],
        "training": [point for point in points if point["kind"] == "training"],
        "held out": held_out,
        "fit": [{"model": fit["model"], "x": fit["flops"], "y": fit["loss"]} for fit in fits],
        "labels": place_labels(held_out or points, y_span, _HEIGHT),
    }
    x = _along_flops("executed training FLOPs (log)", x_span, ".3~s")
    scale = alt.Scale(domain=y_span, nice=False)
    y = alt.Y("y:Q", title="loss (nats per token)", scale=scale, axis=alt.Axis(tickCount=6))
    detail = alt.Detail("series:N")
    by_color, by_shape = _styled(points)
    faint = layer("training").mark_line(strokeWidth=1, clip=True)
    thick = layer("held out").encode(x, y, by_color, isolating(), detail)
    layers = [
        faint.encode(x, y, by_color, isolating(0.45), detail),
        layer("fit").mark_line(strokeWidth=1, clip=True).encode(x, y, by_color, isolating(0.8)),
        thick.mark_line(strokeWidth=2, clip=True),
        thick.encode(by_shape).mark_point(filled=True, size=36, clip=True),
        *_labelled(y, by_color, by_shape),
        _hover(x, y, _TRAINING_TOOLTIP),
    ]
    return finish(layers, data, "Loss against training FLOPs", " ".join(said), _HEIGHT)


def checkpoints_chart(rows: Sequence[Row], task: str, axis_title: str) -> Row:
    """Draw what checkpoints score against their training FLOPs, each at its trained depth.

    Args:
        rows: `model`, `role`, `stage`, `step`, `flops`, `num_recurrences` and `value`, a share.
        task: What was scored.
        axis_title: Of what is drawn upwards, in percent.
    """
    points: list[Row] = [
        {**row, "series": row["model"], "x": row["flops"], "y": 100 * row["value"]}
        for row in rows
        if row["flops"] > 0 and is_finite(row["value"])
    ]
    y_span = span([point["y"] for point in points])
    x_span = span([point["x"] for point in points], log=True)
    x = _along_flops("training FLOPs (log)", x_span, "~e")
    scale = alt.Scale(domain=y_span, nice=False)
    y = alt.Y("y:Q", title=axis_title, scale=scale, axis=alt.Axis(tickCount=6))
    layers = [*_lines(points, x, y, _CHECKPOINT_TOOLTIP), *_labelled(y, *_styled(points))]
    data = {"points": points, "labels": place_labels(points, y_span, _HEIGHT)}
    said = "Each model at the depth it was trained with; before its end the learning rate is high."
    title = f"{task}: checkpoints against training FLOPs"
    return finish(layers, data, title, said, _HEIGHT)


def states_chart(rows: Sequence[Row], measure: StateMeasure) -> Row:
    """Draw one measure of the loop's states by iteration, one line per model.

    Args:
        rows: `model`, `role`, `stage`, and the columns of `states.iterations` in results.json.
        measure: What is drawn upwards.
    """
    title, axis_title, said, log = _STATES[measure]
    points: list[Row] = [
        {**row, "series": row["model"], "x": row["iteration"], "y": row[measure]}
        for row in rows
        # A logarithm has no place for the 0 of the last iteration's distance to itself.
        if is_finite(row[measure]) and (row[measure] > 0 or not log)
    ]
    y_span = span([point["y"] for point in points], log)
    iterations = sorted({point["x"] for point in points})
    axis = alt.Axis(tickMinStep=1, format="d", grid=False, tickCount=min(8, len(iterations)))
    scale = alt.Scale(domain=span(iterations), nice=False)
    x = alt.X("x:Q", title="iteration", scale=scale, axis=axis)
    scale = alt.Scale(type="log" if log else "linear", domain=y_span, nice=False)
    y_axis = alt.Axis(tickCount=5, format="~g")
    y = alt.Y("y:Q", title=axis_title, scale=scale, axis=y_axis)
    layers = _lines(points, x, y, _STATE_TOOLTIP)
    return finish(layers, {"points": points}, title, said, 200)


def _lines(
    points: Sequence[Row], x: alt.X, y: alt.Y, entries: Sequence[tuple[str, str, str | None]]
) -> list[alt.Chart]:
    by_color, by_shape = _styled(points)
    lines = layer("points").encode(x, y, by_color, isolating())
    return [
        lines.mark_line(strokeWidth=2),
        lines.encode(by_shape).mark_point(filled=True, size=45),
        _hover(x, y, entries),
    ]


def _along_flops(title: str, x_span: Sequence[float], form: str) -> alt.X:
    scale = alt.Scale(type="log", domain=list(x_span))
    axis = alt.Axis(format=form, tickCount=6, labelOverlap=True, grid=False)
    return alt.X("x:Q", title=title, scale=scale, axis=axis)


def _without_warmup(points: Sequence[Row]) -> tuple[list[float], list[float]]:
    """Span, in x and y, what comes after the first tenth of each run.

    The random twin starts at a loss that would flatten all others, so it sets no scale unless it
    is alone.
    """
    known = [point for point in points if point["role"] != "random"] or list(points)
    settled: list[Row] = []
    for series in distinct(known, "series"):
        own = [point for point in known if point["series"] == series]
        settled += own[len(own) // 10 :]
    x_span = span([point["x"] for point in settled], log=True)
    return x_span, span([point["y"] for point in settled])


def _styled(points: Sequence[Row]) -> tuple[alt.Color, alt.Shape]:
    models = distinct(points, "model")
    colors, shapes = zip(*styles(points).values(), strict=True)
    return (
        color("model", models, colors).legend(None),
        shape("model", models, shapes).legend(None),
    )


def _labelled(y: alt.Y, by_color: alt.Color, by_shape: alt.Shape) -> list[alt.Chart]:
    labels = layer("labels").encode(alt.XValue("width"), y, isolating())
    return [
        labels.mark_point(filled=True, size=50, xOffset=14)
        .encode(by_color, by_shape)
        .properties(name="label_symbols"),
        labels.mark_text(align="left", dx=24, limit=230)
        .encode(alt.Text("series:N"))
        .properties(name="labels"),
    ]


def _hover(x: alt.X, y: alt.Y, entries: Sequence[tuple[str, str, str | None]]) -> alt.Chart:
    return (
        layer("points")
        .mark_point(filled=True, size=500, opacity=0, clip=True)
        .encode(x, y, tooltip=[tooltip(*entry) for entry in entries])
    )
