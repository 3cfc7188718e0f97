"""`rondo train` on one rank and on two: the same run, stopped and moved or not."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_ranks import ADAPTERS, EXACT, begin, go_on
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))

from tiny import rondo, save_parent

from rondo.provenance import read_metrics
from rondo.training import train


def on_two_ranks(directory: Path, phase: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = str(Path(__file__).with_name("loop_ranks.py"))
    done = subprocess.run(
        [*command, script, str(directory), phase],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "final" / "model.safetensors")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("loop")
    save_parent(directory / "parent", tie_word_embeddings=True)
    lines = (f"line {number} of a text that repeats itself" for number in range(120))
    (directory / "text.txt").write_text("\n\n".join(lines))
    assert rondo("convert", directory / "parent", directory / "model", "--sizes", "2,2,2") == 0
    step = train.train_step
    begin(directory, "one", 0, *EXACT)
    begin(directory, "adapters-one", 0, *ADAPTERS)
    on_two_ranks(directory, "first")
    go_on(directory, "moved", 4)
    on_two_ranks(directory, "last")
    train.train_step = step
    return directory


def steps(directory: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if not key.startswith("perf/")}
        for row in read_metrics(directory)
        if "event" not in row
    ]


@pytest.mark.parametrize("name", ["two", "moved"])
def test_two_ranks_or_a_change_of_ranks_give_the_run_of_one(place: Path, name: str) -> None:
    ours, theirs = steps(place / name), steps(place / "one")
    assert [row["step"] for row in ours] == list(range(1, 7))
    for left, right in zip(ours, theirs, strict=True):
        # An estimate by differences, which show every rounding.
        gains = [row.pop("loop/gain", 0) for row in (left, right)]
        assert gains[0] == pytest.approx(gains[1], rel=2e-2)
        assert left == pytest.approx(right, rel=2e-4), left["step"]
    assert "val/loss@r3" in ours[-1]
    mine, whole = weights(place / name), weights(place / "one")
    assert mine.keys() == whole.keys()
    for key, tensor in whole.items():
        torch.testing.assert_close(mine[key], tensor, rtol=1e-3, atol=2e-5, msg=key)


def test_two_ranks_go_on_bit_for_bit(place: Path) -> None:
    assert steps(place / "halves") == steps(place / "two")
    for key, tensor in weights(place / "two").items():
        assert torch.equal(weights(place / "halves")[key], tensor), key


def test_adapters_in_bfloat16_are_the_same_on_two_ranks(place: Path) -> None:
    ours, theirs = steps(place / "adapters"), steps(place / "adapters-one")
    for left, right in zip(ours, theirs, strict=True):
        assert left["train/loss"] == pytest.approx(right["train/loss"], rel=5e-3)
    assert weights(place / "adapters").keys() == weights(place / "adapters-one").keys()


def test_the_twin_is_trained_on_two_ranks_as_well(place: Path) -> None:
    assert [row["step"] for row in steps(place / "twin")] == list(range(1, 7))
    assert (place / "twin" / "final" / "config.json").is_file()
