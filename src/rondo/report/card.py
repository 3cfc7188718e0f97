"""The section on depth in the model card of a checkpoint: what was measured of it, and how."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from rondo import verdict
from rondo.errors import UserError
from rondo.report import words
from rondo.report.page import Page
from rondo.report.rendering import escape, pipes
from rondo.report.sources import Json

BEGIN, END = "<!-- rondo:depth -->", "<!-- /rondo:depth -->"


def updated(directory: Path, results: Sequence[Json], page: Page) -> str:
    """Return the model card with its section on depth renewed, or appended; the rest stays.

    Raises:
        UserError: The card cannot be read, or holds one mark without the other.
    """
    path = directory / "README.md"
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    section = f"{BEGIN}\n{depth_section(_of_checkpoint(directory, results), page)}\n{END}"
    begin, end = text.find(BEGIN), text.find(END)
    if (begin, end) == (-1, -1):
        return f"{text.rstrip()}\n\n{section}\n" if text.strip() else f"{section}\n"
    if begin == -1 or end < begin:
        raise UserError(
            f"{path} holds only one of {BEGIN} and {END}, or both in the wrong order; remove what "
            "is left of the section"
        )
    return text[:begin] + section + text[end + len(END) :]


def write(directory: Path, text: str) -> None:
    """Write the model card so that a reader finds the old one or the new one."""
    handle, name = tempfile.mkstemp(dir=directory, prefix=".README.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).chmod(0o644)
        Path(name).replace(directory / "README.md")
    finally:
        Path(name).unlink(missing_ok=True)


def depth_section(result: Json, page: Page) -> str:
    """Tabulate every task of a model by depth, under the verdict, with the conditions below."""
    model, conditions = result["model"], result["conditions"]
    rows = _primary(result)
    depths = sorted({row["num_recurrences"] for row in rows})
    lines = list(_lines(result, rows, depths))
    training = model["training"]
    seeds = ", ".join(map(str, conditions["seeds"]))
    trained = f" Trained with seed {training['seed']}." if training else " Not trained."
    return "\n\n".join(
        [
            "## What depth buys",
            f"**{escape(page.headline)}**",
            escape(page.cost) if training else "",
            pipes(["task", *(f"r = {depth}" for depth in depths)], lines),
            escape(
                f"Value +- one standard error over items. Measured by rondo on {conditions['date']}"
                f", {conditions['device']}, {conditions['dtype']}, seeds {seeds}, items limited to "
                f"{conditions['limit'] or 'none'}.{trained}"
            ),
            f"    {' '.join(conditions['command'].split())}",
        ]
    ).replace("\n\n\n\n", "\n\n")


def _of_checkpoint(directory: Path, results: Sequence[Json]) -> Json:
    """Return the result that was measured on this checkpoint, or the one all is about."""
    for result in results:
        if Path(result["model"]["path"]).resolve() == directory.resolve():
            return result
    return verdict.subject(results)


def _primary(result: Json) -> list[Json]:
    return [
        row for row in result["rows"] if row["metric"] == result["tasks"][row["task"]]["metric"]
    ]


def _lines(result: Json, rows: Sequence[Json], depths: Sequence[int]) -> Iterator[list[str]]:
    for task, facts in result["tasks"].items():
        at = {row["num_recurrences"]: row for row in rows if row["task"] == task}
        shown = f"{task}: {facts['metric']}{' (nats)' if facts['kind'] == 'loss' else ''}"
        yield [
            shown,
            *(
                words.score(at[depth]["value"], facts["kind"], at[depth]["stderr"])
                if depth in at
                else words.NONE
                for depth in depths
            ),
        ]
    costs = {row["num_recurrences"]: row for row in rows}
    yield ["FLOPs per token", *(words.si(costs[depth]["flops_per_token"]) for depth in depths)]
    yield [
        "KV bytes per token",
        *(words.number(costs[depth]["kv_bytes_per_token"], ",.0f") for depth in depths),
    ]
