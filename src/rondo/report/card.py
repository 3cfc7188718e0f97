"""The section on depth in the model card of a checkpoint: what was measured of it, and how."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from rondo import verdict
from rondo.errors import UserError
from rondo.report import words
from rondo.report.parts import Json, training_cost
from rondo.report.rendering import escape, pipes

BEGIN, END = "<!-- rondo:depth -->", "<!-- /rondo:depth -->"


def updated(directory: Path, results: Sequence[Json]) -> str:
    """Return the model card with its section on depth renewed, or appended; the rest stays.

    Raises:
        UserError: No result is of this checkpoint, or the card cannot be read, or holds one mark
            without the other.
    """
    path = directory / "README.md"
    section = f"{BEGIN}\n{depth_section(directory, results)}\n{END}"
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
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


def depth_section(directory: Path, results: Sequence[Json]) -> str:
    """Tabulate what was measured of a checkpoint by depth, under the verdict on it.

    Raises:
        UserError: None of the results was measured on it.
    """
    place = directory.resolve()
    own = [result for result in results if Path(result["model"]["path"]).resolve() == place]
    if not own:
        paths = dict.fromkeys(result["model"]["path"] for result in results)
        raise UserError(
            f"--card {directory} is no model that was measured here ({', '.join(paths)}); name one "
            "of these, from the directory where rondo eval ran"
        )
    model = own[0]["model"]
    blocks = ["## What depth buys"]
    if model["role"] == "recurrent":
        # Other runs have verdicts of their own.
        others = [result for result in results if result["model"]["role"] != "recurrent"]
        blocks.append(f"**{escape(verdict.headline([*own, *others]))}**")
    blocks.append(escape(training_cost(model)))
    for result in own:
        blocks += _measured(result)
    return "\n\n".join(blocks)


def _measured(result: Json) -> Iterator[str]:
    conditions = result["conditions"]
    rows = [row for row in result["rows"] if row["metric"] == _metric(result, row["task"])]
    depths = sorted({row["num_recurrences"] for row in rows})
    yield pipes(["task", *(f"r = {depth}" for depth in depths)], list(_lines(result, rows, depths)))
    yield escape(
        f"Value \u00b1 one standard error over items. Measured by rondo on {conditions['date']}, "
        f"{conditions['device']}, {conditions['dtype']}, seeds "
        f"{', '.join(map(str, conditions['seeds']))}, items limited to "
        f"{conditions['limit'] or 'none'}."
    )
    yield f"    {' '.join(conditions['command'].split())}"


def _metric(result: Json, task: str) -> str:
    return result["tasks"][task]["metric"]


def _lines(result: Json, rows: Sequence[Json], depths: Sequence[int]) -> Iterator[list[str]]:
    """Write each task's values, then what depth costs, tasks of equal cost in one line."""
    cost: dict[tuple[str, ...], list[str]] = {}
    for task, facts in result["tasks"].items():
        at = {row["num_recurrences"]: row for row in rows if row["task"] == task}
        metric = facts["metric"]
        values = (
            words.score(at[depth]["value"], metric, at[depth]["stderr"])
            if depth in at
            else words.NONE
            for depth in depths
        )
        yield [f"{task}: {metric}{' (nats)' if facts['kind'] == 'loss' else ''}", *values]
        for name, column in (("FLOPs", "flops_per_token"), ("KV bytes", "kv_bytes_per_token")):
            prices = (
                words.si(at[depth][column]) if depth in at else words.NONE for depth in depths
            )
            cost.setdefault((f"{name} per token", *prices), []).append(task)
    for (name, *prices), tasks in sorted(cost.items()):
        where = "" if len(tasks) == len(result["tasks"]) else f", {', '.join(tasks)}"
        yield [f"{name}{where}", *prices]
