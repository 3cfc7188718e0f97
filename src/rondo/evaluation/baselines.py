"""What a model is compared with: its parent, and the twins that were trained beside it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rondo import provenance
from rondo.config import EvalConfig
from rondo.errors import UserError
from rondo.loading import fetch, parent_directory

ROLES = ("parent", "static", "random", "self-consistency")
CURVE_POINTS = 200


@dataclass(frozen=True)
class Wanted:
    """A model to measure.

    Attributes:
        role: parent, static, random or self-consistency; None for the model asked about.
        directory: Where it lies.
        name: What it was called: a directory, or an id of the hub.
    """

    role: str | None
    directory: Path
    name: str


def wanted_models(config: EvalConfig) -> list[Wanted]:
    """Return the model asked about and those to set beside it.

    Raises:
        UserError: One of them cannot be found.
    """
    directory = locate(config.model)
    found = [Wanted(None, directory, config.model)]
    facts = facts_of(directory)
    for spec in config.against:
        role, _, where = spec.partition("=")
        if role not in ROLES:
            raise UserError(
                f"--against {spec}: give {', '.join(ROLES)}, or one of them as ROLE=DIR"
            )
        if where:
            found.append(Wanted(role, locate(where), where))
        elif role in ("parent", "self-consistency"):
            place = _parent_of(config.model, facts, role)
            found.append(Wanted(role, place, facts["parent"].get("name", str(place))))
        else:
            place = _twin_of(directory, facts, role)
            found.append(Wanted(role, place, str(place)))
    return found


def locate(name: str) -> Path:
    """Return the directory of a model: a local one, the final of a run, or one from the hub.

    Raises:
        UserError: There is none.
    """
    directory = Path(name)
    if (directory / "final" / "config.json").is_file() and not (directory / "config.json").exists():
        return directory / "final"
    if directory.is_dir():
        if facts_of(directory).get("kind") == "run":
            raise UserError(f"{name} is not finished: go on with rondo train {name} --resume")
        return directory
    if directory.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise UserError(f"there is no directory {name}")
    return fetch(name, None)


def name_of(model: str) -> str:
    """Return what a model is called: the run's name, for the final of a run."""
    directory = Path(model).resolve()
    return directory.parent.name if directory.name == "final" else directory.name


def facts_of(directory: Path) -> dict[str, Any]:
    """Return what a checkpoint's run.json says, or nothing where there is none."""
    path = directory / "run.json"
    return provenance.read_json(path) if path.is_file() else {}


def role_of(directory: Path, fields: dict[str, Any]) -> str:
    """Return what a checkpoint with this config.json is: how it was trained, or what it was made.

    A model that was not trained here is recurrent, or else a parent.
    """
    training = facts_of(directory).get("training") or {}
    untrained = "recurrent" if fields.get("model_type") == "rondo" else "parent"
    return training.get("mode") or untrained


def _parent_of(model: str, facts: dict[str, Any], role: str) -> Path:
    if "parent" not in facts:
        raise UserError(f"{model} names no parent in a run.json: say where it is as {role}=DIR")
    try:
        return parent_directory(facts["parent"])
    except UserError as error:
        raise UserError(f"{error}; or say where it is as {role}=DIR") from error


def _twin_of(directory: Path, facts: dict[str, Any], mode: str) -> Path:
    """Return the twin beside a run: of the same parent, on the same data, nearest in FLOPs."""
    runs = directory.resolve().parent.parent
    ours = facts.get("training") or {}
    found, others = [], []
    for path in sorted(runs.glob("*/final/run.json")):
        theirs = facts_of(path.parent)
        training = theirs.get("training") or {}
        itself = path.parent == directory.resolve()
        if itself or training.get("mode") != mode or _hash(theirs) != _hash(facts):
            continue
        if training.get("data_sha256") != ours.get("data_sha256"):
            others.append(path.parent.parent.name)
            continue
        found.append((abs(training.get("flops", 0) - ours.get("flops", 0)), path.parent))
    if not found:
        unlike = f" ({', '.join(others)} saw other data)" if others else ""
        raise UserError(
            f"no {mode} twin of {directory} lies beside it in {runs}{unlike}: train one with rondo "
            f"train --mode {mode} --budget.like RUN, or say where it is as {mode}=DIR"
        )
    return min(found)[1]


def _hash(facts: dict[str, Any]) -> Any:
    return facts.get("parent", {}).get("hash")


def training_curve(directory: Path) -> list[dict[str, Any]]:
    """Return what metrics.jsonl tells of the training of a run's final, thinned out.

    Points with a validation are kept, others at even distances.

    Raises:
        UserError: A line is damaged.
    """
    rows = [row for row in provenance.read_metrics(directory.parent) if "train/loss" in row]
    stride = max(1, len(rows) // CURVE_POINTS)
    curve = []
    for number, row in enumerate(rows):
        validation = {
            key.removeprefix(provenance.VALIDATION): _number(value)
            for key, value in row.items()
            if key.startswith(provenance.VALIDATION)
        }
        if validation or number % stride == 0 or number == len(rows) - 1:
            curve.append(
                {
                    "step": row["step"],
                    "tokens": row["train/tokens"],
                    "flops": row["train/flops"],
                    "loss": _number(row["train/loss"]),
                    "validation": validation,
                }
            )
    return curve


def _number(value: Any) -> float | None:
    # What was not finite stands there as text.
    return value if isinstance(value, int | float) else None
