"""metrics.jsonl, one line per step: the truth about a run. The bar on the screen is a courtesy."""

import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rondo.errors import UserError

FILE = "metrics.jsonl"


class Metrics:
    """Appends a line per step and moves the bar.

    Args:
        directory: The run's directory.
        first_step: Steps done already; later lines of an interrupted run are dropped, because
            the steps will be made again.
        total_steps: Steps of the whole run.
    """

    def __init__(self, directory: Path, first_step: int, total_steps: int):
        path = directory / FILE
        kept = [row for row in read_metrics(directory) if row["step"] <= first_step]
        fresh = directory / f".{FILE}"
        fresh.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        fresh.replace(path)
        self._file = path.open("a", encoding="utf-8")
        self._bar = tqdm(
            total=total_steps, initial=first_step, desc="train", unit="step", disable=None
        )

    def write(self, row: dict[str, Any]) -> None:
        """Record one step."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self._bar.update()
        self._bar.set_postfix_str(
            f"loss {float(row['train/loss']):.3f}, r {row['train/recurrence']:.3g}, "
            f"{row['perf/tokens_per_s']:.0f} tokens/s"
        )

    def close(self) -> None:
        """Close file and bar."""
        self._file.close()
        self._bar.close()


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Return the recorded steps of a run, none where it has not begun.

    Raises:
        UserError: A line other than a last one cut short is damaged.
    """
    path = directory / FILE
    if not path.is_file():
        return []
    rows, lines = [], path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise UserError(f"{path}, line {number} is no JSON: {error}") from error
    return rows
