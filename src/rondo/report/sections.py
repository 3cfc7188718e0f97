"""The sections of a report that are about runs and their states rather than a task."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from rondo import plots, verdict
from rondo.evaluation import controls, fits
from rondo.report import words
from rondo.report.parts import Json, Line, Section, Table, draw, tabulate, training_cost

# More points than this are not seen apart in a chart, nor lines of a table read.
_MOST_POINTS, _MOST_LINES = 150, 12
_STATE_MEASURES: tuple[plots.StateMeasure, ...] = ("step", "kl_to_last", "loss")
# As `evaluation.states.behaviour` defines them.
BEHAVIOURS = {
    "settles": "the state settles: its movements shrink, or its last step is next to nothing",
    "orbits": "the state orbits: it keeps moving, and not one way; it circles, swings, or wanders",
    "drifts": "the state drifts: it keeps moving, and one way",
    "diverges": "the state diverges: its movements grow, or a number in it is none",
    "unclear": "fewer than three iterations, too few to say what the state does",
}


def training(results: Sequence[Json]) -> list[Section]:
    """Set the loss of all runs against what their training cost."""
    runs = [result for result in results if result["model"]["training"]]
    if not runs:
        return []
    notes = [f"{run['model']['label']}: {training_cost(run['model'])}" for run in runs]
    curves = [run for run in runs if run["model"].get("curve")]
    rows = [row for run in curves for row in _curve(run["model"])]
    findings, fitted = [], []
    for run in curves:
        fit, found = fits.training_fit(run)
        label = run["model"]["label"]
        findings += [replace(finding, name=f"{finding.name}, {label}") for finding in found]
        flops = [point["flops"] for point in run["model"]["curve"] if point["flops"]]
        if fit and flops:
            # A straight grid on the chart's logarithmic axis, from where the warm-up is over.
            grid = np.geomspace(flops[len(flops) // 10], flops[-1], 40).tolist()
            fitted += [{"model": label, "flops": x, "loss": float(fit.predict(x))} for x in grid]
    main = verdict.subject(results)
    if main in curves:
        for other in curves:
            if other is not main:
                finding = controls.equal_flops_losses(main, other)
                name = f"{finding.name}, against {other['model']['label']}"
                findings.append(replace(finding, name=name))
    figures, tables = [], []
    if any(row["flops"] and row["loss"] is not None for row in rows):
        figures = [draw("training.svg", {"": plots.training_chart(rows, fitted)})]
    if findings:
        tables.append(tabulate("Laws, and losses at equal cost", findings))
    if curves:
        head = ["model", "step", "training tokens", "training FLOPs", "training loss", "held out"]
        lines = [line for run in curves for line in _curve_lines(run["model"])]
        tables.append(Table("Table of this chart", head, lines))
    return [Section("What the training bought", figures, notes, tables)]


def _curve(model: Json) -> Iterable[Json]:
    """Yield the points of a run to draw: its own loss, and what was held out by depth."""
    about = {key: model[key] for key in ("role", "stage")} | {"model": model["label"]}
    for point in _thinned(model["curve"], _MOST_POINTS):
        yield about | point | {"kind": "training"}
    held_out = [point for point in model["curve"] if point.get("validation")]
    for point in _thinned(held_out, _MOST_POINTS):
        for depth, loss in point["validation"].items():
            kind = f"r = {depth}" if model["split"] else "held out"
            yield about | point | {"kind": kind, "loss": loss}


def _curve_lines(model: Json) -> Iterable[Line]:
    for point in _thinned(model["curve"], _MOST_LINES):
        held_out = ", ".join(
            f"r = {depth}: {words.number(loss, '.4f')}"
            for depth, loss in (point.get("validation") or {}).items()
        )
        yield [
            model["label"],
            words.number(point["step"], ","),
            words.si(point["tokens"]),
            words.si(point["flops"]),
            words.number(point["loss"], ".4f"),
            held_out or words.NONE,
        ]


def _thinned(points: Sequence[Json], most: int) -> list[Json]:
    """Keep so many points, evenly, with the first and the last."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def states_of(results: Sequence[Json]) -> list[Section]:
    """Tell what the loop does to its state."""
    having = [result for result in results if result.get("states")]
    if not having:
        return []
    rows, notes, lines = [], [], []
    for result in having:
        model, states = result["model"], result["states"]
        behaviour = BEHAVIOURS[states["behaviour"]]
        notes.append(
            f"{model['label']}: {behaviour} (gain {words.number(states['gain'], '.3g')} per "
            f"iteration, {states['tokens']:,} tokens of {states['text']})."
        )
        about = {key: model[key] for key in ("role", "stage")} | {"model": model["label"]}
        rows += [about | point for point in states["iterations"]]
        lines += [
            [
                model["label"],
                str(point["iteration"]),
                *(words.number(point[key], ".4g") for key in ("step", "cosine", "state_norm")),
                words.number(point["loss"], ".4f"),
                words.number(point["kl_to_last"], ".3g"),
                words.number(point["agreement"], ".1%"),
                words.number(point["entropy"], ".3f"),
            ]
            for point in states["iterations"]
        ]
    figures = [
        draw(f"states-{measure.replace('_', '-')}.svg", {"": plots.states_chart(rows, measure)})
        for measure in _STATE_MEASURES
        if any(row[measure] for row in rows)
    ]
    head = ["model", "iteration", "step / norm", "cosine to the one before", "norm", "loss"]
    head += ["KL to the last", "agreement with the last", "entropy"]
    return [
        Section("Inside the loop", figures, notes, [Table("Table of these charts", head, lines)])
    ]
