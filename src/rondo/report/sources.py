"""What a report is made of: directories with a results.json and a samples.jsonl, checked."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rondo.errors import UserError
from rondo.evaluation.controls import share_items

Json = dict[str, Any]

FORMAT_VERSION = 2
_KEYS = ("model", "conditions", "tasks", "rows", "items")
_MODEL = (
    "label",
    "role",
    "stage",
    "parent",
    "path",
    "parameters",
    "injection",
    "state_init",
    "max_recurrences",
    "trained_recurrence",
)
_TRAINING = (
    "mode",
    "tokens",
    "steps",
    "flops",
    "flops_paper",
    "seconds",
    "loss",
    "recurrence",
    "optimizer",
    "lr",
    "seed",
    "data",
)
_CONDITIONS = (
    "command",
    "date",
    "device",
    "dtype",
    "seq_len",
    "batch_size",
    "limit",
    "num_processes",
    "seeds",
    "peak_memory_bytes",
    "versions",
    "git",
)
_TASK = ("kind", "metric", "higher_is_better", "chance", "source", "sha256", "items", "num_fewshot")
_ROW = (
    "task",
    "metric",
    "num_recurrences",
    "value",
    "stderr",
    "flops_per_token",
    "kv_bytes_per_token",
    "ms_per_token",
    "samples",
)
_SAMPLE = ("model", "task", "item", "prompt", "target", "answers", "values")
# A machine-hour has so many milliseconds, for a price per million tokens.
_MS_PER_HOUR_AND_MILLION = 3.6


def load(directories: Sequence[str]) -> list[Json]:
    """Read the results of one or more `rondo eval`, and make sure that they can be compared.

    Labels that are alike are told apart, and each result gains `directory` and `samples`: the
    lines of samples.jsonl whose score changes with depth.

    Raises:
        UserError: A directory or file is missing or unreadable, or a task has other items.
    """
    if not directories:
        raise UserError("no results given; name directories written by rondo eval")
    found: list[Json] = []
    for directory in map(Path, directories):
        results = _read(directory)
        samples = list(_changing(directory / "samples.jsonl", results))
        for result in results:
            label = result["model"]["label"]
            own = [line for line in samples if line["model"] == label]
            found.append({**result, "directory": str(directory), "samples": own})
    _check_same_items(found)
    return _told_apart(found)


def flatten(results: Iterable[Json], price_per_hour: float = 1.0) -> list[Json]:
    """Return every row of every result with all its conditions, each as one flat dict.

    What a row adds to results.json is `price`: what a million tokens cost, by the milliseconds.
    """
    rows = []
    for result in results:
        for row in result["rows"]:
            ms = row["ms_per_token"]
            price = None if ms is None else ms * price_per_hour / _MS_PER_HOUR_AND_MILLION
            rows.append({"model": None} | row | {"price": price} | _facts(result, row["task"]))
    return rows


def flatten_checkpoints(results: Iterable[Json]) -> list[Json]:
    """Return every score of every checkpoint likewise, with `checkpoint_step` and `_flops`."""
    return [
        {"model": None, "task": task, "metric": result["tasks"][task]["metric"]}
        | {"num_recurrences": int(depth), "value": score}
        | {"checkpoint_step": point["step"], "checkpoint_flops": point["flops"]}
        | _facts(result, task)
        for result in results
        for point in result["model"].get("checkpoints") or ()
        for task, scores in point["scores"].items()
        if task in result["tasks"]
        for depth, score in scores.items()
    ]


def _facts(result: Json, task: str) -> Json:
    """Return all conditions of the rows of a task."""
    model, conditions = result["model"], result["conditions"]
    training = model["training"] or {}
    facts = {"kind": result["tasks"][task]["kind"], "model": model["label"]}
    facts |= {key: model[key] for key in _MODEL if key != "label"}
    facts |= {f"training_{key}": training.get(key) for key in _TRAINING}
    facts |= {key: conditions[key] for key in _CONDITIONS}
    facts["versions"] = ", ".join(f"{k} {v}" for k, v in conditions["versions"].items())
    facts["seeds"] = ", ".join(map(str, conditions["seeds"]))
    about = (key for key in _TASK if key not in ("metric", "kind"))
    return facts | {key: result["tasks"][task][key] for key in about}


def _read(directory: Path) -> list[Json]:
    path = directory / "results.json"
    if not directory.is_dir():
        raise UserError(f"{directory} is no directory; name directories written by rondo eval")
    if not path.is_file():
        raise UserError(f"{directory} holds no results.json; run rondo eval to write one")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}); run rondo eval again") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format_version {version}, not {FORMAT_VERSION}: it was written by another "
            "version of rondo; run rondo eval again"
        )
    if missing := list(dict.fromkeys(_missing(content))):
        raise UserError(f"{path} lacks {', '.join(missing[:5])}; run rondo eval again")
    return content["results"]


def _missing(content: Json) -> Iterator[str]:
    """Yield the names of what a report needs and a results.json does not hold."""
    if not content.get("results"):
        yield "results"
    for result in content.get("results") or ():
        # Of published values no items are known.
        lacking = [
            key for key in _KEYS if key not in result or (key != "items" and not result[key])
        ]
        yield from lacking
        if lacking:
            continue
        yield from _lacking("model", result["model"], (*_MODEL, "split", "training"))
        yield from _lacking("conditions", result["conditions"], _CONDITIONS)
        for name, task in result["tasks"].items():
            yield from _lacking(f"tasks.{name}", task, _TASK)
            if task.get("sha256") and name not in result["items"]:
                yield f"items.{name}"
        for row in result["rows"]:
            yield from _lacking("rows", row, _ROW)
            if row.get("task") not in result["tasks"]:
                yield f"tasks.{row.get('task')}"


def _lacking(name: str, content: Json, keys: Sequence[str]) -> Iterator[str]:
    return (f"{name}.{key}" for key in keys if key not in content)


def _changing(path: Path, results: Sequence[Json]) -> Iterator[Json]:
    """Yield the samples that are right at one depth and wrong at another."""
    if not path.is_file():
        return
    scored = {
        name
        for result in results
        for name, task in result["tasks"].items()
        if task["kind"] != "loss"
    }
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            sample = json.loads(line)
            changes = len({is_right(value) for value in sample["values"].values()}) > 1
            if changes and sample["task"] in scored:
                yield {key: sample[key] for key in _SAMPLE}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"line {number} of {path} is no sample ({error!r}); run rondo eval again"
            ) from error


def is_right(value: float | None) -> bool:
    """Whether an item counts as right: with several seeds, whether most of them are."""
    return value is not None and value > 0.5


def _check_same_items(results: Sequence[Json]) -> None:
    """Refuse a task that two results measured on other items.

    Raises:
        UserError: They differ.
    """
    first: dict[str, Json] = {}
    for result in results:
        for task in result["tasks"]:
            other = first.setdefault(task, result)
            if not share_items(other, result, task):
                names = [f"{one['directory']} ({one['model']['label']})" for one in (other, result)]
                raise UserError(
                    f"{task} was measured on other items in {names[1]} than in {names[0]}; run "
                    "rondo eval on both with the same data, --limit, --seq-len and solved examples "
                    "(losses of models with different tokenizers cannot be compared by token)"
                )


def _told_apart(results: Sequence[Json]) -> list[Json]:
    """Number labels that are alike, since lines of the same name would merge in the figures."""
    labels: list[str] = []
    found = []
    for result in results:
        label = str(result["model"]["label"])
        labels.append(label)
        count = labels.count(label)
        model = {**result["model"], "label": f"{label} ({count})" if count > 1 else label}
        found.append({**result, "model": model})
    return found
