"""Twenty steps of each loss, as recorded: a change of the numbers must be meant.

`python tests/golden/test_trajectory.py` records them anew; say why in the commit that does.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "e2e"))

from tiny import rondo, save_parent  # noqa: E402

from rondo.provenance import read_metrics  # noqa: E402

FILE = HERE / "trajectories.json"
CASES: dict[str, tuple[object, ...]] = {
    "last": (),
    "last, muon, curriculum": (
        "--optimizer.name", "muon", "--recurrence.schedule", "1-sqrt", "--recurrence.mean", 6,
    ),
    "deep": ("--loss.kind", "deep", "--recurrence.draws-per-step", 2),
    "deep+distil": ("--loss.kind", "deep+distil", "--loss.parent-weight", 0.25),
    "static": ("--mode", "static"),
}  # fmt: skip


def trajectory(directory: Path, case: str) -> list[list[float]]:
    """Loss and gradient norm of each of twenty steps on a tiny model."""
    if not (directory / "model").is_dir():
        save_parent(directory / "parent")
        assert rondo("convert", directory / "parent", directory / "model", "--sizes", "2,2,2") == 0
    out = directory / case.replace(" ", "")
    words = (
        "--output-dir", out, "--data.sources", "general", "--budget.steps", 20, "--watch.every",
        100, "--batch.seq-len", 32, "--optimizer.lr", 1e-3, "--machine.dtype", "float32",
        "--data.cache-dir", directory / "cache",
    )  # fmt: skip
    assert rondo("train", directory / "model", *words, *CASES[case]) == 0
    return [[row["train/objective"], row["train/grad_norm"]] for row in read_metrics(out)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("golden")


@pytest.mark.parametrize("case", CASES)
def test_the_trajectory_is_the_recorded_one(case: str, directory: Path) -> None:
    recorded: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    found = trajectory(directory, case)
    # Muon orthogonalises in bfloat16, whose rounding differs between processors.
    tolerance = 2e-2 if "muon" in case else 1e-4
    for step, (ours, theirs) in enumerate(zip(found, recorded["cases"][case], strict=True)):
        assert ours == pytest.approx(theirs, rel=tolerance), (case, step)


def record() -> None:
    """Write the trajectories of this machine."""
    with tempfile.TemporaryDirectory() as scratch:
        cases = {case: trajectory(Path(scratch), case) for case in CASES}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    text = json.dumps({"versions": versions, "cases": cases}, indent=1)
    FILE.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    record()
