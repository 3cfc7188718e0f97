"""What a report is put together from: figures and tables, in plain text."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rondo import plots
from rondo.evaluation.comparisons import Finding
from rondo.report import words

Json = dict[str, Any]
Line = Sequence[str]


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure: still for Markdown, and in the variants between which the page switches."""

    file: str
    svg: str
    specs: dict[str, Json]
    """By what is drawn upwards."""
    axes: dict[Any, Json]
    """What replaces the encoding of x, by the axis."""

    @property
    def title(self) -> str:
        """What the still picture shows."""
        return next(iter(self.specs.values()))["description"]


@dataclass(frozen=True, slots=True)
class Table:
    """Lines of text under a head; `title` tells what is in it."""

    title: str
    head: Line
    lines: Sequence[Line]
    said: bool = False
    """Whether it holds sentences, and is open at once."""


@dataclass(frozen=True, slots=True)
class Section:
    """Figures with what they mean in words, and their tables."""

    title: str
    figures: list[Figure]
    notes: list[str]
    tables: list[Table]


def draw(file: str, charts: dict[str, Json], axes: dict[Any, Json] | None = None) -> Figure:
    """Render charts by what is drawn upwards; the first is the still picture."""
    return Figure(file, plots.to_svg(next(iter(charts.values()))), charts, axes or {})


def tabulate(title: str, findings: Iterable[Finding]) -> Table:
    """Put findings in a table."""
    lines = [[f.name, words.interval(f.value, f.low, f.high, f.unit), f.sentence] for f in findings]
    return Table(title, ["measure", "value (95% interval)", "in words"], lines, said=True)


def training_cost(model: Json) -> str:
    """Tell what was trained at what cost."""
    training = model["training"]
    if not training:
        trained = model["stage"] == "after"
        return "How it was trained is not known here." if trained else "Nothing was trained."
    depth = f", recurrence {training['recurrence']}" if model["split"] else ""
    flops = f"{words.si(training['flops'])} FLOPs"
    if training["flops"] is None and training["flops_paper"]:
        flops = f"{training['flops_paper']:.3g} FLOPs in the paper's account"
    time = f", {training['seconds']:,.0f} s" if training["seconds"] else ""
    seed = "seed not known" if training["seed"] is None else f"seed {training['seed']}"
    return (
        f"Trained on {words.number(training['tokens'], ',')} tokens of {training['data']} in "
        f"{words.number(training['steps'], ',')} steps: {flops}{time} (loss "
        f"{training['loss']}{depth}, {seed})."
    )
