"""Run by torchrun: `rondo train` on several ranks, whole, in halves, and moved between worlds."""

import sys
from pathlib import Path
from typing import Any

from rondo import processes
from rondo.cli import main
from rondo.training import train

FLAGS = (
    "--batch.seq-len", "16", "--batch.micro-batch-size", "2", "--batch.global-batch-size", "4",
    "--budget.steps", "6", "--safety.save-every", "100", "--loss.kind", "deep", "--optimizer.lr",
    "1e-3", "--optimizer.ema-decay", "0.5", "--watch.every", "3", "--watch.recurrences", "1", "3",
    "--watch.rows", "4",
)  # fmt: skip
# Runs that are to be the same but for rounding, on machines that would round to bfloat16 too.
EXACT = ("--machine.dtype", "float32")
ADAPTERS = ("--lora.rank", "2", "--machine.dtype", "bfloat16", "--data.packing", "documents")
step = train.train_step


def stopping_after(last: int) -> Any:
    """`train_step` that hears a signal at the end of step `last`."""
    return lambda this, _: step(this, [15] if this.progress.step + 1 == last else [])


def begin(directory: Path, name: str, stop_after: int = 0, *flags: str) -> None:
    """Begin a run in directory/name, and stop it after so many steps."""
    train.train_step = stopping_after(stop_after)
    text = str(directory / "text.txt")
    words = ["--data.sources", text, "--watch.data", text, "--output-dir", str(directory / name)]
    assert main(["train", str(directory / "model"), *words, *FLAGS, *flags]) == 0


def go_on(directory: Path, name: str, stop_after: int = 0) -> None:
    """Go on with it."""
    train.train_step = stopping_after(stop_after)
    assert main(["train", str(directory / name), "--resume"]) == 0


if __name__ == "__main__":
    place = Path(sys.argv[1])
    # One launch is one process group; these runs share it.
    world = processes.join("cpu")
    processes.join, processes.leave = lambda *_: world, lambda _: None
    if sys.argv[2] == "first":
        begin(place, "two", 0, *EXACT)
        begin(place, "halves", 3, *EXACT)
        go_on(place, "halves")
        begin(place, "moved", 2, *EXACT)
        begin(place, "twin", 0, "--mode", "static", *EXACT)
        begin(place, "adapters", 0, *ADAPTERS)
    else:
        go_on(place, "moved")
