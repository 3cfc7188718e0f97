"""Killed at any moment, a run loses at most what came after its last save."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import rondo, save_parent

from rondo.provenance import read_metrics

KILLS, SAVE_EVERY = 20, 10


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(tmp_path: Path) -> None:
    save_parent(tmp_path / "parent")
    assert rondo("convert", tmp_path / "parent", tmp_path / "model", "--sizes", "2,2,2") == 0
    words = [
        "train", tmp_path / "model", "--data.sources", "general", "--batch.seq-len", 32,
        "--budget.steps", 4000, "--safety.save-every", SAVE_EVERY, "--watch.every", 100_000,
        "--data.cache-dir", tmp_path / "cache",
    ]  # fmt: skip

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(out: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "rondo", *map(str, words), "--output-dir", str(out)]
        return subprocess.Popen([*command, "--resume"], env=environment, stdout=subprocess.DEVNULL)

    def wait_beyond(step: int, out: Path, process: subprocess.Popen[bytes]) -> None:
        while last_step(out) <= step:
            assert process.poll() is None
            time.sleep(0.05)

    moments, out, whole = random.Random(0), tmp_path / "killed", tmp_path / "whole"
    for _ in range(KILLS):
        before = last_step(out)
        process = start(out)
        wait_beyond(before, out, process)
        # Under way: in a step, a save, or the removal of an old state.
        time.sleep(moments.uniform(0, 1.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        states = [int(path.name.removeprefix("step_")) for path in out.glob("step_*")]
        assert max(states, default=0) >= last_step(out) - SAVE_EVERY
    stop_at, runs = last_step(out), {}
    for directory in (out, whole):
        process = start(directory)
        wait_beyond(stop_at, directory, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
        runs[directory] = {row["step"]: row["train/objective"] for row in read_metrics(directory)}
    assert runs[out].keys() >= set(range(1, stop_at + 1))
    assert all(runs[whole][step] == runs[out][step] for step in range(1, stop_at + 1))


def last_step(out: Path) -> int:
    """The last step that is recorded."""
    return max((row["step"] for row in read_metrics(out)), default=0)
