"""All that a report says, in plain text and figures, whatever it is written in."""

from collections.abc import Sequence
from dataclasses import dataclass

from rondo import verdict
from rondo.report import words
from rondo.report.panels import Panel, panel
from rondo.report.parts import Figure, Json, Section, training_cost
from rondo.report.samples import Group, groups
from rondo.report.sections import states_of, training
from rondo.report.sources import flatten


@dataclass(frozen=True, slots=True)
class Page:
    """All that a report says."""

    title: str
    headline: str
    split: Json | None
    story: str
    cost: str
    panels: list[Panel]
    sections: list[Section]
    samples: list[Group]
    samples_note: str
    caveats: list[str]
    models: dict[str, dict[str, str]]
    commands: list[str]
    price_per_hour: float
    price_note: str

    @property
    def figures(self) -> list[Figure]:
        """All figures in the order in which they stand."""
        parts = [part.figures for part in (*self.panels, *self.sections)]
        return [figure for figures in parts for figure in figures]


def make_page(
    results: Sequence[Json],
    title: str | None,
    command: str,
    price_per_hour: float | None = None,
    num_samples: int = 40,
) -> Page:
    """Put together what the results say.

    Args:
        results: As `load` returns them.
        title: Of the page.
        command: The one that makes this report.
        price_per_hour: Of the machine; 1 unless given.
        num_samples: Items to show of those where depth changed the answer.
    """
    main = verdict.subject(results)["model"]
    rows = flatten(results, price_per_hour or 1.0)
    tasks = list(dict.fromkeys(task for result in results for task in result["tasks"]))
    panels = [panel(number, task, results, rows) for number, task in enumerate(tasks, 1)]
    return Page(
        title=title or f"What depth buys {main['parent']}",
        headline=verdict.headline(results),
        split=main["split"],
        story=_story(main),
        cost=training_cost(main),
        panels=panels,
        sections=[*training(results), *states_of(results)],
        samples=groups(results, num_samples),
        samples_note=_samples_note(results),
        caveats=verdict.caveats(results),
        models=_models(rows),
        commands=_commands(results, command),
        price_per_hour=price_per_hour or 1.0,
        price_note=_price_note(price_per_hour),
    )


def _story(model: Json) -> str:
    """Tell what was converted."""
    if not model["split"]:
        return f"{model['parent']} was measured; nothing was converted."
    core = words.ranges(model["split"]["core"])
    return (
        f"{model['parent']} was made depth-recurrent: its layers {core} "
        f"became the core, which runs r times ({model['injection']} injection, state starts from "
        f"{model['state_init']}, {model['parameters']:,} parameters)."
    )


def _samples_note(results: Sequence[Json]) -> str:
    seeds = max(len(result["conditions"]["seeds"]) for result in results)
    if seeds == 1:
        return ""
    return f"Of {seeds} seeds these are the answers of the first; the values above are their mean."


def _price_note(price_per_hour: float | None) -> str:
    if price_per_hour is None:
        return (
            "Prices are in machine-hours' price (1 per hour), since none was given "
            "(--price-per-hour)."
        )
    return f"Prices take an hour of the machine to cost {price_per_hour:g} (--price-per-hour)."


def _models(rows: Sequence[Json]) -> dict[str, dict[str, str]]:
    """Return each model's conditions, which all its rows share."""
    names = ("role", "stage", "parent", "path", "parameters", "injection", "state_init")
    names += ("max_recurrences", "trained_recurrence")
    names += tuple(name for name in rows[0] if name.startswith("training_"))
    names += ("device", "dtype", "seq_len", "batch_size", "limit", "num_processes", "seeds")
    names += ("peak_memory_bytes", "date", "git", "versions", "command")
    return {
        row["model"]: {
            name.replace("_", " "): words.plain(row[name])
            for name in names
            if row[name] is not None
        }
        for row in rows
    }


def _commands(results: Sequence[Json], command: str) -> list[str]:
    """List the commands that lead here, each once."""
    found = []
    for result in results:
        found += [*result["model"].get("history", []), result["conditions"]["command"]]
    return list(dict.fromkeys([*found, command]))
