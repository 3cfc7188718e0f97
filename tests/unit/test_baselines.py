"""Finding what a model is compared with."""

import json
from pathlib import Path
from typing import Any

import pytest

from rondo.config import EvalConfig
from rondo.errors import UserError
from rondo.evaluation import baselines
from rondo.evaluation.baselines import CURVE_POINTS, locate, training_curve, wanted_models


def checkpoint(directory: Path, **facts: Any) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "run.json").write_text(json.dumps(facts))
    return directory


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Lay out a run with twins of which only one is like it in parent, data and FLOPs."""
    parent = checkpoint(tmp_path / "parent")
    here = {"path": str(parent), "hash": "p"}
    ours = {"mode": "recurrent", "flops": 100.0, "data_sha256": "d"}
    checkpoint(tmp_path / "out" / "run" / "final", parent=here, training=ours)
    for name, hash_, data, flops in (
        ("near", "p", "d", 101.0),
        ("far", "p", "d", 300.0),
        ("other-data", "p", "e", 100.0),
        ("other-parent", "q", "d", 100.0),
    ):
        training = {"mode": "static", "flops": flops, "data_sha256": data}
        facts = {"parent": here | {"hash": hash_}, "training": training}
        checkpoint(tmp_path / "out" / name / "final", **facts)
    return tmp_path / "out"


def found(model: Path, *against: str) -> list[tuple[str | None, str]]:
    models = wanted_models(EvalConfig(model=str(model), against=against))
    return [(one.role, one.directory.parent.name) for one in models]


def test_the_parent_and_the_nearest_twin_are_found(runs: Path) -> None:
    assert found(runs / "run" / "final", "parent", "static") == [
        (None, "run"),
        ("parent", runs.parent.name),
        ("static", "near"),
    ]


def test_a_run_stands_for_its_final(runs: Path) -> None:
    assert found(runs / "run", "static")[0] == (None, "run")
    assert locate(str(runs / "run")) == runs / "run" / "final"


def test_a_named_directory_is_taken(runs: Path) -> None:
    assert found(runs / "run", f"static={runs / 'far'}")[1] == ("static", "far")


def test_a_twin_of_other_data_is_taken_only_where_it_is_named(runs: Path) -> None:
    for name in ("near", "far"):
        (runs / name / "final" / "run.json").unlink()
    with pytest.raises(UserError, match=r"no static twin .*\(other-data saw other data\)"):
        found(runs / "run", "static")
    assert found(runs / "run", f"static={runs / 'other-data'}")[1] == ("static", "other-data")


def test_a_twin_is_not_compared_with_itself(runs: Path) -> None:
    assert found(runs / "near", "static")[1] == ("static", "far")


def test_an_unfinished_run_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"kind": "run"}')
    with pytest.raises(UserError, match=r"is not finished: go on with rondo train .* --resume"):
        locate(str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("against", "told"),
    [
        ("random", r"no random twin of .* lies beside it .* --mode random .* random=DIR"),
        ("teacher", r"--against teacher: give parent, static, random, self-consistency"),
        ("static=/no/such", r"there is no directory /no/such"),
    ],
)
def test_what_cannot_be_found_is_said(runs: Path, against: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        found(runs / "run", against)


def test_a_parent_that_has_moved_is_asked_for(runs: Path) -> None:
    (runs.parent / "parent").rename(runs.parent / "elsewhere")
    with pytest.raises(UserError, match=r"say where it is as parent=DIR"):
        found(runs / "run", "parent")


def test_a_model_without_facts_names_no_parent(tmp_path: Path) -> None:
    checkpoint(tmp_path / "model")
    with pytest.raises(UserError, match=r"names no parent in a run.json"):
        found(tmp_path / "model", "parent")


def test_a_curve_keeps_validations_and_is_thinned(tmp_path: Path) -> None:
    final = checkpoint(tmp_path / "run" / "final")
    rows: list[dict[str, Any]] = [
        {"step": n, "train/loss": 1 / n, "train/tokens": 8 * n, "train/flops": 9.0 * n}
        for n in range(1, 1001)
    ]
    rows[6]["val/loss@r2"] = 0.5
    rows[8]["train/loss"] = "nan"
    rows.append({"step": 1000, "event": "saved"})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "run" / "metrics.jsonl").write_text(text)
    curve = training_curve(final)
    assert len(curve) <= CURVE_POINTS + 2
    assert curve[-1]["step"] == 1000
    (validated,) = [point for point in curve if point["validation"]]
    assert validated == {
        "step": 7,
        "tokens": 56,
        "flops": 63.0,
        "loss": 1 / 7,
        "validation": {"2": 0.5},
    }


def test_a_model_without_a_training_log_has_no_curve(tmp_path: Path) -> None:
    assert training_curve(checkpoint(tmp_path / "model")) == []
    assert baselines.facts_of(tmp_path) == {}
