"""One task of a report: its curve, the verdict on it, its numbers."""

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rondo import plots, verdict
from rondo.evaluation import controls, fits, measures
from rondo.report import words
from rondo.report.parts import Figure, Json, Table, draw, tabulate

# What answers begin with ("No" last, as others begin with it).
WORDS = ("Yes", "Not shown", "Not known", "No")
PRICE = "price per million tokens"


@dataclass(frozen=True, slots=True)
class Panel:
    """One task: its curve, its verdict, its numbers."""

    task: str
    about: str
    word: str
    glance: str
    spark: str
    """Points of a small curve in a box of 100 x 30."""
    answers: list[tuple[str, str, str]]
    """Question, the word that its answer begins with, and the rest of it."""
    figures: list[Figure]
    tables: list[Table]
    measures: list[Table]
    controls: Table


def panel(number: int, task: str, results: Sequence[Json], rows: Sequence[Json]) -> Panel:
    """Put together what the results say on one task; `rows` are all of theirs, flat."""
    having = on_task(results, task)
    main = verdict.subject(having)
    facts = main["tasks"][task]
    here = [row for row in rows if row["task"] == task]
    drawn = [row for row in here if row["metric"] == facts["metric"]]
    recurrent = [result for result in having if result["model"]["role"] == "recurrent"]
    fitted = {result["model"]["label"]: fits.depth_fit(result, task) for result in recurrent}
    curve = [row for row in drawn if row["model"] == main["model"]["label"]]
    answers = [
        (question, *_split_word(answer, task))
        for question, given in verdict.judge(having)
        for answer in given
    ]
    equivalence = fits.recurrence_equivalence(having, task)
    findings = [*controls.depth_controls(having, task), *([equivalence] if equivalence else [])]
    return Panel(
        task=task,
        about=_about(facts),
        word=answers[0][1] if answers else "Not known",
        glance=_glance(curve, facts),
        spark=_spark([row["value"] for row in curve], facts["higher_is_better"]),
        answers=answers,
        figures=[
            *_depth_figures(number, drawn, facts, fitted),
            *_checkpoint_figures(number, task, having),
        ],
        tables=[_numbers(here, facts["kind"])],
        measures=[
            tabulate(
                f"What depth does: {label}",
                [*measures.depth_measures(result, task), *fitted[label][1]],
            )
            for result in recurrent
            for label in [result["model"]["label"]]
        ],
        controls=tabulate("What a gain must beat", findings),
    )


def _split_word(answer: str, task: str) -> tuple[str, str]:
    """Take off the word that an answer begins with, and the task, under whose name it stands."""
    word = next(word for word in WORDS if answer.startswith(word))
    return word, answer.removeprefix(word).removeprefix(f" on {task}").lstrip(": ")


def _about(facts: Json) -> str:
    what = ", ".join(dict.fromkeys([facts["kind"], facts["metric"]]))
    size = f", {facts['tokens']:,} tokens" if facts.get("tokens") else ""
    shots = f", {facts['num_fewshot']} solved examples before each" if facts["num_fewshot"] else ""
    chance = f", chance {facts['chance']:.0%}" if facts["chance"] else ""
    known = f"sha256 {facts['sha256'][:12]}" if facts["sha256"] else "as published, without items"
    return f"{what}, {facts['items']:,} items{size}{shots}{chance}, {facts['source']}, {known}"


def _glance(curve: Sequence[Json], facts: Json) -> str:
    """Say the best depth in a few characters."""
    finite = [row for row in curve if row["value"] is not None and math.isfinite(row["value"])]
    if not finite:
        return "no finite value"
    best_of = max if facts["higher_is_better"] else min
    best = best_of(finite, key=lambda row: row["value"])
    value = words.score(best["value"], facts["kind"])
    if len(finite) < 2 or best is finite[0]:
        return f"r = {best['num_recurrences']}: {value}"
    first = words.score(finite[0]["value"], facts["kind"])
    return f"{first} to {value} at r = {best['num_recurrences']}"


def _spark(values: Sequence[float | None], higher_is_better: bool) -> str:
    """Place a curve in a box of 100 x 30, better above."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if len(finite) < 2:
        return ""
    low, high = min(finite), max(finite)
    points = []
    for index, value in enumerate(finite):
        share = (value - low) / (high - low) if high > low else 0.5
        height = share if higher_is_better else 1 - share
        points.append(f"{4 + 92 * index / (len(finite) - 1):.1f},{26 - 22 * height:.1f}")
    return " ".join(points)


def _depth_figures(
    number: int, rows: Sequence[Json], facts: Json, fitted: dict[str, Any]
) -> list[Figure]:
    """Draw a task: what was trained, and then what was not if one scale cannot hold both."""
    drawable = plots.measures_of(facts)
    name = f"{number}-{_slug(rows[0]['task'])}"
    figures: list[Figure] = []
    seen: set[str] = set()
    stages: tuple[plots.Stage, ...] = ("after", "before")
    for stage in stages:
        loops = {
            row["model"] for row in rows if (row["role"], row["stage"]) == ("recurrent", stage)
        }
        if loops <= seen if figures else not loops and stage == "after":
            continue
        models = plots.drawn_models(rows, drawable[0], stage)
        seen |= models
        charts = {
            measure.name: plots.depth_chart(rows, measure, stage, fits=_fit_lines(rows, fitted))
            for measure in drawable
            if plots.drawn_models(rows, measure, stage)
        }
        if charts:
            axes = plots.x_encodings(rows, drawable[0], stage)
            figures.append(draw(f"depth-{name}-{stage}.svg", charts, axes))
    return figures


def _checkpoint_figures(number: int, task: str, results: Sequence[Json]) -> list[Figure]:
    """Draw what training bought, where checkpoints were scored."""
    rows = [
        {"model": model["label"], "role": model["role"], "stage": model["stage"]}
        | {"flops": flops, "num_recurrences": depth, "step": step, "value": score}
        for result in results
        for model in [result["model"]]
        for flops, depth, step, score in controls.checkpoint_scores(result, task)
    ]
    if not rows or results[0]["tasks"][task]["kind"] == "loss":
        return []
    metric = results[0]["tasks"][task]["metric"]
    chart = plots.checkpoints_chart(rows, task, f"{metric} (%)")
    return [draw(f"checkpoints-{number}-{_slug(task)}.svg", {"": chart})]


def _slug(task: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", task.lower()).strip("-")[:40]


def _fit_lines(rows: Sequence[Json], fitted: dict[str, Any]) -> list[Json]:
    """Follow each fit between the depths it was made of; what depth costs rises evenly."""
    lines = []
    for label, (fit, _) in fitted.items():
        own = [row for row in rows if row["model"] == label]
        if fit is None or len(own) < 2:
            continue
        for one, other in itertools.pairwise(own):
            for step in range(9):
                share = step / 8
                point = {"model": label}
                for column in plots.COLUMNS.values():
                    if one[column] is not None and other[column] is not None:
                        point[column] = one[column] + share * (other[column] - one[column])
                lines.append(point | {"value": float(fit.predict(point["num_recurrences"]))})
    return lines


def _numbers(rows: Sequence[Json], kind: str) -> Table:
    """Tabulate all of a task's metrics."""
    metrics = dict.fromkeys(row["metric"] for row in rows)
    columns = {
        "model": lambda row: row["model"],
        "metric": lambda row: row["metric"],
        "r": lambda row: str(row["num_recurrences"]),
        "value \u00b1 stderr": lambda row: words.score(row["value"], kind, row["stderr"]),
        "bits per byte": lambda row: words.number(row.get("bits_per_byte"), ".4f"),
        "each seed": lambda row: ", ".join(words.score(v, kind) for v in row["seed_values"]),
        "FLOPs per token": lambda row: words.si(row["flops_per_token"]),
        "KV bytes per token": lambda row: words.number(row["kv_bytes_per_token"], ",.0f"),
        "ms per token": lambda row: words.number(row["ms_per_token"], ".3g"),
        PRICE: lambda row: words.number(row["price"], ".3g"),
        "peak memory": lambda row: words.si(row["peak_memory_bytes"], "B"),
    }
    if len(metrics) == 1:
        del columns["metric"]
    if kind != "loss":
        del columns["bits per byte"]
    if all(len(row.get("seed_values") or ()) < 2 for row in rows):
        del columns["each seed"]
    lines = [[write(row) for write in columns.values()] for row in rows]
    return Table("Table of this chart", list(columns), lines)


def on_task(results: Iterable[Json], task: str) -> list[Json]:
    """Return the results that have a task, as if they had no other."""
    return [
        {**result, "tasks": {task: result["tasks"][task]}}
        for result in results
        if task in result["tasks"]
    ]
