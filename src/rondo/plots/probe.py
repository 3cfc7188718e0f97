"""The figures of a probe: which layers can be looped, and what that does untrained."""

import math
from collections.abc import Sequence

from rondo.plots.theme import (
    BLUE,
    BROWN,
    GREEN,
    GREY,
    SPARE_COLORS,
    VERMILION,
    Row,
    alt,
    color,
    distinct,
    finish,
    is_finite,
    layer,
    shape,
    span,
)

_DIFFERENCE_TICKS = (-3, -1, -0.3, -0.1, -0.03, -0.01, 0, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)


def layer_chart(rows: Sequence[Row]) -> Row:
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
    shades: list[Row] = [{"from": number - 0.5, "to": number + 0.5} for number in core]
    scale = alt.Scale(domain=[-0.5, rows[-1]["layer"] + 0.5], nice=False)
    axis = alt.Axis(tickMinStep=1, format="d", grid=False)
    title = "layer of the parent"
    lines = layer("points").encode(
        x=alt.X("layer:Q", title=title, scale=scale, axis=axis),
        # A root shows the small changes of the middle beside the large ones of the outer layers.
        y=alt.Y("change:Q", title="change (root scale)", scale=alt.Scale(type="sqrt", zero=True)),
        color=color("measure", measures, (BLUE, VERMILION)),
        shape=shape("measure", measures),
        tooltip=["layer:Q", "part:N", "measure:N", alt.Tooltip("change:Q", format=".4f")],
    )
    layers = [
        layer("core")
        .mark_rect(opacity=0.16, color=BLUE)
        .encode(x=alt.X("from:Q", title=title, scale=scale, axis=axis), x2="to:Q"),
        lines.mark_line(strokeWidth=1.5),
        lines.mark_point(filled=True, size=45, opacity=1),
    ]
    finding = f"Layers {core[0]} to {core[-1]} are the core" if core else "Change by layer"
    subtitle = "How much each layer changes the state; 0 is not at all. Shaded: the core."
    return finish(layers, {"points": points, "core": shades}, finding, subtitle, 220)


def core_chart(rows: Sequence[Row]) -> Row:
    """Draw what looping each candidate core does to the parent's loss, the best on top.

    Args:
        rows: `core` (a name, such as '12-18'), `num_recurrences`, `mixing`, `difference` (loss
            less the parent's) and `chosen`.
    """
    points: list[Row] = [
        {**row, "depth": f"r = {row['num_recurrences']}", "start": f"mixing {row['mixing']:g}"}
        for row in sorted(rows, key=lambda row: (row["num_recurrences"], row["mixing"]))
        if is_finite(row["difference"])
    ]
    best: dict[str, float] = {}
    for point in points:
        best[point["core"]] = min(point["difference"], best.get(point["core"], math.inf))
    order = sorted(best, key=best.__getitem__)
    chosen = next((point["core"] for point in points if point["chosen"]), order[0])
    low, high = span([0.0, *(point["difference"] for point in points)])
    x = alt.X(
        "difference:Q",
        title="loss less the parent's (nats per token, log away from 0)",
        # Bad cores are worse by orders of magnitude than good ones are better.
        scale=alt.Scale(type="symlog", constant=0.02, domain=[low, high], nice=False),
        axis=alt.Axis(values=[t for t in _DIFFERENCE_TICKS if low <= t <= high], format="~g"),
    )
    y = alt.Y("core:N", title="candidate core", sort=order, axis=alt.Axis(grid=True))
    depths, starts = distinct(points, "depth"), distinct(points, "start")
    layers = [
        layer("chosen")
        .mark_rect(opacity=0.16, color=BLUE)
        .encode(y=y, x=alt.XValue(0), x2=alt.X2Value("width")),
        layer("parent").mark_rule(strokeDash=[4, 3], color=GREY).encode(x=x),
        layer("points")
        .mark_point(filled=True, size=75, opacity=0.9)
        .encode(
            x=x,
            y=y,
            color=color("depth", depths, (BLUE, VERMILION, GREEN, BROWN, *SPARE_COLORS)),
            shape=shape("start", starts),
            tooltip=["core:N", "depth:N", "start:N", alt.Tooltip("difference:Q", format="+.4f")],
        ),
    ]
    change = best[chosen]
    effect = f"lowers the loss by up to {-change:.4f}"
    if change >= 0:
        effect = f"raises the loss by {change:.4f} or more"
    subtitle = "Untrained. Left of the dashed line is better than the parent. Shaded: the choice."
    data = {"points": points, "chosen": [{"core": chosen}], "parent": [{"difference": 0}]}
    return finish(layers, data, f"Looping core {chosen} {effect}", subtitle, {"step": 20})
