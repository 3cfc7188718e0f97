"""`rondo eval` on two processes is what it is on one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))

from tiny import json_of, rondo, save_parent


def words(place: Path, out: str) -> list[str]:
    return [
        "eval", str(place / "model"), "--tasks", "arc_easy", "--data", str(place / "data"),
        str(place / "text.txt"), "--against", "parent", "--recurrences", "1", "3",
        "--batch-size", "4", "--trace-tokens", "64", "--device", "cpu",
        "--output-dir", str(place / out),
    ]  # fmt: skip


def on_two_ranks(place: Path, out: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "-m", "rondo", *words(place, out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("wrote ") == 1


def measured(place: Path, out: str) -> list[Any]:
    """What was measured, without what depends on the moment."""
    results = json_of(place / out / "results.json")["results"]
    rows = [
        {key: value for key, value in row.items() if key not in ("ms_per_token", "seconds")}
        for result in results
        for row in result["rows"]
    ]
    samples = (place / out / "samples.jsonl").read_text().splitlines()
    return [rows, [(one["items"], one["tasks"], one["states"]) for one in results], samples]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("eval")
    save_parent(directory / "parent", tie_word_embeddings=True)
    lines = (f"line {n} of a text that {'again ' * (n % 7)}" for n in range(30))
    (directory / "text.txt").write_text("\n\n".join(lines))
    items = [
        {"question": f"What follows {n}?", "choices": [str(n + 1), "none", "all"], "label": n % 3}
        for n in range(10)
    ]
    (directory / "data" / "arc_easy").mkdir(parents=True)
    text = "".join(json.dumps(item) + "\n" for item in items)
    (directory / "data" / "arc_easy" / "test.jsonl").write_text(text)
    assert rondo("convert", directory / "parent", directory / "model", "--sizes", "2,2,2") == 0
    assert rondo(*words(directory, "one")) == 0
    on_two_ranks(directory, "two")
    return directory


def test_two_processes_measure_what_one_does(place: Path) -> None:
    assert measured(place, "two") == measured(place, "one")


def test_the_number_of_processes_is_recorded(place: Path) -> None:
    for out, size in (("one", 1), ("two", 2)):
        for result in json_of(place / out / "results.json")["results"]:
            assert result["conditions"]["num_processes"] == size
