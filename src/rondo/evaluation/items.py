"""Local records of known tasks, brought into the form of the hub's datasets.

So the prompts, choices and metrics are those of the harness's own definitions.
"""

import re
import string
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rondo.data.sources import Record, parse_source, records
from rondo.errors import UserError

Json = dict[str, Any]
# Makes an item of a record, or nothing of one that belongs to another task.
Adapt = Callable[[Record], Json | None]

GSM8K, MATH, MATH_500 = "openai/gsm8k", "EleutherAI/hendrycks_math", "HuggingFaceH4/MATH-500"


def read_items(files: Mapping[str, Path], adapt: Adapt, **_: Any) -> dict[str, Any]:
    """Read local files as the splits of a dataset, as a task of the harness takes them.

    Raises:
        UserError: A record lacks a field, or there is none.
    """
    from datasets import Dataset

    splits = {}
    for split, path in files.items():
        items = [adapt(record) for record in records(parse_source(str(path)), "text")]
        if not any(items):
            raise UserError(f"{path} holds no item")
        splits[split] = Dataset.from_list([item for item in items if item])
    return splits


def as_it_is(record: Record) -> Json:
    """Take a record as the hub would give it."""
    return record.fields


def _field(record: Record, name: str, kind: type = str) -> Any:
    value = record.fields.get(name)
    if not isinstance(value, kind):
        what = {str: "a text", list: "a list"}[kind]
        raise UserError(f"{record.where} has no `{name}` that is {what}")
    return value


def _fields(record: Record, *names: str) -> Json:
    return {name: _field(record, name) for name in names}


def _number(record: Record, name: str, choices: int, first: int = 0) -> int:
    value = record.fields.get(name)
    number = int(value) if isinstance(value, int | str) and str(value).isdigit() else -1
    if not first <= number < first + choices:
        raise UserError(
            f"{record.where} has no `{name}` that is one of {first} to {first + choices - 1}"
        )
    return number


def _multiple_choice(record: Record, question: str) -> Json:
    """Take the hub's form, or `choices` as a list of texts with the right one's index `label`."""
    item, choices = _fields(record, question), record.fields.get("choices")
    if isinstance(choices, dict):
        key = _field(record, "answerKey").strip()
        if not isinstance(choices.get("text"), list) or key not in (choices.get("label") or ()):
            raise UserError(f"{record.where} has no `choices` with `text` and the `label` {key}")
        return item | {"choices": choices, "answerKey": key}
    texts = _field(record, "choices", list)
    letters = list(string.ascii_uppercase[: len(texts)])
    label = _number(record, "label", len(texts))
    return item | {"choices": {"text": texts, "label": letters}, "answerKey": letters[label]}


def hellaswag(record: Record) -> Json:
    """Take the hub's form, or `query`, `endings` and `label` with the query in words already."""
    endings = _field(record, "endings", list)
    label = _number(record, "label", len(endings))
    if "query" in record.fields:
        return _fields(record, "query") | {"choices": endings, "gold": label, "label": label}
    return _fields(record, "ctx_a", "ctx_b", "activity_label") | {
        "endings": endings,
        "label": str(label),
    }


def _piqa(record: Record) -> Json:
    return _fields(record, "goal", "sol1", "sol2") | {"label": _number(record, "label", 2)}


def _winogrande(record: Record) -> Json:
    item = _fields(record, "sentence", "option1", "option2")
    if "_" not in item["sentence"]:
        raise UserError(f"{record.where} has no _ in its `sentence` for the options")
    return item | {"answer": str(_number(record, "answer", 2, first=1))}


def _gsm8k(record: Record) -> Json:
    return _fields(record, "question", "answer")


def math_problem(record: Record, subject: str | None = None) -> Json | None:
    """Take `problem` and `solution`, of the given subject only (`type` or `subject`)."""
    if subject:
        name = "subject" if "subject" in record.fields else "type"
        words = _field(record, name).lower().replace("&", "and")
        if re.sub(r"\W+", "_", words) != subject:
            return None
    item = _fields(record, "problem", "solution")
    if "\\boxed" not in item["solution"]:
        raise UserError(f"{record.where} has no \\boxed answer in its `solution`")
    return item


# By dataset of the hub, what makes its form of a local record.
FORMS: dict[str, Adapt] = {
    "allenai/ai2_arc": partial(_multiple_choice, question="question"),
    "allenai/openbookqa": partial(_multiple_choice, question="question_stem"),
    "Rowan/hellaswag": hellaswag,
    "baber/piqa": _piqa,
    "allenai/winogrande": _winogrande,
    GSM8K: _gsm8k,
    MATH: math_problem,
    MATH_500: math_problem,
}
