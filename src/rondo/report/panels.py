"""One task of a report: its curve, the verdict on it, its numbers."""

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rondo import plots, verdict
from rondo.evaluation import controls, fits, measures
from rondo.evaluation.comparisons import Finding, is_share
from rondo.report import words
from rondo.report.parts import Figure, Json, Table, draw, tabulate

# What answers begin with ("No" last, as others begin with it).
WORDS = ("Yes", "Not shown", "Not known", "No")
PRICE = "price per million tokens"
# What must stand beside a claimed gain.
_CONTROLS = ("blind depth", "static twin", "parent")


@dataclass(frozen=True, slots=True)
class Panel:
    """One task: its curve, its verdict, its numbers."""

    task: str
    about: str
    marks: list[tuple[str, str]]
    """What is asked in two words, and the word of the answer; the weightiest first."""
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
    findings = controls.depth_controls(having, task)
    if verdict.claims_gain(having):
        demand_controls(task, findings)
    equivalence = fits.recurrence_equivalence(having, task)
    share = is_share(facts["metric"])
    checkpoints = _checkpoints(task, having)
    figures = _depth_figures(number, drawn, plots.measures_of(facts, share), fitted)
    tables = [_numbers(here, facts["kind"])]
    if checkpoints:
        tables.append(_checkpoint_table(checkpoints, facts["metric"]))
    if checkpoints and share:
        chart = plots.checkpoints_chart(checkpoints, task, f"{facts['metric']} (%)")
        name = f"checkpoints-{number}-{_slug(task)}.svg"
        figures.append(draw(name, {facts["metric"]: chart}))
    return Panel(
        task=task,
        about=_about(facts),
        marks=_marks(answers),
        glance=_glance(curve, facts),
        spark=_spark([row["value"] for row in curve], facts["higher_is_better"]),
        answers=answers,
        figures=figures,
        tables=tables,
        measures=[
            tabulate(
                f"What depth does: {label}",
                [*measures.depth_measures(result, task), *fitted[label][1]],
            )
            for result in recurrent
            for label in [result["model"]["label"]]
        ],
        controls=tabulate(
            "What a gain must beat", [*findings, *([equivalence] if equivalence else [])]
        ),
    )


def demand_controls(task: str, findings: Iterable[Finding]) -> None:
    """Insist that a claimed gain stands beside its controls, measured or said to be unknown."""
    told = {
        found.name
        for found in findings
        if found.value is not None or found.sentence.startswith("Not known")
    }
    # Of a single depth one finding says that there is nothing to hold it against.
    alone = any(found.name == "controls" for found in findings)
    lacking = [name for name in _CONTROLS if name not in told and not alone]
    assert not lacking, f"{task} claims a gain without its controls: {', '.join(lacking)}"


def _split_word(answer: str, task: str) -> tuple[str, str]:
    """Take off the word that an answer begins with, and the task, under whose name it stands."""
    word = next(word for word in WORDS if answer.startswith(word))
    return word, answer.removeprefix(word).removeprefix(f" on {task}").lstrip(": ")


def _marks(answers: Sequence[tuple[str, str, str]]) -> list[tuple[str, str]]:
    """Pick what a tile has room for: does depth beat the static twin of equal cost, and r = 1."""
    twin = [(question, word) for question, word, _ in answers if "the static twin" in question]
    equal = [word for question, word in twin if "equal training FLOPs" in question]
    word = equal[0] if equal else "Not known"
    # Of unequal budgets a win may be the budget's; what is no win is none.
    if word == "Not known" and twin and twin[0][1] != "Yes":
        word = twin[0][1]
    marks = [("beats twin", word)] if twin else []
    depth = (word for question, word, _ in answers if "does depth help" in question)
    return [*marks, ("depth helps", next(depth))]


def _about(facts: Json) -> str:
    what = ", ".join(dict.fromkeys([facts["kind"], facts["metric"]]))
    size = f", {facts['tokens']:,} tokens" if facts.get("tokens") else ""
    few = facts["num_fewshot"]
    shots = f", {few} solved example{'s' if few > 1 else ''} before each" if few else ""
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
    value = words.score(best["value"], facts["metric"])
    if len(finite) < 2 or best is finite[0]:
        return f"r = {best['num_recurrences']}: {value}"
    first = words.score(finite[0]["value"], facts["metric"])
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
    number: int,
    rows: Sequence[Json],
    drawable: Sequence[plots.Measure],
    fitted: dict[str, Any],
) -> list[Figure]:
    """Draw a task: what was trained, and then what was not if one scale cannot hold both."""
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


def _checkpoints(task: str, results: Sequence[Json]) -> list[Json]:
    """Collect what the training had bought at each scored step, at the trained depth."""
    return [
        {"model": model["label"], "role": model["role"], "stage": model["stage"]}
        | {"flops": flops, "num_recurrences": depth, "step": step, "value": score}
        for result in results
        for model in [result["model"]]
        for flops, depth, step, score in controls.checkpoint_scores(result, task)
    ]


def _checkpoint_table(rows: Sequence[Json], metric: str) -> Table:
    lines = [
        [
            row["model"],
            f"{row['step']:,}",
            f"{row['flops']:.3g}",
            str(row["num_recurrences"]),
            words.score(row["value"], metric),
        ]
        for row in rows
    ]
    return Table("Table of checkpoints", ["model", "step", "training FLOPs", "r", metric], lines)


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
        "value \u00b1 stderr": lambda row: words.score(row["value"], row["metric"], row["stderr"]),
        "bits per byte": lambda row: words.number(row.get("bits_per_byte"), ".4f"),
        "each seed": lambda row: ", ".join(
            words.score(value, row["metric"]) for value in row["seed_values"]
        ),
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
