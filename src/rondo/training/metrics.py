"""metrics.jsonl, a line per step: the truth about a run. Bar and tracker are copies of it."""

import importlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from rondo.config import WatchConfig
from rondo.errors import UserError
from rondo.provenance import METRICS, VALIDATION, read_metrics


class Tracker(NamedTuple):
    """A tracker that is running."""

    log: Callable[[int, dict[str, float]], Any]
    finish: Callable[[], Any]


class Metrics:
    """Appends lines, and copies the steps to the bar and to a tracker where one is asked for.

    Args:
        directory: The run's directory.
        first_step: Steps done already; later ones of an interrupted run are dropped, because they
            will be made again.
        total_steps: Steps of the whole run.
        watch: Which tracker, and its project.
        config: The run's settings, for the tracker.

    Raises:
        UserError: The file is damaged, or the tracker is not installed.
    """

    def __init__(
        self,
        directory: Path,
        first_step: int,
        total_steps: int,
        watch: WatchConfig,
        config: dict[str, Any],
    ):
        module = None if watch.tracker == "none" else import_tracker(watch.tracker)
        self._directory = directory
        self._keep_steps(first_step, first_step)
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            desc="train",
            unit="step",
            dynamic_ncols=True,
            smoothing=0.1,  # steps differ in depth, and thereby in time
            disable=None,
        )
        self._tracker: Tracker | None = None
        if module is not None:
            self._tracker = self._tolerate(
                lambda: start_tracker(module, directory, first_step, watch, config)
            )

    def write(self, row: dict[str, Any]) -> None:
        """Record one step."""
        row = self._append(row)
        self._validated = _validated(row) or self._validated
        loss = row["train/loss" if "train/loss" in row else "train/objective"]
        self._bar.set_postfix_str(
            f"loss {float(loss):.3f}{self._validated}, "
            f"r {row['train/recurrence']:.3g}, {row['perf/tokens_per_s']:.0f} tokens/s, "
            f"MFU {row['perf/mfu']:.0%}",
            refresh=False,
        )
        self._bar.update(row["step"] - self._step)
        self._step = row["step"]
        if self._tracker is not None:
            log = self._tracker.log
            numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
            self._tolerate(lambda: log(row["step"], numbers))

    def event(self, step: int, name: str, **facts: Any) -> None:
        """Record what happened beside the steps and print it above the bar, `text` as it is."""
        self._append({"step": step, "event": name, **facts})
        words = [str(fact) if key == "text" else f"{key} {fact}" for key, fact in facts.items()]
        tqdm.write(f"step {step}: {name}: {', '.join(words)}", file=sys.stderr)

    def rewind(self, step: int) -> None:
        """Forget the steps beyond one, which will be made again; events stay."""
        self._file.close()
        self._bar.update(step - self._step)
        self._keep_steps(step, self._step)

    def close(self) -> None:
        """Close tracker, file and bar."""
        if self._tracker is not None:
            self._tolerate(self._tracker.finish)
        self._file.close()
        self._bar.close()

    def _append(self, row: dict[str, Any]) -> dict[str, Any]:
        # JSON has no name for a number that is not finite.
        row = {
            key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        return row

    def _keep_steps(self, last: int, last_event: int) -> None:
        path, fresh = self._directory / METRICS, self._directory / f".{METRICS}"
        lines = read_metrics(self._directory)
        rows = [row for row in lines if row["step"] <= (last_event if "event" in row else last)]
        fresh.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        fresh.replace(path)
        self._file = path.open("a", encoding="utf-8")
        self._step = last
        self._validated = next(filter(None, map(_validated, reversed(rows))), "")

    def _tolerate(self, act: Callable[[], Any]) -> Any:
        """Do something of the tracker's, and do without the tracker from where it fails."""
        try:
            return act()
        except Exception as error:  # it is of no matter which: training goes on
            self._tracker = None
            self.event(self._step, "tracker off", text=f"{type(error).__name__}: {error}")


def _validated(row: dict[str, Any]) -> str:
    depths = sorted(int(key.removeprefix(VALIDATION)) for key in row if key.startswith(VALIDATION))
    ends = dict.fromkeys((depths[0], depths[-1])) if depths else ()
    return "".join(f", {float(row[f'{VALIDATION}{r}']):.3f} at r={r}" for r in ends)


def import_tracker(name: str) -> Any:
    """Import the module of a tracker.

    Raises:
        UserError: It is not installed.
    """
    try:
        return importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    except ImportError as error:
        package = '"rondo-lm[track]"' if name == "trackio" else name
        raise UserError(
            f"--watch.tracker {name} is not installed: pip install {package}, or leave it out"
        ) from error


def start_tracker(
    module: Any, directory: Path, first_step: int, watch: WatchConfig, config: dict[str, Any]
) -> Tracker:
    """Begin, or go on with, a tracked run that has the name of the run's directory.

    trackio and wandb are called alike; tensorboard's files lie in the run's directory.
    """
    if watch.tracker == "tensorboard":
        writer = module.SummaryWriter(str(directory / "tensorboard"), purge_step=first_step + 1)

        def log(step: int, numbers: dict[str, float]) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)

        return Tracker(log, writer.close)
    module.init(
        project=watch.project,
        name="/".join(directory.resolve().parts[-2:]),
        config=config,
        resume="allow" if first_step else "never",
    )
    return Tracker(lambda step, numbers: module.log(numbers, step=step), module.finish)
