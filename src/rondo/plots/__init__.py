"""The figures of the reports, each defined once: interactive in HTML, still as SVG.

The only user of altair and vl-convert, which come with the extra `report`. Charts are made of plain
rows (dicts), are Vega-Lite as a browser takes it, and as wide as their container; `to_svg` fixes
the width. Text in the charts names no colour, so that a page can restyle it for a dark background.
"""

from rondo.plots.depth import (
    COLUMNS,
    X_AXES,
    Measure,
    Stage,
    XAxis,
    depth_chart,
    drawn_models,
    measures_of,
    x_encodings,
)
from rondo.plots.probe import core_chart, layer_chart
from rondo.plots.series import (
    StateMeasure,
    checkpoints_chart,
    states_chart,
    training_chart,
)
from rondo.plots.theme import Row, javascript, to_svg

__all__ = [
    "COLUMNS",
    "X_AXES",
    "Measure",
    "Row",
    "Stage",
    "StateMeasure",
    "XAxis",
    "checkpoints_chart",
    "core_chart",
    "depth_chart",
    "drawn_models",
    "javascript",
    "layer_chart",
    "measures_of",
    "states_chart",
    "to_svg",
    "training_chart",
    "x_encodings",
]
